"""Normalizing flows: sbi, nflows, zuko, normflows, FrEIA, glasflow, pyro."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.foreign.case import Case, Density, Foreign

__all__ = ["CASES"]

#: Dimensions of x, and of what it is given.
D, C = 6, 4


def given(batch: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, D), "c": torch.randn(batch, C)}


def sbi(batch: int, *, builder: str, **options: Any) -> Case:
    """A density estimator as `posterior_nn` builds it, of parameters given a simulation."""
    from sbi.neural_nets import net_builders

    data = given(200)
    net = getattr(net_builders, builder)(data["x"], data["c"], **options)
    return Density(net, lambda net, b: net.log_prob(b["x"].unsqueeze(0), b["c"])[0]), given(batch)


# nflows


def nflow(batch: int, *, layer: Callable[[int], list[nn.Module]], layers: int = 5) -> Case:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    parts = [part for i in range(layers) for part in layer(i)]
    net = Flow(CompositeTransform(parts), StandardNormal([D]))
    return om.LogLikelihood(net, sample="row"), torch.randn(batch, D)


def residual_net(inputs: int, outputs: int) -> nn.Module:
    from nflows.nn.nets import ResidualNet

    net: nn.Module = ResidualNet(inputs, outputs, hidden_features=50, num_blocks=2)
    return net


def nsf_and_batch_norm(index: int) -> list[nn.Module]:
    from nflows import transforms
    from nflows.utils import create_alternating_binary_mask

    coupling = transforms.PiecewiseRationalQuadraticCouplingTransform(
        create_alternating_binary_mask(D, even=index % 2 == 0),
        residual_net,
        num_bins=8,
        tails="linear",
        tail_bound=3.0,
    )
    return [coupling, transforms.BatchNorm(D)]


def autoregressive_nsf(index: int) -> list[nn.Module]:
    from nflows import transforms

    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        D, 50, num_bins=8, tails="linear", tail_bound=3.0, num_blocks=2
    )
    return [spline, transforms.ReversePermutation(D)]


def maf_and_lu(index: int) -> list[nn.Module]:
    from nflows import transforms

    return [transforms.MaskedAffineAutoregressiveTransform(D, 50), transforms.LULinear(D)]


def nflows_real_nvp(batch: int) -> Case:
    from nflows.flows import SimpleRealNVP

    net = SimpleRealNVP(D, 50, num_layers=5, num_blocks_per_layer=2)
    return om.LogLikelihood(net, sample="row"), torch.randn(batch, D)


# zuko


def zuko(batch: int, *, kind: str, hidden: int = 64, **options: Any) -> Case:
    import zuko as package

    net = getattr(package.flows, kind)(D, context=C, hidden_features=(hidden, hidden), **options)
    adapter = om.LogLikelihood(
        net, inputs=lambda b: b["x"], condition=lambda b: {"c": b["c"]}, sample="row"
    )
    return adapter, given(batch)


# normflows


def normflow(batch: int, *, layer: Callable[[], list[nn.Module]], layers: int = 6) -> Case:
    import normflows as nf

    parts = [part for _ in range(layers) for part in layer()]
    net = nf.NormalizingFlow(nf.distributions.DiagGaussian(D, trainable=False), parts)
    return om.LogLikelihood(net, sample="row"), torch.randn(batch, D)


def coupled_spline() -> list[nn.Module]:
    import normflows as nf

    spline = nf.flows.CoupledRationalQuadraticSpline(D, 2, 32)
    return [spline, nf.flows.LULinearPermute(D)]


def autoregressive_spline() -> list[nn.Module]:
    import normflows as nf

    spline = nf.flows.AutoregressiveRationalQuadraticSpline(D, 2, 32)
    return [spline, nf.flows.LULinearPermute(D)]


def affine_coupling() -> list[nn.Module]:
    import normflows as nf

    network = nf.nets.MLP([D // 2, 64, 64, D], init_zeros=True)
    return [nf.flows.AffineCouplingBlock(network), nf.flows.Permute(D, mode="swap")]


# FrEIA


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


def freia(batch: int, *, block: str, **options: Any) -> Case:
    from FrEIA import framework, modules

    net = framework.SequenceINN(D)
    for _ in range(8):
        net.append(getattr(modules, block), subnet_constructor=subnet, **options)
    return om.LogLikelihood(net, om.latents_and_log_det, sample="row"), torch.randn(batch, D)


def freia_graph(batch: int) -> Case:
    """A graph of nodes with a condition, as its documentation builds them."""
    from FrEIA import framework, modules

    nodes = [framework.InputNode(D, name="x")]
    condition = framework.ConditionNode(C, name="c")
    for i in range(4):
        coupling = framework.Node(
            nodes[-1],
            modules.GLOWCouplingBlock,
            {"subnet_constructor": subnet, "clamp": 2.0},
            conditions=condition,
        )
        shuffled = framework.Node(coupling, modules.PermuteRandom, {"seed": i})
        nodes += [coupling, shuffled]
    nodes.append(framework.OutputNode(nodes[-1], name="z"))
    net = framework.GraphINN([*nodes, condition])

    def log_prob(net: Any, b: dict[str, Tensor]) -> Tensor:
        z, log_det = net(b["x"], c=[b["c"]])
        return -0.5 * z.square().sum(1) + log_det

    return Density(net, log_prob), given(batch)


# glasflow


def glasflow(batch: int, *, kind: str, **options: Any) -> Case:
    from glasflow import flows

    net = getattr(flows, kind)(D, 4, n_conditional_inputs=C, n_neurons=32, **options)
    return Density(net, lambda net, b: net.log_prob(b["x"], conditional=b["c"])), given(batch)


# pyro


class Pyro(nn.Module):
    """A flow of its transforms, which keep what they computed last until they are cleared."""

    def __init__(self, transforms: list[nn.Module], inverse: bool) -> None:
        super().__init__()
        self.transforms, self._inverse = nn.ModuleList(transforms), inverse

    def log_prob(self, x: Tensor) -> Tensor:
        from pyro import distributions

        base = distributions.Normal(torch.zeros_like(x[0]), torch.ones_like(x[0])).to_event(1)
        transforms = [t.inv if self._inverse else t for t in self.transforms]
        flow = distributions.TransformedDistribution(base, transforms)
        found: Tensor = flow.log_prob(x)
        flow.clear_cache()
        return found


def pyro(
    batch: int, *, transform: str, layers: int = 4, inverse: bool = False, **options: Any
) -> Case:
    """Inverse where the density would else take a pass for each dimension, or not be there."""
    from pyro.distributions import transforms

    net = Pyro([getattr(transforms, transform)(D, **options) for _ in range(layers)], inverse)
    return om.LogLikelihood(net, sample="row"), torch.randn(batch, D)


SPLINES = {"num_bins": 8, "tail_type": "linear", "tail_bound": 3.0}

CASES: tuple[Foreign, ...] = (
    Foreign("sbi NSF", "sbi", partial(sbi, builder="build_nsf"), target=4),
    Foreign("sbi NSF, B = 128", "sbi", partial(sbi, builder="build_nsf"), batch=128),
    Foreign("sbi MAF", "sbi", partial(sbi, builder="build_maf")),
    Foreign("sbi MAF with splines", "sbi", partial(sbi, builder="build_maf_rqs")),
    Foreign("sbi mixture density network", "sbi", partial(sbi, builder="build_mdn")),
    Foreign("sbi NSF of zuko", "sbi", partial(sbi, builder="build_zuko_nsf"), target=4),
    Foreign("nflows NSF + BN", "nflows", partial(nflow, layer=nsf_and_batch_norm), target=4),
    Foreign("nflows autoregressive NSF", "nflows", partial(nflow, layer=autoregressive_nsf)),
    Foreign("nflows MAF + LU", "nflows", partial(nflow, layer=maf_and_lu), target=4),
    Foreign("nflows RealNVP", "nflows", nflows_real_nvp),
    Foreign("zuko NSF", "zuko", partial(zuko, kind="NSF"), target=4),
    Foreign("zuko MAF", "zuko", partial(zuko, kind="MAF")),
    Foreign("zuko BPF", "zuko", partial(zuko, kind="BPF")),
    Foreign("zuko SOSPF", "zuko", partial(zuko, kind="SOSPF")),
    Foreign("zuko NAF", "zuko", partial(zuko, kind="NAF", hidden=32)),
    Foreign(
        "normflows coupled spline", "normflows", partial(normflow, layer=coupled_spline), target=5
    ),
    Foreign(
        "normflows autoregressive spline",
        "normflows",
        partial(normflow, layer=autoregressive_spline),
    ),
    Foreign("normflows RealNVP", "normflows", partial(normflow, layer=affine_coupling)),
    Foreign("FrEIA AllInOne", "FrEIA", partial(freia, block="AllInOneBlock"), target=4),
    Foreign(
        "FrEIA AllInOne, Householder",
        "FrEIA",
        partial(freia, block="AllInOneBlock", learned_householder_permutation=3),
    ),
    Foreign("FrEIA RNVP", "FrEIA", partial(freia, block="RNVPCouplingBlock")),
    Foreign("FrEIA conditional Glow", "FrEIA", freia_graph),
    Foreign(
        "glasflow RealNVP",
        "glasflow",
        partial(
            glasflow, kind="RealNVP", linear_transform="lu", batch_norm_between_transforms=True
        ),
        target=4,
    ),
    Foreign("glasflow NSF", "glasflow", partial(glasflow, kind="CouplingNSF", **SPLINES)),
    Foreign(
        "pyro affine autoregressive",
        "pyro",
        partial(pyro, transform="affine_autoregressive", inverse=True),
    ),
    Foreign("pyro affine coupling", "pyro", partial(pyro, transform="affine_coupling")),
    Foreign("pyro spline coupling", "pyro", partial(pyro, transform="spline_coupling")),
    Foreign("pyro spline autoregressive", "pyro", partial(pyro, transform="spline_autoregressive")),
    Foreign(
        "pyro block autoregressive",
        "pyro",
        partial(pyro, transform="block_autoregressive", inverse=True),
    ),
)
