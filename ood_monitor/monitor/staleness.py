"""Whether a model still has the weights that a detector was fitted on."""

import logging

from torch import nn

from ood_monitor.saving.fingerprints import digest, marks
from ood_monitor.saving.states import KnownWeights

__all__ = ["Weights"]

_log = logging.getLogger(__name__)


class Weights:
    """A module's weights against the digest of those that a detector was fitted on.

    All bytes are hashed the first time, at about a second per gigabyte on a CPU, and again only
    when :func:`~ood_monitor.saving.fingerprints.marks` says that a tensor is another or was
        written to.

    Args:
        module: The model.
        expected: The :func:`~ood_monitor.saving.digest` of the weights that it should have.

    Attributes:
        in_background: Whether bytes are read in a thread, and the answer is None until they are.
    """

    def __init__(self, module: nn.Module, expected: str) -> None:
        self._module, self._expected = module, expected
        self._marks: int | None = None
        self._is_stale = False
        self.in_background = False

    def are_stale(self) -> bool | None:
        """Whether they are other weights; as before, where they cannot be read. Does not raise."""
        try:
            if self.in_background:
                return self._known_to_be()
            if (seen := marks(self._module)) != self._marks:
                self._is_stale = digest(self._module) != self._expected
                self._marks = seen
        except Exception:  # whatever a sharded, offloaded or foreign tensor raises
            _log.debug("Could not compare the model's weights with the detector's.", exc_info=True)
        return self._is_stale

    def _known_to_be(self) -> bool | None:
        """Whether they are, as far as is known; what is not is read."""
        known = KnownWeights.of(self._module)
        found = known.differ(known.state(self._module), self._expected)
        if found is None:
            known.read_later(self._module, lambda: None)
        else:
            self._is_stale = found
        return found
