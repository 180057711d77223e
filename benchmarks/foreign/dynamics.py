"""Gaussian processes, and differential equations: gpytorch, torchdiffeq, torchcde."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.foreign.case import Case, Density, Foreign

__all__ = ["CASES"]


# Gaussian processes


def gaussian_process(batch: int, *, deep: bool = False, inducing: int = 16) -> Case:
    """Of sparse variational ones the expected log-likelihood of each y at its x."""
    import gpytorch as gp

    class Process(gp.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self, points: Tensor) -> None:
            strategy = gp.variational.VariationalStrategy(
                self, points, gp.variational.CholeskyVariationalDistribution(len(points))
            )
            super().__init__(strategy)
            self.mean = gp.means.ConstantMean()
            self.kernel = gp.kernels.ScaleKernel(gp.kernels.RBFKernel(ard_num_dims=2))

        def forward(self, x: Tensor) -> Any:
            return gp.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    net = nn.Module()
    net.process, net.likelihood = (
        Process(torch.randn(inducing, 2)),
        gp.likelihoods.GaussianLikelihood(),
    )
    layers = [nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)] if deep else []
    net.features = nn.Sequential(*layers)

    def log_prob(net: Any, b: dict[str, Tensor]) -> Tensor:
        # In eval mode it keeps a factor of the first call, with its graph.
        gp.utils.memoize.clear_cache_hook(net.process.variational_strategy)
        process = net.process(net.features(b["x"]))
        found: Tensor = net.likelihood.expected_log_prob(b["y"], process)
        return found

    samples = {"x": torch.randn(batch, 2), "y": torch.randn(batch)}
    net.train()
    log_prob(net, samples)  # the first call sets the variational distribution
    return Density(net, log_prob), samples


# Differential equations


class Field(nn.Module):
    """dx/dt, and with it the change of the log-density, of an exact trace."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        x = x if x.requires_grad else x.detach().requires_grad_()
        change = self.net(torch.cat([x, t.expand(len(x), 1)], 1))
        trace = sum(
            torch.autograd.grad(change[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)
        )
        return change, -trace


def continuous_flow(batch: int, *, width: int = 64, steps: int = 8) -> Case:
    """A continuous normalising flow, by Runge and Kutta's method of a fixed step."""
    from torchdiffeq import odeint

    def log_prob(net: Any, x: Tensor) -> Tensor:
        times = torch.linspace(1, 0, 2).to(x)
        options = {"step_size": 1 / steps}
        start = x, torch.zeros_like(x[:, 0])
        states = odeint(net, start, times, method="rk4", options=options)
        z, change = (state[-1] for state in states)
        return -0.5 * z.square().sum(1) - change

    return om.LogLikelihood(Field(width), log_prob, sample="row"), torch.randn(batch, 2)


class LatentODE(nn.Module):
    """A series' future from its past: a recurrent encoder, and an equation of the latent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.GRU(3, width, batch_first=True)
        self.field = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.output = nn.Linear(width, 3)

    def log_prob(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint

        past, future = x.chunk(2, 1)
        start = self.encoder(past)[1][0]
        times = torch.arange(future.shape[1] + 1).to(x)
        latents = odeint(lambda t, z: self.field(z), start, times, method="midpoint")
        return -0.5 * (self.output(latents[1:]).transpose(0, 1) - future).square().sum((1, 2))


def latent_ode(batch: int, *, width: int = 32, length: int = 16) -> Case:
    return om.LogLikelihood(LatentODE(width)), torch.randn(batch, length, 3)


class ControlledField(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 3 * width))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.net(z)).unflatten(-1, (-1, 3))


class Controlled(nn.Module):
    """The density of a label given a path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.field = nn.Linear(3, width), ControlledField(width)
        self.output = nn.Linear(width, 2)

    def log_prob(self, coefficients: Tensor, label: Tensor) -> Tensor:
        import torchcde

        path = torchcde.CubicSpline(coefficients)
        start = self.start(path.evaluate(path.interval[0]))
        ends = torchcde.cdeint(
            path,
            self.field,
            start,
            path.interval,
            adjoint=False,
            method="rk4",
            options={"step_size": 1.0},
        )
        logits = self.output(ends[:, -1]).log_softmax(1)
        return logits.gather(1, label[:, None])[:, 0]


def controlled(batch: int, *, width: int = 16, length: int = 10) -> Case:
    import torchcde

    times = torch.arange(float(length)).expand(batch, length)[..., None]
    paths = torch.cat([times, torch.randn(batch, length, 2)], 2)
    coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(paths)
    samples = coefficients, torch.randint(2, (batch,))
    return Density(Controlled(width), lambda net, batch: net.log_prob(*batch)), samples


CASES: tuple[Foreign, ...] = (
    Foreign("gpytorch variational process", "gpytorch", gaussian_process),
    Foreign("gpytorch deep kernel", "gpytorch", partial(gaussian_process, deep=True)),
    Foreign("torchdiffeq continuous flow", "torchdiffeq", continuous_flow, small={"steps": 2}),
    Foreign("torchdiffeq latent ODE", "torchdiffeq", latent_ode, small={"width": 6, "length": 6}),
    Foreign("torchcde classifier", "torchcde", controlled, small={"length": 4}),
)
