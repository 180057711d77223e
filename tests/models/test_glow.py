"""Glow and each of its bijections against their Jacobians, inverses and total probability."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call, grad, vmap

from ood_monitor.models.bijections import (
    ActNorm,
    AffineCoupling,
    Bijection,
    Chain,
    InvertibleConv1x1,
    Squeeze,
)
from ood_monitor.models.glow import ConditionalGaussian, Glow

M = TypeVar("M", bound=nn.Module)

SHAPE = (4, 2, 6)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def perturbed(module: M, scale: float = 0.2) -> M:
    """In evaluation mode and float64, with no parameter left at its (often zero) initial value."""
    module.double().eval()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.add_(scale * randn(*parameter.shape, seed=seed))
    return module


BLOCKS: dict[str, Callable[[], Bijection]] = {
    "squeeze": Squeeze,
    "actnorm": lambda: ActNorm(4),
    "conv1x1": lambda: InvertibleConv1x1(4, generator=seeded()),
    "coupling": lambda: AffineCoupling(4, 5, generator=seeded()),
    "chain": lambda: Chain(norm=ActNorm(4), conv=InvertibleConv1x1(4, generator=seeded())),
}
GLOWS: dict[str, dict[str, Any]] = {
    "one-level": {"channels": 1, "size": 2, "levels": 1, "steps": 1, "hidden": 3},
    "two-levels": {"channels": 1, "size": 4, "levels": 2, "steps": 2, "hidden": 3},
    "three-levels": {"channels": 2, "size": (8, 16), "levels": 3, "steps": 1, "hidden": 3},
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}

blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
glows = pytest.mark.parametrize("options", GLOWS.values(), ids=GLOWS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def images(flow: Glow, n: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(n, *flow.shape, seed=seed, dtype=dtype)


def log_abs_det_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Log |det| of each sample's Jacobian, by autograd."""

    def one(sample: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda v: function(v[None])[0], sample)
        return torch.linalg.slogdet(jacobian.reshape(sample.numel(), -1)).logabsdet

    return torch.stack([one(sample) for sample in x])


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def initialised(flow: Glow) -> list[bool]:
    return [bool(m.initialised) for m in flow.modules() if isinstance(m, ActNorm)]


# Bijections


@dtypes
@blocks
def test_inverse_undoes_forward(make: Callable[[], Bijection], dtype: torch.dtype) -> None:
    block = perturbed(make()).to(dtype)
    x = randn(3, *SHAPE, dtype=dtype)
    z, _ = block(x)
    assert z.numel() == x.numel()
    torch.testing.assert_close(block.inverse(z), x, rtol=0, atol=TOLERANCES[dtype])


@blocks
def test_log_det_is_that_of_the_jacobian(make: Callable[[], Bijection]) -> None:
    block = perturbed(make())
    x = randn(3, *SHAPE)
    log_det = block(x)[1]
    assert log_det.shape == (3,)
    assert isinstance(block, Squeeze) == (float(log_det.detach().abs().max()) < 1e-3)
    torch.testing.assert_close(log_det, log_abs_det_jacobian(lambda v: block(v)[0], x))


def test_squeeze_gathers_each_square_of_pixels() -> None:
    z, _ = Squeeze()(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert z[0, :, 0, 1].tolist() == [2, 3, 6, 7]


def test_conv1x1_starts_orthogonal() -> None:
    conv = InvertibleConv1x1(6, generator=seeded()).double()
    weight = conv(torch.eye(6, dtype=torch.float64)[..., None, None])[0].squeeze().T
    torch.testing.assert_close(weight @ weight.T, torch.eye(6).double(), rtol=0, atol=1e-6)
    assert (weight - torch.eye(6)).abs().max() > 0.1


def test_conv1x1_is_the_same_matrix_at_each_pixel() -> None:
    conv = perturbed(InvertibleConv1x1(4, generator=seeded()))
    x = randn(2, *SHAPE)
    pixel, _ = conv(x[:, :, 1:2, 3:4])
    torch.testing.assert_close(conv(x)[0][:, :, 1:2, 3:4], pixel)


def test_coupling_starts_as_the_identity() -> None:
    x = randn(2, *SHAPE, dtype=torch.float32)
    z, log_det = AffineCoupling(4, 5, generator=seeded())(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(2))


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_coupling_changes_only_the_second_part(channels: int) -> None:
    coupling = perturbed(AffineCoupling(channels, 5, generator=seeded()))
    x = randn(2, channels, 2, 2)
    z, _ = coupling(x)
    kept = channels // 2
    assert torch.equal(z[:, :kept], x[:, :kept])
    assert (z[:, kept:] != x[:, kept:]).all()
    torch.testing.assert_close(coupling.inverse(z), x)


@pytest.mark.parametrize("bound", [3.0, 0.5])
def test_coupling_scale_is_bounded(bound: float) -> None:
    coupling = perturbed(AffineCoupling(2, 5, bound=bound, generator=seeded()), scale=100.0)
    _, log_det = coupling(100 * randn(8, 2, 1, 1))
    assert 0.95 * bound < log_det.abs().max() <= bound


def test_a_deep_flow_with_a_small_bound_does_not_overflow() -> None:
    def unusual(bound: float) -> Tensor:
        flow = Glow(1, 4, levels=1, steps=48, hidden=4, log_scale_bound=bound)
        for part in flow.modules():
            if isinstance(part, AffineCoupling):
                perturbed(part)
        return flow.float().eval().log_prob(10 * torch.ones(1, 1, 4, 4))

    assert not unusual(3.0).isfinite()
    assert unusual(0.5).isfinite()


# ActNorm


def test_actnorm_standardises_the_first_training_batch() -> None:
    norm = ActNorm(3).double().train()
    x = 5 + 3 * randn(4, 3, 4, 4) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    z, _ = norm(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(3).double())
    assert norm.initialised


def test_actnorm_is_not_initialised_again() -> None:
    norm = ActNorm(3).double().train()
    norm(randn(4, 3, 4, 4))
    before = copy.deepcopy(norm)
    norm(7 + 2 * randn(4, 3, 4, 4, seed=1))
    assert same_state(norm, before)


def test_actnorm_is_the_identity_in_evaluation_before_initialisation() -> None:
    norm = ActNorm(3).double().eval()
    x = 7 + 2 * randn(4, 3, 4, 4)
    z, log_det = norm(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(4).double())
    assert same_state(norm, ActNorm(3).double())


def test_actnorm_initialisation_travels_in_the_state_dict() -> None:
    norm = ActNorm(3).double().train()
    norm(randn(4, 3, 4, 4))
    loaded = ActNorm(3).double().train()
    loaded.load_state_dict(norm.state_dict())
    x = 7 + 2 * randn(4, 3, 4, 4, seed=1)
    assert torch.equal(loaded(x)[0], norm(x)[0])
    assert same_state(loaded, norm)


def test_actnorm_leaves_the_scale_of_a_constant_channel() -> None:
    norm = ActNorm(2).double().train()
    x = randn(4, 2, 4, 4)
    x[:, 1] = 1 / 3
    z, _ = norm(x)
    assert norm.log_scale[1] == 0
    torch.testing.assert_close(z[:, 1], torch.zeros(4, 4, 4).double(), rtol=0, atol=1e-9)


# The prior


def test_prior_is_the_gaussian_of_its_convolution() -> None:
    prior = perturbed(ConditionalGaussian(4))
    z, h = randn(3, *SHAPE), randn(3, *SHAPE, seed=1)
    mean, raw = prior.conv(h).chunk(2, dim=1)
    log_sd = 3 * torch.tanh(raw / 3)
    expected = Normal(mean, log_sd.exp()).log_prob(z).sum((1, 2, 3))
    torch.testing.assert_close(prior(z, h), expected)
    torch.testing.assert_close(prior.sample((z - mean) / log_sd.exp(), h), z)


# Glow


@dtypes
@glows
def test_decode_undoes_encode(options: dict[str, Any], dtype: torch.dtype) -> None:
    flow = perturbed(Glow(**options), 0.1).to(dtype)
    x = images(flow, dtype=dtype)
    latents = flow.encode(x)
    assert len(latents) == options["levels"]
    torch.testing.assert_close(flow.decode(latents), x, rtol=0, atol=TOLERANCES[dtype])


def test_decode_undoes_encode_at_the_default_size() -> None:
    flow = Glow(channels=3, size=16)
    x = images(flow, n=8, dtype=torch.float32)
    flow(x)
    flow.eval()
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-4)


@glows
def test_latents_have_the_documented_shapes(options: dict[str, Any]) -> None:
    flow = perturbed(Glow(**options))
    channels, height, width = flow.shape
    levels = options["levels"]
    expected = [(3, 2**n * channels, height // 2**n, width // 2**n) for n in range(1, levels + 1)]
    expected[-1] = (3, 2 * expected[-1][1], *expected[-1][2:])
    assert [z.shape for z in flow.encode(images(flow))] == expected


@pytest.mark.parametrize("options", list(GLOWS.values())[:2], ids=list(GLOWS)[:2])
def test_glow_log_det_is_that_of_the_jacobian(options: dict[str, Any]) -> None:
    flow = perturbed(Glow(**options))
    x = images(flow)

    def latents(v: Tensor) -> Tensor:
        return torch.cat([z.flatten(1) for z in flow.encode(v)], dim=1)

    log_det = flow.log_prob_terms(x)["log_det"]
    assert log_det.detach().abs().min() > 1e-2
    torch.testing.assert_close(log_det, log_abs_det_jacobian(latents, x))


@glows
def test_terms_are_named_and_sum_to_log_prob(options: dict[str, Any]) -> None:
    flow = perturbed(Glow(**options))
    x = images(flow)
    terms = flow.log_prob_terms(x)
    assert list(terms) == [f"latent_{n + 1}" for n in range(options["levels"])] + ["log_det"]
    assert all(term.shape == (3,) for term in terms.values())
    assert torch.equal(sum(terms.values(), torch.zeros(3)), flow.log_prob(x))
    assert torch.equal(flow(x), flow.log_prob(x))


def test_latent_terms_are_the_densities_of_the_latents() -> None:
    flow = perturbed(Glow(**GLOWS["two-levels"]))
    x = images(flow)
    z_1, z_2 = flow.encode(x)
    h_1 = flow.levels[1].inverse(z_2)
    terms = flow.log_prob_terms(x)
    torch.testing.assert_close(terms["latent_1"], flow.priors[0](z_1, h_1))
    torch.testing.assert_close(terms["latent_2"], Normal(0.0, 1.0).log_prob(z_2).sum((1, 2, 3)))


@glows
def test_fresh_glow_is_a_standard_gaussian(options: dict[str, Any]) -> None:
    flow = Glow(**options).double().eval()
    x = images(flow)
    expected = Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-4)


def assert_mean_one(log_weights: Tensor) -> None:
    """Importance weights have mean 1 where both densities are normalised."""
    weights = log_weights.exp()
    standard_error = float(weights.std()) / math.sqrt(len(weights))
    assert standard_error < 0.03
    assert abs(float(weights.mean()) - 1) < 4 * standard_error


# More dimensions need a milder flow: the weights' variance grows exponentially with both.
normalised = pytest.mark.parametrize(
    ("options", "scale"), [(GLOWS["one-level"], 0.2), (GLOWS["two-levels"], 0.03)], ids=[4, 16]
)


@normalised
@torch.no_grad()
def test_density_integrates_to_one(options: dict[str, Any], scale: float) -> None:
    flow = perturbed(Glow(**options), scale)
    perturbed(flow.priors, 0.05)
    x = 1.5 * images(flow, n=30_000)
    assert_mean_one(flow.log_prob(x) - Normal(0.0, 1.5).log_prob(x).sum((1, 2, 3)))


@normalised
@torch.no_grad()
def test_samples_have_the_density(options: dict[str, Any], scale: float) -> None:
    flow = perturbed(Glow(**options), scale)
    perturbed(flow.priors, 0.05)
    x = flow.sample(30_000, generator=seeded())
    assert_mean_one(Normal(0.0, 0.8).log_prob(x).sum((1, 2, 3)) - flow.log_prob(x))


@dtypes
def test_odd_inputs_do_not_overflow(dtype: torch.dtype) -> None:
    flow = perturbed(Glow(channels=1, size=8)).to(dtype)
    x = (1e3 * images(flow, dtype=dtype)).requires_grad_()
    log_prob = flow.log_prob(x)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@glows
def test_score_of_a_sample_is_independent_of_its_batch(options: dict[str, Any]) -> None:
    flow = perturbed(Glow(**options))
    x = images(flow)
    alone = torch.cat([flow.log_prob(sample[None]) for sample in x])
    torch.testing.assert_close(flow.log_prob(x), alone)
    assert alone.detach().std() > 0.1


def test_per_sample_gradients_by_vmap_equal_a_loop_and_leave_no_trace() -> None:
    flow = Glow(**GLOWS["two-levels"]).double().eval()
    before = copy.deepcopy(flow)
    x = images(flow)
    parameters = dict(flow.named_parameters())

    def log_prob(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(flow, parameters, (sample[None],)).squeeze(0)

    per_sample = vmap(grad(log_prob), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        one = torch.autograd.grad(flow.log_prob(sample[None]).sum(), list(parameters.values()))
        for (name, got), expected in zip(per_sample.items(), one, strict=True):
            torch.testing.assert_close(got[index], expected, msg=lambda m, n=name: f"{n}: {m}")
    assert same_state(flow, before)
    assert not any(initialised(flow))


def test_every_parameter_gets_the_gradient_of_finite_differences() -> None:
    flow = perturbed(Glow(**GLOWS["three-levels"]), 0.1)
    x = images(flow)
    flow.log_prob(x).sum().backward()
    step = 1e-6
    for name, parameter in flow.named_parameters():
        direction = randn(*parameter.shape)
        with torch.no_grad():
            parameter.add_(step * direction)
            above = flow.log_prob(x).sum()
            parameter.sub_(2 * step * direction)
            below = flow.log_prob(x).sum()
            parameter.add_(step * direction)
        assert parameter.grad is not None, name
        got, expected = (parameter.grad * direction).sum(), (above - below) / (2 * step)
        assert expected.abs() > 1e-4, name
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_inputs_are_not_changed() -> None:
    flow = Glow(**GLOWS["two-levels"]).double()
    x = images(flow)
    before = x.clone()
    flow.decode(flow.encode(x))
    assert torch.equal(x, before)


def test_first_training_batch_initialises_every_actnorm() -> None:
    flow = Glow(**GLOWS["two-levels"]).double()
    flow.eval()(images(flow))
    assert initialised(flow) == [False] * 4
    flow.train()(5 + images(flow, n=8))
    assert initialised(flow) == [True] * 4


def test_state_dict_round_trip() -> None:
    flow = Glow(**GLOWS["two-levels"], seed=0).double()
    x = 5 + images(flow, n=8)
    flow(x)
    loaded = Glow(**GLOWS["two-levels"], seed=1).double()
    loaded.load_state_dict(flow.state_dict())
    assert torch.equal(loaded.train()(x), flow(x))
    assert same_state(loaded, flow)


def test_training_raises_the_likelihood() -> None:
    flow = Glow(channels=1, size=8, steps=2, hidden=16)
    noise = randn(128, 1, 8, 8, dtype=torch.float32)
    x = noise.cumsum(-1) + noise.sum((1, 2, 3), keepdim=True).tanh()
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    history = []
    for _ in range(30):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(-loss.item())
    assert history[-1] > history[0] + 10


@glows
def test_sample_is_determined_by_its_generator(options: dict[str, Any]) -> None:
    flow = perturbed(Glow(**options))
    first = flow.sample(5, generator=seeded())
    assert first.shape == (5, *flow.shape)
    assert first.dtype == torch.float64
    assert not first.requires_grad
    assert torch.equal(first, flow.sample(5, generator=seeded()))
    assert not torch.equal(first, flow.sample(5, generator=seeded(1)))


def test_sample_without_a_generator_follows_the_global_one() -> None:
    flow = perturbed(Glow(**GLOWS["two-levels"]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = flow.sample(2), flow.sample(2)
        torch.manual_seed(0)
        assert torch.equal(first, flow.sample(2))
    assert not torch.equal(first, second)


def test_temperature_scales_the_latents() -> None:
    flow = perturbed(Glow(**GLOWS["two-levels"]))
    top = flow.encode(flow.sample(3, generator=seeded()))[-1]
    cool = flow.encode(flow.sample(3, generator=seeded(), temperature=0.5))[-1]
    torch.testing.assert_close(cool, 0.5 * top)
    cold = flow.sample(3, generator=seeded(), temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))


def test_same_seed_same_model() -> None:
    options = GLOWS["two-levels"]
    assert same_state(Glow(**options, seed=3), Glow(**options, seed=3))
    assert not same_state(Glow(**options, seed=3), Glow(**options, seed=4))


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    flow = Glow(**GLOWS["two-levels"]).double()
    flow.log_prob(images(flow)).sum().backward()
    flow.decode(flow.encode(images(flow)))
    flow.sample(2, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


# Errors


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"shape \(B, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 4), r"shape \(B, 1, 8, 8\), got \(2, 1, 8, 4\)"),
        (torch.zeros(1, 8, 8), r"shape \(B, 1, 8, 8\), got \(1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"floating-point dtype, got torch.uint8"),
    ],
    ids=["channels", "size", "no-batch", "dtype"],
)
@pytest.mark.parametrize("method", ["log_prob", "log_prob_terms", "encode"])
def test_wrong_images_are_refused(x: Tensor, message: str, method: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(Glow(channels=1, size=8), method)(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 6}, r"divisible by 2\*\*levels = 4, got 6x6"),
        ({"size": (8, 10)}, r"divisible by 2\*\*levels = 4, got 8x10"),
        ({"size": 8, "levels": 4}, r"divisible by 2\*\*levels = 16, got 8x8"),
        ({"size": 2}, r"divisible by 2\*\*levels = 4, got 2x2"),
        ({"size": 8, "levels": 0}, r"levels of at least 1, got 0"),
        ({"size": 8, "steps": 0}, r"steps of at least 1, got 0"),
        ({"size": 8, "hidden": 0}, r"hidden of at least 1, got 0"),
        ({"size": 8, "channels": 0}, r"channels of at least 1, got 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Glow(**{"channels": 1, **options})


def test_coupling_of_one_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="channels of at least 2, got 1"):
        AffineCoupling(1, 5, generator=seeded())


@pytest.mark.parametrize("shapes", [[(2, 4, 4)], [(2, 4, 4), (4, 2, 2)], []])
def test_wrong_latents_are_refused(shapes: list[tuple[int, int, int]]) -> None:
    flow = Glow(channels=1, size=8)
    with pytest.raises(ValueError, match=r"\[\(2, 4, 4\), \(8, 2, 2\)\], got \["):
        flow.decode([torch.zeros(1, *shape) for shape in shapes])
