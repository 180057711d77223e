"""A detector in `checkpoint-N/`, of the weights that it holds; afterwards that of the best one."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ood_monitor.saving import CONFIG, TENSORS
from ood_monitor.saving.checkpoints import folder_inside, states_of
from ood_monitor.saving.fitted import digest
from ood_monitor_integrations.training.calibration import Calibrator
from ood_monitor_integrations.training.detectors import Detectors
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.options import Policy
from ood_monitor_integrations.transformers.runs import TransformersRun

__all__ = ["Checkpoints"]

_log = logging.getLogger(__name__)

#: The state of the training stream, beside a detector's files.
_STREAMS = "training.json"


class Checkpoints:
    """Calibrates while checkpoints are saved, and puts detectors into them.

    Args:
        policy: Which are to have one; None for the best where a metric decides, else the last.
        calibrator: Fits it.
        detectors: Has those that there are.
        failures: Told of failures.
    """

    def __init__(
        self,
        policy: Policy | None,
        calibrator: Calibrator,
        detectors: Detectors,
        failures: Failures,
    ) -> None:
        self._policy = policy
        self._calibrator, self._detectors, self._failures = calibrator, detectors, failures
        self._saved: dict[str, Path] = {}  # by digest of the weights, the latest that has them
        self._tried: set[str] = set()

    @property
    def calibrates(self) -> bool:
        """Whether anything is calibrated."""
        return self._policy != "never"

    def begin(self, run: TransformersRun) -> dict[str, Any]:
        """Training begins, maybe from a checkpoint; the state of its training stream."""
        assert run.state is not None
        self._saved.clear()
        self._tried.clear()
        if run.state.global_step == 0:
            return {}
        folder = folder_inside(_folder(run), self._failures.name)
        self._look_into(_folder(run))
        try:
            streams: dict[str, Any] = json.loads((folder / _STREAMS).read_text())
        except FileNotFoundError:
            return {}
        return streams

    def save(self, run: TransformersRun, streams: Mapping[str, Any]) -> None:
        """A checkpoint was saved, and the model has its weights: put their detector into it."""
        if not (self.calibrates or self._detectors.has_any or streams):
            return
        model = self._of_now(run, is_due=self.calibrates and self._is_due(run))
        self._saved[model] = _folder(run)
        if run.state is not None and run.state.is_world_process_zero:
            self._write(_folder(run), model, streams)

    def finish(self, run: TransformersRun) -> None:
        """Training has ended, maybe with the best weights: they have a detector, too."""
        state = run.state
        assert state is not None
        if not (self.calibrates or self._detectors.has_any):
            return
        if state.best_model_checkpoint is not None:
            self._look_into(Path(state.best_model_checkpoint))
        model = self._of_now(run, is_due=self.calibrates)
        place = self._saved.get(model)
        if not state.is_world_process_zero:
            return
        if place is not None and place.is_dir() and not self._has_one(place):
            self._write(place, model, {})
        if self.calibrates:
            self._tell_without()

    def _has_one(self, checkpoint: Path) -> bool:
        return (folder_inside(checkpoint, self._failures.name) / CONFIG).is_file()

    def _is_due(self, run: TransformersRun) -> bool:
        """Whether what is saved now is to have a detector."""
        args, state, control = run.args, run.state, run.control
        assert args is not None
        assert state is not None
        assert control is not None
        policy = self._policy or ("best" if args.metric_for_best_model is not None else "last")
        if policy == "every checkpoint":
            return True
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        is_best = state.best_global_step == state.global_step
        return is_last or (policy == "best" and is_best)

    def _of_now(self, run: TransformersRun, *, is_due: bool) -> str:
        """The digest of the weights that the model has, which get a detector if it is due."""
        model = digest(self._detectors.adapter(run.module).module)
        if is_due and model not in self._tried and not self._detectors.knows(model):
            self._tried.add(model)
            with self._failures.contained("was not calibrated and will not watch"):
                self._calibrator.fit(run)
        return model

    def _look_into(self, checkpoint: Path) -> None:
        """Keep the detector of a checkpoint, if it has one."""
        with self._failures.contained("could not read the detector of a checkpoint"):
            if self._has_one(checkpoint):
                for state in states_of(checkpoint, self._failures.name):
                    self._detectors.load_state_dict(state)

    def _write(self, checkpoint: Path, model: str, streams: Mapping[str, Any]) -> None:
        with self._failures.contained("could not put its detector into a checkpoint"):
            state = self._detectors.state_of(model)
            if not checkpoint.is_dir():
                raise FileNotFoundError(f"Expected a folder {checkpoint}, got none.")
            before = os.stat(checkpoint)
            folder = folder_inside(checkpoint, self._failures.name)
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier training
            if state is not None or streams:
                folder.mkdir()
            if state is not None:
                (folder / TENSORS).write_bytes(state["tensors"])
                (folder / CONFIG).write_text(state["config"])
            if streams:
                (folder / _STREAMS).write_text(json.dumps(streams))
            # The Trainer deletes the oldest by the time of their folders.
            os.utime(checkpoint, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _tell_without(self) -> None:
        """Name the checkpoints that are kept and have no detector."""
        kept = [place for place in self._saved.values() if place.is_dir()]
        lacking = [place.name for place in kept if not self._has_one(place)]
        if lacking:
            _log.warning(
                "%s: no detector of their weights have %s. `calibrate='every checkpoint'` makes "
                "one for each, `OODCallback.calibrate` for a model that was loaded. [OOD504]",
                self._failures.name,
                ", ".join(sorted(lacking)),
            )


def _folder(run: TransformersRun) -> Path:
    """The folder of the checkpoint at this step, as the Trainer calls it."""
    assert run.args is not None
    assert run.state is not None
    root = Path(run.args.output_dir or ".")
    name = f"{PREFIX_CHECKPOINT_DIR}-{run.state.global_step}"
    if not run.state.is_hyper_param_search:
        return root / name
    # Each trial has a folder of its own, of which callbacks are not told.
    found = sorted(root.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1] if found else root / name
