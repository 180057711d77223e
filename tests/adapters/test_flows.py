"""Flows of other libraries: their terms, that densities are densities, and what stays invariant."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import normflows
import numpy as np
import pytest
import torch
import zuko
from support.foreign_cases import normflows_glow, normflows_real_nvp
from support.model_case import Function, perturbed
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import checked_terms
from ood_monitor.densities.baselines import Typicality

Terms = dict[str, Tensor]


def terms_of(adapter: om.Adapter, batch: Any) -> Terms:
    return {term: value.detach() for term, value in checked_terms(adapter, batch)}


def total(adapter: om.Adapter, batch: Any) -> Tensor:
    return torch.stack([*terms_of(adapter, batch).values()]).sum(0)


def off_initial(module: nn.Module) -> nn.Module:
    perturbed(module)
    return module.double().eval()


def zuko_flow(name: str = "NSF", features: int = 2, **options: Any) -> nn.Module:
    make = getattr(zuko.flows, name)
    return off_initial(make(features=features, transforms=2, hidden_features=(8,), **options))


# Terms


def test_terms_of_a_multiscale_flow_are_its_levels_and_add_up() -> None:
    adapter, (x, y) = normflows_glow()
    found = terms_of(adapter, (x, y))
    assert list(found) == ["latent_1", "latent_2", "log_det"]
    with torch.no_grad():
        expected = adapter.module.log_prob(x, y)  # type: ignore[operator]
        z, log_det = adapter.module.inverse_and_log_det(x)  # type: ignore[operator]
        top = adapter.module.q0[0].log_prob(z[0], y)  # type: ignore[index, union-attr]
    torch.testing.assert_close(sum(found.values()), expected)
    torch.testing.assert_close(found["latent_2"], top)
    torch.testing.assert_close(found["log_det"], log_det)


def test_a_multiscale_flow_may_have_no_classes() -> None:
    priors = [normflows.distributions.DiagGaussian(s) for s in ((8, 2, 2), (2, 4, 4))]
    flows = [[normflows.flows.Squeeze()], [normflows.flows.Squeeze()]]
    net = normflows.MultiscaleFlow(priors, flows, [normflows.flows.Merge()], class_cond=False)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(total(om.LogLikelihood(net), x), net.log_prob(x, None).detach())


def test_terms_of_a_normalizing_flow() -> None:
    adapter, x = normflows_real_nvp()
    found = terms_of(adapter, x)
    assert list(found) == ["latent", "log_det"]
    with torch.no_grad():
        expected = adapter.module.log_prob(x)  # type: ignore[operator]
    torch.testing.assert_close(sum(found.values()), expected)


@pytest.mark.parametrize("name", ["NSF", "MAF", "NICE", "NCSF", "SOSPF", "BPF", "GF"])
@pytest.mark.parametrize("context", [0, 3])
def test_terms_of_a_zuko_flow(name: str, context: int) -> None:
    flow = getattr(zuko.flows, name)(features=2, context=context, transforms=2)
    x, c = torch.rand(5, 2), torch.randn(5, context) if context else None
    adapter = om.LogLikelihood(flow, condition=lambda batch: {"c": c})
    found = terms_of(adapter, x)
    assert list(found) == ["latent", "log_det"]
    torch.testing.assert_close(sum(found.values()), flow(c).log_prob(x).detach())


@pytest.mark.parametrize("several", [False, True])
def test_terms_of_latents_and_log_det(several: bool) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Any, Tensor]:
        z = m.scale.exp() * x
        return (z[:, :1], z[:, 1:]) if several else z, m.scale.sum().expand(len(x))

    net, x = Function(forward, scale=torch.tensor([0.3, -0.2, 0.1])), torch.randn(4, 3)
    found = terms_of(om.LogLikelihood(net, om.latents_and_log_det), x)
    assert list(found) == (["latent_1", "latent_2"] if several else ["latent"]) + ["log_det"]
    expected = torch.distributions.Normal(0.0, (-net.scale).exp()).log_prob(x).sum(1)  # type: ignore[operator]
    torch.testing.assert_close(sum(found.values()), expected.detach())


def test_what_gives_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(z, log-determinant\), got a tensor of shape \(4, 2\)"):
        terms_of(om.LogLikelihood(nn.Linear(3, 2), om.latents_and_log_det), torch.randn(4, 3))


# Densities


def flow_1() -> om.models.Glow:
    """Of one level and step on 1 x 2 x 2 images."""
    flow = om.models.Glow(channels=1, size=2, levels=1, steps=2, hidden=4)
    off_initial(flow)
    return flow


DENSITIES: dict[str, tuple[Callable[[], om.Adapter], tuple[int, ...], int]] = {
    "zuko NSF": (lambda: om.LogLikelihood(zuko_flow()), (2,), 401),
    "zuko MAF": (lambda: om.LogLikelihood(zuko_flow("MAF")), (2,), 401),
    "RealNVP": (lambda: om.LogLikelihood(off_initial(normflows_real_nvp()[0].module)), (2,), 401),
    "Glow": (lambda: om.LogLikelihood(flow_1()), (1, 2, 2), 27),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_density_integrates_to_one(name: str) -> None:
    make, shape, points = DENSITIES[name]
    line = torch.linspace(-9, 9, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * math.prod(shape)).reshape(-1, *shape)
    adapter = make()
    with torch.no_grad():
        mass = sum(total(adapter, part).exp().sum() for part in grid.split(2**17))
    assert float(mass) * float(line[1] - line[0]) ** math.prod(shape) == pytest.approx(1, abs=5e-3)


SAMPLED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, int], Tensor]]] = {
    "zuko": (zuko_flow, lambda flow, n: flow().sample((n,))),
    "Glow": (flow_1, lambda flow, n: flow.sample(n)),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_gradient_is_zero_on_average_over_the_models_samples(name: str) -> None:
    make, sample = SAMPLED[name]
    flow, n = make(), 400
    x, gradients = sample(flow, n).detach(), []
    parameters = list(flow.parameters())
    for one in x:
        [value] = [sum(v for _, v in checked_terms(om.LogLikelihood(flow), one[None]))]
        found = torch.autograd.grad(torch.as_tensor(value).sum(), parameters, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    table = torch.stack(gradients)
    moves = table.std(0) > 1e-9
    t = table.mean(0)[moves] / (table.std(0)[moves] / math.sqrt(n))
    assert moves.sum() > 50
    assert t.abs().max() < 4.5


# The paper's invariance


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """On the sector where red > green > blue: hue in (0, 1/6)."""
    h, s, v = hsv.unbind(-1)
    blue = v * (1 - s)
    return torch.stack([v, blue + 6 * h * (v - blue), blue], -1)


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    red, green, blue = rgb.unbind(-1)
    return torch.stack([(green - blue) / (red - blue) / 6, 1 - blue / red, red], -1)


def hsv_log_det(hsv: Tensor) -> Tensor:
    """log |det d rgb / d hsv|, shape (B,)."""
    jacobian = torch.func.vmap(torch.func.jacrev(hsv_to_rgb))(hsv)
    return torch.linalg.slogdet(jacobian).logabsdet


MATRIX = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.5, -1.0], [0.3, 0.0, 0.7]], dtype=torch.float64)

#: A fixed map of the data y = T(x), its inverse, and log |det dx/dy| of it.
MAPS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "affine": (
        lambda x: x @ MATRIX + 3,
        lambda y: (y - 3) @ torch.linalg.inv(MATRIX),
        lambda y: -torch.linalg.slogdet(MATRIX).logabsdet.expand(len(y)),
    ),
    "permutation": (
        lambda x: x[:, [2, 0, 1]],
        lambda y: y[:, [1, 2, 0]],
        lambda y: torch.zeros(len(y)).double(),
    ),
    "logit": (
        torch.logit,
        torch.sigmoid,
        lambda y: torch.sigmoid(y).mul(1 - y.sigmoid()).log().sum(1),
    ),
    "rgb to hsv": (rgb_to_hsv, hsv_to_rgb, hsv_log_det),
}


def pixels(n: int, seed: int) -> Tensor:
    """Colours with red > green > blue, off the ends."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.02 + 0.96 * torch.rand(n, 3, generator=generator, dtype=torch.float64)
    return x.sort(1, descending=True).values


@pytest.mark.parametrize("name", MAPS)
def test_scores_of_a_fixed_map_of_the_data_are_the_same_and_its_likelihood_is_not(
    name: str,
) -> None:
    forward, inverse, log_det = MAPS[name]
    flow = zuko_flow(features=3)
    plain = om.LogLikelihood(flow, lambda flow, x: flow().log_prob(x))
    mapped = om.LogLikelihood(flow, lambda flow, y: flow().log_prob(inverse(y)) + log_det(y))
    held_out, x = pixels(120, 0), pixels(20, 1)
    torch.testing.assert_close(inverse(forward(x)), x)
    a, b = om.gradient_norms(plain, x), om.gradient_norms(mapped, forward(x))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    detectors = [
        om.Detector(adapter).fit([batch], progress=False)
        for adapter, batch in ((plain, held_out), (mapped, forward(held_out)))
    ]
    one, two = detectors[0].score(x), detectors[1].score(forward(x))
    torch.testing.assert_close(one.score, two.score, rtol=1e-6, atol=1e-8)
    assert torch.equal(one.p_value, two.p_value)
    differs = name != "permutation"  # which has no volume
    assert bool(((one.log_likelihood - two.log_likelihood).abs() > 0.01).any()) == differs
    typical = [
        Typicality().fit(d.fitted.log_likelihood).score(s.log_likelihood.numpy())
        for d, s in zip(detectors, (one, two), strict=True)
    ]
    order = [np.argsort(values).tolist() for values in typical]
    assert (order[0] != order[1]) == (name in ("logit", "rgb to hsv"))


def test_a_dummy_is_read_like_the_library_that_it_imitates() -> None:
    class Dummy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform, self.base = nn.Identity(), nn.Identity()

        def forward(self, c: Tensor | None) -> Any:
            normal = torch.distributions.Normal(0.0, 1.0)
            base = SimpleNamespace(log_prob=lambda z: normal.log_prob(z).sum(1))
            transform = SimpleNamespace(call_and_ladj=lambda x: (2 * x, torch.full_like(x, 0.5)))
            return SimpleNamespace(base=base, transform=transform)

    found = terms_of(om.LogLikelihood(Dummy()), torch.zeros(4, 3))
    torch.testing.assert_close(found["log_det"], torch.full((4,), 1.5))
