"""Calls of scikit-learn that no autologging records: a detector's fits are not its user's.

After ``mlflow.autolog()`` each fit of an estimator is a run, or writes into the active one. MLflow
can switch that off for a process only. So it is told, for the calling thread, that it is off.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from ood_monitor.processes import Lock

__all__ = ["without_autologging"]

#: Where MLflow asks for its settings before it records a call, if it is loaded.
_MLFLOW = "mlflow.utils.autologging_utils"

_is_off: ContextVar[bool] = ContextVar("ood_monitor_autologging_is_off", default=False)
_lock = Lock()
_users = 0


@contextmanager
def without_autologging() -> Iterator[None]:
    """MLflow's autologging is off for what this thread calls within the block.

    Other threads are logged meanwhile, and the user's settings are not touched.
    """
    # First: MLflow sets its autologging up when a library is imported, and must not find it off.
    import sklearn  # noqa: F401

    mlflow, token = sys.modules.get(_MLFLOW), _is_off.set(True)
    try:
        if mlflow is None:
            yield
        else:
            with _asking_us(mlflow):
                yield
    finally:
        _is_off.reset(token)


@contextmanager
def _asking_us(mlflow: ModuleType) -> Iterator[None]:
    """MLflow asks for the calling thread's state before the settings, while there is a user."""
    global _users
    with _lock:
        if not _users:
            mlflow.get_autologging_config = _by_thread(mlflow.get_autologging_config)  # type: ignore[attr-defined]
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                mlflow.get_autologging_config = mlflow.get_autologging_config.__wrapped__  # type: ignore[attr-defined]


def _by_thread(config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(config)
    def answer(flavor_name: str, config_key: str, default_value: Any = None) -> Any:
        if config_key == "disable" and _is_off.get():
            return True
        return config(flavor_name, config_key, default_value)

    return answer
