"""The denoising bound against losses written with diffusers' own schedulers."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support import diffusers_cases
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import normal_draws

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
KNOWN = r"\['edm', 'epsilon', 'flow_prediction', 'sample', 'v_prediction', 'velocity'\]"
LEVELS = [0, 50, 999]


class Linear(nn.Module):
    """A network of pixels and the level that gives ``channels`` channels."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + t[:, None, None, None] / 1000


def unet(channels: int = 1, out_channels: int | None = None) -> nn.Module:
    sizes = {"in_channels": channels, "out_channels": out_channels or channels}
    network = diffusers_cases.unet(sample_size=4, attention_head_dim=4, **sizes)
    return network.double().eval()


def noise_at(level: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The bound's noise on a schedule of 1 000 levels."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + level)).double()


def images(n: int = 3, channels: int = 1) -> Tensor:
    return torch.randn(n, channels, 4, 4, dtype=torch.float64)


def bound(adapter: om.Adapter, batch: Any) -> dict[str, Tensor]:
    return {term: value.detach() for term, value in adapter.log_likelihood(batch)}


def scheduler_loss(network: Any, scheduler: Any, x: Tensor, level: int, noise: Tensor) -> Tensor:
    """-1/2 of the squared error, sample by sample, as a diffusers training script has it."""
    t = torch.tensor([level])
    losses = []
    for sample in x:
        noisy = scheduler.add_noise(sample[None], noise[None], t)
        targets = {
            "epsilon": noise[None],
            "sample": sample[None],
            "v_prediction": scheduler.get_velocity(sample[None], noise[None], t),
        }
        error = network(noisy, t).sample - targets[scheduler.config.prediction_type]
        losses.append(-0.5 * (error**2).sum().detach())
    return torch.stack(losses)


# The bound


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_terms_are_the_losses_of_a_training_script(prediction_type: str, schedule: str) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    network, x = unet(), images()
    found = bound(om.DenoisingBound(network, scheduler, levels=LEVELS, seed=3), x)
    assert list(found) == ["t=0", "t=50", "t=999"]
    for level in LEVELS:
        expected = scheduler_loss(network, scheduler, x, level, noise_at(level, (1, 4, 4), seed=3))
        torch.testing.assert_close(found[f"t={level}"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_network_has_bound_zero(prediction_type: str) -> None:
    x, level, alphas = images(1), 50, torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
    alpha, sigma = alphas[level].sqrt(), (1 - alphas[level]).sqrt()
    noise = noise_at(level, (1, 4, 4))
    answers = {"epsilon": noise, "sample": x, "v_prediction": alpha * noise - sigma * x}

    class Oracle(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            torch.testing.assert_close(x_t, alpha * x + sigma * noise)
            return answers[prediction_type].expand_as(x_t)

    adapter = om.DenoisingBound(Oracle(), alphas, levels=[level], prediction_type=prediction_type)
    assert bound(adapter, x)["t=50"].item() == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction"),
        diffusers.EDMDPMSolverMultistepScheduler(sigma_max=20.0, rho=5.0),
    ],
    ids=["edm", "v", "of other sigmas"],
)
def test_a_preconditioned_denoiser_has_the_loss_of_what_it_denoises(scheduler: Any) -> None:
    """EDM's: the denoised's squared error over c_out's square."""
    network, x, config = Linear().double(), images(), scheduler.config
    ends = [each ** (1 / config.rho) for each in (config.sigma_min, config.sigma_max)]
    sigmas = torch.linspace(*ends, 1000, dtype=torch.float64) ** config.rho
    for term, found in bound(om.DenoisingBound(network, scheduler, levels=LEVELS), x).items():
        level = int(term.removeprefix("t="))
        sigma, noise = sigmas[level], noise_at(level, (1, 4, 4))
        noisy = x + sigma * noise
        told = (0.25 * sigma.log()).expand(len(x))
        given = scheduler.precondition_inputs(noisy, sigma)
        denoised = scheduler.precondition_outputs(noisy, network(given, told), sigma)
        scale = config.sigma_data
        c_out = sigma * scale / (sigma**2 + scale**2).sqrt()
        expected = -0.5 * ((denoised - x) / c_out).square().flatten(1).sum(1)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=0)


def test_the_variational_bound_of_edm_is_that_of_the_data_themselves() -> None:
    """Of data N(0, 1/4), whose best network gives nothing, it is the density itself."""

    class Nothing(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    schedule = om.NoiseSchedule.edm(4000, sigma_data=0.5)
    adapter = om.DenoisingBound(
        Nothing(), schedule, levels=range(4000), loss="vlb", draws=64, antithetic=True
    )
    x = 0.5 * images(4)
    found = torch.stack(list(bound(adapter, x).values())).sum(0)
    exact = torch.distributions.Normal(0.0, 0.5).log_prob(x).flatten(1).sum(1)
    # The bound of so many levels is lower by a third of a nat; the scale of 16 pixels is 11.
    torch.testing.assert_close(found, exact, rtol=0, atol=1.0)


def test_a_scheduler_that_preconditions_otherwise_is_refused() -> None:
    class Other(diffusers.EDMEulerScheduler):
        def precondition_outputs(self, sample: Any, model_output: Any, sigma: Any) -> Any:
            return 2 * super().precondition_outputs(sample, model_output, sigma)

    with pytest.raises(ValueError, match=r"c_out as EDM's with .* got others of Other"):
        om.DenoisingBound(Linear(), Other())


def test_ipndm_is_of_angles() -> None:
    schedule = om.NoiseSchedule.of(diffusers.IPNDMScheduler(num_train_timesteps=4))
    assert schedule.t.tolist() == [0.125, 0.375, 0.625, 0.875]
    torch.testing.assert_close(torch.atan2(schedule.sigma, schedule.alpha), schedule.t * np.pi / 2)
    assert (schedule.prediction_type, schedule.is_variance_preserving) == ("v_prediction", True)


def test_learned_variance_is_left_out() -> None:
    network, x = unet(2, out_channels=4), images(channels=2)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")

    def mean_only(x_t: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=network(x_t, t).sample[:, :2])

    found = bound(om.DenoisingBound(network, scheduler, levels=[50]), x)["t=50"]
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    expected = scheduler_loss(mean_only, scheduler, x, 50, noise_at(50, (2, 4, 4)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (y, "more"), lambda y: SimpleNamespace(sample=y)],
    ids=["tensor", "tuple", "sample"],
)
def test_network_may_answer_in_three_ways(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return wrap(self.inner(x, t))

    network, alphas, x = Linear().double(), torch.linspace(0.9, 0.1, 10), images()
    plain = bound(om.DenoisingBound(network, alphas, levels=[3]), x)
    found = bound(om.DenoisingBound(Wrapped(), alphas, levels=[3]), x)
    assert torch.equal(found["t=3"], plain["t=3"])


def test_samples_may_have_any_shape() -> None:
    class Sequence(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * 0.5 * t[:, None, None]

    x = torch.randn(4, 3, 7)
    adapter = om.DenoisingBound(Sequence(), torch.linspace(0.9, 0.1, 10), levels=[3])
    assert bound(adapter, x)["t=3"].shape == (4,)


def test_levels_reach_the_network_as_integers_of_each_sample() -> None:
    seen = []

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return x

    list(
        om.DenoisingBound(Network(), torch.linspace(0.9, 0.1, 10), levels=[3, 7]).log_likelihood(
            images()
        )
    )
    assert [t.tolist() for t in seen] == [[3, 3, 3], [7, 7, 7]]
    assert {t.dtype for t in seen} == {torch.int64}


def test_each_level_is_asked_for_when_its_turn_comes() -> None:
    calls = []

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            calls.append(int(t[0]))
            return x

    adapter = om.DenoisingBound(Network(), torch.linspace(0.9, 0.1, 10), levels=[3, 7])
    next(iter(adapter.log_likelihood(images())))
    assert calls == [3]


# Deterministic, and no trace


def test_sample_has_the_same_bound_alone_and_in_any_batch() -> None:
    x, adapter = images(5), om.DenoisingBound(unet(), diffusers.DDPMScheduler())
    together = bound(adapter, x)
    torch.rand(9)
    for order in ([0], [3], [4, 2, 0], [2, 2, 2, 2]):
        for term, value in bound(adapter, x[order]).items():
            torch.testing.assert_close(value, together[term][order], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("seed", "same"), [(0, True), (7, False)])
def test_seed_decides_the_noise(seed: int, same: bool) -> None:
    network, alphas, x = Linear(), torch.linspace(0.9, 0.1, 10), images().float()
    first = bound(om.DenoisingBound(network, alphas, levels=[3]), x)["t=3"]
    second = bound(om.DenoisingBound(network, alphas, levels=[3], seed=seed), x)["t=3"]
    assert torch.equal(first, second) == same


def test_a_level_has_the_same_term_whatever_the_others() -> None:
    network, alphas, x = Linear(), torch.linspace(0.9, 0.1, 10), images().float()
    alone = bound(om.DenoisingBound(network, alphas, levels=[7]), x)["t=7"]
    among = bound(om.DenoisingBound(network, alphas, levels=[3, 7]), x)["t=7"]
    assert torch.equal(alone, among)


def test_live_scheduler_is_neither_changed_nor_used_later() -> None:
    scheduler, x = diffusers.DDPMScheduler(), images()
    before = copy.deepcopy(scheduler.__dict__)
    adapter = om.DenoisingBound(unet(), scheduler)
    first = bound(adapter, x)
    assert scheduler.__dict__.keys() == before.keys()
    assert all(np.array_equal(scheduler.__dict__[name], before[name]) for name in before)
    scheduler.set_timesteps(7)
    scheduler.alphas_cumprod.zero_()
    assert all(torch.equal(value, first[term]) for term, value in bound(adapter, x).items())


@pytest.mark.parametrize(
    "make",
    [
        diffusers.DDIMScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
    ],
)
def test_any_variance_preserving_scheduler_gives_the_same(make: Callable[[], Any]) -> None:
    network, x = Linear().double(), images()
    found = bound(om.DenoisingBound(network, make()), x)
    expected = bound(om.DenoisingBound(network, diffusers.DDPMScheduler()), x)
    torch.testing.assert_close(found, expected)


def test_given_prediction_type_comes_before_the_schedulers() -> None:
    network, x, scheduler = Linear().double(), images(), diffusers.DDPMScheduler()
    sample = diffusers.DDPMScheduler(prediction_type="sample")
    found = bound(om.DenoisingBound(network, scheduler, prediction_type="sample"), x)
    torch.testing.assert_close(found, bound(om.DenoisingBound(network, sample), x))


# Refusals


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        (torch.linspace(0.9, 0.1, 1000), "flow"),
        (diffusers.DDPMScheduler(prediction_type="trigflow"), None),
    ],
    ids=["argument", "scheduler"],
)
def test_unknown_prediction_type_lists_the_known(
    schedule: Any, prediction_type: str | None
) -> None:
    with pytest.raises(ValueError, match=f"prediction type of {KNOWN}, got '"):
        om.DenoisingBound(Linear(), schedule, prediction_type=prediction_type)


@pytest.mark.parametrize("levels", [[10], [3, 99], []], ids=str)
def test_levels_outside_the_schedule_are_refused(levels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"noise levels in \[0, 10\), got \["):
        om.DenoisingBound(Linear(), torch.linspace(0.9, 0.1, 10), levels=levels)


def test_a_level_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="distinct whole noise levels"):
        om.DenoisingBound(Linear(), torch.linspace(0.9, 0.1, 10), levels=[3, 3])


@pytest.mark.parametrize(
    "schedule",
    [
        diffusers.ScoreSdeVeScheduler(),
        torch.ones(2, 2),
        torch.ones(0),
        None,
    ],
    ids=lambda s: type(s).__name__,
)
def test_unknown_schedule_lists_the_known(schedule: Any) -> None:
    known = r"NoiseSchedule, .*\(T,\), .*`alphas_cumprod`.*`scale_noise`\), got "
    with pytest.raises(ValueError, match=known):
        om.DenoisingBound(Linear(), schedule, levels=[0])


@pytest.mark.parametrize(
    "numbers",
    [torch.arange(1000.0), -torch.linspace(0, 1, 1000), diffusers.DDPMScheduler().betas],
    ids=["above 1", "below 0", "betas"],
)
def test_what_are_no_cumulative_products_is_refused(numbers: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cumulative"):
        om.DenoisingBound(Linear(), numbers)


@pytest.mark.parametrize("channels", [3, 4])
def test_prediction_of_another_shape_is_refused(channels: int) -> None:
    adapter = om.DenoisingBound(Linear(channels), torch.linspace(0.9, 0.1, 10), levels=[3])
    got = rf"shape \(2, 1, 4, 4\) of its input, got \(2, {channels}, 4, 4\)"
    with pytest.raises(ValueError, match=got):
        bound(adapter, images(2).float())


@pytest.mark.parametrize("x", [torch.ones(2, 1, 4, 4, dtype=torch.uint8), torch.ones(2)], ids=str)
def test_what_is_no_image_is_refused(x: Tensor) -> None:
    adapter = om.DenoisingBound(Linear(), torch.linspace(0.9, 0.1, 10), levels=[3])
    with pytest.raises(ValueError, match=r"floating-point samples.*, got a tensor"):
        bound(adapter, x)


# Losses, draws and conditions


def errors(network: nn.Module, x: Tensor, noises: list[Tensor], level: int = 3) -> list[Tensor]:
    """Of an epsilon prediction on the ten levels from 0.9 to 0.1, for each draw of the noise."""
    product = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)[level]
    t = torch.full((len(x),), level)
    noisy = [product.sqrt() * x + (1 - product).sqrt() * noise for noise in noises]
    return [(network(x_t, t) - e).detach() for x_t, e in zip(noisy, noises, strict=True)]


def draws(k: int, level: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(level)
    return [torch.randn(1, 4, 4, generator=generator).double() for _ in range(k)]


TEN = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)


def test_l1_is_minus_the_sum_of_absolute_errors() -> None:
    network, x = Linear().double(), images()
    found = bound(om.DenoisingBound(network, TEN, levels=[3], loss="l1"), x)["t=3"]
    [error] = errors(network, x, draws(1))
    torch.testing.assert_close(found, -error.abs().flatten(1).sum(1))


def test_the_papers_loss_is_l1_at_the_least_noise() -> None:
    network, x = Linear().double(), images()
    found = bound(om.DenoisingBound.paper(network, TEN), x)
    expected = bound(om.DenoisingBound(network, TEN, levels=[0], loss="l1"), x)
    assert found.keys() == {"t=0"}
    assert torch.equal(found["t=0"], expected["t=0"])


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_term_is_the_mean_over_draws_and_their_negatives(antithetic: bool) -> None:
    network, x = Linear().double(), images()
    options: dict[str, Any] = {"draws": 3, "antithetic": antithetic}
    found = bound(om.DenoisingBound(network, TEN, levels=[3], **options), x)["t=3"]
    noises = draws(3) + ([-noise for noise in draws(3)] if antithetic else [])
    losses = [-0.5 * e.square().flatten(1).sum(1) for e in errors(network, x, noises)]
    torch.testing.assert_close(found, torch.stack(losses).mean(0))


def test_the_first_draw_is_the_only_one_of_a_single_draw() -> None:
    assert torch.equal(normal_draws((2, 3), 1, seed=5)[0], normal_draws((2, 3), 4, seed=5)[0])


class Labelled(Linear):
    """Shifts its output by a label."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None
        assert len(label) == len(x)
        return super().forward(x, t) + label[:, None, None, None]


def test_each_draw_has_its_samples_condition() -> None:
    network, x, labels = Labelled().double(), images(), torch.tensor([1.0, 5.0, 9.0]).double()
    adapter = om.DenoisingBound(
        network, TEN, levels=[3], draws=2, condition=lambda batch: {"label": batch[1]}
    )
    found = bound(adapter, (x, labels))["t=3"]
    for i in range(3):
        alone = bound(adapter, (x[i : i + 1], labels[i : i + 1]))["t=3"]
        torch.testing.assert_close(found[i : i + 1], alone)
    assert not torch.allclose(bound(adapter, (x, labels.flip(0)))["t=3"], found)


def test_other_levels_and_another_seed_make_another_adapter() -> None:
    adapter = om.DenoisingBound(Linear().double(), TEN, levels=[3])
    other, x = adapter.with_levels([1, 7], seed=4), images()
    expected = bound(om.DenoisingBound(adapter.module, TEN, levels=[1, 7], seed=4), x)
    assert all(torch.equal(value, expected[term]) for term, value in bound(other, x).items())
    assert (adapter.levels, adapter.seed, other.levels) == ((3,), 0, (1, 7))
    with pytest.raises(ValueError, match=r"noise levels in \[0, 10\)"):
        adapter.with_levels([10])


def test_a_network_in_half_precision_gets_its_own() -> None:
    network, x = nn.Module.to(Linear(), torch.bfloat16), images().float()
    found = bound(om.DenoisingBound(network, TEN, levels=[3]), x)["t=3"]
    exact = bound(om.DenoisingBound(network.double(), TEN, levels=[3]), x.double())["t=3"]
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0)
