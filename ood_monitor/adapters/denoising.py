r"""Diffusion and flow-matching models: the denoising bound, one term a noise level.

At level t of a schedule, :math:`x_t = \alpha_t x + \sigma_t \epsilon` with fixed noise, and the
network's prediction :math:`\hat y(x_t, t)` is compared with what it should be, y:

========================  =================================================
``"epsilon"``             :math:`\epsilon`
``"sample"``              :math:`x`
``"v_prediction"``        :math:`\alpha_t \epsilon - \sigma_t x`
``"edm"``                 :math:`\sigma_t x - \alpha_t \epsilon`
``"flow_prediction"``     :math:`\epsilon - x`
``"velocity"``            :math:`x - \epsilon`
========================  =================================================

The term is minus a loss of that comparison, summed over dimensions:

- ``"l2"``: :math:`-\tfrac12 \lVert \hat y - y \rVert^2`, a Gaussian's log-density up to a constant;
- ``"l1"``: :math:`-\lVert \hat y - y \rVert_1`;
- ``"vlb"``: the variational lower bound's own. Any prediction is one of x, :math:`\hat x`, and

.. math::

    \log p(x) \ge \log N(x; \hat x(x_0), \mathrm{SNR}_0^{-1} I)
    - \sum_{t=1}^{T-1} \tfrac12 (\mathrm{SNR}_{t-1} - \mathrm{SNR}_t) \lVert x - \hat x \rVert^2
    - \mathrm{KL}(q(x_{T-1} | x) \,\|\, N(0, I))

with :math:`\mathrm{SNR}_t = \alpha_t^2 / \sigma_t^2`, in expectation over the noise: the terms of
all T levels add up to it, in nats of the density of x. The last divergence, which has no
parameters, is counted with level T - 1.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import (
    NULL_SUFFIX,
    Adapter,
    Batch,
    Condition,
    OnePass,
    SampleKind,
    batch_size,
    checked_floating,
    checked_range,
    describe,
    first_tensor,
    map_tensors,
    no_condition,
    normal_draws,
    repeated,
    tensors_in,
)
from ood_monitor.adapters.predictions import PREDICTIONS, prediction_of
from ood_monitor.adapters.schedules import NoiseSchedule
from ood_monitor.checks import flag, function, items, number, seed_of, whole, word
from ood_monitor.modules import dtype_of

__all__ = ["DenoisingBound", "DenoisingLoss"]

#: What a term is minus of.
DenoisingLoss: TypeAlias = Literal["l2", "l1", "vlb"]


#: Noise to signal where residuals are taken: least noise of pixels and of latents, and much.
_RATIOS = (0.015, 0.33, 3.4)

#: Names of a time, where a forward takes it before the sample.
_TIMES = ("t", "time", "times", "timestep", "timesteps", "time_steps")


class DenoisingBound(Adapter):
    r"""Negative denoising losses at chosen noise levels, with noise that never changes.

    Args:
        network: Called as ``network(x_t, t, **condition)`` with x_t of shape (B, C, ...) and t of
            shape (B,). If it has a keyword ``timestep``, t is passed by it; if its ``forward``
            names a time first (torchcfm), t comes first. It gives a tensor, a tuple that begins
            with one, or an object with ``.sample`` (diffusers). If it gives twice as many channels
            as x has (learned variance), the first half is used.
        schedule: A :class:`NoiseSchedule`, the cumulative products :math:`\bar\alpha`, shape (T,),
            or an object that has them as ``alphas_cumprod``, such as a diffusers scheduler or
            lucidrains' ``GaussianDiffusion``. Its numbers are copied. If it normalises images
            (lucidrains), give x in [0, 1]; it is normalised in the same way.
        levels: Noise levels, in [0, T). The default suits T = 1 000: little noise and much. Each
            level costs a pass. More levels, spread over T, detect more; no rule of
            ``benchmarks/detection/noise_levels.py`` chose two better ones from held-out data.
        prediction_type: What the network predicts; by default what the schedule says
            (``config.prediction_type``, ``objective``), and epsilon if you give cumulative products
            alone.
        loss: ``"l2"``, ``"l1"`` or ``"vlb"``, as above.
        draws: Draws of the noise a level; the term is their mean.
        antithetic: Whether each draw comes with its negative, which doubles the passes.
        inputs: Takes x, shape (B, C, ...), from a batch as the loader yields it. For latent
            diffusion, :func:`latent_mean` of the pipeline's autoencoder.
        condition: Gives the network's further keywords from a batch: class labels, text
            embeddings, ``added_cond_kwargs``.
        time: What the network takes for the schedule's t. Flux: ``lambda t: t / 1000``.
        seed: Seed of the noise, which all samples share.
        ratios: At which levels :meth:`residuals` look at samples: values of sigma / alpha, of which
            the nearest levels are taken; or 2, which is 0.015 (0.33 for latents) and 3.4; or 3, all
            three of these. Samples of one or three channels count as pixels, others as latents.
        null_condition: A function that gives the keywords of no condition, as guidance takes them:
            an empty prompt's embeddings, or the label of none. :meth:`residuals` then make one more
            pass, at the level of most noise. It shows how much a sample's own condition helps to
            denoise it, as diffusion classifiers do, and so finds a wrong label or prompt.

    Raises:
        ValueError: An unknown schedule, prediction type or loss, a schedule that does not say what
            its network predicts, no level or one outside [0, T), no draw, the bound of an epsilon
            prediction at a level without signal, or ratios that are not positive.
        TypeError: An option of another type.

    References:
        | Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, 2020)
        | https://arxiv.org/abs/2006.11239
        | Variational Diffusion Models (Kingma, Salimans, Poole, Ho, 2021)
        | https://arxiv.org/abs/2107.00630
        | Your Diffusion Model is Secretly a Zero-Shot Classifier (Li et al., 2023)
        | https://arxiv.org/abs/2303.16203

    Example:
        >>> network = nn.Conv2d(1, 1, 3, padding=1)
        >>> network.forward = lambda x, t, forward=network.forward: forward(x)
        >>> adapter = DenoisingBound(network, torch.linspace(0.99, 0.01, 1000), levels=[50, 500])
        >>> terms = adapter.log_likelihood(torch.zeros(4, 1, 8, 8))
        >>> [(term, tuple(values.shape)) for term, values in terms]
        [('t=50', (4,)), ('t=500', (4,))]
    """

    sample: SampleKind | None = "diffusion"

    def __init__(
        self,
        network: nn.Module,
        schedule: Any,
        *,
        levels: Sequence[int] = (50, 500),
        prediction_type: str | None = None,
        loss: DenoisingLoss = "l2",
        draws: int = 1,
        antithetic: bool = False,
        inputs: Callable[[Batch], Tensor] = first_tensor,
        condition: Condition = no_condition,
        time: Callable[[Tensor], Tensor] = lambda t: t,
        seed: int = 0,
        ratios: Literal[2, 3] | Sequence[float] = 2,
        null_condition: Condition | None = None,
    ) -> None:
        if network is schedule:
            raise ValueError(
                f"Expected a network that predicts, got {type(network).__name__} for both network "
                "and schedule, whose forward is a loss: pass its network, such as `.model`."
            )
        self.module, self._normalise = network, _normaliser(schedule)
        self._order = _order(network)
        self.schedule = NoiseSchedule.of(schedule)
        self.seed, self._draws = self._checked_seed(seed), whole("draws", draws, 1)
        self._antithetic = flag("antithetic", antithetic)
        self._loss: DenoisingLoss = word("loss", loss, get_args(DenoisingLoss))
        self._prediction_type = prediction_of(prediction_type, schedule, self.schedule)
        self._prediction = PREDICTIONS[self._prediction_type]
        self._inputs, self._time = function("inputs", inputs), function("time", time)
        self._condition = function("condition", condition)
        self.levels = self._checked(levels)
        self._ratios = _checked_ratios(ratios)
        null = None if null_condition is None else function("null_condition", null_condition)
        self._null_condition: Condition | None = null
        self.has_null_condition = null_condition is not None

    @classmethod
    def paper(cls, network: nn.Module, schedule: Any, **options: Any) -> Self:
        """The loss of the paper's diffusion models: L1, at the level of least noise, t = 0.

        It takes the mean over pixels and new noise each time; here the sum, which changes no
        score, and fixed noise. Further options are the class's.

        References:
            Dauncey, Holmes, Williams, Falck (2024), https://arxiv.org/abs/2403.01485
        """
        return cls(network, schedule, levels=(0,), loss="l1", **options)

    def with_levels(self, levels: Sequence[int], *, seed: int | None = None) -> Self:
        """The same bound at other levels, and with another seed of the noise if one is given."""
        other = copy.copy(self)
        other.levels = self._checked(levels)
        other.seed = self.seed if seed is None else self._checked_seed(seed)
        return other

    def with_ratios(self, ratios: Literal[2, 3] | Sequence[float]) -> Self:
        """The same bound, whose residuals are taken at other ratios of noise to signal."""
        other = copy.copy(self)
        other._ratios = _checked_ratios(ratios)
        return other

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield the terms ``t=<level>``, each of a forward pass of its own."""
        x = self._checked_inputs(batch)
        # Copies of a sample are neighbours, so that it still has its own rows of the batch.
        condition = self._condition(repeated(batch, self._copies))
        x = repeated(x, self._copies)
        for level in self.levels:  # nothing here holds a term while the next is computed
            yield f"t={level}", self._mean(self._term(x, condition, level))

    def residuals(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield prediction less target of samples without noise, ``t=<level>``, shape (B, C, ...).

        No draw of noise decides what they show. They are no likelihood's bound. With a null
        condition, ``t=<level>/null`` comes last, of the level of most noise.
        """
        x = self._checked_inputs(batch)
        for level in (levels := self._levels_without_noise(x)):
            yield f"t={level}", self._residual(x, batch, level, self._condition)
        if self._null_condition is not None:
            null = self._residual(x, batch, levels[-1], self._null_condition)
            yield f"t={levels[-1]}{NULL_SUFFIX}", null

    def conditions(self, batch: Batch) -> Mapping[str, Tensor]:
        """Labels, embeddings: those of the network's keywords that have a row for each sample."""
        size, found = batch_size(batch), dict[str, Tensor]()
        for name, value in self._condition(map_tensors(torch.clone, batch)).items():
            tensors = [each for each in tensors_in(value) if each.ndim and len(each) == size]
            found |= {f"{name}.{i}" if i else name: each for i, each in enumerate(tensors)}
        return found

    def group_of(self, batch: Batch) -> Sequence[str]:
        """The samples' shape, as ``"4x64x64"``."""
        x = self._inputs(batch)
        return ["x".join(map(str, x.shape[1:]))] * len(x)

    def residuals_at_once(self, batch: Batch) -> tuple[tuple[str, ...], Tensor] | None:
        """All levels in one batch, and the null condition's rows after them."""
        x = self._checked_inputs(batch)
        size, levels = len(x), self._levels_without_noise(x)
        names = [f"t={level}" for level in levels]
        if self._null_condition is not None:
            levels, names = [*levels, levels[-1]], [*names, f"{names[-1]}{NULL_SUFFIX}"]
        x, rows = _stacked((x, batch), len(levels))
        condition = self._condition_of_rows(rows, size)
        if condition is None:
            return None
        of_rows = {k: v.repeat_interleave(size) for k, v in self._by_level(x, levels).items()}
        alpha, sigma = (of_rows[k].view(-1, *[1] * (x.ndim - 1)) for k in ("alpha", "sigma"))
        residual = self._error(x, torch.zeros_like(x), alpha, sigma, of_rows["t"], condition)
        return tuple(names), residual

    def _condition_of_rows(self, rows: Batch, size: int) -> Mapping[str, Any] | None:
        """Of the last so many the null condition; None where the two cannot be put together."""
        own = self._condition(rows)
        if self._null_condition is None:
            return own
        null, found = self._null_condition(rows), dict[str, Any]()
        for name in own:
            a, b = own[name], null.get(name)
            if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
                return None
            found[name] = torch.cat([a[:-size], b[-size:]])
        return found if own.keys() == null.keys() else None

    def _residual(self, x: Tensor, batch: Batch, level: int, condition: Condition) -> Tensor:
        """Prediction less target at a level without noise."""
        # Made anew for each, since a network may write into it.
        given = condition(map_tensors(torch.clone, batch))
        alpha, sigma = float(self.schedule.alpha[level]), float(self.schedule.sigma[level])
        return self._error(x, torch.zeros_like(x), alpha, sigma, self._times(x, level), given)

    def _levels_without_noise(self, x: Tensor) -> list[int]:
        ratios = self._ratios
        if isinstance(ratios, int):
            least = 0 if x.ndim == 4 and x.shape[1] in (1, 3) else 1
            ratios = _RATIOS if ratios == 3 else (_RATIOS[least], _RATIOS[2])
        return sorted(set(map(self.schedule.nearest, ratios)))

    def one_pass(self, batch: Batch) -> OnePass | None:
        """All levels at once, but for the variational bound's weights."""
        if len(self.levels) == 1 or self._loss == "vlb":
            return None
        x, count = self._checked_inputs(batch), len(self.levels)
        by_level = self._by_level(x, self.levels)
        by_level["noise"] = torch.stack([self._noise(x, level) for level in self.levels])
        rows = {name: value.repeat_interleave(len(x), 0) for name, value in by_level.items()}
        rows["x"], rows["batch"] = _stacked((x, batch), count)
        return OnePass(tuple(f"t={level}" for level in self.levels), rows, self._rows)

    def _by_level(self, x: Tensor, levels: Sequence[int]) -> dict[str, Tensor]:
        """What samples are mixed by and what the network is told, (K,) each."""
        chosen = list(levels)
        return {
            "alpha": self.schedule.alpha[chosen].to(x),
            "sigma": self.schedule.sigma[chosen].to(x),
            "t": torch.stack([self._told(x, level) for level in chosen]),
        }

    def _rows(self, rows: Mapping[str, Any]) -> Tensor:
        """The term of each row of :meth:`one_pass`."""
        condition = self._condition(repeated(rows["batch"], self._copies))
        x, t, alpha, sigma = repeated([rows[k] for k in ("x", "t", "alpha", "sigma")], self._copies)
        alpha, sigma = (value.view(-1, *[1] * (x.ndim - 1)) for value in (alpha, sigma))
        noise = rows["noise"].flatten(0, 1)
        return self._mean(-self._loss_of(self._error(x, noise, alpha, sigma, t, condition)))

    def _term(self, x: Tensor, condition: Mapping[str, Any], level: int) -> Tensor:
        alpha, sigma = float(self.schedule.alpha[level]), float(self.schedule.sigma[level])
        noise = self._noise(x, level)
        noise = noise.repeat(len(x) // len(noise), *[1] * (x.ndim - 1))
        error = self._error(x, noise, alpha, sigma, self._times(x, level), condition)
        if self._loss == "vlb":
            return self._bound(x.flatten(1), error.flatten(1).square().sum(1), level)
        return -self._loss_of(error)

    def _error(
        self,
        x: Tensor,
        noise: Tensor,
        alpha: Any,
        sigma: Any,
        t: Tensor,
        condition: Mapping[str, Any],
    ) -> Tensor:
        """Prediction less target, as x; alpha and sigma are numbers, or of each row."""
        predicted = self._predicted(alpha * x + sigma * noise, t, condition)
        return predicted - self._prediction.target(x, noise, alpha, sigma)

    def _loss_of(self, error: Tensor) -> Tensor:
        error = error.flatten(1)
        return error.abs().sum(1) if self._loss == "l1" else 0.5 * error.square().sum(1)

    @property
    def _copies(self) -> int:
        return self._draws * (1 + self._antithetic)

    def _mean(self, values: Tensor) -> Tensor:
        """Over the draws of each sample."""
        return values.view(-1, self._copies).mean(1)

    def _checked_inputs(self, batch: Batch) -> Tensor:
        x = checked_floating(self._inputs(batch))
        if x.ndim < 2:
            raise ValueError(f"Expected floating-point samples (B, C, ...), got {describe(x)}.")
        x = x if self._normalise is None else _normalised(x, self._normalise)
        return x if self.schedule.sigma_data == 1 else x / self.schedule.sigma_data

    def _noise(self, x: Tensor, level: int) -> Tensor:
        """All draws at a level, shape (draws, C, ...), or twice as many with their negatives."""
        # A stream of its own for each level of each seed.
        seed = self.seed * len(self.schedule) + level
        noise = normal_draws(x.shape[1:], self._draws, seed).to(x)
        return torch.cat([noise, -noise]) if self._antithetic else noise

    def _told(self, x: Tensor, level: int) -> Tensor:
        """The time that the network is told of a level."""
        t = _precise(self._time, self.schedule.t[level])
        dtype = torch.promote_types(x.dtype, torch.float32) if t.is_floating_point() else t.dtype
        return t.to(x.device, dtype)

    def _times(self, x: Tensor, level: int) -> Tensor:
        """The same for each sample, (B,).

        Made of the samples: to the gradients' engine, a time for each sample is data of its own.
        """
        told = self._told(x, level)
        return torch.full_like(x.flatten(1)[:, 0], told.item(), dtype=told.dtype)

    def _predicted(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        given = x_t.to(dtype_of(self.module, x_t.dtype))
        if self._order == "keyword":
            return _like(x_t, self.module(given, timestep=t, **condition))
        arguments = (t, given) if self._order == "time first" else (given, t)
        return _like(x_t, self.module(*arguments, **condition))

    def _bound(self, x: Tensor, squared_error: Tensor, level: int) -> Tensor:
        """The level's term of the variational bound; x has shape (B, D)."""
        snr, dimensions = self.schedule.snr, x.shape[1]
        alpha, sigma = float(self.schedule.alpha[level]), float(self.schedule.sigma[level])
        weight = float(snr[0] if level == 0 else snr[level - 1] - snr[level])
        term = -0.5 * weight * self._prediction.scale(alpha, sigma) ** 2 * squared_error
        if level == 0:
            per_dimension = 0.5 * math.log(float(snr[0]) / (2 * math.pi))
            # x has been divided by the latter, and the density is that of the whole.
            term = term + dimensions * (per_dimension - math.log(self.schedule.sigma_data))
        if level == len(self.schedule) - 1:
            divergence = alpha**2 * x.square() + sigma**2 - 1 - 2 * math.log(sigma)
            term = term - 0.5 * divergence.sum(1)
        return term

    def _checked_seed(self, seed: int) -> int:
        """Such that each level has one of its own, see :meth:`_noise`."""
        return seed_of("seed", seed, 2**64 // len(self.schedule))

    def _checked(self, levels: Sequence[int]) -> tuple[int, ...]:
        length = len(self.schedule)
        chosen = tuple(whole("a noise level", level) for level in items("levels", levels))
        if not chosen or max(chosen) >= length or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"Expected distinct whole noise levels in [0, {length}), got {list(levels)}."
            )
        for level in chosen if self._loss == "vlb" else ():
            alpha, sigma = float(self.schedule.alpha[level]), float(self.schedule.sigma[level])
            if not sigma or math.isinf(self._prediction.scale(alpha, sigma)):
                raise ValueError(
                    f"Expected levels with signal and noise for loss='vlb', got t={level} with "
                    f"alpha = {alpha:.4g} and sigma = {sigma:.4g}."
                )
        return chosen


def _stacked(batch: Batch, count: int) -> Batch:
    """All samples several times, one batch after the other."""
    return map_tensors(lambda tensor: tensor.repeat(count, *[1] * (tensor.ndim - 1)), batch)


def _checked_ratios(ratios: Literal[2, 3] | Sequence[float]) -> int | tuple[float, ...]:
    if not isinstance(ratios, Iterable):
        if (count := whole("ratios", ratios)) in (2, 3):
            return count
        raise ValueError(f"Expected ratios as 2, 3 or positive numbers, got {ratios!r}.")
    found = tuple(number("a ratio", r, 0, ends="()") for r in items("ratios", ratios))
    if not found:
        raise ValueError(f"Expected ratios as 2, 3 or positive numbers, got {ratios!r}.")
    return found


def _normaliser(schedule: Any) -> Callable[[Tensor], Tensor] | None:
    """How a diffusion maps images in [0, 1] to what its network takes; None if it does not."""
    normalise: Callable[[Tensor], Tensor] | None = getattr(schedule, "normalize", None)
    if not callable(normalise):
        return None
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    return None if torch.equal(normalise(ends), ends) else normalise


def _normalised(x: Tensor, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    remedy = (
        "It normalises them itself; to give what its network takes, pass its `alphas_cumprod` and "
        "`prediction_type=`."
    )
    return normalise(checked_range(x, 0, 1, "the schedule's images", slack=1e-3, remedy=remedy))


def _precise(time: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The time of a level, in double precision: t / 1000 of an integer has the default dtype."""
    told = time(t)
    if not told.is_floating_point() or t.is_floating_point():
        return told
    try:
        return time(t.double())
    except (IndexError, RuntimeError, TypeError):  # of a table, which whole numbers alone index
        return told


def _order(network: nn.Module) -> Literal["keyword", "time first", "time second"]:
    """Where a network takes the time, as its forward names it."""
    forward = getattr(network, "_orig_mod", network).forward  # under torch.compile
    names = list(inspect.signature(forward).parameters)
    if len(names) > 1 and names[0] in _TIMES:
        return "time first"
    return "keyword" if "timestep" in names else "time second"


def _like(x: Tensor, output: Any) -> Tensor:
    """The prediction in what a network gives: of the shape of x."""
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    found = tuple(getattr(output, "shape", ()))
    if found[1:2] == (2 * x.shape[1],):
        output = output.chunk(2, 1)[0]
    if not isinstance(output, Tensor) or output.shape != x.shape:
        # As a training module's forward gives it.
        loss = "" if found else " If that is a loss: pass the network in it, such as `.model`."
        raise ValueError(
            f"Expected the network's prediction to have the shape {tuple(x.shape)} of its input, "
            f"got {found or describe(output)}.{loss}"
        )
    return output
