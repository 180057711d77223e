"""A detector for each checkpoint: in it, or in a folder beside it, and of the weights it holds."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ood_monitor.saving import CONFIG, TENSORS
from ood_monitor.saving.checkpoints import State, folder_beside
from ood_monitor.saving.fitted import digest
from ood_monitor_integrations.lightning.runs import LightningRun
from ood_monitor_integrations.lightning.training_end import ends_training, is_last_validation
from ood_monitor_integrations.training.calibration import Calibrator
from ood_monitor_integrations.training.detectors import Detectors
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.options import Policy
from ood_monitor_integrations.training.swapping import holding, places

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Checkpoints"]

#: Why a checkpoint has none.
_REASONS: Mapping[Policy, str] = {
    "best": "the monitored value had not improved",
    "every checkpoint": "the weights that it holds were not at hand after it was saved",
    "last": "it was not the last",
}

#: In the place of a digest, of weights that the module has no longer.
_MOVED_ON = "moved on"


@dataclass(frozen=True)
class _Saved:
    """A checkpoint on its way to a file, which later hooks may give other weights.

    Attributes:
        checkpoint: What is saved.
        seen: The places of its weights when they were looked at.
        model: Digest of these.
        is_due: Whether it was to have a detector.
    """

    checkpoint: Mapping[str, Any]
    seen: tuple[tuple[str, int], ...]
    model: str
    is_due: bool


@dataclass(frozen=True)
class _File:
    """A file that was written.

    Attributes:
        stamp: What changes when it is written again.
        model: Digest of its weights; None where they are not known.
        has_detector: Whether there is one of these weights, in it or beside it.
    """

    stamp: tuple[int, int, int]
    model: str | None
    has_detector: bool


class Checkpoints:
    """Calibrates while checkpoints are saved, and knows in the end which of them have a detector.

    Args:
        policy: Which are to have one; None for the best where a value is monitored, else the last.
        calibrator: Fits it.
        detectors: Has those that there are.
        failures: Told of failures.
        key: Of the callback's state in a checkpoint.
    """

    def __init__(
        self,
        policy: Policy | None,
        calibrator: Calibrator,
        detectors: Detectors,
        failures: Failures,
        key: str,
    ) -> None:
        self._policy, self._key = policy, key
        self._calibrator, self._detectors, self._failures = calibrator, detectors, failures
        self._best: dict[int, tuple[str, float | None]] = {}
        self._clear()

    @property
    def calibrates(self) -> bool:
        """Whether anything is calibrated."""
        return self._policy != "never"

    def begin(self, trainer: "Trainer") -> None:
        """Training begins; files that are there are none of its own."""
        self._clear()
        self._best = self._bests(trainer)
        self._saved_weights_only(trainer)  # those of an earlier training
        for path in _kept(trainer):
            if (stamp := _stamp(path)) is not None:
                self._files[path] = _File(stamp, None, False)

    def _clear(self) -> None:
        self._pending: list[_Saved] = []
        self._light: dict[int, int] = {}
        self._files: dict[str, _File] = {}
        self._tried: dict[str, str] = {}  # why weights have no detector, by their digest

    def save(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule | None",
        checkpoint: dict[str, Any],
        *,
        calibrate: bool,
    ) -> None:
        """Put a detector of its weights into a checkpoint, if it is to have one; no other one.

        Without a module, whose weights nobody can look at now, there is none.
        """
        entry: dict[str, Any] = checkpoint.setdefault("callbacks", {}).setdefault(self._key, {})
        for name in ("config", "tensors"):  # of the detector in use, be it of these weights or not
            entry.pop(name, None)
        if pl_module is None or not (self.calibrates or self._detectors.has_any):
            return
        is_due = calibrate and self._is_due(trainer)
        weights = checkpoint["state_dict"]
        model = self._of_weights(trainer, pl_module, weights, is_due=is_due)
        entry |= self._state_of(model)
        self._pending.append(_Saved(checkpoint, places(weights), model, is_due))

    def settle(self, trainer: "Trainer", pl_module: "LightningModule", *, calibrate: bool) -> None:
        """See what became of checkpoints that were saved since, before weights move on."""
        light = self._saved_weights_only(trainer)
        if not (self._pending or light):
            return
        pending, self._pending = self._pending, []
        with self._failures.contained("could not look at a checkpoint"):
            full = self._settled(trainer, pl_module, pending, calibrate=calibrate)
            alone: dict[str, str] = {}
            is_due = bool(light) and calibrate and self._is_due(trainer)
            for paths in light:
                alone |= self._of_files(trainer, pl_module, paths, is_due=is_due)
            if trainer.is_global_zero:
                self._look_at_files(trainer, full, alone)

    def finish(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Training has ended: its weights have a detector, too, unless none was asked for."""
        self.settle(trainer, pl_module, calibrate=True)
        if self.calibrates:
            with self._failures.contained("was not calibrated and will not watch"):
                self._of_now(trainer, pl_module, is_due=True)

    def name_those_without(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Warn of the checkpoints that are kept and have no detector of their weights."""
        self.settle(trainer, pl_module, calibrate=False)
        if not (self.calibrates and trainer.is_global_zero):
            return
        found = {path: file for path, file in self._files.items() if _stamp(path)}
        lacking = {p: f.model for p, f in found.items() if f.model and not f.has_detector}
        if lacking:
            told = (f"{p} ({self._reason(trainer, model)})" for p, model in lacking.items())
            warnings.warn(
                f"{self._failures.name}: no detector of their weights have "
                f'{", ".join(sorted(told))}. `calibrate="every checkpoint"` makes one for each, '
                "`OODMonitor.calibrate` for a model that was loaded. [OOD504]",
                stacklevel=2,
            )

    def _reason(self, trainer: "Trainer", model: str) -> str:
        if model == _MOVED_ON:
            return _REASONS["every checkpoint"]
        return self._tried.get(model) or _REASONS[self._when(trainer)]

    def _when(self, trainer: "Trainer") -> Policy:
        return self._policy or ("best" if self._bests(trainer) else "last")

    def _is_due(self, trainer: "Trainer") -> bool:
        """Whether what is saved now is to have a detector."""
        policy = self._when(trainer)
        best, self._best = self._best, self._bests(trainer)
        if policy in ("never", "every checkpoint"):
            return policy != "never"
        is_better = policy == "best" and best != self._best
        return is_better or ends_training(trainer) or is_last_validation(trainer)

    def _bests(self, trainer: "Trainer") -> dict[int, tuple[str, float | None]]:
        """Path and value of the best checkpoint, of each callback that monitors a value."""
        found = {}
        for number, callback in enumerate(trainer.checkpoint_callbacks):
            if getattr(callback, "monitor", None) is not None:
                score = getattr(callback, "best_model_score", None)
                path = getattr(callback, "best_model_path", "")
                found[number] = path, None if score is None else float(score)
        return found

    def _of_now(self, trainer: "Trainer", pl_module: "LightningModule", *, is_due: bool) -> str:
        """The digest of the weights that the module has, which get a detector if it is due."""
        model = digest(self._detectors.adapter(pl_module).module)
        if is_due and model not in self._tried and not self._detectors.knows(model):
            self._tried[model] = "it could not be calibrated"
            try:
                self._calibrator.fit(LightningRun(trainer, pl_module))
                del self._tried[model]
            except Exception as error:  # the training must not end on a monitor's account
                self._tried[model] = f"{type(error).__name__}: {error}"
                self._failures.tell("was not calibrated and will not watch", error)
        return model

    def _state_of(self, model: str) -> State:
        try:
            return self._detectors.state_of(model) or {}
        except ValueError as error:
            self._tried[model] = "no file can hold its detector"
            self._failures.tell("has a detector that no checkpoint can hold", error)
            return {}

    def _settled(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        pending: list[_Saved],
        *,
        calibrate: bool,
    ) -> tuple[str, bool]:
        """The digest of the weights that were saved last, and whether their detector is inside."""
        model, is_inside = "", False
        for saved in pending:
            model, weights = saved.model, saved.checkpoint["state_dict"]
            if places(weights) != saved.seen:  # a hook of the module has put in others
                due = calibrate and saved.is_due
                model = self._of_weights(trainer, pl_module, weights, is_due=due)
            entry = saved.checkpoint.get("callbacks", {}).get(self._key, {})
            is_inside = model == saved.model and "config" in entry
        return model, is_inside

    def _of_weights(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        weights: Mapping[str, Any],
        *,
        is_due: bool,
    ) -> str:
        """:meth:`_of_now`, of weights that the module may have no longer, or not have at all."""
        try:
            with holding(pl_module, weights):
                return self._of_now(trainer, pl_module, is_due=is_due)
        except Exception as error:  # the training must not end on a monitor's account
            unknown = f"unknown {len(self._tried)}"
            self._tried[unknown] = str(error)
            return unknown

    def _saved_weights_only(self, trainer: "Trainer") -> list[list[str]]:
        """By callback, the files that it has written since with weights alone, untold by a hook."""
        found = []
        for number, callback in enumerate(trainer.checkpoint_callbacks):
            step = getattr(callback, "_last_global_step_saved", 0)
            if getattr(callback, "save_weights_only", False) and step != self._light.get(number, 0):
                self._light[number] = step
                found.append([path for path in _paths(callback) if self._is_new(path)])
        return found

    def _is_new(self, path: str) -> bool:
        stamp, known = _stamp(path), self._files.get(path)
        return stamp is not None and (known is None or known.stamp != stamp)

    def _of_files(
        self, trainer: "Trainer", pl_module: "LightningModule", paths: list[str], *, is_due: bool
    ) -> dict[str, str]:
        """By file, the digest of its weights, which get a detector if it is due."""
        if trainer.world_size > 1:  # others may not see the files, and all are to do the same
            model = self._of_now(trainer, pl_module, is_due=is_due)
            paths = paths if trainer.is_global_zero else []
            same = {path: _is(pl_module, _weights_in(path)) for path in paths}
            return {path: model if same[path] else _MOVED_ON for path in paths}
        found = {}
        for path in paths:
            try:
                weights = _weights_in(path)
            except Exception as error:  # a file of another form, or gone
                found[path] = f"unknown {len(self._tried)}"
                self._tried[found[path]] = str(error)
                continue
            if _is(pl_module, weights):
                found[path] = self._of_now(trainer, pl_module, is_due=is_due)
            else:
                found[path] = self._of_weights(trainer, pl_module, weights, is_due=is_due)
        return found

    def _look_at_files(
        self, trainer: "Trainer", full: tuple[str, bool], alone: Mapping[str, str]
    ) -> None:
        """Note what was written, and put detectors beside what has none inside."""
        for callback in trainer.checkpoint_callbacks:
            is_light = getattr(callback, "save_weights_only", False)
            for path in filter(self._is_new, _paths(callback)):
                stamp = _stamp(path)
                assert stamp is not None
                model, has = (alone.get(path, _MOVED_ON), False) if is_light else full
                has = has or self._write_beside(path, model)
                self._files[path] = _File(stamp, model, has)
        for path in [path for path in self._files if _stamp(path) is None]:
            del self._files[path]
            _clear(self._folder(path))

    def _folder(self, path: str) -> Path:
        return folder_beside(Path(path), self._failures.name)

    def _write_beside(self, path: str, model: str) -> bool:
        """Whether there is a detector of these weights, which stands beside them now."""
        folder = self._folder(path)
        _clear(folder)  # of weights that the file had before
        state = self._state_of(model)
        try:
            if state:
                folder.mkdir(exist_ok=True)
                (folder / TENSORS).write_bytes(state["tensors"])
                (folder / CONFIG).write_text(state["config"])
        except OSError as error:
            self._tried[model] = f"its detector could not be written: {error}"
            return False
        return bool(state)


def _clear(folder: Path) -> None:
    """Take a detector away; what else is in its folder is somebody's."""
    for name in (CONFIG, TENSORS):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _kept(trainer: "Trainer") -> Iterator[str]:
    """The files that the Trainer's checkpoint callbacks keep."""
    yield from dict.fromkeys(p for c in trainer.checkpoint_callbacks for p in _paths(c))


def _paths(callback: Any) -> Iterator[str]:
    """The files that one keeps, links followed."""
    names = ("best_model_path", "last_model_path", "_last_checkpoint_saved")
    named = [getattr(callback, name, "") for name in names]
    paths = [*getattr(callback, "best_k_models", {}), *named]
    yield from dict.fromkeys(os.path.realpath(path) for path in paths if path)


def _stamp(path: str) -> tuple[int, int, int] | None:
    """None of a file that is not there, or on no local disk."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _weights_in(path: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return found


def _is(pl_module: "LightningModule", weights: Mapping[str, Any]) -> bool:
    """Whether a module has these weights."""
    own = pl_module.state_dict()
    return weights.keys() == own.keys() and all(
        torch.equal(value, own[name].cpu()) if isinstance(value, torch.Tensor) else True
        for name, value in weights.items()
    )
