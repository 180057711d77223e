"""What models of other libraries say of themselves is read, or asked for by name.

Each stands in for a library's own: the names of its attributes and arguments are that library's.
"""

from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.model_case import Function
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor import NoiseSchedule
from ood_monitor.adapters.base import checked_terms

PRODUCTS = torch.linspace(0.99, 0.01, 20, dtype=torch.float64)
LEVEL = 9


def images(n: int = 3) -> Tensor:
    """In [0, 1], float64."""
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def terms(adapter: om.Adapter, batch: Tensor) -> dict[str, Tensor]:
    return {term: value.detach() for term, value in checked_terms(adapter, batch)}


class Unet(nn.Module):
    """Of pixels and a time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.conv(x) + time.double()[:, None, None, None] / 10


class GaussianDiffusion(nn.Module):
    """As lucidrains': a loss of images in [0, 1], which it maps to [-1, 1] itself."""

    def __init__(self, objective: str, auto_normalize: bool = True) -> None:
        super().__init__()
        self.model, self.objective = Unet(), objective
        self.register_buffer("alphas_cumprod", PRODUCTS.clone())
        self.normalize = (lambda img: img * 2 - 1) if auto_normalize else (lambda img: img)

    def loss(self, img: Tensor, noise: Tensor) -> Tensor:
        """Of one image at one level, as its `p_losses` has it."""
        x, product = self.normalize(img), PRODUCTS[LEVEL]
        alpha, sigma = product.sqrt(), (1 - product).sqrt()
        output = self.model(alpha * x + sigma * noise, torch.tensor([LEVEL]))
        targets = {"pred_noise": noise, "pred_x0": x, "pred_v": alpha * noise - sigma * x}
        return (output - targets[self.objective]).square().mean()

    def forward(self, img: Tensor, *args: Any) -> Tensor:
        return self.loss(img, torch.randn_like(img))


def noise_at(level: int, steps: int, shape: tuple[int, ...] = (1, 4, 4)) -> Tensor:
    """The bound's noise of seed 0."""
    del steps
    return torch.randn(shape, generator=torch.Generator().manual_seed(level)).double()


# What a schedule says


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("auto_normalize", [True, False])
def test_a_gaussian_diffusion_is_scored_by_its_own_loss(
    objective: str, auto_normalize: bool
) -> None:
    diffusion = GaussianDiffusion(objective, auto_normalize)
    adapter = om.DenoisingBound(diffusion.model, diffusion, levels=[LEVEL])
    noise = noise_at(LEVEL, 20)
    own = torch.stack([diffusion.loss(one[None], noise[None]) for one in images()])
    expected = -0.5 * 16 * own.detach()
    torch.testing.assert_close(terms(adapter, images())[f"t={LEVEL}"], expected)
    both = adapter.with_levels([LEVEL, 3]).one_pass(images())
    assert both is not None
    torch.testing.assert_close(both.values(both.batch)[:3].detach(), expected)


class Kind(Enum):
    V = "v_prediction"


#: A schedule of a library, by what it says, and the prediction that it means.
STATEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "diffusers": ({"config": {"prediction_type": "sample"}}, "sample"),
    "MONAI": ({"prediction_type": Kind.V}, "v_prediction"),
    "lucidrains": ({"objective": "pred_x0"}, "sample"),
    "lucidrains' simple diffusion": ({"pred_objective": "v"}, "v_prediction"),
    "CompVis, eps": ({"parameterization": "eps"}, "epsilon"),
    "CompVis, x0": ({"parameterization": "x0"}, "sample"),
    "CompVis, v": ({"parameterization": "v"}, "v_prediction"),
}


@pytest.mark.parametrize(("said", "meant"), STATEMENTS.values(), ids=STATEMENTS)
def test_a_schedule_is_taken_at_its_word(said: dict[str, Any], meant: str) -> None:
    network, schedule = Unet(), SimpleNamespace(alphas_cumprod=PRODUCTS, **said)
    found = terms(om.DenoisingBound(network, schedule, levels=[LEVEL]), images())
    plain = om.DenoisingBound(network, PRODUCTS, levels=[LEVEL], prediction_type=meant)
    torch.testing.assert_close(found, terms(plain, images()), rtol=0, atol=0)


def test_a_schedule_that_does_not_say_is_settled_by_the_argument() -> None:
    network, schedule = Unet(), SimpleNamespace(alphas_cumprod=PRODUCTS)
    with pytest.raises(ValueError, match=r"SimpleNamespace to say.*pass `prediction_type=`"):
        om.DenoisingBound(network, schedule, levels=[LEVEL])
    assert om.DenoisingBound(network, schedule, levels=[LEVEL], prediction_type="sample")


@pytest.mark.parametrize("said", [{"objective": "pred_score"}, {"parameterization": "mu"}])
def test_a_word_that_is_not_known_is_settled_by_the_argument(said: dict[str, str]) -> None:
    schedule = SimpleNamespace(alphas_cumprod=PRODUCTS, **said)
    with pytest.raises(ValueError, match=r"got '(pred_score|mu)': pass `prediction_type=`"):
        om.DenoisingBound(Unet(), schedule, levels=[LEVEL])
    assert om.DenoisingBound(Unet(), schedule, levels=[LEVEL], prediction_type="epsilon")


def test_images_that_were_normalised_before_are_refused() -> None:
    diffusion = GaussianDiffusion("pred_v")
    adapter = om.DenoisingBound(diffusion.model, diffusion, levels=[LEVEL])
    with pytest.raises(ValueError, match=r"values in \[0, 1\].*pass its `alphas_cumprod`"):
        terms(adapter, 2 * images() - 1)


def test_a_diffusion_whose_forward_is_a_loss_is_no_network() -> None:
    diffusion = GaussianDiffusion("pred_v")
    with pytest.raises(ValueError, match=r"got GaussianDiffusion for both.*such as `\.model`"):
        om.DenoisingBound(diffusion, diffusion, levels=[LEVEL])
    adapter = om.DenoisingBound(diffusion, PRODUCTS, levels=[LEVEL])
    with pytest.raises(ValueError, match=r"got a tensor of shape \(\).*such as `\.model`"):
        terms(adapter, images())


# Flow matching


class TimeFirst(Unet):
    """As torchcfm's: network(t, x)."""

    def forward(self, t: Tensor, x: Tensor, y: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, t)


class TimeSecond(Unet):
    """As Meta's: network(x, t)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t)


@pytest.mark.parametrize("order", [TimeFirst, TimeSecond])
def test_a_network_of_torchcfm_or_meta_is_scored_by_its_own_loss(order: type[Unet]) -> None:
    """x_t = t x_1 + (1 - t) x_0 of noise x_0 and data x_1, the target x_1 - x_0."""
    network, x, noise = order(), images(), noise_at(4, 10)
    schedule = NoiseSchedule.flow(10, convention="data_minus_noise")
    found = terms(om.DenoisingBound(network, schedule, levels=[4]), x)["t=4"]
    t = torch.tensor([0.5], dtype=torch.float64)
    for sample, value in zip(x, found, strict=True):
        x_t = t * sample[None] + (1 - t) * noise[None]
        given = (t, x_t) if order is TimeFirst else (x_t, t)
        error = network(*given) - (sample - noise)
        torch.testing.assert_close(value, -0.5 * error.square().sum().detach())


@pytest.mark.parametrize("name", ["t", "time", "timestep", "timesteps"])
def test_the_order_of_arguments_is_read_from_their_names(name: str) -> None:
    unet, expected = Unet(), om.DenoisingBound(Unet(), PRODUCTS, levels=[LEVEL])
    expected.module.load_state_dict(unet.state_dict())
    named = {"unet": unet}
    exec(f"def first({name}, x): return unet.forward(x, {name})", named)
    exec(f"def second(x, {name}): return unet.forward(x, {name})", named)
    for forward in ("first", "second"):
        module = nn.Sequential(unet)
        module.forward = named[forward]  # type: ignore[assignment]
        found = terms(om.DenoisingBound(module, PRODUCTS, levels=[LEVEL]), images())
        torch.testing.assert_close(found, terms(expected, images()), rtol=0, atol=0)


@pytest.mark.parametrize("convention", [None, "torchcfm"])
def test_flow_matching_needs_a_convention(convention: Any) -> None:
    told = r"'noise_minus_data'.*or 'data_minus_noise'.*got (None|'torchcfm')"
    with pytest.raises(ValueError, match=told):
        NoiseSchedule.flow(10, convention=convention)


def test_what_makes_a_path_is_refused_with_the_schedule_to_give() -> None:
    """torchcfm's `ConditionalFlowMatcher` and Meta's `CondOTScheduler` are no such schedules."""
    matcher = SimpleNamespace(sigma=0.0, compute_mu_t=lambda x0, x1, t: t * x1 + (1 - t) * x0)
    with pytest.raises(ValueError, match=r"NoiseSchedule\.flow\(convention='data_minus_noise'\)"):
        om.DenoisingBound(TimeFirst(), matcher)


def test_a_time_of_a_table_is_looked_up_by_whole_numbers() -> None:
    told: list[Tensor] = []
    table, unet = torch.linspace(5, 0.1, 20), Unet()
    unet.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    adapter = om.DenoisingBound(unet, PRODUCTS, levels=[LEVEL], time=lambda t: table[t])
    terms(adapter, images())
    assert torch.equal(told[0], table[LEVEL].double().expand(3))


# Log-determinants


def scaled(log_det: Callable[[Tensor, Tensor], Any]) -> om.Adapter:
    """z = exp(s) x, and a log-determinant of the log-scale s and of x in some shape."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.scale.exp() * x, log_det(m.scale, x)

    scale = torch.tensor([[[0.3]], [[-0.2]]], dtype=torch.float64)
    return om.LogLikelihood(Function(forward, scale=scale), om.latents_and_log_det)


#: (B, 2, 4, 4), of as many samples as an image is wide: what a sum over them would broadcast.
SQUARE = torch.randn(4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

#: Shapes of log-determinants that are one number a sample.
OF_SAMPLES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "(B,)": lambda scale, x: 16 * scale.sum().expand(len(x)),
    "(B, 1)": lambda scale, x: 16 * scale.sum().expand(len(x), 1),
    "a number": lambda scale, x: 16 * scale.sum().item(),
}

#: Others.
OF_OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "(B, H, W)": lambda scale, x: scale.sum().expand(len(x), 4, 4),
    "(B, H, W), a part of samples added": lambda scale, x: (
        scale.sum().expand(len(x)) + scale.sum().expand(len(x), 4, 4)
    ),
    "(B, C, H, W)": lambda scale, x: scale.expand(len(x), 2, 4, 4),
    "(1,)": lambda scale, x: scale.sum()[None],
    "()": lambda scale, x: scale.sum(),
    "nothing": lambda scale, x: None,
}


@pytest.mark.parametrize("log_det", OF_SAMPLES.values(), ids=OF_SAMPLES)
def test_one_log_determinant_a_sample_is_taken(log_det: Callable[..., Any]) -> None:
    found = terms(scaled(log_det), SQUARE)
    torch.testing.assert_close(found["log_det"], torch.full((4,), 1.6, dtype=torch.float64))


@pytest.mark.parametrize("log_det", OF_OTHERS.values(), ids=OF_OTHERS)
@pytest.mark.parametrize("samples", [1, 4])
def test_another_log_determinant_is_refused(samples: int, log_det: Callable[..., Any]) -> None:
    adapter, x = scaled(log_det), SQUARE[:samples]
    if samples == 1 and log_det is OF_OTHERS["(1,)"]:
        assert terms(adapter, x)["log_det"].shape == (1,), "of one sample it is one a sample"
        return
    with pytest.raises(ValueError, match=rf"shape \({samples},\), one a sample.*give a function"):
        terms(adapter, x)


@pytest.mark.parametrize(
    "latents",
    [
        lambda x: x[:, :1],
        lambda x: (x, x),
        lambda x: x[:2],
        lambda x: {"z": x},
    ],
    ids=["fewer dimensions", "twice", "fewer samples", "a mapping"],
)
def test_latents_of_another_size_are_refused(latents: Callable[[Tensor], Any]) -> None:
    net = Function(lambda m, x: (latents(m.gain * x), m.gain.expand(len(x))), gain=torch.ones(()))
    with pytest.raises(ValueError, match=r"latents of 32 elements a sample.*give a function"):
        terms(om.LogLikelihood(net, om.latents_and_log_det), SQUARE)


def test_latents_of_one_number_a_sample_have_a_density() -> None:
    net = Function(lambda m, x: (m.gain * x[:, 0], 0), gain=torch.ones(()))
    found = terms(om.LogLikelihood(net, om.latents_and_log_det), torch.zeros(5, 1))
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(5))
    torch.testing.assert_close(found["latent"], normal)
