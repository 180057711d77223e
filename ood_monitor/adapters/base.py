"""The boundary to a foreign model: per-sample log-likelihood terms.

Everything downstream sees a model only through :class:`Adapter`. A *term* is a named, per-sample
part of the log-likelihood (or of a lower bound on it), in nats: a latent level's log-density, the
log-determinant, the bound at one noise level. Terms can cancel in their sum; apart they speak.
"""

import abc
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ood_monitor.adapters.describing import describe
from ood_monitor.adapters.elements import Elements, checked
from ood_monitor.adapters.mapped import of_all
from ood_monitor.adapters.nested import map_tensors, tensors_in
from ood_monitor.checks import word
from ood_monitor.modules import Passes, device_of, gradless, scored

__all__ = [
    "NULL_SUFFIX",
    "Adapter",
    "Batch",
    "Condition",
    "OnePass",
    "SampleKind",
    "batch_size",
    "checked_elements",
    "checked_floating",
    "checked_range",
    "checked_sample",
    "checked_terms",
    "cpu_generator",
    "describe",
    "first_tensor",
    "images_in",
    "keywords_of",
    "map_tensors",
    "no_condition",
    "normal_draws",
    "pieces",
    "repeated",
    "reseeded",
    "sample_or_image",
    "tensors_in",
    "term_values",
    "uniform_draw",
    "usable_by",
]

#: A tensor of shape (B, ...), or a nested list, tuple, mapping or dataclass of such tensors, with
#: one B.
Batch: TypeAlias = Any

#: Gives, from a batch, the keywords that a model takes beside the samples. They are made of the
#: batch's tensors, so that a piece of it has its own, or are the same for all samples.
Condition: TypeAlias = Callable[[Batch], Mapping[str, Any]]

#: What a sample is, which decides by which statistics a detector judges it. It is an image, a
#: sequence of tokens, a row of a table, whose columns are its numbers, or whatever a diffusion
#: model denoises.
SampleKind: TypeAlias = Literal["image", "sequence", "row", "diffusion"]

#: What the name of a level ends with, of residuals with the null condition.
NULL_SUFFIX = "/null"

#: The least height and width of what is taken for an image without being called one.
_LEAST_SIZE = 4


@dataclass(frozen=True)
class OnePass:
    """The terms of a batch by one forward pass, each in rows of its own.

    Attributes:
        terms: Names of the K terms.
        batch: K * B rows: those of the first term, then those of the second.
        values: Gives of such rows the term of each, shape (K * B,), in nats.
    """

    terms: tuple[str, ...]
    batch: Batch
    values: Callable[[Batch], Tensor]


class Adapter(abc.ABC):
    """A generative model as per-sample log-likelihood terms.

    A subclass sets :attr:`module` and implements :meth:`log_likelihood`; nothing else is asked.
    It must be deterministic and per-sample: whatever noise a term needs comes from a generator of
    the adapter's own, so that an input has the same value alone, in any batch and after a restart,
    and neither the global random state nor the caller's generators move.

    An adapter with noise keeps the noise's seed as ``seed``, which diagnostics change on a copy.

    Attributes:
        module: The module whose parameters are differentiated; put in eval mode while scoring.
        sample: What a sample is, where the adapter was told.
        is_one_pass: Whether all terms come of one forward pass: a detector then takes gradients of
            their sum, as the paper does, and not a backward pass for each.
        has_null_condition: Whether :meth:`residuals` tell what a null condition leaves.

    Example:
        >>> class Gaussian(Adapter):
        ...     def __init__(self, module):
        ...         self.module = module
        ...     def log_likelihood(self, batch):
        ...         residual = batch - self.module(torch.zeros_like(batch))
        ...         yield "log_likelihood", -0.5 * residual.square().sum(1)
        >>> terms = Gaussian(nn.Linear(3, 3)).log_likelihood(torch.randn(5, 3))
        >>> [(term, tuple(values.shape)) for term, values in terms]
        [('log_likelihood', (5,))]
    """

    module: nn.Module
    sample: SampleKind | None = None
    is_one_pass: bool = False
    has_null_condition: bool = False

    @abc.abstractmethod
    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor | Elements]]:
        """Yield each term as (name, values).

        Terms of one forward pass are yielded one after the other. Where terms need passes of their
        own (noise levels), make each when it is asked for and hold no reference to the last: the
        engine differentiates a term before it asks for the next, so only one graph is alive.

        Args:
            batch: B samples, as :data:`~ood_monitor.adapters.base.Batch`.

        Yields:
            The term's name and its values, shape (B,), in nats, or its elements where the law of
            each is known; the terms add up to the log-likelihood or to its bound.
        """

    def one_pass(self, batch: Batch) -> OnePass | None:
        """The terms of :meth:`log_likelihood` by a single forward pass, or None if not so.

        For terms that need passes of their own: where samples are few, one pass over K times the
        rows is quicker than K passes. The engine takes it where the first use of a model shows that
        it gives the same.
        """
        return None

    def residuals(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        """Yield what a denoiser leaves of samples without noise, by level.

        Yields:
            The level's name and the prediction less its target, shape (B, ...), up to a factor that
            is the same for all samples. Each takes a pass of its own when it is asked for. With a
            null condition the last is the same of the level before it, under its name and
            ``NULL_SUFFIX``.

        Raises:
            ValueError: It is no denoiser.
        """
        raise ValueError(
            "Expected a denoiser, which leaves residuals of samples without noise, got "
            f"{type(self).__name__}."
        )

    def conditions(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the model is told of each sample beside it, by name, (B, ...); empty of most."""
        return {}

    def compared(self, batch: Batch) -> Batch:
        """What of a batch must have the shapes and types of the held-out data; all by default.

        It begins with the batch's first tensors.
        """
        return batch

    def own_calls(self, batch: Batch) -> Mapping[str, Tensor]:
        """What was seen of the model's own calls that made B samples, in columns (B,) or (B, k).

        Nothing, where samples come without.
        """
        return {}

    def group_of(self, batch: Batch) -> Sequence[str] | None:
        """The group of each of B samples, by its size and what else is no fault of a sample's.

        A detector for any size, which is given no ``groups``, compares a sample with its own.

        Returns:
            B labels; None where samples are of one group.
        """
        return None

    def residuals_at_once(self, batch: Batch) -> tuple[tuple[str, ...], Tensor] | None:
        """The K names and the values of :meth:`residuals` by a single pass, or None if not so.

        The values are K * B rows, those of the first name, then those of the second. They are taken
        where samples are few and small, once a first use has shown that both are the same.
        """
        return None

    def sample_of(self, batch: Batch) -> SampleKind | None:
        """What the samples of a batch are, or None where that is not plain."""
        return self.sample

    def images(self, batch: Batch) -> Tensor | None:
        """The samples as images as they would be shown, or None where they are none.

        Returns:
            Real numbers, shape (B, C, H, W) with C of 1 or 3. They are in [0, 1] if the samples
            are in the range that the adapter was told; nothing is clipped.
        """
        return None

    def texts(self, batch: Batch) -> list[Tensor] | None:
        """The samples as numbers of tokens, or None where they are no sequences of these.

        Returns:
            Of each of B samples whole numbers, shape (T',), from the first token on and without
            padding.
        """
        return None

    def positions(self, batch: Batch) -> Tensor | None:
        """Which positions of the module's input are text: neither padding nor prompt.

        Returns:
            Bool, shape (B, T), of the T tokens that the module is given; None for all but
            sequences.
        """
        return None


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive pieces of ``size`` samples; the last may be smaller."""
    for start in range(0, batch_size(batch), size):
        yield map_tensors(lambda t, start=start: t[start : start + size], batch)  # type: ignore[misc]


def usable_by(module: nn.Module, batch: Batch) -> Batch:
    """A batch where a model is, of tensors of our own, which a backward pass may keep."""
    device = device_of(module)

    def usable(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        return tensor.clone() if tensor.is_inference() else tensor.detach()

    return map_tensors(usable, batch)


def checked_elements(adapter: Adapter, batch: Batch) -> Iterator[tuple[str, Tensor | Elements]]:
    """The adapter's terms, each checked to be of shape (B,), or elements of B samples.

    What elements expect is computed, and checked, when it is asked for.

    Raises:
        ValueError: A term or elements of another shape, two of one name, or no term at all.
    """
    size = batch_size(batch)
    terms: set[str] = set()
    # A copy, since a model may write into its input.
    for term, value in adapter.log_likelihood(map_tensors(torch.clone, batch)):
        if term in terms:
            raise ValueError(f"Expected {term!r} once among the terms, got it twice.")
        if not term or "/" in term:
            raise ValueError(f"Expected a term's name without '/', got {term!r}.")
        terms.add(term)
        if isinstance(value, Elements):
            yield term, checked(value, f"term {term!r} of {type(adapter).__name__}", size)
        else:
            yield term, _checked_value(value, term, adapter, size)
        del value
    if not terms:
        raise ValueError(f"Expected {type(adapter).__name__} to yield a term, got none.")


def checked_terms(adapter: Adapter, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """The adapter's terms, each checked to be of shape (B,); elements are taken together.

    Raises:
        ValueError: As :func:`checked_elements`.
    """
    size = batch_size(batch)
    for term, value in checked_elements(adapter, batch):
        if isinstance(value, Elements):
            yield term, _checked_value(value.total(), term, adapter, size)
        else:
            yield term, value
        del value  # the graph of a term is free before the next forward pass


def _checked_value(value: Any, term: str, adapter: Adapter, size: int) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (size,):
        raise ValueError(
            f"Expected term {term!r} of {type(adapter).__name__} to be of shape ({size},), one "
            f"value a sample, got {describe(value)} for a batch of {size} samples."
        )
    return value


def term_values(adapter: Adapter, batch: Batch) -> dict[str, Tensor]:
    """Each term's values as scoring has them, ``{term: (B,)}`` in nats, without gradients.

    The model is in eval mode, and left as it was.

    Raises:
        ValueError: As :func:`checked_terms`.
    """

    def values(passes: Passes[Adapter]) -> dict[str, Tensor]:
        found = gradless(passes.holder, lambda: dict(checked_terms(passes.fresh(), batch)))
        return {term: value.detach() for term, value in found.items()}

    return scored(values, adapter, adapter.module)


def batch_size(batch: Batch) -> int:
    """B, the leading dimension that all tensors of the batch share.

    Raises:
        ValueError: No tensor, a tensor without dimensions, or leading dimensions that differ.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors_in(batch)]
    if not shapes or any(not shape for shape in shapes):
        raise ValueError(f"Expected a batch of tensors of shape (B, ...), got {describe(batch)}.")
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"Expected one batch size in all tensors, got shapes {shapes}.")
    return shapes[0][0]


def first_tensor(batch: Batch) -> Tensor:
    """The sample of a batch as loaders yield it: the tensor itself, or the first of a sequence.

    Raises:
        ValueError: The batch is neither.
    """
    candidate = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(candidate, torch.Tensor):
        raise ValueError(
            f"Expected a tensor, or a list or tuple that begins with one, got {describe(batch)}. "
            "Pass `inputs=` to say where the sample is."
        )
    return candidate


def checked_sample(sample: SampleKind | None) -> SampleKind | None:
    """What a sample was said to be.

    Raises:
        ValueError: It is no word for that.
    """
    return None if sample is None else word("sample", sample, get_args(SampleKind))


def sample_or_image(sample: SampleKind | None, x: Tensor) -> SampleKind | None:
    """What a sample was said to be, else an image where real numbers plainly are one.

    They are (B, C, H, W), grey or of three colours, and not tiny.
    """
    is_large = x.ndim == 4 and min(x.shape[2:]) >= _LEAST_SIZE
    is_image = x.is_floating_point() and is_large and x.shape[1] in (1, 3)
    return sample or ("image" if is_image else None)


def images_in(
    x: Tensor, kind: SampleKind | None, value_range: tuple[float, float]
) -> Tensor | None:
    """Samples in a range as images in [0, 1], as :meth:`Adapter.images` gives them.

    Args:
        x: Samples, shape (B, ...).
        kind: What they are.
        value_range: What is shown black, and what white.
    """
    if kind != "image" or x.ndim != 4 or x.shape[1] not in (1, 3) or not x.is_floating_point():
        return None
    low, high = value_range
    return (x - low) / (high - low)


def repeated(batch: Batch, copies: int) -> Batch:
    """Each sample several times, as neighbours."""
    if copies == 1:
        return batch
    return map_tensors(lambda tensor: tensor.repeat_interleave(copies, 0), batch)


def keywords_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """What a function names; None of compiled code, which has no signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def no_condition(batch: Batch) -> Mapping[str, Any]:
    """No keywords: the model takes the samples alone."""
    return {}


def normal_draws(shape: Sequence[int], draws: int, seed: int) -> Tensor:
    """Standard normal noise, shape (draws, *shape), float32; fewer draws are the first of more.

    It is drawn on the CPU, whatever the process's default dtype and device are.
    """
    generator = cpu_generator(seed)
    one = partial(torch.randn, tuple(shape), dtype=torch.float32, device="cpu")
    return torch.stack([one(generator=generator) for _ in range(draws)])


def uniform_draw(shape: Sequence[int], seed: int) -> Tensor:
    """Uniform noise in [0, 1), float32, drawn on the CPU as :func:`normal_draws` does."""
    generator = cpu_generator(seed)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def cpu_generator(seed: int) -> torch.Generator:
    """A generator of the CPU's, which no default device changes."""
    return torch.Generator("cpu").manual_seed(seed)


def reseeded(adapter: Adapter, seed: int) -> Adapter | None:
    """The adapter with other noise, or None for one without noise: without a ``seed``."""
    if not hasattr(adapter, "seed"):
        return None
    other = copy.copy(adapter)
    other.seed = seed
    return other


def checked_floating(x: Tensor) -> Tensor:
    """x, if its numbers are real, not whole.

    Raises:
        ValueError: They are whole, as bytes are.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"Expected floating-point samples, got {describe(x)}: give the values that the model "
            "was trained on, `x.float() / 255` if those are bytes in [0, 1]."
        )
    return x


def checked_range(
    x: Tensor, low: float, high: float, told: str, *, slack: float = 0.0, remedy: str = ""
) -> Tensor:
    """x, if its finite values are within [low, high]; the engine refuses the others.

    Args:
        x: Of any shape.
        low: The smallest value.
        high: The largest.
        told: What the range is of, for the message.
        slack: How far beyond a value may be for rounding.
        remedy: What to do, for the message.

    Raises:
        ValueError: They are not.
    """
    outside = (x < low - slack) | (x > high + slack)
    if of_all(x.isfinite() & outside).any():
        finite = x[x.isfinite()]
        raise ValueError(
            f"Expected values in [{low:g}, {high:g}] for {told}, got values from "
            f"{finite.min():.4g} to {finite.max():.4g}.{remedy and ' ' + remedy}"
        )
    return x
