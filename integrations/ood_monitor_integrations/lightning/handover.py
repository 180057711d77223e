"""What a launched process has learned, on its way to the process that launched it."""

import base64
import json
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ood_monitor.private_files import write_private

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Handover"]

_BYTES = "base64"


class Handover:
    """Brings the state of a callback back from processes that a strategy forks or spawns.

    Under `ddp_spawn`, `ddp_fork` and `ddp_notebook` the whole of `fit` runs in other processes, of
    which Lightning brings back weights and metrics alone. So one of them leaves the state in a
    folder that only this user may read and whose name both know; it goes with the process that made
    this object.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._folder = Path(tempfile.gettempdir()) / f"ood-monitor-{secrets.token_hex(16)}"
        self._taken: tuple[int, int] | None = None
        weakref.finalize(self, _remove, self._folder, self._process)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The copy of a callback is another, which fits a detector of its own."""
        return type(self)()

    def give(self, trainer: "Trainer", state: Mapping[str, Any]) -> None:
        """Leave a state of primitives and bytes, if this process is launched, one of each node.

        Raises:
            OSError: It cannot be written.
        """
        if os.getpid() == self._process or not _is_launched(trainer):
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_private(self._file, json.dumps(state, default=_encoded).encode())

    @property
    def has_taken(self) -> bool:
        """Whether there was something to take."""
        return self._taken is not None

    def take(self) -> dict[str, Any] | None:
        """The state that was left since this was last asked; None if there is none.

        Raises:
            OSError: It cannot be read.
        """
        try:
            found = self._file.stat()
        except FileNotFoundError:
            return None
        which = found.st_ino, found.st_mtime_ns
        if which == self._taken:
            return None
        state: dict[str, Any] = json.loads(self._file.read_bytes(), object_hook=_decoded)
        self._taken = which
        return state

    @property
    def _file(self) -> Path:
        return self._folder / "state.json"


def _is_launched(trainer: "Trainer") -> bool:
    """Whether `fit` runs in a process that ends with it, and this is the first of its node."""
    launcher = trainer.strategy.launcher
    names = {base.__name__ for base in type(launcher).__mro__}
    return "_MultiProcessingLauncher" in names and trainer.local_rank == 0


def _encoded(value: object) -> dict[str, str]:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    raise TypeError(f"Expected a state of primitives and bytes, got {type(value).__name__}.")


def _decoded(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES]) if value.keys() == {_BYTES} else value


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child has it too
        shutil.rmtree(folder, ignore_errors=True)
