"""The detector: what it learns from which samples, what its scores promise, and what it refuses."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from support.small_cases import SMALL, Branches, Counted, Small, Walled, randn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_monitor as om
from ood_monitor.adapters.base import Batch, checked_terms
from ood_monitor.densities import DiagonalGaussian, ShrunkGaussian
from ood_monitor.densities.features import table

BRANCHES, ZUKO = SMALL["branches"], SMALL["zuko"]
every_small = pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)


def fitted(small: Small = BRANCHES, n: int = 220, data: int = 0, **options: Any) -> om.Detector:
    return om.Detector(small(), **options).fit([small.data(n, seed=data)], progress=False)


def log_likelihood(adapter: om.Adapter, x: Tensor) -> Tensor:
    return torch.stack([value for _, value in checked_terms(adapter, x)]).sum(0).detach()


# The paper's claims


class Composed(om.Adapter):
    """The density of y where x = T(y) has the model's: a change of the data's representation."""

    def __init__(self, adapter: om.Adapter, forward: Any, log_volume: Any) -> None:
        self.module, self._adapter = adapter.module, adapter
        self.is_one_pass = adapter.is_one_pass
        self._forward, self._log_volume = forward, log_volume

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        *terms, (last, value) = checked_terms(self._adapter, self._forward(batch))
        yield from terms
        yield last, value + self._log_volume(batch)


def flat_permutation(y: Tensor, reverse: bool = False) -> Tensor:
    order = torch.randperm(y[0].numel(), generator=torch.Generator().manual_seed(0))
    order = order.argsort() if reverse else order
    return y.flatten(1)[:, order].reshape(y.shape)


#: T, its inverse, and log |det dT/dy|.
MAPS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "affine": (
        lambda y: 4 * y - 2,
        lambda x: (x + 2) / 4,
        lambda y: torch.full_like(y.flatten(1)[:, 0], y[0].numel() * math.log(4)),
    ),
    "permutation": (
        flat_permutation,
        lambda x: flat_permutation(x, reverse=True),
        lambda y: torch.zeros_like(y.flatten(1)[:, 0]),
    ),
    "logit": (torch.logit, torch.sigmoid, lambda y: -(y - y**2).log().flatten(1).sum(1)),
}
every_map = pytest.mark.parametrize("name", MAPS)


@every_small
@every_map
def test_representation_of_the_data_changes_no_score(small: Small, name: str) -> None:
    forward, inverse, log_volume = MAPS[name]
    fit, new = small.data(120), 1.2 * small.data(30, seed=1)
    norms = om.ShrunkGaussian()
    plain = om.Detector(small(), density=norms).fit([fit], progress=False).score(new)
    composed = om.Detector(Composed(small(), forward, log_volume), density=norms)
    other = composed.fit([inverse(fit)], progress=False).score(inverse(new))
    torch.testing.assert_close(other.score, plain.score, rtol=1e-6, atol=1e-6)
    assert torch.equal(other.p_value, plain.p_value)
    torch.testing.assert_close(other.z, plain.z, rtol=1e-6, atol=1e-6)
    # What the likelihood says does change, and with a volume that varies its typicality too.
    change = other.log_likelihood - plain.log_likelihood
    torch.testing.assert_close(change, log_volume(inverse(new)))
    assert (change.abs().max() > 1) == (name != "permutation")
    assert (change.std() > 0.1) == (name == "logit")


@every_small
@every_map
def test_representation_of_the_data_changes_no_gradient(small: Small, name: str) -> None:
    forward, inverse, log_volume = MAPS[name]
    x = small.data(5)
    plain = om.gradient_norms(small(), x)
    composed = om.gradient_norms(Composed(small(), forward, log_volume), inverse(x))
    torch.testing.assert_close(composed, plain, rtol=1e-8, atol=1e-18)


@pytest.mark.parametrize(("shift", "is_zero"), [(0.0, True), (0.5, False)])
def test_mean_gradient_over_the_models_own_samples_is_zero(shift: float, is_zero: bool) -> None:
    n, adapter = 4000, ZUKO()
    x = adapter.module().sample((n,)) + shift
    log_likelihood = dict(checked_terms(adapter, x))["log_likelihood"]
    names, parameters = zip(*adapter.module.named_parameters(), strict=True)
    means = torch.autograd.grad(log_likelihood.mean(), parameters)
    norms = om.gradient_norms(adapter, x)
    # n |mean|^2 / mean |g|^2 is near a mean of chi-squares of one degree of freedom.
    ratios = {
        name: float(n * mean.square().sum() / norms[f"log_likelihood/{name}"].mean())
        for name, mean in zip(names, means, strict=True)
    }
    assert (max(ratios.values()) < 20) == is_zero, ratios


# What is learned, from which samples


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_density_and_calibration_see_different_samples(fraction: float, seed: int) -> None:
    x, density = BRANCHES.data(200), DiagonalGaussian()
    detector = om.Detector(
        BRANCHES(), density=density, calibration_fraction=fraction, seed=seed
    ).fit(x.split(64), progress=False)
    learned = detector.fitted
    calibrated = np.isin(log_likelihood(BRANCHES(), x).numpy(), learned.log_likelihood)
    assert calibrated.sum() == len(learned.calibration.scores) == round(200 * fraction)
    assert learned.fit_count == 200 - calibrated.sum()
    features = np.log(table(om.gradient_norms(BRANCHES(), x))[1])
    density.fit(features[~calibrated])
    for name, value in learned.joined.parts[0].density.state().items():
        np.testing.assert_allclose(value, density.state()[name], rtol=1e-10)
    expected = np.sort(density.score(features[calibrated]))
    np.testing.assert_allclose(learned.calibration.scores, expected, rtol=1e-10)


def test_seed_decides_the_split() -> None:
    first, same, other = (fitted(seed=seed).fitted for seed in (0, 0, 1))
    assert np.array_equal(first.log_likelihood, same.log_likelihood)
    assert not np.array_equal(np.sort(first.log_likelihood), np.sort(other.log_likelihood))


@every_small
def test_batches_of_the_held_out_data_do_not_matter(small: Small) -> None:
    x, new = small.data(100), small.data(9, seed=1)
    whole = om.Detector(small()).fit([x], progress=False).score(new)
    pieces = om.Detector(small(), chunk_size=5).fit(x.split(13), progress=False).score(new)
    torch.testing.assert_close(pieces.score, whole.score, rtol=1e-7, atol=1e-7)


def test_held_out_data_may_be_any_iterable() -> None:
    x, new = BRANCHES.data(100), BRANCHES.data(9, seed=1)
    expected = om.Detector(BRANCHES()).fit([x], progress=False).score(new)

    def generator() -> Iterator[Tensor]:
        yield from x.split(100)

    loader = (batch for [batch] in DataLoader(TensorDataset(x), batch_size=100))
    for held_out in (generator(), loader, iter([x])):
        found = om.Detector(BRANCHES()).fit(held_out, progress=False).score(new)
        assert torch.equal(found.score, expected.score)


def test_labels_of_a_loader_do_not_matter() -> None:
    x, labels = BRANCHES.data(100), torch.arange(100)
    loader = DataLoader(TensorDataset(x, labels), batch_size=50)
    found = om.Detector(BRANCHES()).fit(loader, progress=False).score([x[:9], labels[:9]])
    torch.testing.assert_close(found.score, fitted(n=100).score(x[:9]).score)


@pytest.mark.parametrize("kind", [tuple, list])
def test_labels_may_be_left_out_or_come_on_top(kind: Callable[[Any], Any]) -> None:
    x, labels = BRANCHES.data(100), torch.arange(100)
    labelled = om.Detector(BRANCHES()).fit([kind((x, labels))], progress=False)
    bare = om.Detector(BRANCHES()).fit([x], progress=False)
    expected = bare.score(x[:9]).score
    for detector in (labelled, bare):
        for batch in (x[:9], kind([x[:9]]), kind((x[:9], labels[:9]))):
            assert torch.equal(detector.score(batch).score, expected)


class Weighted(om.Adapter):
    """Takes two tensors of a batch."""

    def __init__(self) -> None:
        self.module = BRANCHES.model()

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        x, weight = batch
        yield "log_likelihood", self.module.log_prob(x) * weight  # type: ignore[operator]


def test_a_tensor_that_the_adapter_takes_is_not_left_out() -> None:
    x, weight = BRANCHES.data(100), torch.ones(100)
    detector = om.Detector(Weighted()).fit([(x, weight)], progress=False)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        detector.score([x[:9]])
    with pytest.raises(
        ValueError, match=r"float64, \(\) torch.float32, got .*, \(2,\) torch.float32"
    ):
        detector.score((x[:9], torch.ones(9, 2)))


def test_density_given_by_the_user_is_left_as_it_was() -> None:
    density = DiagonalGaussian()
    first = fitted(density=density)
    before = first.score(BRANCHES.data(5)).score
    fitted(density=density, data=7)
    assert vars(density) == {}
    assert torch.equal(first.score(BRANCHES.data(5)).score, before)


def test_refit_is_independent_of_an_earlier_fit() -> None:
    detector, x = fitted(data=5), BRANCHES.data(5)
    again = detector.fit([BRANCHES.data(220)], progress=False).score(x)
    assert torch.equal(again.score, fitted().score(x).score)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_if_asked_for(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    om.Detector(BRANCHES()).fit([BRANCHES.data(100)], progress=progress)
    assert ("held-out data" in capsys.readouterr().err) == progress


def test_parameters_that_are_no_numbers_can_be_left_out() -> None:
    module = BRANCHES.model()
    quantised = nn.Module()
    quantised.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    quantised.inner = module
    adapter = om.LogLikelihood(quantised, lambda m, x: m.inner.log_prob(x))  # type: ignore[operator, union-attr]
    x = BRANCHES.data(220)
    with pytest.raises(ValueError, match=r"'codes', quantised.*Pass `layers=`"):
        om.Detector(adapter).fit([x], progress=False)
    found = om.Detector(adapter, layers="inner.*").fit([x], progress=False).score(x[:9])
    torch.testing.assert_close(found.score, fitted().score(x[:9]).score)


# Scores


@every_small
def test_scores_are_numbers_in_double_precision(small: Small) -> None:
    scores = fitted(small).score(small.data(7, seed=1, dtype=torch.float64))
    per_sample = [scores.score, scores.p_value, scores.log_likelihood]
    per_sample += [*scores.layers.values(), *scores.z.values()]
    assert all(value.shape == (7,) and value.dtype == torch.float64 for value in per_sample)
    assert all(torch.isfinite(value).all() for value in per_sample)
    assert scores.valid.tolist() == [True] * 7


@every_small
def test_log_likelihood_is_the_models(small: Small) -> None:
    x = small.data(7, seed=1)
    torch.testing.assert_close(fitted(small).score(x).log_likelihood, log_likelihood(small(), x))


@every_small
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str
)
def test_sample_scores_the_same_alone_and_in_any_batch(
    small: Small, dtype: torch.dtype, tolerance: float
) -> None:
    adapter = small.adapter(small.model().to(dtype))
    detector = om.Detector(adapter).fit([small.data(100, dtype=dtype)], progress=False)
    x = small.data(12, seed=1, dtype=dtype)
    together = detector.score(x)
    assert torch.equal(detector.score(x).score, together.score)
    torch.rand(5)
    for order in ([0], [11], [5, 3, 4], list(range(12))[::-1]):
        some = detector.score(x[order])
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(some.score, together.score[order], **close)
        torch.testing.assert_close(some.p_value, together.p_value[order], rtol=0, atol=1 / 49)


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
@every_small
def test_layers_add_up_to_the_score(small: Small, granularity: Any) -> None:
    detector = fitted(small, n=100, granularity=granularity)
    scores = detector.score(small.data(9, seed=1))
    total = torch.stack([*scores.layers.values()]).sum(0)
    torch.testing.assert_close(total, scores.score, rtol=1e-9, atol=1e-9)
    assert tuple(scores.layers) == tuple(scores.z) == detector.fitted.layers


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_layers_are_named_as_the_parameters(granularity: Any) -> None:
    scores = fitted(n=100, granularity=granularity).score(BRANCHES.data(3))
    names = [f"log_likelihood/{name}" for name, _ in BRANCHES.model().named_parameters()]
    assert list(scores.layers) == list(scores.z) == names


def test_a_layer_is_the_sum_of_its_rows() -> None:
    x, new = BRANCHES.data(220), BRANCHES.data(9, seed=1)
    detector = fitted(density=DiagonalGaussian(), granularity="row")
    norms = table(om.gradient_norms(BRANCHES(), torch.cat([x, new]), granularity="row"))[1]
    calibrated = np.isin(log_likelihood(BRANCHES(), x).numpy(), detector.fitted.log_likelihood)
    density = DiagonalGaussian().fit(np.log(norms[:220][~calibrated]))
    rows = density.contributions(np.log(norms[220:]))  # three rows a tensor
    found = torch.stack([*detector.score(new).layers.values()], 1)
    np.testing.assert_allclose(found, rows.reshape(9, 4, 3).sum(2), rtol=1e-9)


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ("left.*", {"left.weight", "left.bias"}),
        (["*.bias"], {"left.bias", "right.bias"}),
        (lambda name: name == "right.weight", {"right.weight"}),
    ],
    ids=["pattern", "list", "function"],
)
def test_only_the_chosen_layers_are_features(layers: Any, kept: set[str]) -> None:
    scores = fitted(layers=layers).score(BRANCHES.data(3))
    assert {name.removeprefix("log_likelihood/") for name in scores.layers} == kept


def test_z_counts_standard_deviations_from_usual() -> None:
    detector, x = fitted(n=1000), BRANCHES.data(1000, seed=1)
    usual = torch.stack([*detector.score(x).z.values()])
    assert usual.mean(1).abs().max() < 0.2
    assert (usual.std(1) - 1).abs().max() < 0.15
    x[:, 3:] *= 0.01
    smaller = detector.score(x).z
    assert smaller["log_likelihood/right.weight"].mean() < -1.5
    assert torch.equal(smaller["log_likelihood/left.weight"], usual[0])


def test_terms_are_features_where_a_model_has_several() -> None:
    glow, x, new = SMALL["glow"], SMALL["glow"].data(400), SMALL["glow"].data(50, seed=1)
    adapter = glow()
    detector = om.Detector(adapter, method="gradient_norms").fit([x], progress=False)
    scores, terms = detector.score(new), dict(checked_terms(adapter, new))
    assert [name for name in scores.layers if "/" not in name] == list(terms)
    torch.testing.assert_close(sum(scores.layers.values()), scores.score)
    for name, values in terms.items():
        # Standard deviations of the value from its mean, up to that of another sample.
        z = torch.stack([values, scores.z[name]])
        assert torch.corrcoef(z)[0, 1] > 1 - 1e-6
        assert scores.z[name].mean().abs() < 0.5
    only_norms = om.Detector(adapter, density=om.ShrunkGaussian()).fit([x], progress=False)
    assert all("/" in name for name in only_norms.score(new).layers)
    assert all("/" in name for name in fitted().score(BRANCHES.data(3)).layers)


class Shifted(om.LogLikelihood):
    """Terms whose sum, and whose gradients, are those of the model that it wraps."""

    def log_likelihood(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        moved = torch.where(batch.flatten(1)[:, 0] > 5, 50.0, 0.0)
        for sign, (name, value) in zip([1, -1, 0], super().log_likelihood(batch), strict=True):
            total = value.total() if isinstance(value, om.Elements) else value
            yield name, total + sign * moved


def test_what_cancels_in_the_likelihood_is_seen_in_its_terms() -> None:
    glow = SMALL["glow"]
    detector = om.Detector(Shifted(glow().module)).fit([glow.data(400)], progress=False)
    usual, odd = glow.data(50, seed=1), glow.data(50, seed=1)
    odd[:, 0, 0, 0] = 5.0001
    before = glow.data(50, seed=1)
    before[:, 0, 0, 0] = 4.9999
    assert (detector.score(odd).p_value < 0.01).all()
    close = detector.score(before).log_likelihood - detector.score(odd).log_likelihood
    assert close.abs().max() < 0.1
    assert detector.score(usual).p_value.mean() > 0.4


class Faint(Branches):
    """The gradients of one row of ``left``, and of all of ``right``, are rounding noise."""

    def log_prob(self, x: Tensor) -> Tensor:
        y = self.left(x[:, :3]).square() * torch.tensor([1, 1, 1e-20])
        return -0.5 * (y.sum(1) + 1e-20 * self.right(x[:, 3:]).square().sum(1))


def test_z_is_of_the_live_rows() -> None:
    module, live = Faint().double(), nn.Linear(3, 2).double()
    live.load_state_dict({name: value[:2] for name, value in module.left.state_dict().items()})
    x, new = BRANCHES.data(220), BRANCHES.data(9, seed=1)
    expected = om.LogLikelihood(live, lambda m, x: -0.5 * m(x[:, :3]).square().sum(1))
    found, wanted = (
        om.Detector(adapter, granularity="row").fit([x], progress=False).score(new).z
        for adapter in (om.LogLikelihood(module), expected)
    )
    assert list(found) == ["log_likelihood/left.weight", "log_likelihood/left.bias"]
    for name, z in wanted.items():
        torch.testing.assert_close(found[name.replace("/", "/left.")], z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [0.05, 20.0], ids=["smaller", "larger"])
@every_small
def test_far_samples_are_anomalous(small: Small, factor: float) -> None:
    detector = fitted(small, n=400)
    far = detector.score(factor * small.data(50, seed=1))
    near = detector.score(small.data(50, seed=1))
    assert far.score.median() > near.score.quantile(0.8)
    assert far.p_value.median() <= 0.2


# The promise


def in_distribution(alpha: float, calibration: int, n: int, width: float = 1e-6) -> tuple[int, int]:
    """How many of n p-values may be at most alpha: binomial, and a calibration set's luck."""
    slack = 4 * math.sqrt(alpha * (1 - alpha) / calibration)
    low, high = max(alpha - slack, 0.0), min(alpha + slack, 1.0)
    return int(binom.ppf(width, n, low)), int(binom.isf(width, n, high))


@every_small
@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5, 0.9])
def test_p_values_of_new_samples_are_uniform(small: Small, alpha: float) -> None:
    p = fitted(small, n=600).score(small.data(400, seed=1)).p_value
    low, high = in_distribution(alpha, 300, 400)
    assert low <= int((p <= alpha).sum()) <= high


def test_p_values_are_exact_over_calibration_sets() -> None:
    # A full covariance of twelve rows from fifty samples: too sure of those that it has seen.
    adapter, flagged = BRANCHES(), []
    for seed in range(40):
        detector = om.Detector(adapter, density=ShrunkGaussian(), granularity="row", seed=seed)
        detector.fit([BRANCHES.data(99, seed=2 * seed)], progress=False)
        p = detector.score(BRANCHES.data(50, seed=2 * seed + 1)).p_value
        flagged.append(float((p <= 0.1).double().mean()))
    error = float(np.std(flagged)) / math.sqrt(40)
    assert abs(np.mean(flagged) - 0.1) < 4 * error


def test_p_value_is_the_rank_among_the_calibration_scores() -> None:
    detector = fitted()
    scores = detector.score(BRANCHES.data(20, seed=1))
    calibration = torch.tensor(detector.fitted.calibration.scores)
    expected = (1 + (calibration >= scores.score[:, None]).sum(1)) / 111
    torch.testing.assert_close(scores.p_value, expected.double())


def by_score(x: Tensor) -> Tensor:
    return x[fitted().score(x).score.argsort()]


@pytest.mark.parametrize("order", [by_score, lambda x: x.repeat_interleave(2, 0)])
def test_held_out_data_that_are_correlated_warn(order: Callable[[Tensor], Tensor]) -> None:
    x = order(BRANCHES.data(500))
    with pytest.warns(UserWarning, match="Neighbouring calibration scores are correlated") as found:
        om.Detector(BRANCHES()).fit([x], progress=False)
    assert found[0].filename == __file__


def test_held_out_data_that_alternate_do_not_warn() -> None:
    x = BRANCHES.data(500)
    low, high = by_score(x).chunk(2)
    om.Detector(BRANCHES()).fit([torch.stack([low, high.flip(0)], 1).flatten(0, 1)], progress=False)


# No trace


@every_small
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(small: Small, training: bool) -> None:
    adapter, x = small(), small.data(100)
    module = adapter.module.train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    given = x.clone()
    om.Detector(adapter).fit([x], progress=False).score(x[:5])
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(part.training == training for part in module.modules())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert torch.equal(x, given)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scores_are_the_same_without_gradients(mode: Callable[[], Any]) -> None:
    x = BRANCHES.data(5)
    with mode():
        found = fitted().score(x)
    assert torch.equal(found.score, fitted().score(x).score)


def test_random_state_does_not_move() -> None:
    x, state = BRANCHES.data(100), (torch.get_rng_state(), np.random.get_state())
    om.Detector(BRANCHES()).fit([x], progress=False).score(x)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1][1])


# Samples that cannot be scored


def test_gradients_that_overflow_are_the_most_anomalous() -> None:
    adapter = om.LogLikelihood(BRANCHES.model().float())
    detector = om.Detector(adapter).fit([BRANCHES.data(100).float()], progress=False)
    x = BRANCHES.data(3, seed=1).float()
    expected = detector.score(x[[0, 2]]).score
    x[1] = 1e30
    scores = detector.score(x)
    assert scores.valid.all()
    assert scores.p_value[1] == detector.fitted.calibration.smallest
    torch.testing.assert_close(scores.score[[0, 2]], expected, rtol=1e-4, atol=1e-4)


def test_sample_without_a_likelihood_is_not_valid() -> None:
    def square_root(module: Any, x: Tensor) -> Tensor:
        return module.log_prob(x) * (x[:, 0] + 9).sqrt()

    adapter = om.LogLikelihood(BRANCHES.model(), square_root)
    detector = om.Detector(adapter).fit([BRANCHES.data(100)], progress=False)
    x = BRANCHES.data(3, seed=1)
    expected = detector.score(x[[0, 2]])
    x[1, 0] = -10
    scores = detector.score(x)
    assert scores.valid.tolist() == [True, False, True]
    assert scores.p_value.isnan().tolist() == [False, True, False]
    assert scores.score.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores.score[[0, 2]], expected.score)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_scores_are_valid(value: float) -> None:
    detector = fitted(density=Walled(value))
    x = BRANCHES.data(3, seed=1)
    x[1] *= 100
    scores = detector.score(x)
    assert scores.valid.all()
    assert scores.score.isfinite().tolist() == [True, False, True]
    assert scores.score[1] == value
    assert scores.p_value[1] == (detector.fitted.calibration.smallest if value > 0 else 1)
    torch.testing.assert_close(scores.score[[0, 2]], detector.score(x[[0, 2]]).score)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = BRANCHES.data(3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"in 1 of 3 samples, the first at index 1"):
        fitted().score(x)
    with pytest.raises(ValueError, match=r"in 1 of 3 samples, the first at index 1"):
        om.Detector(BRANCHES()).fit([BRANCHES.data(100), x], progress=False)


# Refusals


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (randn(3, 5), r"got \(5,\) torch.float64"),
        (randn(3, 6).float(), r"got \(6,\) torch.float32"),
        (torch.ones(3, 6, dtype=torch.uint8), r"got \(6,\) torch.uint8"),
        ([torch.ones(3), randn(3, 6)], r"got \(\) torch.float32, \(6,\) torch.float64"),
    ],
    ids=["shape", "precision", "integers", "order"],
)
def test_samples_unlike_the_held_out_are_refused(x: Any, got: str) -> None:
    expected = r"Expected samples as the detector was fitted on, \(6,\) torch.float64, "
    with pytest.raises(ValueError, match=expected + got):
        fitted().score(x)


@pytest.mark.parametrize("call", ["score", "check"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (BRANCHES.data(0), "samples, got 0"),
        ("text", "batch of tensors.*got str"),
        (None, "got None"),
    ],
    ids=["empty", "text", "nothing"],
)
def test_what_is_no_batch_is_refused(call: str, batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(fitted(), call)(batch)


@pytest.mark.parametrize(
    "call",
    [
        lambda detector: detector.score(BRANCHES.data(3)),
        lambda detector: detector.fitted,
        lambda detector: detector.state_dict(),
        om.Monitor,
    ],
    ids=["score", "fitted", "state_dict", "Monitor"],
)
def test_without_fit_nothing_is_known(call: Callable[[om.Detector], Any]) -> None:
    detector = om.Detector(BRANCHES())
    assert not detector.is_fitted
    with pytest.raises(RuntimeError, match="call `fit` first"):
        call(detector)


BAD_LOADERS: dict[str, tuple[list[Any], str]] = {
    "empty loader": ([], "Expected held-out batches, got an empty loader"),
    "empty batch": ([BRANCHES.data(100), BRANCHES.data(0)], "samples, got 0"),
    "too few": ([BRANCHES.data(30)], r"20 to calibrate, got 15 and 15 of 30 held-out samples"),
    "integers": ([torch.ones(100, 6, dtype=torch.int64)], "floating-point samples"),
    "text": (["text"], "Expected a batch of tensors"),
    "all the same": ([torch.ones(100, 6).double()], "gradient norms vary, got none"),
}


@pytest.mark.parametrize(("held_out", "message"), BAD_LOADERS.values(), ids=BAD_LOADERS)
def test_held_out_data_that_will_not_do_are_refused(held_out: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        om.Detector(BRANCHES()).fit(held_out, progress=False)


@pytest.mark.parametrize("x", [BRANCHES.data(100), torch.ones(())], ids=["batch", "number"])
def test_a_tensor_is_no_loader(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"iterable of batches, got a tensor of .*`\[batch\]`"):
        om.Detector(BRANCHES()).fit(x, progress=False)


def test_a_wrong_term_is_told_with_the_size_of_the_batch_that_it_was_for() -> None:
    # Two samples are scored first, to check the model: not the hundred that were passed.
    adapter = om.LogLikelihood(BRANCHES.model(), lambda m, x: m.log_prob(x)[:, None])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"got .* \(2, 1\) .* for a batch of 2 samples"):
        om.Detector(adapter).fit([BRANCHES.data(100)], progress=False)


def failing_loader() -> Iterator[Tensor]:
    yield BRANCHES.data(100, seed=9)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("held_out", "error"),
    [([], ValueError), ([randn(25, 6)], ValueError), (failing_loader(), OSError)],
    ids=["empty", "too few", "failing"],
)
def test_detector_is_unchanged_after_a_failed_fit(held_out: Any, error: type[Exception]) -> None:
    detector, x = fitted(), BRANCHES.data(5)
    learned, before = detector.fitted, detector.score(x).score
    with pytest.raises(error):
        detector.fit(held_out, progress=False)
    assert detector.fitted is learned
    assert torch.equal(detector.score(x).score, before)


@pytest.mark.parametrize(
    "layers", ["nothing.*", lambda name: False, []], ids=["pattern", "function", "none"]
)
def test_layers_that_match_nothing_are_refused(layers: Any) -> None:
    with pytest.raises(
        ValueError, match=r"to match a parameter name, got no match of \[.* among 4"
    ):
        om.Detector(BRANCHES(), layers=layers).fit([BRANCHES.data(100)], progress=False)


@pytest.mark.parametrize("option", [{"granularity": "Row"}, {"chunk_size": 0}], ids=str)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    [name] = option
    with pytest.raises(ValueError, match=name):
        fitted(**option)


class Shared(Branches):
    """Mixes the samples of a batch."""

    def log_prob(self, x: Tensor) -> Tensor:
        return super().log_prob(x - x.mean(0))


def test_a_model_that_mixes_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="the same alone and in a batch"):
        om.Detector(om.LogLikelihood(Shared().double())).fit([BRANCHES.data(100)], progress=False)


def test_a_users_own_density_will_do() -> None:
    scores = fitted(density=Counted()).score(BRANCHES.data(50, seed=1))
    assert scores.valid.all()
    assert 0.2 < scores.p_value.mean() < 0.8


# Foreign samples among the held-out ones


def contaminated(n: int = 400, share: float = 0.05) -> Tensor:
    x = BRANCHES.data(n)
    x[:: round(1 / share)] *= 1e3
    return x


def test_trimming_forgets_foreign_samples() -> None:
    """The density is nearly the one of clean data, and what is foreign scores high again."""
    options: dict[str, Any] = {"density": DiagonalGaussian()}
    clean = om.Detector(BRANCHES(), **options).fit([BRANCHES.data(400)], progress=False)
    plain = om.Detector(BRANCHES(), **options).fit([contaminated()], progress=False)
    trimmed = om.Detector(BRANCHES(), trim=0.08, **options).fit([contaminated()], progress=False)
    sd = {
        name: d.fitted.joined.parts[0].density.state()["sd"].mean()
        for name, d in (("clean", clean), ("plain", plain), ("trimmed", trimmed))
    }
    assert sd["plain"] > 1.5 * sd["clean"]
    assert sd["trimmed"] == pytest.approx(sd["clean"], rel=0.2)


def test_trimming_forgets_foreign_samples_in_z_too() -> None:
    clean = om.Detector(BRANCHES()).fit([BRANCHES.data(400)], progress=False)
    trimmed = om.Detector(BRANCHES(), trim=0.08).fit([contaminated()], progress=False)
    np.testing.assert_allclose(trimmed.fitted.layer_sd, clean.fitted.layer_sd, rtol=0.3)
    assert trimmed.fitted.fit_count == pytest.approx(184, abs=1)


def test_trimming_leaves_all_calibration_samples() -> None:
    trimmed = om.Detector(BRANCHES(), trim=0.2).fit([BRANCHES.data(200)], progress=False)
    assert len(trimmed.fitted.calibration.scores) == 100


def test_without_trimming_all_samples_fit() -> None:
    a, b = (
        om.Detector(BRANCHES(), **o).fit([BRANCHES.data(200)], progress=False)
        for o in ({}, {"trim": 0.0})
    )
    assert a.fitted.fingerprint == b.fitted.fingerprint


class Ahead(nn.Module):
    """Keeps a weight that it computed ahead, past any way to see it, and has one that is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.raw = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.kept = self.raw.detach().tanh()

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * (self.kept * self.linear(x)).square().sum(1)


def test_parameters_without_a_gradient_are_told(caplog: pytest.LogCaptureFixture) -> None:
    detector = om.Detector(om.LogLikelihood(Ahead().double()))
    detector.fit([randn(220, 3)], progress=False)
    [record] = [r for r in caplog.records if "No gradient" in r.message]
    assert "not watched: raw, unused." in record.message
    assert "220" in record.message
    caplog.clear()
    fitted()
    assert not caplog.records
