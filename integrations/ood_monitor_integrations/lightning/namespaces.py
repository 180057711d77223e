"""The two names that Lightning is installed under, `pytorch_lightning` and `lightning.pytorch`."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["callback_class"]


def callback_class() -> Any:
    """A class that the Trainers of all namespaces installed here take for their own `Callback`.

    Raises:
        ModuleNotFoundError: None is installed.
    """
    found = [import_module(name).Callback for name in _installed()]
    if not found:
        raise ModuleNotFoundError(
            "Expected `pytorch_lightning` or `lightning` to be installed, got neither: "
            "pip install 'ood-monitor[lightning]'."
        )
    return found[0] if len(found) == 1 else type("Callback", tuple(found), {})


def _installed() -> list[str]:
    names = ["pytorch_lightning"] if find_spec("pytorch_lightning") else []
    # A folder of that name, without the subpackage, is somebody else's.
    unified = find_spec("lightning") and find_spec("lightning.pytorch")
    return [*names, "lightning.pytorch"] if unified else names
