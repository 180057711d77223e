"""How a logged detector is built again: its adapter by a function, its weights from safetensors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from mlflow.utils.model_utils import _get_flavor_configuration
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ood_monitor import Adapter, Detector
from ood_monitor.checks import flag, path_of
from ood_monitor.importing import imported
from ood_monitor_integrations.mlflow.inputs import Inputs

__all__ = ["DETECTOR", "FLAVOR_NAME", "Recipe", "recipe_of", "save_weights"]

#: What MLflow calls models that are a detector.
FLAVOR_NAME = "ood_monitor"
DETECTOR = "detector"

_WEIGHTS, _FILES = "weights.safetensors", "files"

#: What a function of groups says that it returns.
_GROUPS = (Tensor, Sequence)


@dataclass(frozen=True)
class Recipe:
    """How to build a detector again, as a flavour's settings in ``MLmodel``."""

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    weights: str | None = None
    groups: str | None = None
    structure: str = "tensor"
    names: list[str] = field(default_factory=list)
    fingerprint: str = ""

    @classmethod
    def of(cls, folder: Path) -> "Recipe":
        """That of a model's folder."""
        settings = _get_flavor_configuration(str(folder), FLAVOR_NAME)
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})

    def detector(self, folder: Path) -> Detector:
        """The detector that it is of, with its model.

        Raises:
            ValueError: A damaged file, or a function that is gone or builds another model.
            TypeError: The function does not say that it returns an adapter, or gives none.
        """
        paths = {name: str(folder / path) for name, path in self.files.items()}
        adapter = imported(self.factory, Adapter)(**self.arguments, **paths)
        if not isinstance(adapter, Adapter):
            kind = type(adapter).__name__
            raise TypeError(f"Expected {self.factory} to give an Adapter, got {kind}.")
        if self.weights is not None:
            _load_weights(adapter.module, folder / self.weights, self.factory)
        groups = None if self.groups is None else imported(self.groups, *_GROUPS)
        return Detector.from_pretrained(folder / DETECTOR, adapter, groups=groups)


def recipe_of(
    detector: Detector,
    factory: str,
    arguments: Mapping[str, Any] | None,
    files: Mapping[str, Any] | None,
    weights: bool,
    groups: str | None,
    inputs: Inputs,
) -> Recipe:
    """The recipe of a detector; arguments as those of :func:`flavour.save_model`.

    Raises:
        TypeError: A function that does not say that it returns an adapter, or groups.
        ValueError: A function that cannot be imported, arguments that are no JSON or come twice, or
            groups without their function.
    """
    if (groups is None) != (detector.groups is None):
        raise ValueError(
            f"Expected `groups` as 'package.module:function' if and only if the detector has any, "
            f"got {groups!r}."
        )
    imported(factory, Adapter)
    if groups is not None:
        imported(groups, *_GROUPS)
    weights = flag("weights", weights)
    for name, source in (files or {}).items():
        path_of(f"files[{name!r}]", source)
    given = dict(arguments or {})
    try:
        plain = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected JSON-able arguments of {factory}, got {error}.") from error
    if common := sorted(plain.keys() & dict(files or {}).keys()):
        raise ValueError(f"Expected each keyword of {factory} once, got {common} twice.")
    return Recipe(
        factory=factory,
        arguments=plain,
        files={name: f"{_FILES}/{name}" for name in files or {}},
        weights=_WEIGHTS if weights else None,
        groups=groups,
        structure=inputs.structure,
        names=list(inputs.names),
        fingerprint=detector.fitted.fingerprint,
    )


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights and persistent buffers as safetensors.

    Raises:
        ValueError: It has a state that is no tensor.
    """
    state = module.state_dict()
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"Expected weights that are tensors, got others: {others}.")
    # Copies, since tensors that share memory cannot be saved; they share it again when loaded.
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, path
    )


def _load_weights(module: nn.Module, path: Path, factory: str) -> None:
    try:
        saved = load_file(path)
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            if name in saved:  # in the precision that it was saved in
                tensor.data = tensor.data.to(saved[name].dtype)
        module.load_state_dict(saved)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path}: Expected weights of what {factory} builds, got {error}"
        ) from error
