"""Whether a model still has the weights that a detector was fitted on."""

import logging
from itertools import chain

from torch import Tensor, nn

from ood_monitor.fitted import digest

__all__ = ["Weights"]

_log = logging.getLogger(__name__)


class Weights:
    """A module's weights against the digest of those that a detector was fitted on.

    All bytes are hashed the first time, at about a second per gigabyte on a CPU, and again only
    when a tensor was replaced, moved or written to since, which a glance at every tensor's address
    and version tells in milliseconds. What is written past autograd, through
    ``tensor.data`` or a NumPy view, is not seen.

    Args:
        module: The model.
        expected: :func:`~ood_monitor.fitted.digest` of the weights that it should have.
    """

    def __init__(self, module: nn.Module, expected: str) -> None:
        self._module, self._expected = module, expected
        self._marks: int | None = None
        self._is_stale = False

    def are_stale(self) -> bool:
        """Whether they are other weights; as before, where they cannot be read. Does not raise."""
        try:
            if (marks := _marks(self._module)) != self._marks:
                self._is_stale = digest(self._module) != self._expected
                self._marks = marks
        except Exception:  # whatever a sharded, offloaded or foreign tensor raises
            _log.debug("Could not compare the model's weights with the detector's.", exc_info=True)
        return self._is_stale


def _marks(module: nn.Module) -> int:
    tensors = chain(module.named_parameters(), module.named_buffers())
    return hash(tuple((name, id(t), t.data_ptr(), _version(t)) for name, t in tensors))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
