"""Fields of a batch that a model ignores, and that cannot be cut by sample: they are left out.

Scoring cuts batches, so that every tensor must have a row for each sample. Loaders yield more: a
temperature, a size that all samples share, names in a list. Whether the adapter uses such a field
is seen, not guessed: it is called with nothing in the batch, and what it asks for is put back until
it asks for no more. What it has not asked for is left out of this batch and of all later ones, and
a later use of it is refused by name (:mod:`~ood_monitor.adapters.left_out`). What it asks for, and
what has no row for each sample, is refused by name at once. Nothing is passed whole: beside some of
the samples it would be another model's input, as all the tokens are beside some of the lengths.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import Adapter, Batch, describe, usable_by
from ood_monitor.adapters.elements import Elements
from ood_monitor.adapters.left_out import LeftOut
from ood_monitor.adapters.nested import map_parts, map_tensors, parts_of, tensors_in
from ood_monitor.modules import Passes, gradless, scored

__all__ = ["without_ignored"]

#: Paths that were left out, by adapter.
_ignored: WeakIdKeyDictionary = WeakIdKeyDictionary()


def without_ignored(adapter: Adapter, batch: Batch) -> Batch:
    """A batch of which each tensor has a row for each sample; the batch itself where that is so.

    The first time that it is not, the adapter is called to see what it uses: at most once for each
    field that it does, and once more.

    Args:
        adapter: The model. What it was seen to ignore is remembered of this object.
        batch: B samples, and fields beside them.

    Returns:
        The batch, with what refuses any use in the place of what is left out.

    Raises:
        ValueError: The adapter uses a field that cannot be cut by sample.
        Exception: What the adapter raises of such a batch.
    """
    known: frozenset[str] = _ignored.get(adapter, frozenset())  # type: ignore[no-untyped-call]
    batch = _without(batch, known, set()) if known else batch
    if isinstance(batch, Tensor) or _can_be_cut(batch):
        return batch
    size, used = _used(adapter, batch)
    found = frozenset(_uncuttable(batch, size, used))
    if refused := [path for path, _ in _leaves(batch) if path in found & used]:
        _refuse(adapter, batch, refused[0], size)
    _ignored[adapter] = known | found
    return _without(batch, found, set())


def _can_be_cut(batch: Batch) -> bool:
    """Whether nothing stands against it; a batch of no tensors is for others to refuse."""
    sizes = {tensor.shape[:1] for tensor in tensors_in(batch)}
    if not sizes:
        return True
    (size, *others) = sizes
    return not others and len(size) == 1 and (size[0] < 2 or not _has_items(batch, size[0]))


def _used(adapter: Adapter, batch: Batch) -> tuple[int, set[str]]:
    """B, and the paths of what an adapter uses."""
    known, used = {path for path, _ in _leaves(batch)}, set[str]()
    while True:
        asked = set[str]()
        try:
            size = _called(adapter, _without(batch, known - used, asked))
        except Exception as error:  # of any kind: of what was left out, or the model's own
            if not asked and used == known:
                _refuse_sizes(batch, error)
                raise
            asked = asked or known - used  # it may have failed of what is not seen to be used
        if not asked:
            return size, used
        used |= asked


def _refuse_sizes(batch: Batch, error: Exception) -> None:
    """Say that a batch has several sizes, and that the model could not be asked what it uses."""
    sizes = {tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim}
    if isinstance(batch, list | tuple) and len(sizes) > 1:
        raise ValueError(
            f"Expected one batch size in all tensors, got shapes "
            f"{[tuple(tensor.shape) for tensor in tensors_in(batch)]}; which of them the model "
            f"uses could not be seen: {type(error).__name__}: {error}"
        ) from error


def _called(adapter: Adapter, batch: Batch) -> int:
    """Call all that an adapter has on a batch; the number of its values."""
    usable = usable_by(adapter.module, batch)

    def called(passes: Passes[Adapter]) -> int:
        view, own = passes.fresh(), partial(map_tensors, torch.clone, usable)
        sizes = [_size(value) for _, value in view.log_likelihood(own())]
        for more in (view.residuals, view.conditions, view.images, view.positions):
            _try(more, own())
        return sizes[0] if sizes else 0

    return scored(lambda passes: gradless(adapter, lambda: called(passes)), adapter, adapter.module)


def _size(value: Tensor | Elements) -> int:
    total = value.total() if isinstance(value, Elements) else value
    return len(total) if isinstance(total, Tensor) and total.ndim else 0


def _try(more: Callable[[Batch], object], batch: Batch) -> None:
    """Call what an adapter may refuse to give; what it uses for that is noted by then."""
    try:
        found = more(batch)
        for _ in found if isinstance(found, Iterator) else ():
            pass
    except (ValueError, RuntimeError):
        pass


def _leaves(value: Batch, path: str = "batch") -> Iterator[tuple[str, Batch]]:
    """Tensors, arrays and lists without tensors, with their places."""
    if type(value) is LeftOut:
        return
    is_list = isinstance(value, list | tuple) and len(value) > 0 and not tensors_in(value)
    if is_list or isinstance(value, Tensor | np.ndarray):
        yield path, value
    else:
        for key, part in parts_of(value):
            yield from _leaves(part, _below(path, value, key))


def _below(path: str, value: Batch, key: object) -> str:
    """The path of a part, as Python would name it."""
    is_keyed = isinstance(value, Mapping | list | tuple)
    return f"{path}[{key!r}]" if is_keyed else f"{path}.{key}"


def _uncuttable(value: Batch, size: int, used: set[str], path: str = "batch") -> list[str]:
    """Paths of what is not cut with B samples."""
    leaves = list(_leaves(value, path))
    if [own for own, _ in leaves] == [path]:
        return [] if _is_cut(value, size) else [path]
    parts = ((_below(path, value, key), part) for key, part in parts_of(value))
    found = [each for below, part in parts for each in _uncuttable(part, size, used, below)]
    is_of_each = isinstance(value, list | tuple) and len(value) == size > 1
    if found and is_of_each and used.isdisjoint(own for own, _ in leaves):
        return [path]  # an item for each sample, such as its boxes
    return found


def _is_cut(leaf: Batch, size: int) -> bool:
    """Whether a leaf is cut with B samples, or has nothing to do with them."""
    if isinstance(leaf, Tensor):
        return leaf.shape[:1] == (size,)
    return size < 2 or not _has_items(leaf, size)


def _has_items(value: Batch, size: int) -> bool:
    """Whether an array or a list without tensors, here or below, has an item for each sample."""
    if type(value) is LeftOut:
        return False
    if isinstance(value, np.ndarray):
        return bool(value.shape[:1] == (size,))
    if isinstance(value, list | tuple) and len(value) == size and not tensors_in(value):
        return True
    return any(_has_items(part, size) for _, part in parts_of(value))


def _without(batch: Batch, paths: Collection[str], used: set[str], path: str = "batch") -> Batch:
    """The batch with :class:`LeftOut` at these places, which notes its use."""
    if type(batch) is LeftOut:
        return batch
    if path in paths:
        return LeftOut(path, used)
    return map_parts(lambda part, key: _without(part, paths, used, _below(path, batch, key)), batch)


def _refuse(adapter: Adapter, batch: Batch, path: str, size: int) -> None:
    (leaf,) = (leaf for own, leaf in _leaves(batch) if own == path)
    raise ValueError(
        f"Expected {type(adapter).__name__} to use fields with a row for each of {size} samples, "
        f"since batches are cut by sample, got a use of {path}, {describe(leaf)}. Give a tensor "
        "with a row for each sample, or keep in the model what is the same for all."
    )
