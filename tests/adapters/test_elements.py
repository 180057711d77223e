"""Terms by element: what each adapter gives of them, against laws computed in another way."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import normflows
import pytest
import torch
import zuko
from support.foreign_cases import FOREIGN, Autoencoder, gpt2, gpt2_model, normflows_glow, pixelcnn
from support.model_case import perturbed
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

import ood_monitor as om
from ood_monitor.adapters.base import Batch, checked_elements, checked_terms
from ood_monitor.adapters.elements import averaged, resolved, shifted
from ood_monitor.adapters.laws import categorical

CASES = {case.name: case for case in FOREIGN}
Pair = tuple[Tensor, Tensor]


def elements_of(adapter: om.Adapter, batch: Batch) -> dict[str, om.Elements]:
    with torch.no_grad():
        found = list(checked_elements(adapter, batch))
    return {term: value for term, value in found if isinstance(value, om.Elements)}


def expected_of(elements: om.Elements) -> Tensor:
    assert elements.expected is not None
    return resolved(elements.expected).detach()


def quadratic_of(elements: om.Elements) -> Pair:
    assert elements.quadratic is not None
    came, law = elements.quadratic()
    return came.detach(), law.detach()


# The sum

LOG_PROB = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -5.0, float("nan")]])
COUNTED = torch.tensor([[True, True, False], [True, True, False]])


def test_a_term_is_the_sum_or_the_mean_of_what_counts() -> None:
    assert om.Elements(LOG_PROB[:1]).total().tolist() == [-7.0]
    assert om.Elements(LOG_PROB[:1], mean=True).total().item() == pytest.approx(-7 / 3)
    assert om.Elements(LOG_PROB, counted=COUNTED).total().tolist() == [-3.0, -8.0]
    assert om.Elements(LOG_PROB, counted=COUNTED, mean=True).total().tolist() == [-1.5, -4.0]
    assert om.Elements(LOG_PROB[:, 0]).total().tolist() == [-1.0, -3.0]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("counted", [None, COUNTED])
def test_a_constant_is_in_the_term_and_in_no_surprise(counted: Tensor | None, mean: bool) -> None:
    log_prob = LOG_PROB.nan_to_num()
    before = om.Elements(log_prob, 2 * log_prob, counted=counted, mean=mean)
    after = shifted(before, 6.0)
    torch.testing.assert_close(after.total(), before.total() + 6)
    surprise = after.log_prob - expected_of(after)
    torch.testing.assert_close(surprise, before.log_prob - expected_of(before))


def test_draws_are_averaged_in_what_came_and_in_what_is_expected() -> None:
    values = torch.arange(12.0).reshape(6, 2)
    found = averaged(om.Elements(values, 2 * values, lambda: (3 * values, 4 * values)), 3)
    mean = torch.tensor([[2.0, 3.0], [8.0, 9.0]])
    assert found.log_prob.tolist() == mean.tolist()
    assert expected_of(found).tolist() == (2 * mean).tolist()
    assert [part.tolist() for part in quadratic_of(found)] == [
        (3 * mean).tolist(),
        (4 * mean).tolist(),
    ]
    with pytest.raises(ValueError, match="several draws to count, got `counted`"):
        averaged(om.Elements(values, counted=values > 1), 3)


# What is refused


class Yields(om.Adapter):
    """Yields what it was given."""

    def __init__(self, value: Any) -> None:
        self.module, self._value = nn.Linear(1, 1), value

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, om.Elements]]:
        yield "mine", self._value


ROWS = torch.zeros(5, 2)
AT_ONCE: dict[str, tuple[Any, str]] = {
    "other size": (
        om.Elements(ROWS[:4]),
        r"log_prob of term 'mine' of Yields .*\(5, ...\).*\(4, 2",
    ),
    "a number": (om.Elements(1.0), "got float for a batch of 5"),  # type: ignore[arg-type]
    "expected": (om.Elements(ROWS, ROWS[:, :1]), r"expected of .* shape \(5, 2\) .*got .*\(5, 1\)"),
    "counted": (om.Elements(ROWS, counted=ROWS[0] > 1), r"counted of .* shape \(5, 2\).*\(2,\)"),
    "no flags": (om.Elements(ROWS, counted=ROWS), "counted of .* to be bool, got torch.float32"),
    "apart": (om.Elements(ROWS[:, None], apart=True), r"apart of .*\(5, K\).*\(5, 1, 2\).*: sum"),
    "the samples' axis": (om.Elements(ROWS, axes=(0,)), r"from 1 to 1, got \(0,\): 0 is the sam"),
    "an axis twice": (om.Elements(ROWS, axes=(1, 1)), r"each once, from 1 to 1, got \(1, 1\)"),
}


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.parametrize("read", [checked_terms, checked_elements])
def test_elements_of_the_wrong_shape_are_named(name: str, read: Any) -> None:
    elements, message = AT_ONCE[name]
    with pytest.raises(ValueError, match=message):
        list(read(Yields(elements), torch.ones(5, 3)))


INFINITE = torch.zeros(5, 2).index_fill(0, torch.tensor([3]), math.inf)
WHEN_ASKED: dict[str, tuple[om.Elements, str]] = {
    "shape": (om.Elements(ROWS, lambda: ROWS[0]), r"expected of .* shape \(5, 2\).*got .*\(2,\)"),
    "infinite": (om.Elements(ROWS, INFINITE), "expected of .* finite.* 1 of 5 .*first at index 3"),
    "quadratic": (
        om.Elements(ROWS, quadratic=lambda: (ROWS, INFINITE)),
        "the expected quadratic of .* finite .* first at index 3",
    ),
}


@pytest.mark.parametrize("name", WHEN_ASKED)
def test_an_expectation_is_checked_when_it_is_asked_for(name: str) -> None:
    elements, message = WHEN_ASKED[name]
    ((_, total),) = checked_terms(Yields(elements), torch.ones(5, 3))
    assert total.shape == (5,)
    found = elements_of(Yields(elements), torch.ones(5, 3))["mine"]
    with pytest.raises(ValueError, match=message):
        (expected_of if found.expected is not None else quadratic_of)(found)


@pytest.mark.parametrize("counted", [None, INFINITE.isfinite()])
def test_what_is_not_finite_itself_is_not_taken_for_a_wrong_expectation(
    counted: Tensor | None,
) -> None:
    log_prob = -INFINITE if counted is None else ROWS
    elements = om.Elements(log_prob, -INFINITE, counted=counted)
    found = elements_of(Yields(elements), torch.ones(5, 3))["mine"]
    assert torch.equal(expected_of(found), -INFINITE)


# What each adapter gives

#: By case and term: whether something is expected, whether there is a quadratic pair, the axes.
GIVEN: dict[str, dict[str, tuple[bool, bool, tuple[int, ...]]]] = {
    "autoencoder": {"reconstruction": (False, False, (2, 3))},
    "autoencoder-iwae": {"reconstruction": (False, False, (2, 3))},
    "vae-bernoulli": {"reconstruction": (True, True, ())},
    "vae-learned": {"reconstruction": (True, False, ())},
    "vae-logistic": {"reconstruction": (True, True, ())},
    "glow": {
        "latent_1": (True, False, (2, 3)),
        "latent_2": (False, False, (2, 3)),
        "log_det": (False, False, ()),
    },
    "normflows-glow": {"latent_1": (True, False, (2, 3)), "latent_2": (True, False, (2, 3))},
    "zuko-maf": {"latent": (False, False, ()), "log_det": (False, False, ())},
    "zuko-nsf": {"latent": (False, False, ()), "log_det": (False, False, ())},
    "gpt2": {"log_likelihood": (True, True, (1,))},
    "gpt2-masked": {"log_likelihood": (True, True, (1,))},
    "pixelcnn": {"log_likelihood": (True, True, (2, 3))},
}


def test_grey_images_of_tokens_have_places() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv2d(1, 4, 3, padding=1)).double()

    class Grey(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = model(tokens.double())
            return out

    adapter = om.SequenceLikelihood(Grey(), shifted=False, class_dim=1)
    [pixels] = elements_of(adapter, torch.arange(72).reshape(2, 6, 6) % 4).values()
    assert pixels.axes == (1, 2)
    of_codes = om.SequenceLikelihood(nn.Embedding(4, 4), shifted=False)
    [codes] = elements_of(of_codes, torch.zeros(2, 6, 3, dtype=torch.long)).values()
    assert codes.axes == ()


@pytest.mark.parametrize("name", CASES)
def test_what_an_adapter_gives(name: str) -> None:
    adapter, batch = CASES[name]()
    found = elements_of(adapter, batch)
    given = {t: (e.expected is not None, e.quadratic is not None, e.axes) for t, e in found.items()}
    assert given == GIVEN.get(name, {})
    for elements in found.values():  # each is of the right shape and finite, or is refused
        if elements.expected is not None:
            assert (expected_of(elements) <= elements.log_prob.max() + 1e9).all()
        if elements.quadratic is not None:
            came, law = quadratic_of(elements)
            assert (came >= 0).all()
            assert (law >= 0).all()


class WithoutExpectations(om.Adapter):
    """Elements whose expectations fail when they are asked for."""

    def __init__(self, adapter: om.Adapter) -> None:
        self.module, self._adapter = adapter.module, adapter

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Any]]:
        def fails() -> Any:
            raise AssertionError("asked for")

        for term, value in self._adapter.log_likelihood(batch):
            is_by_element = isinstance(value, om.Elements)
            yield term, replace(value, expected=fails, quadratic=fails) if is_by_element else value


@pytest.mark.parametrize("name", GIVEN)
def test_gradients_ask_for_no_expectation(name: str) -> None:
    adapter, batch = CASES[name]()
    found = om.gradient_norms(WithoutExpectations(adapter), batch)
    plain = om.gradient_norms(adapter, batch)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


# Laws, computed in another way


def test_tokens_against_a_loop_over_the_vocabulary() -> None:
    adapter, tokens = CASES["gpt2"]()
    found = elements_of(adapter, tokens)["log_likelihood"]
    assert found.counted is not None
    came, law = quadratic_of(found)
    for i, row in enumerate(tokens):
        text = row[row != 0]
        with torch.no_grad():
            logits = adapter.module(text[None]).logits[0]
        assert int(found.counted[i].sum()) == len(text) - 1
        for t in range(len(text) - 1):
            p = [float(v) for v in logits[t].softmax(0)]
            assert float(found.log_prob[i, t]) == pytest.approx(math.log(p[int(text[t + 1])]))
            assert float(expected_of(found)[i, t]) == pytest.approx(sum(v * math.log(v) for v in p))
            distance = sum(((v == int(text[t + 1])) - q) ** 2 for v, q in enumerate(p))
            assert float(came[i, t]) == pytest.approx(distance)
            assert float(law[i, t]) == pytest.approx(1 - sum(v * v for v in p))


def test_a_mean_of_tokens_is_that_of_their_elements() -> None:
    adapter, batch = CASES["gpt2-masked"]()
    found = elements_of(adapter, batch)["log_likelihood"]
    assert found.mean
    for row, mask, total in zip(
        found.log_prob, batch["attention_mask"], found.total(), strict=True
    ):
        assert float(total) == pytest.approx(float(row[: int(mask.sum()) - 1].mean()))


def test_expectations_of_pixels_are_means_over_what_may_come() -> None:
    adapter, x = CASES["pixelcnn"]()
    i, j = 3, 2
    found = elements_of(adapter, x)["log_likelihood"]
    of_values = []
    for value in range(3):
        other = x.clone()
        other[:, :, i, j] = value
        of_values.append(elements_of(adapter, other)["log_likelihood"].log_prob[:, 0, i, j])
    expected = sum(log_p.exp() * log_p for log_p in of_values)
    torch.testing.assert_close(expected_of(found)[:, 0, i, j], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_expectations_of_half_precision_are_in_single(dtype: torch.dtype) -> None:
    logits, values = torch.randn(2, 3, 3000).to(dtype), torch.randint(3000, (2, 3))
    found, exact = categorical(logits, values), categorical(logits.double(), values)
    assert expected_of(found).dtype == torch.float32
    torch.testing.assert_close(expected_of(found).double(), expected_of(exact), rtol=2e-2, atol=0)


def test_what_cannot_come_adds_nothing_to_an_expectation() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]]).double()
    found = categorical(logits, torch.tensor([[1]]))
    assert float(expected_of(found)) == pytest.approx(-math.log(2))
    assert [float(part) for part in quadratic_of(found)] == [0.5, 0.5]


def test_a_model_that_is_sure_has_squares_above_zero() -> None:
    logits = torch.tensor([[[30.0, 0.0, 0.0]]])
    came, law = quadratic_of(categorical(logits, torch.tensor([[0]])))
    assert float(law) == pytest.approx(2 * math.exp(-30), rel=1e-3)
    assert 0 <= float(came) < 1e-12


def test_many_probabilities_are_taken_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, values = torch.randn(3, 5, 7).double(), torch.randint(7, (3, 5))
    whole = categorical(logits, values)
    expected, pair = expected_of(whole), quadratic_of(whole)
    monkeypatch.setattr("ood_monitor.adapters.laws._AT_ONCE_ON_CPU", 20)
    assert torch.equal(expected_of(whole), expected)
    assert all(map(torch.equal, quadratic_of(whole), pair))


def observed(name: str, x: Tensor, decoded: Any) -> om.Elements:
    found = {
        "bernoulli": om.observations.Bernoulli(),
        "logistic": om.observations.DiscretizedLogistic(bins=7, low=-1.0, high=2.0),
        "learned": om.observations.Gaussian(None),
    }[name]
    elements = found.elements(x, decoded)  # type: ignore[attr-defined]
    torch.testing.assert_close(elements.log_prob, found.log_prob(x, decoded))
    assert isinstance(elements, om.Elements)
    return elements


VALUES = {
    "bernoulli": torch.tensor([0.0, 1.0]).double(),
    "logistic": torch.linspace(-1, 2, 7).double(),
}


@pytest.mark.parametrize("name", VALUES)
def test_discrete_observations_against_every_value(name: str) -> None:
    first = 2 * torch.randn(4, 3).double()
    decoded = first if name == "bernoulli" else (first, torch.randn(4, 3).double() - 1)
    values = VALUES[name]
    every = [observed(name, torch.full((4, 3), float(v)).double(), decoded) for v in values]
    p = torch.stack([found.log_prob.exp() for found in every])
    expected = (p * p.log()).sum(0)
    # Of a coin, one number tells both: its distance is that of one of them.
    share = 0.5 if name == "bernoulli" else 1.0
    for i, found in enumerate(every):
        came, law = quadratic_of(found)
        torch.testing.assert_close(expected_of(found), expected)
        one_hot = torch.zeros_like(p)
        one_hot[i] = 1
        torch.testing.assert_close(came, share * (one_hot - p).square().sum(0))
        torch.testing.assert_close(law, share * (1 - p.square().sum(0)))


def test_of_grey_values_the_surprise_is_the_residual_by_the_logit() -> None:
    logits, x = 3 * torch.randn(4, 3).double(), torch.rand(4, 3).double()
    found = observed("bernoulli", x, logits)
    surprise = (x - logits.sigmoid()) * logits
    torch.testing.assert_close(found.log_prob - expected_of(found), surprise)


def test_a_learned_variance_against_an_integral() -> None:
    mean, log_variance = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    found = observed("learned", mean, (mean, log_variance))
    line = torch.linspace(-40, 40, 40001).double()
    log_p = Normal(mean[..., None], (0.5 * log_variance).exp()[..., None]).log_prob(line)
    integral = torch.trapezoid(log_p.exp() * log_p, line)
    torch.testing.assert_close(expected_of(found), integral)


def test_an_observation_of_ones_own_needs_a_log_probability_alone() -> None:
    class Mine:
        def log_prob(self, x: Tensor, decoded: Any) -> Tensor:
            return -(x - decoded).abs()

    adapter = om.ELBO(Autoencoder(), observation=Mine(), draws=3)
    x = torch.rand(4, 6)
    assert elements_of(adapter, x) == {}
    assert [value.shape for _, value in checked_terms(adapter, x)] == [(4,), (4,)]


@pytest.mark.parametrize("name", ["bernoulli", "logistic", "learned"])
def test_elements_are_means_over_the_draws(name: str) -> None:
    observation = {
        "bernoulli": om.observations.Bernoulli(),
        "logistic": om.observations.DiscretizedLogistic(bins=5),
        "learned": om.observations.Gaussian(None),
    }[name]
    module, x, draws = Autoencoder(1 if name == "bernoulli" else 2).double(), torch.rand(4, 6), 3
    x = x.double()
    adapter = om.ELBO(module, observation=observation, draws=draws, importance_weighted=True)
    found = elements_of(adapter, x)["reconstruction"]
    mean, log_variance = module.encode(x)
    generator = torch.Generator().manual_seed(0)
    each = []
    for _ in range(draws):
        eps = torch.randn(2, generator=generator).double()
        each.append(observation.elements(x, module.decode(mean + (0.5 * log_variance).exp() * eps)))  # type: ignore[attr-defined]
    expected = torch.stack([expected_of(one) for one in each]).mean(0)
    torch.testing.assert_close(expected_of(found), expected)
    log_prob = torch.stack([one.log_prob for one in each]).mean(0).detach()
    torch.testing.assert_close(found.log_prob, log_prob)
    assert list(dict(checked_terms(adapter, x))) == ["reconstruction", "kl", "importance"]


# Flows


def test_levels_of_our_flow() -> None:
    flow = om.models.Glow(channels=1, size=8, levels=3, steps=2, hidden=6)
    perturbed(flow)
    flow.double().eval()
    x = torch.randn(4, 1, 8, 8).double()
    found = elements_of(om.LogLikelihood(flow), x)
    with torch.no_grad():
        latents, h = flow.encode(x), x
        for i, (level, prior) in enumerate(zip(flow.levels, flow.priors, strict=False)):
            (h, log_det), elements = level(h), found[f"latent_{i + 1}"]
            h, z = h.chunk(2, 1)
            mean, raw = prior.conv(h).chunk(2, 1)  # type: ignore[operator, union-attr]
            law = Normal(mean, (3 * torch.tanh(raw / 3)).exp())
            torch.testing.assert_close(elements.log_prob, law.log_prob(z))
            torch.testing.assert_close(expected_of(elements), -law.entropy())
            torch.testing.assert_close(found["log_det"].log_prob[:, i], log_det)
        top = flow.levels[2](h)[1]
    torch.testing.assert_close(found["log_det"].log_prob[:, 2], top)
    assert found["log_det"].apart
    assert found["latent_3"].expected is None
    torch.testing.assert_close(found["latent_3"].log_prob, Normal(0.0, 1.0).log_prob(latents[2]))
    terms = flow.log_prob_terms(x)
    assert all(torch.equal(terms[name], elements.total()) for name, elements in found.items())


def test_bins_leave_each_surprise_as_it_is() -> None:
    adapter, x = CASES["glow"]()
    (discrete, terms) = elements_of(adapter, x), dict(checked_terms(adapter, x))
    torch.testing.assert_close(discrete["log_det"].total(), terms["log_det"])
    volume = 64 * math.log(1 / 256)
    u = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    plain = elements_of(om.LogLikelihood(adapter.module), (255 * x + u) / 256)
    torch.testing.assert_close(terms["log_det"], plain["log_det"].total() + volume)
    torch.testing.assert_close(expected_of(discrete["latent_1"]), expected_of(plain["latent_1"]))


def conditional_base(kind: str) -> tuple[nn.Module, Any]:
    if kind == "glow":
        return normflows.distributions.GlowBase((4, 2, 2), num_classes=3), torch.tensor([0, 2, 1])
    if kind == "classes":
        base = normflows.distributions.ClassCondDiagGaussian((4, 2, 2), 3)
        return base, torch.tensor([0, 2, 1])
    encoder = nn.Linear(2, 8)
    return normflows.distributions.base.ConditionalDiagGaussian(4, encoder), torch.randn(
        3, 2
    ).double()


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("kind", ["glow", "classes", "context"])
def test_conditional_bases_of_normflows(kind: str, temperature: float | None) -> None:
    base, condition = conditional_base(kind)
    perturbed(base, 0.4)
    base.double()
    if kind != "context":
        base.temperature = temperature  # type: ignore[assignment]
    keyword = "context" if kind == "context" else "y"
    latent = torch.randn(3, 4, *([] if kind == "context" else [2, 2])).double()

    def wrapped(z: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))

    flow = nn.Module()
    flow.inverse = wrapped
    net = nn.Module()
    net.q0, net.flows, net.inverse_and_log_det = base, nn.ModuleList([flow]), wrapped
    adapter = om.LogLikelihood(net, condition=lambda batch: {keyword: batch[1]})
    found = elements_of(adapter, (latent, condition))["latent"]
    with torch.no_grad():
        torch.testing.assert_close(found.total(), base.log_prob(latent, condition))  # type: ignore[operator]
        # The density at the mean is where the gradient by z is zero; an element expects half less.
        z = latent.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(base.log_prob(z, condition).sum(), z)  # type: ignore[operator]
            steep = torch.autograd.functional.hessian(
                lambda one: base.log_prob(one, condition).sum(),  # type: ignore[operator]
                latent,
            )
        variance = -1 / steep.reshape(latent.numel(), -1).diagonal().view(latent.shape)
        mean = latent + slope * variance
        at_mean = base.log_prob(mean, condition)  # type: ignore[operator]
    torch.testing.assert_close(
        expected_of(found).flatten(1).sum(1), at_mean - latent[0].numel() / 2
    )
    torch.testing.assert_close(expected_of(found), -Normal(0.0, variance.sqrt()).entropy())


def test_bases_that_are_the_same_for_all_expect_nothing() -> None:
    net = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), [])
    assert elements_of(om.LogLikelihood(net), torch.randn(3, 2)) == {}
    adapter, (x, _) = normflows_glow()
    adapter.module.class_cond = False
    for i, shape in enumerate(((8, 2, 2), (2, 4, 4))):
        adapter.module.q0[i] = normflows.distributions.GlowBase(shape)  # type: ignore[index, operator]
    plain = om.LogLikelihood(adapter.module)
    assert elements_of(plain, x) == {}


class ConditionalNormal(zuko.lazy.LazyDistribution):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 6)

    def forward(self, c: Tensor | None = None) -> Distribution:
        mean, log_sd = self.net(c).chunk(2, -1)
        return zuko.distributions.DiagNormal(mean, log_sd.exp())


@pytest.mark.parametrize("by_column", [True, False])
def test_a_conditional_base_of_zuko(by_column: bool) -> None:
    if by_column:
        transform = zuko.flows.MAF(3, context=2, transforms=2, hidden_features=(6,)).transform
    else:
        transform = zuko.flows.NICE(3, context=2, transforms=2, hidden_features=(6,)).transform
    flow = zuko.flows.Flow(transform, ConditionalNormal()).double()
    x, c = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    adapter = om.LogLikelihood(flow, condition=lambda batch: {"c": batch[1]})
    found, terms = elements_of(adapter, (x, c)), dict(checked_terms(adapter, (x, c)))
    torch.testing.assert_close(sum(terms.values()), flow(c).log_prob(x))
    scale = flow.base(c).base_dist.scale.detach()
    torch.testing.assert_close(expected_of(found["latent"]), -Normal(0.0, scale).entropy())
    assert ("log_det" in found) == by_column


@pytest.mark.parametrize("name", ["MAF", "NSF", "SOSPF", "BPF"])
@pytest.mark.parametrize("transforms", [1, 3])
def test_elements_of_an_autoregressive_flow_are_its_columns(name: str, transforms: int) -> None:
    flow = getattr(zuko.flows, name)(features=3, transforms=transforms, hidden_features=(6,))
    flow.double()
    x = 0.5 * torch.randn(4, 3).double()
    found = elements_of(om.LogLikelihood(flow), x)
    z, log_det = x, torch.zeros_like(x)
    for step in flow.transform.transforms:
        # Step by step, since of two steps in opposite orders the whole Jacobian is no triangle.
        f = step(None)
        jacobians = [torch.autograd.functional.jacobian(f, one) for one in z]
        log_det = log_det + torch.stack([j.diagonal().abs().log() for j in jacobians])
        z = f(z).detach()
    torch.testing.assert_close(found["log_det"].log_prob, log_det)
    torch.testing.assert_close(found["latent"].log_prob, Normal(0.0, 1.0).log_prob(z))


def test_columns_of_one_step_are_conditional_densities() -> None:
    flow = zuko.flows.MAF(features=3, transforms=1, hidden_features=(6,)).double()
    adapter, x = om.LogLikelihood(flow), torch.randn(4, 3).double()

    def columns(x: Tensor) -> Tensor:
        found = elements_of(adapter, x)
        return found["latent"].log_prob + found["log_det"].log_prob

    other = x.clone()
    other[:, 2] += 1
    torch.testing.assert_close(columns(other)[:, :2], columns(x)[:, :2])
    line = torch.linspace(-12, 12, 4001).double()
    grid = x[0].repeat(len(line), 1)
    grid[:, 1] = line
    assert float(torch.trapezoid(columns(grid)[:, 1].exp(), line)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["NICE", "GF"])
def test_flows_that_mix_columns_have_none(name: str) -> None:
    flow = getattr(zuko.flows, name)(features=3, transforms=2)
    assert elements_of(om.LogLikelihood(flow), torch.randn(4, 3)) == {}


# Distributions


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(1, keepdim=True).expand_as(x), 0.1 + x.square()


LAWS: dict[str, tuple[Callable[[Tensor], Distribution], bool, bool]] = {
    "normal": (lambda x: Normal(*two(x)), True, False),
    "independent": (lambda x: Independent(Normal(*two(x)), 1), True, False),
    "dirichlet": (lambda x: torch.distributions.Dirichlet(0.1 + x), True, False),
    "bernoulli": (lambda x: torch.distributions.Bernoulli(logits=two(x)[1]), True, True),
    "poisson": (
        lambda x: torch.distributions.Poisson(two(x)[1], validate_args=False),
        False,
        False,
    ),
    "shared": (lambda x: Normal(torch.zeros(3), torch.ones(3)), False, False),
    "shared, independent": (lambda x: Independent(Normal(torch.zeros(3), 1.0), 1), False, False),
    "mixture": (
        lambda x: torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones(len(x), 2)), Normal(x[:, :2], 1.0)
        ),
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_distribution_is_read_by_element(name: str) -> None:
    law, has_expected, has_quadratic = LAWS[name]
    x = torch.rand(4, 3).double()
    x = (x / x.sum(1, keepdim=True)).round(decimals=12) if name == "dirichlet" else x
    x = (x > 0.5).double() if name == "bernoulli" else x
    x = x[:, 0] if name == "mixture" else x
    given = torch.rand(4, 3).double()
    net = nn.Linear(1, 1)
    adapter = om.LogLikelihood(
        net, lambda m, x, given: law(given), condition=lambda b: {"given": b[1]}
    )
    found = elements_of(adapter, (x, given))["log_likelihood"]
    log_prob = law(given).log_prob(x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.total(), log_prob.reshape(4, -1).sum(1))
    assert (found.expected is not None, found.quadratic is not None) == (
        has_expected,
        has_quadratic,
    )
    if has_expected:
        entropy = law(given).entropy()  # type: ignore[no-untyped-call]
        total = expected_of(found).reshape(4, -1).sum(1)
        torch.testing.assert_close(total, -entropy.reshape(4, -1).sum(1))
    alone = elements_of(adapter, (x[:1], given[:1]))["log_likelihood"]
    assert (alone.expected is None) == (found.expected is None)  # one sample has the same columns


# What a sample is


def likelihood(**options: Any) -> om.Adapter:
    return om.LogLikelihood(nn.Linear(1, 1), lambda m, x: x.flatten(1).sum(1), **options)


def autoencoder(**options: Any) -> om.Adapter:
    return om.ELBO(Autoencoder(), **options)


def sequence(**options: Any) -> om.Adapter:
    return om.SequenceLikelihood(gpt2_model(), **options)


GREY, COLOUR, TOKENS = torch.rand(2, 1, 4, 5), torch.rand(2, 3, 8, 8), torch.ones(2, 7).long()
KINDS: dict[str, tuple[Callable[..., om.Adapter], Tensor, str | None]] = {
    "grey": (likelihood, GREY, "image"),
    "colour": (autoencoder, COLOUR, "image"),
    "latents": (likelihood, torch.rand(2, 4, 8, 8), None),
    "tiny": (autoencoder, torch.rand(2, 1, 3, 8), None),
    "whole numbers": (likelihood, COLOUR.long(), None),
    "flat": (likelihood, torch.rand(2, 9), None),
    "text": (sequence, TOKENS, "sequence"),
    "pixels": (sequence, torch.ones(2, 3, 2, 2).long(), "image"),
    "other tokens": (sequence, torch.ones(2, 4, 2, 2).long(), None),
    "lines of tokens": (sequence, torch.ones(2, 2, 2).long(), None),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_sample_is_is_said_or_plain(name: str) -> None:
    make, x, expected = KINDS[name]
    assert make().sample is None
    assert make().sample_of(x) == expected
    assert make(sample="row").sample_of(x) == "row"
    assert make(sample="row").images(x) is None


def test_an_adapter_of_ones_own_may_say_it() -> None:
    class Mine(Yields):
        sample = "row"

    assert Mine(None).sample_of(GREY) == "row"
    assert Yields(None).sample_of(GREY) is None
    assert Yields(None).images(GREY) is None
    assert Yields(None).positions(GREY) is None


@pytest.mark.parametrize("make", [likelihood, autoencoder, sequence])
def test_another_kind_is_refused(make: Callable[..., om.Adapter]) -> None:
    kinds = r"\('image', 'sequence', 'row', 'diffusion'\)"
    with pytest.raises(ValueError, match=f"sample of {kinds}, got 'images'"):
        make(sample="images")


def test_images_are_in_the_unit_interval_and_not_clipped() -> None:
    x = torch.linspace(-1, 2, 32).view(2, 1, 4, 4)
    assert torch.equal(likelihood().images(x), x)  # type: ignore[arg-type]
    mapped = likelihood(value_range=(-1.0, 1.0)).images(x)
    torch.testing.assert_close(mapped, (x + 1) / 2)
    assert torch.equal(autoencoder().images(x), x)  # type: ignore[arg-type]
    logistic = om.observations.DiscretizedLogistic(256, -1.0, 3.0)
    torch.testing.assert_close(autoencoder(observation=logistic).images(x), (x + 1) / 4)
    assert likelihood(sample="image").images(torch.rand(2, 9)) is None


def test_images_of_tokens_are_shares_of_the_largest_value() -> None:
    adapter, x = pixelcnn()
    adapter.module.train()
    found = adapter.images(x)
    torch.testing.assert_close(found, x / 2)  # of three values, whichever are in the batch
    torch.testing.assert_close(adapter.images(torch.zeros_like(x)), 0.0 * x)
    assert adapter.module.training
    assert sequence().images(TOKENS) is None


def test_positions_are_neither_padding_nor_prompt() -> None:
    adapter = om.SequenceLikelihood(
        gpt2_model(), padding=0, given=lambda batch: torch.tensor([2, 0])
    )
    tokens = torch.tensor([[0, 0, 5, 6, 7, 8], [4, 5, 6, 0, 0, 0]])
    found = adapter.positions(tokens)
    assert found is not None
    assert found.int().tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    elements = elements_of(adapter, tokens)["log_likelihood"]
    assert elements.counted is not None
    assert torch.equal(elements.counted, found[:, 1:])
    texts = adapter.texts(tokens)
    assert texts is not None
    assert [text.tolist() for text in texts] == [[5, 6, 7, 8], [4, 5, 6]]
    adapter, x = pixelcnn()
    assert adapter.positions(x) is None
    assert adapter.texts(x) is None


def test_positions_fit_what_the_module_is_given() -> None:
    adapter, tokens = gpt2()
    seen: list[tuple[int, ...]] = []
    adapter.module.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
    list(adapter.log_likelihood(tokens))
    positions = adapter.positions(tokens)
    assert positions is not None
    assert [tuple(positions.shape)] == seen


# Conditions of an autoencoder


class Conditional(Autoencoder):
    """Whose decoder takes a label, and whose encoder also takes a scale."""

    def encode(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        assert scale is not None
        return super().encode(x * scale)

    def decode(self, z: Tensor, label: Tensor | None = None) -> Any:  # type: ignore[override]
        assert label is not None
        return super().decode(z + label[:, None])


@pytest.mark.parametrize("draws", [1, 3])
def test_a_condition_goes_to_the_method_that_names_it(draws: int) -> None:
    module, x = Conditional().double(), torch.rand(4, 6).double()
    label, scale = torch.tensor([0.0, 2.0, -1.0, 1.0]).double(), torch.tensor(0.5).double()
    adapter = om.ELBO(
        module, draws=draws, condition=lambda batch: {"label": batch[1], "scale": scale}
    )
    found = dict(checked_terms(adapter, (x, label)))
    for i in range(4):
        plain = Autoencoder().double()
        plain.load_state_dict(module.state_dict())
        plain.decode = lambda z, i=i, plain=plain: Autoencoder.decode(plain, z + label[i])  # type: ignore[method-assign, misc]
        alone = dict(checked_terms(om.ELBO(plain, draws=draws), 0.5 * x[[i]]))
        log_prob = alone["kl"]
        torch.testing.assert_close(found["kl"][[i]], log_prob)
        mean, log_variance = plain.encode(0.5 * x[[i]])
        eps = torch.stack(
            [
                torch.randn(2, generator=g)
                for g in [torch.Generator().manual_seed(0)]
                for _ in range(draws)
            ]
        ).double()
        decoded = plain.decode(mean + (0.5 * log_variance).exp() * eps)
        expected = Normal(decoded, 1.0).log_prob(x[[i]]).sum(1).mean()
        torch.testing.assert_close(found["reconstruction"][i], expected)


def test_a_keyword_that_no_method_names_is_refused() -> None:
    adapter = om.ELBO(Conditional(), condition=lambda batch: {"labels": batch[1]})
    with pytest.raises(ValueError, match=r"`encode` or `decode` of Conditional names, got \['lab"):
        list(checked_terms(adapter, (torch.rand(4, 6), torch.ones(4))))


def test_a_method_of_any_keywords_is_given_all() -> None:
    module = Autoencoder()
    seen: list[dict[str, Any]] = []

    def decode(z: Tensor, **keywords: Any) -> Any:
        seen.append(keywords)
        return Autoencoder.decode(module, z)

    module.decode = decode  # type: ignore[method-assign]
    adapter = om.ELBO(module, draws=2, condition=lambda batch: {"label": batch[1]})
    list(adapter.log_likelihood((torch.rand(2, 6), torch.tensor([5, 7]))))
    assert [{k: v.tolist() for k, v in found.items()} for found in seen] == [
        {"label": [5, 5, 7, 7]}
    ]


def test_tokens_with_two_places_and_classes_before_them_are_a_grey_image() -> None:
    adapter, x = pixelcnn()
    flat = x[:, 0]
    assert adapter.sample_of(flat) == "image"
    assert om.SequenceLikelihood(gpt2_model()).sample_of(TOKENS) == "sequence"


def test_terms_of_a_subclass_s_own_are_those_that_count() -> None:
    class Own(om.models.Glow):
        def log_prob_terms(self, x: Tensor) -> dict[str, Tensor]:
            return {"own": x.flatten(1).sum(1)}

    x, options = torch.rand(2, 1, 4, 4), {"channels": 1, "size": 4, "steps": 1, "hidden": 4}
    terms = dict(om.LogLikelihood(Own(**options)).log_likelihood(x))
    assert terms.keys() == {"own"}
    instance = om.models.Glow(**options)
    instance.log_prob_terms = lambda x: {"mine": x.flatten(1).sum(1)}  # type: ignore[method-assign]
    assert dict(om.LogLikelihood(instance).log_likelihood(x)).keys() == {"mine"}
