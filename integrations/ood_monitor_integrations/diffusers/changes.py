"""Changes of a denoiser since the fit: found without a wait, and told once a state."""

import logging
import weakref
from dataclasses import dataclass, field

from torch import nn

from ood_monitor import Monitor
from ood_monitor.processes import Lock
from ood_monitor.saving.fingerprints import marks
from ood_monitor.saving.states import KnownWeights, State
from ood_monitor_integrations.diffusers.denoisers import original_of
from ood_monitor_integrations.diffusers.deployment import settings_of
from ood_monitor_integrations.diffusers.groups import adapters_in
from ood_monitor_integrations.diffusers.replay import ReplayedBound

__all__ = ["Changes"]

_log = logging.getLogger(__name__)

#: Calls after which weights are looked at that show no change: they may have been written to past
#: autograd.
_EVERY = 16

#: States that are told of, after which no more are.
_MOST = 100


@dataclass
class _Told:
    """The states that were told of, each with its settings, and what was seen last.

    Attributes:
        states: Likewise.
        seen: Marks and settings of the last look.
        looks: How many there were.
    """

    states: list[tuple[str, State]] = field(default_factory=list)
    seen: tuple[int, str] | None = None
    looks: int = 0

    def is_seen(self, seen: tuple[int, str]) -> bool:
        """Whether nothing shows a change, and it is not yet time to look whether one hides."""
        self.looks += 1
        is_same, self.seen = self.seen == seen, seen
        return is_same and self.looks % _EVERY > 0

    def is_new(self, settings: str, state: State) -> bool:
        """Whether a state was not told of before; it is now."""
        if len(self.states) >= _MOST:
            return False
        if any(settings == other and state.is_like(its) for other, its in self.states):
            return False
        self.states.append((settings, state))
        return True


#: By monitor: several pipelines may share one, as those of single requests do.
_told: weakref.WeakKeyDictionary[Monitor, _Told] = weakref.WeakKeyDictionary()
_lock = Lock()


class Changes:
    """Whether a denoiser is as it was when a detector was fitted.

    Args:
        denoiser: As `torch.compile` may have wrapped it.
        monitor: What is told of changes once. Where its detector has a group for each state of the
            adapters (LoRA's), these are no change, and weights are compared in the fit's state.
    """

    def __init__(self, denoiser: nn.Module, monitor: Monitor) -> None:
        module, adapter = original_of(denoiser), monitor.detector.adapter
        self._monitor, self._are_groups = monitor, monitor.detector.fitted.groups_of_adapter
        if isinstance(adapter, ReplayedBound):
            self._settings = adapter.own_settings if self._are_groups else adapter.settings
            self._adapters = adapter.adapters
        else:
            self._settings, self._adapters = self._found(module), adapters_in(module)
        if KnownWeights.of(module).is_empty:  # the costly look, before a request waits for it
            KnownWeights.of(module).digest(module)

    def _found(self, module: nn.Module) -> str:
        return settings_of(module, with_adapters=not self._are_groups)

    def _is_other_group(self, module: nn.Module) -> bool:
        return self._are_groups and adapters_in(module) != self._adapters

    def are_there(self, denoiser: nn.Module) -> bool:
        """Whether it is not as it was; all weights are read if they may be others."""
        module = original_of(denoiser)
        if self._found(module) != self._settings:
            return True
        if self._is_other_group(module):
            return False
        known, expected = KnownWeights.of(module), self._monitor.detector.fitted.model
        found = known.differ(known.state(module), expected)
        return known.digest(module) != expected if found is None else found

    def tell(self, denoiser: nn.Module) -> None:
        """Log a state that is not as at the fit, once; later, where weights must be read for it."""
        module = original_of(denoiser)
        settings = self._found(module)
        with _lock:
            if _told.setdefault(self._monitor, _Told()).is_seen((marks(module), settings)):
                return
        state, name = KnownWeights.of(module).state(module), type(module).__name__
        if settings != self._settings:
            self._log(name, settings, state)
            return
        if self._is_other_group(module):
            return
        known, expected = KnownWeights.of(module), self._monitor.detector.fitted.model

        def differs() -> bool | None:
            return known.differ(state, expected)

        def tell_if_it_does() -> None:
            if differs():
                self._log(name, settings, state)

        if differs() is None:
            known.read_later(module, tell_if_it_does)
        else:
            tell_if_it_does()

    def _log(self, name: str, settings: str, state: State) -> None:
        with _lock:
            is_new = _told.setdefault(self._monitor, _Told()).is_new(settings, state)
        if is_new:
            _log.warning(
                "Stale calibration: %s is not as it was when the detector was fitted. Fit it again "
                "on held-out data. [OOD201]",
                name,
            )
