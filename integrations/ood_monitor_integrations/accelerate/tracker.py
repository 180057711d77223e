"""A tracker of files: figures as lines of JSON, which any thread and any tool may read or write."""

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker

from ood_monitor.checks import path_of

__all__ = ["FileTracker"]


class FileTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no annotations
    """Writes what is logged to a folder, from the main process, and from any of its threads.

    ::

        accelerator = Accelerator(log_with=[FileTracker("runs/1")])

    ``metrics.jsonl`` has a line for each call of `accelerator.log`, with its ``"step"``;
    ``config.json`` what `init_trackers` was given; alerts lie in ``ood/alerts``. A line is written
    whole and reaches the disk before `log` returns. A number that is not finite is null.

    Args:
        folder: Made if need be; what is there is added to.
    """

    name = "files"
    requires_logging_directory = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = path_of("folder", folder)
        self._lock = threading.Lock()
        super().__init__()

    @property
    def tracker(self) -> Path:
        """The folder."""
        return self.folder

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        self.write("config.json", json.dumps(_finite(values), indent=2, default=str))

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Add a line to ``metrics.jsonl``.

        Raises:
            OSError: It cannot be written.
        """
        if not PartialState().is_main_process:
            return
        line = json.dumps({"step": step, **_finite(values)}, default=str)
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def write(self, place: str, words: str) -> None:
        """Write a file of the folder.

        Raises:
            OSError: It cannot be written.
        """
        if not PartialState().is_main_process:
            return
        with self._lock:
            path = self.folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(words, encoding="utf-8")


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and NumPy's scalars as numbers, and none that JSON has not."""
    found = {name: getattr(value, "item", lambda v=value: v)() for name, value in values.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }
