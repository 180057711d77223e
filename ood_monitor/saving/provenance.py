"""Where a detector comes from: what its adapter says of itself, the base model, the software."""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ood_monitor.adapters.base import Adapter
from ood_monitor.adapters.schedules import NoiseSchedule
from ood_monitor.saving.fingerprints import digest_of_tensors

__all__ = ["Provenance", "differences", "libraries_of", "recipe"]

_KEYS = ("adapter", "base_model", "base_model_revision", "libraries")

#: Where the Hub's cache keeps a repository at a commit.
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")

#: What a recipe has no word for.
_UNSAID: Any = object()

_NUMBERS = bool | int | float

#: Of a list that is told.
_LONGEST = 1000

_LIBRARIES = ("ood-monitor", "torch", "numpy", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Provenance:
    """Facts of how a detector was made; nothing is computed from them.

    Attributes:
        adapter: As :func:`recipe` gives it.
        base_model: Name on the Hub of the model that is watched, or of what it was trained from.
        base_model_revision: Its commit.
        libraries: Versions by distribution, when the detector was fitted.
    """

    adapter: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    base_model_revision: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, adapter: Adapter, terms: tuple[str, ...], conditions: Mapping[str, int] | None = None
    ) -> Self:
        """Of an adapter in this environment.

        Args:
            adapter: The model. One that knows where its samples come from says so as ``origin``.
            terms: Names of its terms, in order.
            conditions: How many different values samples had of what the model was told beside
                them, by name.
        """
        name, revision = _base_model(adapter.module)
        said = recipe(adapter) | {"terms": list(terms)}
        if conditions:
            said["conditions"] = dict(conditions)
        if origin := getattr(adapter, "origin", None):
            said["origin"] = dict(origin)
        return cls(said, name, revision, _libraries(adapter))

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Self:
        """From the settings of a file, which may be older than these."""
        return cls(**{name: settings[name] for name in _KEYS if name in settings})

    def dump(self) -> dict[str, Any]:
        """What is known, as settings of a file."""
        return {name: value for name in _KEYS if (value := getattr(self, name))}


def libraries_of(names: Iterable[str]) -> dict[str, str]:
    """Versions of distributions that are installed here."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def recipe(adapter: Adapter) -> dict[str, Any]:
    """What an adapter says of itself, JSON-able: its class, and its arguments.

    An argument is what the adapter keeps under its name, or under its name after ``_``: numbers,
    flags, lists of them, and text, which for a class of one's own may be a secret and is left out.
    A function or another object is given by its name, unless it is the default, and a small data
    class by its numbers too.
    """
    kind, kept = type(adapter), getattr(adapter, "__dict__", {})
    is_ours = kind.__module__.split(".", 1)[0] in ("ood_monitor", "ood_monitor_integrations")
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        value = kept.get(name, kept.get(f"_{name}", _UNSAID))
        plain = _plain(value)
        is_secret = isinstance(value, str) and not is_ours
        is_default_object = value is parameter.default and isinstance(plain, dict)
        if plain is not _UNSAID and not is_secret and not is_default_object:
            arguments[name] = plain
    return {"class": _name(kind), "arguments": arguments}


def differences(fitted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Arguments of two recipes of one class that are not the same, as (fitted, found).

    Functions and objects are left out: their names may change. So is what only one of them has: it
    is of another version.
    """
    if not fitted or fitted.get("class") != found.get("class"):
        return {}
    a, b = dict(fitted.get("arguments", {})), found["arguments"]
    pairs = {name: (a[name], b[name]) for name in a if name in b and a[name] != b[name]}
    return {
        name: pair
        for name, pair in pairs.items()
        if not any(isinstance(value, dict) and "object" in value for value in pair)
    }


def _plain(value: Any) -> Any:
    """A value as JSON, or ``_UNSAID``."""
    if isinstance(value, NoiseSchedule):
        return _schedule(value)
    if isinstance(value, list | tuple):
        short = len(value) <= _LONGEST and all(isinstance(item, _NUMBERS) for item in value)
        return [_scalar(item) for item in value] if short else _UNSAID
    if value is _UNSAID or isinstance(value, Tensor | nn.Module | type):
        return _UNSAID
    if value is None or isinstance(value, str | torch.dtype | _NUMBERS):
        return _scalar(value)
    own = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else {}
    numbers = {name: _scalar(it) for name, it in own.items() if isinstance(it, _NUMBERS)}
    return {"object": _name(value)} | numbers


def _schedule(schedule: NoiseSchedule) -> dict[str, Any]:
    """Its numbers' digest, and what they do not show; straight lines leave no choice of it."""
    tensors = {name: getattr(schedule, name) for name in ("alpha", "sigma", "t")}
    said: dict[str, Any] = {"levels": len(schedule), "digest": digest_of_tensors(tensors.items())}
    if schedule.is_variance_preserving and schedule.prediction_type != "epsilon":
        said["prediction_type"] = schedule.prediction_type
    if schedule.sigma_data != 1:
        said["sigma_data"] = schedule.sigma_data
    return said


def _scalar(value: Any) -> Any:
    """A value, or its text where JSON has no word for it."""
    is_odd = isinstance(value, torch.dtype) or (isinstance(value, float) and not isfinite(value))
    return str(value) if is_odd else value


def _name(value: Any) -> str:
    """Of a class or a function, or of an object's class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _base_model(module: nn.Module) -> tuple[str | None, str | None]:
    """Name and commit on the Hub, where a model of diffusers or transformers says them."""
    config = getattr(module, "config", None)
    path = str(getattr(config, "_name_or_path", None) or "")
    if found := _SNAPSHOT.search(path):
        return f"{found[1]}/{found[2]}", found[3]
    if not _REPOSITORY.fullmatch(path) or Path(path).exists():
        return None, None  # a folder of this machine, which says nothing elsewhere
    commit = getattr(config, "_commit_hash", None)
    return path, commit if isinstance(commit, str) else None


def _libraries(adapter: Adapter) -> dict[str, str]:
    package = type(adapter.module).__module__.split(".", 1)[0]
    return {name: found for name in (*_LIBRARIES, package) if (found := _version(name))}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # a script, or a checkout on the path
        return None
