"""Log-likelihoods and their terms; dequantisation against the discrete probability it bounds."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Beta, Normal

import ood_monitor as om
from ood_monitor.adapters.base import checked_terms


class Diagonal(nn.Module):
    """Independent Normals, by torch.distributions."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.linspace(-1.0, 1.0, width))
        self.log_sd = nn.Parameter(torch.linspace(-0.5, 0.5, width))

    def log_prob(self, x: Tensor) -> Tensor:
        return Normal(self.mean, self.log_sd.exp()).log_prob(x).sum(1)


class Terms(Diagonal):
    """The same in two terms."""

    def log_prob_terms(self, x: Tensor) -> dict[str, Tensor]:
        z = (x - self.mean) * torch.exp(-self.log_sd)
        base = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return {"base": base, "log_det": -self.log_sd.sum().expand(len(x))}


class Cube(nn.Module):
    """The uniform density on the unit cube, and its Beta generalisation, in any shape."""

    def __init__(self, a: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def log_prob(self, x: Tensor) -> Tensor:
        return Beta(self.a, self.a).log_prob(x).flatten(1).sum(1)


def log_likelihood(adapter: om.Adapter, batch: Any) -> Tensor:
    return sum(value for _, value in checked_terms(adapter, batch)).detach()  # type: ignore[attr-defined]


def bits(n: int, *shape: int, bins: int = 256) -> Tensor:
    """Images of ``bins`` equally spaced values in [0, 1]."""
    return torch.randint(bins, (n, *shape)).double() / (bins - 1)


# The density


def test_log_prob_is_one_term() -> None:
    x = torch.randn(5, 3)
    [(term, value)] = checked_terms(om.LogLikelihood(Diagonal()), x)
    assert term == "log_likelihood"
    assert torch.equal(value, Diagonal().log_prob(x))


def test_terms_come_before_log_prob_and_add_up_to_it() -> None:
    x, adapter = torch.randn(5, 3), om.LogLikelihood(Terms())
    assert [term for term, _ in checked_terms(adapter, x)] == ["base", "log_det"]
    torch.testing.assert_close(log_likelihood(adapter, x), Diagonal().log_prob(x).detach())


@pytest.mark.parametrize(
    "function",
    [
        lambda module, x: module.log_prob(x) / 2,
        lambda module, x: {"a": module.log_prob(x) / 4, "b": module.log_prob(x) / 4},
    ],
    ids=["tensor", "mapping"],
)
def test_function_comes_before_the_modules_methods(function: Callable[..., Any]) -> None:
    x, module = torch.randn(5, 3), Terms()
    found = log_likelihood(om.LogLikelihood(module, function), x)
    torch.testing.assert_close(found, module.log_prob(x).detach() / 2)


@pytest.mark.parametrize("name", ["NSF", "MAF", "NICE", "GMM"])
def test_zuko_flow_has_the_density_that_it_says(name: str) -> None:
    flow = getattr(zuko.flows, name)(features=3)
    x = torch.randn(5, 3)
    found = log_likelihood(om.LogLikelihood(flow, lambda flow, x: flow().log_prob(x)), x)
    torch.testing.assert_close(found, flow().log_prob(x).detach())


def test_density_of_a_flow_integrates_to_one() -> None:
    flow = zuko.flows.NSF(features=1, transforms=2, hidden_features=(8,)).double()
    adapter = om.LogLikelihood(flow, lambda flow, x: flow().log_prob(x))
    x = torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)
    density = log_likelihood(adapter, x[:, None]).exp()
    assert torch.trapezoid(density, x) == pytest.approx(1.0, abs=1e-4)


def test_glow_shows_its_levels() -> None:
    flow = om.models.Glow(channels=1, size=4, steps=1, hidden=2)
    terms = [term for term, _ in checked_terms(om.LogLikelihood(flow), torch.rand(2, 1, 4, 4))]
    assert terms == ["latent_1", "latent_2", "log_det"]


@pytest.mark.parametrize("batch", [lambda x: x, lambda x: [x, torch.ones(5)], lambda x: (x,)])
def test_sample_is_what_a_batch_begins_with(batch: Callable[[Tensor], Any]) -> None:
    x = torch.randn(5, 3)
    found = log_likelihood(om.LogLikelihood(Diagonal()), batch(x))
    assert torch.equal(found, Diagonal().log_prob(x).detach())


def test_inputs_say_where_the_sample_is() -> None:
    x = torch.randn(5, 3)
    adapter = om.LogLikelihood(Diagonal(), inputs=lambda batch: batch["image"])
    assert torch.equal(log_likelihood(adapter, {"image": x}), Diagonal().log_prob(x).detach())


# Dequantisation


@pytest.mark.parametrize("bins", [2, 17, 256])
@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)], ids=str)
def test_uniform_density_gives_each_discrete_sample_the_same(
    bins: int, shape: tuple[int, ...]
) -> None:
    adapter = om.LogLikelihood(Cube(), bins=bins)
    found = log_likelihood(adapter, bits(5, *shape, bins=bins))
    expected = torch.full((5,), -math.prod(shape) * math.log(bins), dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_of_the_discrete_values_add_up_to_one(seed: int) -> None:
    adapter = om.LogLikelihood(Cube(3.0), bins=256, seed=seed)
    every_value = torch.arange(256).double()[:, None] / 255
    assert log_likelihood(adapter, every_value).exp().sum() == pytest.approx(1.0, abs=1e-3)


def test_dequantised_likelihood_is_a_bound_on_the_discrete_one() -> None:
    bins, value = 4, torch.tensor([[1 / 3]], dtype=torch.float64)  # the second of four values
    grid = torch.linspace(0.25, 0.5, 2001, dtype=torch.float64)
    probability = torch.trapezoid(Cube(3.0).log_prob(grid[:, None]).exp().detach(), grid)
    draws = torch.cat(
        [log_likelihood(om.LogLikelihood(Cube(3.0), bins=bins, seed=s), value) for s in range(400)]
    )
    assert draws.exp().mean() == pytest.approx(probability.item(), rel=0.05)
    assert draws.mean() < probability.log()


@pytest.mark.parametrize("bins", [2, 256])
def test_dequantised_values_stay_in_their_bins(bins: int) -> None:
    seen = []
    adapter = om.LogLikelihood(
        Cube(), lambda module, x: seen.append(x) or module.log_prob(x), bins=bins
    )
    x = bits(50, 8, bins=bins)
    log_likelihood(adapter, x)
    assert torch.equal((seen[0] * bins).floor(), (x * (bins - 1)).round())
    assert seen[0].std() > 0


def test_volume_belongs_to_the_last_term() -> None:
    x = bits(5, 3)
    found = dict(checked_terms(om.LogLikelihood(Terms().double(), bins=256), x))
    plain = dict(checked_terms(om.LogLikelihood(Terms().double()), x))
    shift = found["log_det"] - plain["log_det"]
    torch.testing.assert_close(shift, torch.full_like(shift, -3 * math.log(256)))
    assert torch.all((found["base"] - plain["base"]).abs() < 1)


def test_same_sample_gets_the_same_noise_alone_and_in_a_batch() -> None:
    x, adapter = bits(5, 3), om.LogLikelihood(Diagonal().double(), bins=256)
    torch.rand(7)
    alone = torch.cat([log_likelihood(adapter, x[[i]]) for i in range(5)])
    torch.testing.assert_close(alone, log_likelihood(adapter, x))


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_seed_decides_the_noise(seed: int, same: bool) -> None:
    x, module = bits(5, 3), Diagonal().double()
    first = log_likelihood(om.LogLikelihood(module, bins=256), x)
    assert (
        torch.equal(log_likelihood(om.LogLikelihood(module, bins=256, seed=seed), x), first) == same
    )


def test_dequantisation_leaves_the_global_random_state_and_the_input() -> None:
    x = bits(5, 3)
    given, state = x.clone(), torch.get_rng_state()
    log_likelihood(om.LogLikelihood(Diagonal().double(), bins=256), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)


# Refusals


@pytest.mark.parametrize("x", [-0.1, 1.1, 255.0])
def test_values_outside_the_unit_interval_are_refused_with_bins(x: float) -> None:
    adapter = om.LogLikelihood(Diagonal(), bins=256)
    with pytest.raises(ValueError, match=r"values in \[0, 1\] for bins=256, got values from"):
        list(checked_terms(adapter, torch.full((2, 3), x)))


def test_a_module_without_a_density_needs_a_function() -> None:
    with pytest.raises(
        ValueError, match=r"`log_prob` or `log_prob_terms`, .*, got Linear; give a function"
    ):
        om.LogLikelihood(nn.Linear(3, 3))


def test_integer_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating-point samples.*\(2, 3\) and dtype torch.int64"):
        list(checked_terms(om.LogLikelihood(Diagonal()), torch.ones(2, 3, dtype=torch.long)))


def test_a_mapping_without_a_term_is_refused() -> None:
    adapter = om.LogLikelihood(Diagonal(), lambda module, x: {})
    with pytest.raises(ValueError, match="term"):
        om.gradient_norms(adapter, torch.randn(2, 3))


def test_one_number_for_a_batch_is_refused() -> None:
    adapter = om.LogLikelihood(Diagonal(), lambda module, x: module.log_prob(x).mean())
    with pytest.raises(ValueError, match=r"'log_likelihood' of Log.*one value a sample"):
        om.gradient_norms(adapter, torch.randn(5, 3))


# Ranges, conditions and bits


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0)])
def test_range_scales_the_values_and_the_volume(low: float, high: float) -> None:
    """Of the same discrete images, the same density in other units gives the same probability."""
    x = bits(5, 3)
    width = high - low

    def scaled(module: nn.Module, y: Tensor) -> Tensor:
        return module.log_prob((y - low) / width) - y[0].numel() * math.log(width)  # type: ignore[operator]

    expected = log_likelihood(om.LogLikelihood(Cube(3.0), bins=256), x)
    adapter = om.LogLikelihood(Cube(3.0), scaled, bins=256, value_range=(low, high))
    torch.testing.assert_close(log_likelihood(adapter, low + width * x), expected)
    with pytest.raises(ValueError, match=rf"values in \[{low:g}, {high:g}\] for bins=256"):
        log_likelihood(adapter, low + width * x + 2 * width)


def test_bits_per_dimension_of_uniform_bytes_are_eight() -> None:
    adapter, x = om.LogLikelihood(Cube(), bins=256), bits(5, 1, 4, 4)
    found = adapter.bits_per_dimension(x)
    torch.testing.assert_close(found, torch.full((5,), 8.0, dtype=torch.float64))
    assert not found.requires_grad


def test_bits_per_dimension_are_those_of_scoring_and_leave_no_trace() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 6)

        def log_prob(self, x: Tensor) -> Tensor:
            x -= 0.5
            return -self.linear(self.norm(x)).square().sum(1)

    module, x = Centred(), torch.rand(8, 6)
    adapter, kept, state = om.LogLikelihood(module), x.clone(), copy.deepcopy(module.state_dict())
    found = adapter.bits_per_dimension(x)
    assert torch.equal(x, kept)
    assert module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    expected = -module.eval().log_prob(kept) / (6 * math.log(2))
    torch.testing.assert_close(found, expected.detach())


def test_bits_per_dimension_take_all_terms() -> None:
    x, adapter = torch.randn(5, 3), om.LogLikelihood(Terms())
    expected = -log_likelihood(adapter, x) / (3 * math.log(2))
    torch.testing.assert_close(adapter.bits_per_dimension(x), expected)


def test_keywords_come_from_the_batch() -> None:
    def log_prob(module: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
        return module.log_prob(x - shift)  # type: ignore[operator, no-any-return]

    x, shift = torch.randn(5, 3), torch.randn(5, 3)
    adapter = om.LogLikelihood(Diagonal(), log_prob, condition=lambda batch: {"shift": batch[1]})
    torch.testing.assert_close(
        log_likelihood(adapter, (x, shift)), Diagonal().log_prob(x - shift).detach()
    )


@pytest.mark.parametrize("value_range", [(1.0, 0.0), (0.5, 0.5)])
def test_a_range_that_is_none_is_refused(value_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"range \(low, high\) with low < high, got"):
        om.LogLikelihood(Diagonal(), bins=256, value_range=value_range)
