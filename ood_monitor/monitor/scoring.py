"""From a batch to scores, in which a sample that cannot be scored costs the others nothing.

A model may refuse a batch for one of its samples: a value outside its support, a token that it does
not know. The batch is then cut in halves until such samples are alone. Memory that does not suffice
is no sample's fault: the halves are scored, each by itself. An error of the device ends it all,
since nothing after it can be trusted.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from ood_monitor.adapters.base import Batch, batch_size, map_tensors
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.calibration.scores import Scores
from ood_monitor.detector.detector import Detector
from ood_monitor.gradients.norms import finite_samples
from ood_monitor.modules import Lockstep

__all__ = ["first_sound", "scored"]

_log = logging.getLogger(__name__)

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_OF_MEMORY = ("can't allocate memory", "out of memory")
#: Torch 2.6 has no class for them.
_ACCELERATORS = getattr(torch, "AcceleratorError", ())
_OF_A_DEVICE = ("CUDA error", "HIP error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS")

#: Some of B samples, by index.
_Rows = range


def scored(detector: Detector, batch: Batch, good: Batch | None = None) -> Scores:
    """Scores of B samples, nan for one that cannot be scored.

    Args:
        detector: Scores them.
        batch: The samples.
        good: A sample that was scored before. Where all samples of a batch raise, it tells a model
            that is broken from samples that are all at fault.

    Raises:
        ValueError: An empty batch, or one of other shapes or types than the held-out data.
        Exception: What all samples raise and the good one does too, or none is known; or what two
            samples raise that can be scored one by one.
    """
    with Lockstep(detector.adapter.module).passes():  # which others may need more or fewer of
        detector.check(batch)
        given, batch = batch, without_ignored(detector.adapter, batch)
        finite = finite_samples(batch)
        if finite.all():
            return _Halving(detector, batch, good, given).scores()
        if not finite.any():
            return Scores.none().among(len(finite), [])
        kept = map_tensors(lambda t: t[finite.to(t.device)], batch)
        return _Halving(detector, kept, good, kept).scores().among(len(finite), finite)


def first_sound(batch: Batch, scores: Scores) -> Batch | None:
    """A copy of the first sample with a score, a batch of one; None if there is none."""
    rows = scores.valid.nonzero().flatten()[:1]
    if not len(rows):
        return None
    return map_tensors(lambda t: t[rows.to(t.device)].detach().clone(), batch)


class _Halving:
    """Scores a batch in parts where it cannot be scored as a whole."""

    def __init__(self, detector: Detector, batch: Batch, good: Batch | None, whole: Batch) -> None:
        self._detector, self._batch, self._good = detector, batch, good
        self._whole = whole  # with fields that are not cut, of which groups may be told
        self._size = batch_size(batch)
        self._found: list[tuple[_Rows, Scores]] = []
        self._at_fault: dict[int, Exception] = {}
        self._pairs: dict[_Rows, Exception] = {}

    def scores(self) -> Scores:
        """All that could be scored, nan for the others."""
        waiting, failed = deque([range(self._size)]), 0
        while waiting:
            rows = waiting.popleft()
            error = self._tried(rows)
            if error is None:
                continue
            waiting.extend(self._after(rows, error))
            failed += not _is_of_memory(error)
            if failed == math.ceil(2 * math.log2(self._size)) + 2 and not self._found:
                self._check_model(error)  # as many calls find one sample among the others
        self._check_samples()
        return self._joined()

    def _tried(self, rows: _Rows) -> Exception | None:
        """Score some of the samples; what they raised, but for an error of the device."""
        own = self._whole if len(rows) == self._size else self._some(rows)
        try:
            self._found.append((rows, self._detector.score(own)))
        except Exception as error:  # of any kind: a model is anybody's code
            if _is_of_a_device(error):
                raise
            return error
        return None

    def _after(self, rows: _Rows, error: Exception) -> Sequence[_Rows]:
        """What is to be scored in place of samples that raised."""
        if _is_of_memory(error):
            if len(rows) == 1:
                raise error
            return _halves(rows)
        if len(rows) == 1:
            self._at_fault[rows.start] = error
            return ()
        if len(rows) == 2:
            self._pairs[rows] = error
        return _halves(rows)

    def _check_samples(self) -> None:
        """Blame samples for what was raised only if others, or a known one, are sound."""
        for pair, error in self._pairs.items():
            if not self._at_fault.keys() & set(pair):
                raise error  # it is of two samples together, as of a model that mixes them
        if self._at_fault:
            if not self._found:
                self._check_model(self._at_fault[0])
            self._tell()

    def _check_model(self, error: Exception) -> None:
        """Raise what all samples raised, unless one that was scored before still can be."""
        for good in self._sound():
            try:
                self._detector.score(good)
            except Exception:  # of any kind, as above
                continue
            return
        raise error from None

    def _sound(self) -> Iterator[Batch]:
        """A sample that was scored before; else some of these, which may be sound."""
        if self._good is not None:
            yield self._good
        elif len(self._at_fault) < self._size:
            step = math.ceil(self._size / (1 + math.log2(self._size)))
            yield from (self._some(range(i, i + 1)) for i in range(0, self._size, step))

    def _some(self, rows: _Rows) -> Batch:
        return map_tensors(lambda t: t[rows.start : rows.stop], self._batch)

    def _tell(self) -> None:
        first, why = min(self._at_fault.items())
        _log.warning(
            "%d of %d samples could not be scored, the first at index %d: %s: %s [OOD301]",
            len(self._at_fault),
            self._size,
            first,
            type(why).__name__,
            why,
        )

    def _joined(self) -> Scores:
        parts = sorted(self._found, key=lambda part: part[0].start)
        if len(parts) == 1 and len(parts[0][0]) == self._size:
            return parts[0][1]
        rows = [i for own, _ in parts for i in own]
        return Scores.together([scores for _, scores in parts]).among(self._size, rows)


def _halves(rows: _Rows) -> Sequence[_Rows]:
    middle = rows.start + (len(rows) + 1) // 2
    return [range(rows.start, middle), range(middle, rows.stop)]


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, _OUT_OF_MEMORY) or _says(error, _OF_MEMORY)


def _is_of_a_device(error: Exception) -> bool:
    is_accelerators = isinstance(error, _ACCELERATORS)
    return not _is_of_memory(error) and (is_accelerators or _says(error, _OF_A_DEVICE))


def _says(error: Exception, words: Sequence[str]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
