"""The detectors of a module in training, by the weights that each is of."""

import hashlib
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ood_monitor import Adapter, Detector
from ood_monitor.checks import path_of
from ood_monitor.densities.parts import Method
from ood_monitor.detector.plan import checked_method
from ood_monitor.gradients.layers import Layers
from ood_monitor.modules import stored_weights
from ood_monitor.saving.checkpoints import (
    State,
    check_there,
    folder_beside,
    of_weights,
    states_of,
)
from ood_monitor.saving.fingerprints import digest, digest_of_tensors
from ood_monitor.saving.fitted import CONFIG, Fitted
from ood_monitor_integrations.training.adapters import WatchedModel
from ood_monitor_integrations.training.rebinding import bound_to
from ood_monitor_integrations.training.sharding import (
    refuse_gradients_of_shards,
    refuse_shards_of_others,
)

__all__ = ["Detectors", "Ready", "check_method"]

#: Detectors that stay at hand; those of older checkpoints are read from their files.
_KEPT = 8


@dataclass(frozen=True)
class Ready:
    """A detector to watch with.

    Attributes:
        detector: On the module that is watched.
        is_stale: Whether the module has other weights than the detector was fitted on.
        is_read: Whether it was read from a file or a state now, which has told of that.
    """

    detector: Detector
    is_stale: bool
    is_read: bool


class Detectors:
    """Where a detector comes from, and which goes with the weights of a module.

    Args:
        model: Says what is watched.
        given: A detector, the folder of a saved one, or a checkpoint that has one.
        method: Of a detector to be made.
        layers: Likewise.
        name: Of the callback, whose detector a checkpoint is to have.
        remedy: How to get one of other weights, in words.

    Attributes:
        model: Says what is watched.
        current: The detector that was in use last; None before there is one.
    """

    def __init__(
        self,
        model: WatchedModel,
        given: str | Path | Detector | None,
        method: Method | None,
        layers: Layers,
        name: str,
        remedy: str,
    ) -> None:
        self.model, self._method, self._layers, self._name = model, method, layers, name
        self._remedy = remedy
        self._adapter: Adapter | None = None
        self._of: weakref.ref[nn.Module] | None = None
        self._template = given if isinstance(given, Detector) else None
        is_saved = given is not None and self._template is None
        self._saved = path_of("detector", given) if is_saved else None
        self._loaded: Detector | None = None
        self._fitted: OrderedDict[str, Detector] = OrderedDict()
        self._states: OrderedDict[str, State] = OrderedDict()
        self._buffers: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        is_fitted = self._template is not None and self._template.is_fitted
        self.current = self._template if is_fitted else None

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is spawned, which has a module of its own."""
        return {**self.__dict__, "_adapter": None, "_of": None}

    @property
    def is_given(self) -> bool:
        """Whether there is a fitted one from outside, which goes before those of checkpoints."""
        is_fitted = self._template is not None and self._template.is_fitted
        return is_fitted or self._saved is not None

    def check(self, module: nn.Module) -> None:
        """Refuse what could never be monitored.

        Raises:
            ValueError: The module has no log-likelihood and none was given.
            FileNotFoundError: No detector was saved there.
        """
        self.model.adapter_for(module)  # not for good: parts may be made after this
        if self._saved is not None:
            check_there(self._saved, self._name)

    def adapter(self, module: nn.Module) -> Adapter:
        """The module's model, the same object each time, with the module's own part in it.

        Raises:
            ValueError: The module has none, or it cannot be told which part of it is meant.
        """
        if self._of is None or self._of() is not module or self._adapter is None:
            self._adapter = bound_to(self.model.adapter_for(module), module)
            self._of = weakref.ref(module)
        return self._adapter

    def new(self, module: nn.Module) -> Detector:
        """A detector to be fitted."""
        adapter = self.adapter(module)
        if self._template is not None:
            return _checked(self._template.on(adapter))
        return _checked(Detector(adapter, method=self._method, layers=self._layers))

    def put(self, detector: Detector) -> None:
        """Keep a detector that was fitted here, which is in use from now on."""
        model, module = detector.fitted.model, detector.adapter.module
        _put(self._fitted, model, detector)
        buffers = {name: buffer.cpu().clone() for name, buffer in module.named_buffers()}
        saved = module.state_dict().keys()
        _put(self._buffers, model, {k: v for k, v in buffers.items() if k in saved})
        self.current = detector

    @property
    def has_any(self) -> bool:
        """Whether there is a detector of some weights, which may be those that are saved."""
        return bool(self._states) or self.current is not None

    def knows(self, model: str) -> bool:
        """Whether there is a detector of weights, by their digest."""
        return model in self._fitted or model in self._states

    def state_of(self, model: str) -> State | None:
        """The detector of weights as primitives, None if there is none.

        Raises:
            ValueError: It is one that no file can hold.
        """
        for detector in (self._fitted.get(model), self.current):
            if detector is not None and detector.fitted.model == model:
                return detector.state_dict()
        return self._states.get(model)

    def state_in_use(self) -> State:
        """Of the detector in use, as primitives; empty if there is none.

        Raises:
            ValueError: As :meth:`state_of`.
        """
        if self.current is not None:
            return self.current.state_dict()
        return next(reversed(self._states.values()), {})

    def load_state_dict(self, state: State) -> None:
        """Keep what a checkpoint has, until a module has its weights.

        Raises:
            ValueError: It is no detector's, or of a newer version.
        """
        fitted, _ = Fitted.parse(state["config"], state["tensors"])
        _put(self._states, fitted.model, state)

    def look_beside(self, checkpoint: str | Path | None) -> None:
        """Keep what stands beside a checkpoint."""
        for path in {Path(checkpoint), Path(checkpoint).resolve()} if checkpoint else ():
            if ((folder := folder_beside(path, self._name)) / CONFIG).is_file():
                self.load_state_dict(states_of(folder, self._name)[0])

    def ready(self, module: nn.Module) -> "Ready | None":
        """The detector to watch a module with, None if there is none.

        It is that of the module's weights that was fitted here; else the one that was given; else
        one from a checkpoint, of these weights if there is any. One that is read warns of others.

        Its weights are read, which of shards takes all processes: :meth:`mark` is to be the same.
        """
        adapter = self.adapter(module)
        model = digest(adapter.module)
        before = self._loaded
        found = self._fitted.get(model) or self._given(adapter)
        is_read = found is not None and found is self._loaded is not before
        if found is None and (state := self._states.get(model) or self._latest_state()):
            found, is_read = Detector.from_state_dict(state, adapter, groups=self._groups), True
        found = found or self.current
        if found is not None and found.adapter.module is not adapter.module:
            found = found.on(adapter)
        self.current = found
        if found is None:
            return None
        return Ready(_checked(found), is_stale=found.fitted.model != model, is_read=is_read)

    def changed(self) -> str:
        """In words, what the model has that the detector in use was not fitted on."""
        assert self.current is not None
        module, model = self.current.adapter.module, self.current.fitted.model
        saved = module.state_dict().keys()
        now = {name: value for name, value in module.named_buffers() if name in saved}
        then = self._buffers.get(model, {})
        if now.keys() == then.keys():
            other = [name for name in now if not torch.equal(now[name].cpu(), then[name])]
            if digest_of_tensors(chain(stored_weights(module), then.items())) == model:
                return f"buffers were written to after the detector was fitted: {', '.join(other)}."
        return (
            "the model has other weights than the detector was fitted on, and no detector of them "
            f"is at hand. {self._remedy}"
        )

    def mark(self) -> bytes:
        """What tells apart what this process would watch with; empty if it has nothing."""
        known = [*self._fitted, *(f"{k} {s.get('config')}" for k, s in self._states.items())]
        if self._template is not None and self._template.is_fitted:
            known.append(self._template.fitted.fingerprint)
        if self._saved is not None:
            known += [str(state.get("config")) for state in states_of(self._saved, self._name)]
        return hashlib.sha256("\n".join(known).encode()).digest() if known else b""

    @property
    def _groups(self) -> Any:
        return None if self._template is None else self._template.groups

    def _given(self, adapter: Adapter) -> Detector | None:
        if self._template is not None and self._template.is_fitted:
            return self._template
        if self._saved is None:
            return None
        if self._loaded is None or self._loaded.adapter.module is not adapter.module:
            state = of_weights(states_of(self._saved, self._name), adapter.module)
            self._loaded = Detector.from_state_dict(state, adapter, groups=self._groups)
        return self._loaded

    def _latest_state(self) -> State | None:
        is_newer = self.current is None and self._states
        return next(reversed(self._states.values())) if is_newer else None


def _put(held: OrderedDict[str, Any], key: str, value: Any) -> None:
    held[key] = value
    held.move_to_end(key)
    while len(held) > _KEPT:
        held.popitem(last=False)


def _checked(detector: Detector) -> Detector:
    module = detector.adapter.module
    refuse_shards_of_others(module)
    refuse_gradients_of_shards(module, takes_gradients=detector.takes_gradients)
    return detector


def check_method(method: Method | None, detector: str | Path | Detector | None) -> None:
    """Refuse a method that is none, or that a detector has of its own.

    Raises:
        ValueError: It is or has.
    """
    checked_method(method, None, None, "tensor")
    if method is not None and detector is not None:
        raise ValueError(
            f"Expected `method=` or a detector, got {method!r} and a detector, which has a method "
            "of its own: give it there, `Detector(adapter, method=...)`."
        )
