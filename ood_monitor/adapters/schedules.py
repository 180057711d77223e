r"""Noise schedules of diffusion and flow-matching models, as numbers of our own.

A level t = 0, ..., T - 1 mixes data x with noise eps ~ N(0, I), the more noise the larger t:

.. math:: x_t = \alpha_t x + \sigma_t \epsilon .

Variance-preserving models have :math:`\alpha_t^2 = \bar\alpha_t`, :math:`\sigma_t^2 = 1 -
\bar\alpha_t`; flow matching along straight lines has :math:`\alpha_t = 1 - \sigma_t`. A denoiser
that is preconditioned as EDM is one of them too: it is given :math:`(x + \sigma \epsilon) /
\sqrt{\sigma^2 + \sigma_d^2} = \alpha x / \sigma_d + s \epsilon` with :math:`\alpha^2 + s^2 = 1`. A
live scheduler is never used: after a pipeline's call its step index and its sigmas are that call's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor

from ood_monitor.adapters.base import describe
from ood_monitor.checks import number, text, whole

__all__ = ["FlowConvention", "NoiseSchedule", "is_preconditioned", "stated_prediction"]

#: What a network of flow matching predicts, and so which way its time runs.
FlowConvention: TypeAlias = Literal["noise_minus_data", "data_minus_noise"]

#: Where schedules of other libraries say what their networks predict: diffusers and MONAI,
#: lucidrains (two names), CompVis' latent diffusion.
_STATEMENTS = ("prediction_type", "objective", "pred_objective", "parameterization")

#: Their names for it, and ours.
_PREDICTIONS = {
    "pred_noise": "epsilon",
    "eps": "epsilon",
    "pred_x0": "sample",
    "x0": "sample",
    "pred_v": "v_prediction",
    "v": "v_prediction",
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The coefficients of each noise level, and what the network is told of it.

    Attributes:
        alpha: Of the data, shape (T,), float64, not increasing.
        sigma: Of the noise, shape (T,), float64, not decreasing.
        t: The time that the network is given at each level, shape (T,): integers for diffusion
            models, real numbers for flow matching.
        prediction_type: What a network on this schedule predicts unless it is said otherwise.
        sigma_data: Data are divided by this before they are mixed, as those of EDM.

    Raises:
        ValueError: Shapes that differ, levels that are not in order of their noise, or a scale of
            data that is not positive.
        TypeError: What are no tensors.
    """

    alpha: Tensor
    sigma: Tensor
    t: Tensor
    prediction_type: str = "epsilon"
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        text("prediction_type", self.prediction_type)
        number("sigma_data", self.sigma_data, 0, ends="()")
        given = (self.alpha, self.sigma, self.t)
        if not all(isinstance(values, Tensor) for values in given):
            told = ", ".join(map(describe, given))
            raise TypeError(f"Expected alpha, sigma and t as tensors of shape (T,), got {told}.")
        shapes = [tuple(values.shape) for values in given]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"Expected alpha, sigma and t of one shape (T,), got {shapes}.")
        for name in ("alpha", "sigma"):
            values = getattr(self, name).detach().to("cpu", torch.float64, copy=True)
            object.__setattr__(self, name, values)
        if (self.alpha.diff() > 0).any() or (self.sigma.diff() < 0).any() or self.sigma[0] < 0:
            raise ValueError(
                "Expected levels in order of their noise, alpha not increasing and sigma not "
                f"decreasing, got alpha from {self.alpha[0]:.4g} to {self.alpha[-1]:.4g} and sigma "
                f"from {self.sigma[0]:.4g} to {self.sigma[-1]:.4g}."
            )

    def __len__(self) -> int:
        """T, the number of levels."""
        return len(self.alpha)

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio alpha^2 / sigma^2 of each level, shape (T,)."""
        return (self.alpha / self.sigma).square()

    @property
    def is_variance_preserving(self) -> bool:
        """Whether alpha^2 + sigma^2 = 1 at all levels."""
        ones = torch.ones_like(self.alpha)
        return torch.allclose(self.alpha.square() + self.sigma.square(), ones, atol=1e-6)

    def nearest(self, ratio: float) -> int:
        """The level whose sigma / alpha is nearest to a ratio, by orders of magnitude.

        Raises:
            ValueError: No level has both signal and noise, or the ratio is not positive.
            TypeError: It is no number.
        """
        ratio = number("ratio", ratio, 0, ends="()")
        usable = (self.alpha > 0) & (self.sigma > 0)
        if not usable.any():
            raise ValueError(
                "Expected a level with both signal and noise, got sigma from "
                f"{self.sigma[0]:.4g} to {self.sigma[-1]:.4g}."
            )
        distances = ((self.sigma / self.alpha).log() - math.log(ratio)).abs()
        return int(torch.where(usable, distances, torch.inf).argmin())

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor) -> Self:
        r"""Of the cumulative products :math:`\bar\alpha`, shape (T,).

        Raises:
            ValueError: They are not in [0, 1] or increase.
        """
        values = alphas_cumprod.detach().to("cpu", torch.float64)
        if not (values.diff() <= 0).all() or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(
                "Expected cumulative products in [0, 1] that do not increase, got values from "
                f"{values[0]:.4g} to {values[-1]:.4g}."
            )
        return cls(values.sqrt(), (1 - values).sqrt(), torch.arange(len(values), device="cpu"))

    @classmethod
    def flow(
        cls, steps: int = 1000, shift: float = 1.0, *, convention: FlowConvention | None = None
    ) -> Self:
        """Straight lines between data and noise.

        Args:
            steps: T; sigma is (t + 1) / T before the shift.
            shift: Moves levels to more noise, sigma -> shift sigma / (1 + (shift - 1) sigma).
            convention: ``"noise_minus_data"``, as the networks of diffusers (SD3, Flux) were
                trained: they predict noise less data and are given T sigma, 0 for data.
                ``"data_minus_noise"``, as those of torchcfm and of Meta's flow_matching: they
                predict data less noise and are given 1 - sigma, 1 for data. A network says nothing
                of it, so it has no default.

        Raises:
            ValueError: No convention, or an unknown one, no step, or a shift that is not positive.
            TypeError: Steps that are no whole number, or a shift that is no number.

        References:
            | Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al.,
              2024), https://arxiv.org/abs/2403.03206
            | Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal
              Transport (Tong et al., 2024), https://arxiv.org/abs/2302.00482
        """
        if convention not in get_args(FlowConvention):
            raise ValueError(
                "Expected convention='noise_minus_data' (networks of diffusers: SD3, Flux) or "
                "'data_minus_noise' (of torchcfm and Meta's flow_matching), which a network does "
                f"not say itself, got {convention!r}."
            )
        steps, shift = whole("steps", steps, 1), number("shift", shift, 0, ends="()")
        sigma = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / steps
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        if convention == "data_minus_noise":
            return cls(1 - sigma, sigma, 1 - sigma, "velocity")
        return cls(1 - sigma, sigma, steps * sigma, "flow_prediction")

    @classmethod
    def edm(
        cls,
        steps: int = 1000,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        time: Callable[[Tensor], Tensor] = lambda sigma: 0.25 * sigma.log(),
        prediction_type: str = "edm",
    ) -> Self:
        """Of a denoiser with EDM's preconditioning, of which the network alone is called.

        Args:
            steps: T, the levels from sigma_min to sigma_max, at equal distances of sigma^(1 / rho).
            sigma_min: The least noise of data x, and
            sigma_max: the most.
            sigma_data: The standard deviation of data that the preconditioning assumes.
            rho: As above.
            time: What the network is told of sigma, shape (T,): a fourth of its logarithm.
            prediction_type: ``"edm"``: what EDM's c_out and c_skip make a denoiser of;
                ``"v_prediction"``: minus that, as some schedulers of diffusers take it.

        Raises:
            ValueError: No step, or numbers that are not positive, or sigmas not in order.
            TypeError: Options of another type.

        References:
            Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
            https://arxiv.org/abs/2206.00364
        """
        steps, rho = whole("steps", steps, 1), number("rho", rho, 0, ends="()")
        least = number("sigma_min", sigma_min, 0, ends="()")
        most = number("sigma_max", sigma_max, least, ends="[)")
        scale = number("sigma_data", sigma_data, 0, ends="()")
        ends = (least ** (1 / rho), most ** (1 / rho))
        sigma = torch.linspace(*ends, steps, dtype=torch.float64, device="cpu") ** rho
        angle = torch.atan(sigma / scale)
        return cls(angle.cos(), angle.sin(), time(sigma), prediction_type, scale)

    @classmethod
    def of(cls, schedule: Any) -> "NoiseSchedule":
        """The schedule of what users have: this, cumulative products, or a diffusers scheduler.

        Raises:
            ValueError: None of these.
        """
        if isinstance(schedule, NoiseSchedule):
            return schedule
        config = _config(schedule)
        if is_preconditioned(schedule):
            return _preconditioned(schedule, config)
        if _is_of_angles(schedule):
            return _of_angles(config["num_train_timesteps"])
        if config.get("use_flow_sigmas") or (
            hasattr(schedule, "scale_noise") and not hasattr(schedule, "alphas_cumprod")
        ):
            steps, shift = config["num_train_timesteps"], _shift(config)
            return cls.flow(steps, shift, convention="noise_minus_data")
        products = getattr(schedule, "alphas_cumprod", schedule)
        if not isinstance(products, Tensor) or products.ndim != 1 or not len(products):
            raise ValueError(
                "Expected a schedule as a NoiseSchedule, a tensor of cumulative products (T,), or "
                "a diffusers scheduler that is variance-preserving (`alphas_cumprod`), of EDM "
                "(`precondition_inputs`) or for flow matching (`scale_noise`), got "
                f"{describe(schedule)}. For a network of torchcfm or Meta's flow_matching: "
                "NoiseSchedule.flow(convention='data_minus_noise')."
            )
        return cls.variance_preserving(products)


def stated_prediction(schedule: Any) -> str | None:
    """What a schedule says that its network predicts, by our names; None if it says nothing."""
    said = _config(schedule).get("prediction_type")
    for name in _STATEMENTS:
        said = getattr(schedule, name, None) if said is None else said
    said = getattr(said, "value", said)  # of an enumeration
    if is_preconditioned(schedule):
        return _preconditioned(schedule, _config(schedule)).prediction_type
    if said is None:
        return "v_prediction" if _is_of_angles(schedule) else None
    return _PREDICTIONS.get(str(said), str(said))


def _config(schedule: Any) -> Mapping[str, Any]:
    config = getattr(schedule, "config", None)
    return config if isinstance(config, Mapping) else {}


def is_preconditioned(schedule: Any) -> bool:
    """Whether a scheduler of diffusers scales what its network takes and gives, as EDM."""
    return all(hasattr(schedule, f"precondition_{name}") for name in ("inputs", "noise", "outputs"))


def _preconditioned(schedule: Any, config: Mapping[str, Any]) -> NoiseSchedule:
    """EDM's by its configuration, and by what it makes of numbers: the sign of c_out is no name's.

    Raises:
        ValueError: It scales otherwise.
    """
    found = NoiseSchedule.edm(
        config["num_train_timesteps"],
        sigma_min=config["sigma_min"],
        sigma_max=config["sigma_max"],
        sigma_data=(scale := config["sigma_data"]),
        rho=config.get("rho", 7.0),
        time=schedule.precondition_noise,
    )
    zero, one = torch.zeros_like(found.alpha), torch.ones_like(found.alpha)
    sigma = scale * found.sigma / found.alpha
    c_in = schedule.precondition_inputs(one, sigma)
    c_skip = schedule.precondition_outputs(one, zero, sigma)
    c_out = schedule.precondition_outputs(zero, one, sigma)
    expected = torch.stack([found.alpha / scale, found.alpha.square(), scale * found.sigma])
    if not torch.allclose(torch.stack([c_in, c_skip, c_out.abs()]), expected, rtol=1e-4):
        raise ValueError(
            f"Expected c_in, c_skip and c_out as EDM's with sigma_data = {scale:g}, got others of "
            f"{type(schedule).__name__}: make a NoiseSchedule of its numbers."
        )
    return found if bool((c_out > 0).all()) else replace(found, prediction_type="v_prediction")


def _is_of_angles(schedule: Any) -> bool:
    return any(base.__name__ == "IPNDMScheduler" for base in type(schedule).__mro__)


def _of_angles(steps: int) -> NoiseSchedule:
    """Of iPNDM, whose times are the angle between data and noise, as a share of the right one.

    Its networks (Dance Diffusion) predict v, of which it says nothing.
    """
    t = (torch.arange(steps, dtype=torch.float64, device="cpu") + 0.5) / steps
    angle = 0.5 * math.pi * t
    return NoiseSchedule(angle.cos(), angle.sin(), t, "v_prediction")


def _shift(config: Mapping[str, Any]) -> float:
    """The fixed shift; one that depends on the image's size is the call's, not the schedule's."""
    if config.get("use_dynamic_shifting"):
        return 1.0
    return float(config.get("shift") or config.get("flow_shift") or 1.0)
