"""Entry points that watch every Trainer of an environment, for those who ask for it.

Lightning calls :func:`callbacks` for each Trainer that is made. Unless ``OOD_MONITOR_DETECTOR``
names the folder of a saved detector, it returns nothing and imports nothing.
"""

import os
import warnings
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "callbacks"]

#: The environment variable that names a saved detector.
VARIABLE = "OOD_MONITOR_DETECTOR"


def callbacks() -> list[Any]:
    """An :class:`~ood_monitor_integrations.lightning.OODMonitor` with the detector, if asked for.

    It watches validation, test and predict, fits nothing, and leaves a model alone that the
    detector is not of.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return []
    if not (Path(folder) / "config.json").is_file():
        warnings.warn(
            f"Expected {VARIABLE} to name a saved detector, got {folder}. [OOD514]", stacklevel=2
        )
        return []
    from ood_monitor_integrations.lightning import OODMonitor

    watch: Any = ("val", "test", "predict")
    callback = OODMonitor(detector=folder, watch=watch, name="autoload", strict=False)
    return [callback]
