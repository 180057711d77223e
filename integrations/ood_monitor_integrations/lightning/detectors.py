"""The detector of a LightningModule: given, read from a file or a checkpoint, or fitted."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from ood_monitor import Adapter, Detector, LogLikelihood
from ood_monitor.checks import function, path_of
from ood_monitor.densities.parts import Method
from ood_monitor.detector.plan import checked_method
from ood_monitor.gradients.layers import Layers
from ood_monitor.saving.checkpoints import State, check_there, of_weights, states_of
from ood_monitor_integrations.lightning.sharding import (
    refuse_gradients_of_shards,
    refuse_shards_of_others,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["AdapterLike", "Detectors", "check_method"]

#: An adapter, or a function `(module, x) -> (B,)` that gives log-likelihoods in nats.
AdapterLike: TypeAlias = Adapter | Callable[[nn.Module, Any], Tensor]


class Detectors:
    """Where the detector comes from, and the one in use.

    Args:
        adapter: The model; None for the LightningModule's own.
        given: A detector, the folder of a saved one, or a checkpoint that has one.
        method: Of a detector to be made.
        layers: Likewise.
        name: Of the callback, whose detector a checkpoint is to have.

    Attributes:
        current: The fitted detector in use; None before there is one.
    """

    def __init__(
        self,
        adapter: AdapterLike | None,
        given: str | Path | Detector | None,
        method: Method | None,
        layers: Layers,
        name: str,
    ) -> None:
        if adapter is not None and not isinstance(adapter, Adapter):
            function("adapter", adapter)
        self._adapter, self._method, self._layers, self._name = adapter, method, layers, name
        self._template = given if isinstance(given, Detector) else None
        is_saved = given is not None and self._template is None
        self._saved = path_of("detector", given) if is_saved else None
        self._states: tuple[State, ...] = ()
        is_fitted = self._template is not None and self._template.is_fitted
        self.current = self._template if is_fitted else None

    def check(self, pl_module: "LightningModule") -> None:
        """Refuse what could never be monitored.

        Raises:
            ValueError: The module has no log-likelihood and none was given.
            FileNotFoundError: No detector was saved there.
        """
        self.adapter(pl_module)
        if self._saved is not None:
            check_there(self._saved)

    def adapter(self, pl_module: "LightningModule") -> Adapter:
        """The module as an adapter: the given one, `pl_module.adapter()`, or its `log_prob`."""
        if self._template is not None:
            return self._template.adapter
        if isinstance(self._adapter, Adapter):
            return self._adapter
        if self._adapter is None and callable(own := getattr(pl_module, "adapter", None)):
            return own()  # type: ignore[no-any-return]
        return LogLikelihood(pl_module, self._adapter)

    def new(self, pl_module: "LightningModule") -> Detector:
        """A detector to be fitted."""
        if self._template is not None:
            return _checked(copy.copy(self._template))
        adapter = self.adapter(pl_module)
        return _checked(Detector(adapter, method=self._method, layers=self._layers))

    def ready(self, pl_module: "LightningModule") -> Detector | None:
        """The detector in use, with what a checkpoint or a folder holds; None if there is none.

        Its weights are read, which of shards takes all processes: :meth:`mark` is to be the same.
        """
        groups = None if self._template is None else self._template.groups
        self._look_up()
        if self._states:
            states, self._states = self._states, ()
            adapter = self.adapter(pl_module)
            state = of_weights(states, adapter.module)
            self.current = Detector.from_state_dict(state, adapter, groups=groups)
        return None if self.current is None else _checked(self.current)

    def mark(self) -> bytes:
        """What tells apart what this process would watch with; empty if it has nothing."""
        self._look_up()
        if self._states:
            told = hashlib.sha256()
            for state in self._states:
                told.update(str(state.get("config")).encode())
                told.update(bytes(state.get("tensors", b"")))
            return told.digest()
        return b"" if self.current is None else self.current.fitted.fingerprint.encode()

    def _look_up(self) -> None:
        if not self._states and self.current is None and self._saved is not None:
            self._states = states_of(self._saved, self._name)

    def state_dict(self) -> dict[str, Any]:
        """Of the detector in use, as primitives: the checkpoint still loads as weights only."""
        if self.current is None:
            return dict(self._states[0]) if self._states else {}
        return dict(self.current.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state until the model has its weights."""
        self._states = (state,)


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
