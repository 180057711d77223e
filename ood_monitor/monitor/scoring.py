"""From a batch to scores, in which a sample that cannot be scored costs the others nothing.

A model may refuse a batch for one of its samples: a value outside its support, a token that it does
not know. The batch is then cut in halves until that sample is alone. Memory that does not suffice
is no sample's fault: the halves are scored, each by itself. An error of the device ends it all,
since nothing after it can be trusted.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence

import torch

from ood_monitor.adapters.base import Batch, batch_size, map_tensors
from ood_monitor.calibration.scores import Scores
from ood_monitor.detector.detector import Detector
from ood_monitor.gradients.norms import finite_samples
from ood_monitor.modules import Lockstep

__all__ = ["scored"]

_log = logging.getLogger(__name__)

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_OF_MEMORY = ("can't allocate memory", "out of memory")
_OF_A_DEVICE = ("CUDA error", "HIP error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS")

#: Some of B samples, by index.
_Rows = range


def scored(detector: Detector, batch: Batch) -> Scores:
    """Scores of B samples, nan for one that cannot be scored.

    Raises:
        ValueError: An empty batch, or one of other shapes or types than the held-out data.
        Exception: What a model raises for all samples, or for two that it takes one by one.
    """
    with Lockstep(detector.adapter.module).passes():  # which others may need more or fewer of
        detector.check(batch)
        finite = finite_samples(batch)
        if finite.all():
            return _Halving(detector, batch).scores()
        if not finite.any():
            return Scores.none().among(len(finite), [])
        kept = map_tensors(lambda t: t[finite.to(t.device)], batch)
        return _Halving(detector, kept).scores().among(len(finite), finite)


class _Halving:
    """Scores a batch in parts where it cannot be scored as a whole."""

    def __init__(self, detector: Detector, batch: Batch) -> None:
        self._detector, self._batch, self._size = detector, batch, batch_size(batch)
        self._found: list[tuple[_Rows, Scores]] = []
        self._at_fault: dict[int, Exception] = {}

    def scores(self) -> Scores:
        """All that could be scored, nan for the others."""
        everything = range(self._size)
        try:
            return self._detector.score(self._batch)
        except Exception as error:  # of any kind: a model is anybody's code
            if self._size == 1 or _is_of_a_device(error):
                raise
            if _is_of_memory(error):
                self._in_halves(everything)
            else:
                self._search(everything, error)
        return self._joined()

    def _score(self, rows: _Rows) -> None:
        own = map_tensors(lambda t: t[rows.start : rows.stop], self._batch)
        self._found.append((rows, self._detector.score(own)))

    def _in_halves(self, rows: _Rows) -> None:
        """Score two halves, each cut again where memory does not suffice."""
        for half in _halves(rows):
            try:
                self._score(half)
            except Exception as error:
                if len(half) == 1 or not _is_of_memory(error):
                    raise
                self._in_halves(half)

    def _search(self, rows: _Rows, error: Exception) -> None:
        """Score all but the samples that raise, within 2 log2(B) + 1 calls."""
        calls, waiting = 2 * math.ceil(math.log2(self._size)) + 1, deque([(rows, error)])
        while waiting:
            failed, why = waiting.popleft()
            if len(failed) == 1 or calls < 2:
                self._at_fault |= dict.fromkeys(failed, why)
                continue
            calls -= 2
            raised = [(half, self._tried(half)) for half in _halves(failed)]
            if len(failed) == 2 and all(each is None for _, each in raised):
                raise why  # it is of two samples together, as of a model that mixes them
            waiting.extend((half, each) for half, each in raised if each is not None)
        if not self._found:
            raise error  # of all samples: it is the model's
        self._tell()

    def _tried(self, rows: _Rows) -> Exception | None:
        try:
            self._score(rows)
        except Exception as error:
            if _is_of_a_device(error):
                raise
            return error
        return None

    def _tell(self) -> None:
        first, why = min(self._at_fault.items())
        _log.warning(
            "%d of %d samples could not be scored, the first at index %d: %s: %s",
            len(self._at_fault),
            self._size,
            first,
            type(why).__name__,
            why,
        )

    def _joined(self) -> Scores:
        parts = sorted(self._found, key=lambda part: part[0].start)
        rows = [i for own, _ in parts for i in own]
        return Scores.together([scores for _, scores in parts]).among(self._size, rows)


def _halves(rows: _Rows) -> Sequence[_Rows]:
    middle = rows.start + (len(rows) + 1) // 2
    return [range(rows.start, middle), range(middle, rows.stop)]


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, _OUT_OF_MEMORY) or _says(error, _OF_MEMORY)


def _is_of_a_device(error: Exception) -> bool:
    is_accelerators = isinstance(error, torch.AcceleratorError)
    return not _is_of_memory(error) and (is_accelerators or _says(error, _OF_A_DEVICE))


def _says(error: Exception, words: Sequence[str]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
