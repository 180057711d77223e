"""What a detector expects of a batch and of a model: those that it was fitted on."""

import re
import warnings
from collections.abc import Callable

from ood_monitor.adapters import SequenceLikelihood
from ood_monitor.adapters.base import Adapter, Batch, tensors_in
from ood_monitor.gradients.layers import Layers, selection, supported
from ood_monitor.modules import Names, dtype_of, stored_weights
from ood_monitor.saving.fingerprints import digest
from ood_monitor.saving.fitted import Fitted
from ood_monitor.saving.provenance import differences, recipe

__all__ = ["check_layers", "check_samples", "parameters_of", "samples_of", "warn_of_other_model"]


def samples_of(batch: Batch) -> tuple[str, ...]:
    """Shape and type of each tensor of a batch, without B."""
    return tuple(f"{tuple(t.shape[1:])} {t.dtype}" for t in tensors_in(batch))


def check_samples(
    adapter: Adapter, batch: Batch, expected: tuple[str, ...], *, any_size: bool = False
) -> None:
    """Refuse a batch of other shapes or types than :func:`samples_of` gave.

    The length of token sequences is not compared where the adapter tells padding from text, nor
    what the adapter takes in any shape; of samples of any size only how many dimensions there are.

    Raises:
        ValueError: It is one.
    """
    found = samples_of(adapter.compared(batch))
    # What only one of them has, such as labels, is for the adapter to take or to miss.
    other = [(a, b) for a, b in zip(found, expected, strict=False) if a != b]
    other = [(a, b) for a, b in other if not any_size or _without_sizes(a) != _without_sizes(b)]
    if other and not _differ_by_padding(adapter, batch, other):
        raise ValueError(
            f"Expected samples as the detector was fitted on, {', '.join(expected)}, got "
            f"{', '.join(found)}: give samples of that form, or fit a detector on such samples."
        )


def _differ_by_padding(adapter: Adapter, batch: Batch, other: list[tuple[str, str]]) -> bool:
    """Whether pairs of samples differ in nothing but the length of the adapter's tokens."""
    pairs = [(_length_and_rest(a), _length_and_rest(b)) for a, b in other]
    if not isinstance(adapter, SequenceLikelihood) or any(a[1] != b[1] for a, b in pairs):
        return False
    lengths, fitted = {a[0] for a, _ in pairs}, {b[0] for _, b in pairs}
    return len(fitted) == 1 and lengths == {adapter.padded_length(batch)}


def _without_sizes(sample: str) -> str:
    """The type of a sample and its number of dimensions: (4, 8, 8) float32 as (, , ) float32."""
    shape, end, dtype = sample.partition(")")
    return re.sub(r"\d+", "", shape) + end + dtype


def _length_and_rest(sample: str) -> tuple[int | None, str]:
    """The first number of a shape, and what is without it: (7,) int64 as 7 and (T,) int64."""
    first = re.match(r"\((\d+)", sample)
    return (None, sample) if first is None else (int(first[1]), f"(T{sample[first.end() :]}")


def parameters_of(adapter: Adapter, layers: Layers) -> dict[str, tuple[int, ...]]:
    """Shapes of the chosen parameters, in module order; by default of all that have a gradient."""
    names = Names.of(adapter.module)
    if layers is None:
        every = supported(adapter.module)
        found = (name for name in every if names.weights(name))
        chosen: Callable[[str], bool] = frozenset(found).__contains__
    else:
        chosen = selection(adapter.module, layers, shards=True)
    shapes = {}
    for name, p in stored_weights(adapter.module):
        parts = names.weights(name)
        if chosen(name) and len(parts) < 2:  # what is fused is there under the names of before
            shapes[parts[0].name if parts else name] = tuple(p.shape)
    return shapes


def check_layers(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Refuse a model of other parameters, by name and shape; the first that differs is named.

    Raises:
        ValueError: It is one.
    """
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"Expected a model with the detector's layers, got {name!r} of shape "
                f"{found.get(name, 'missing')} where the detector has "
                f"{expected.get(name, 'none')}: load the model that it was fitted on, or fit "
                "it again."
            )


def warn_of_other_model(fitted: Fitted, adapter: Adapter, *, stacklevel: int) -> None:
    """Tell of weights, a precision or an adapter's arguments other than fitted."""
    found, dtype = digest(adapter.module), str(dtype_of(adapter.module))
    if found != fitted.model:
        other = "" if dtype == fitted.dtype else f", in {fitted.dtype}"
        warnings.warn(
            f"Stale calibration: the detector was fitted on weights {fitted.model}{other}, the "
            f"model has {found}{other and f', in {dtype}'}. Fit it again on held-out data. "
            "[OOD201]",
            stacklevel=stacklevel + 1,
        )
    changed = differences(fitted.provenance.adapter, recipe(adapter))
    if changed:
        told = [f"{name}={a!r}, got {b!r}" for name, (a, b) in changed.items()]
        warnings.warn(
            f"Another adapter: the detector was fitted with {'; '.join(told)}. Its scores mean "
            "something else now: build the adapter as it was. [OOD202]",
            stacklevel=stacklevel + 1,
        )
