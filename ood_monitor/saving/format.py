"""What a detector's files may hold: settings and arrays that fit each other.

A checksum finds damage, not intent: whoever edits a file can make a new one. So whatever is read is
looked at before anything is made of it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from ood_monitor.adapters.base import SampleKind
from ood_monitor.densities import DENSITIES
from ood_monitor.densities.columns import FLOORS
from ood_monitor.densities.features import layer_of
from ood_monitor.densities.parts import CHOSEN, KINDS, OF_SQUARES, Method
from ood_monitor.gradients import Granularity

__all__ = ["check_arrays", "check_settings", "sample_of", "strict_json"]

#: A size by its number, or by a letter that stands for one number within a file.
_Shape: TypeAlias = tuple[int | str, ...]

_SAMPLE = re.compile(r"\(((?:\d+(?:, \d+)*,?)?)\) torch\.(\w+)")


def strict_json(text: str | bytes) -> Any:
    """The value of a JSON text in which no key comes twice and no number is not finite.

    Raises:
        ValueError: It is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key twice among {[key for key, _ in pairs][:20]}")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant}, which is no JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error


def sample_of(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape, without B, and type of a tensor from their text, as ``"(1, 8, 8) torch.float32"``.

    Raises:
        ValueError: Another text.
    """
    found = _SAMPLE.fullmatch(text)
    dtype = getattr(torch, found[2], None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise ValueError(f"Expected a shape and a type of torch, got {text!r}.")
    return tuple(int(size) for size in found[1].replace(",", " ").split()), dtype


@dataclass(frozen=True)
class _Rule:
    """What a setting must be, and how that is said."""

    holds: Callable[[Any], bool]
    told: str
    required: bool = True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any, low: int = 0) -> bool:
    return type(value) is int and low <= value < 2**63


def _are_names(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return texts and len(set(value)) == len(value)


def _is_mapping(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(of, value.values()))


def _is_share(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value < high


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) in (int, float) for number in value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _is_sample(value: Any) -> bool:
    return isinstance(value, str) and _SAMPLE.fullmatch(value) is not None


def _is_floating_type(value: Any) -> bool:
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    return isinstance(value, str) and isinstance(dtype, torch.dtype) and dtype.is_floating_point


_METHODS, _SAMPLES = (*get_args(Method), CHOSEN), (None, *get_args(SampleKind))

_SETTINGS: dict[str, _Rule] = {
    "method": _Rule(lambda v: _is_text(v) and v in _METHODS, f"one of {_METHODS}"),
    "sample": _Rule(lambda v: v is None or v in get_args(SampleKind), f"one of {_SAMPLES}"),
    "reason": _Rule(_is_text, "text", False),
    "parts": _Rule(lambda v: isinstance(v, list) and len(v) > 0, "a list of parts"),
    "layers": _Rule(_are_names, "names, each once"),
    "parameters": _Rule(lambda v: _is_mapping(v, _is_shape), "shapes by name"),
    "samples": _Rule(
        lambda v: isinstance(v, list) and all(map(_is_sample, v)), "shapes and types of tensors"
    ),
    "model": _Rule(
        lambda v: _is_text(v) and re.fullmatch("[0-9a-f]{12}", v) is not None,
        "12 hexadecimal digits",
    ),
    "dtype": _Rule(_is_floating_type, "a floating-point type of torch"),
    "fit_count": _Rule(lambda v: _is_whole(v, 1), "a count"),
    "calibration_count": _Rule(lambda v: _is_whole(v, 1), "a count", required=False),
    "options": _Rule(lambda v: isinstance(v, dict), "a mapping"),
    "groups": _Rule(lambda v: isinstance(v, list) and all(map(_is_text, v)), "names", False),
    "large_groups": _Rule(_are_names, "names, each once", False),
    "groups_of_adapter": _Rule(lambda v: isinstance(v, bool), "a flag", False),
    "adapter": _Rule(lambda v: isinstance(v, dict), "a mapping", False),
    "base_model": _Rule(_is_text, "a name", False),
    "base_model_revision": _Rule(_is_text, "a name", False),
    "libraries": _Rule(lambda v: _is_mapping(v, _is_text), "versions by name", False),
    "explanation": _Rule(lambda v: isinstance(v, dict), "a mapping", False),
    "probe": _Rule(lambda v: isinstance(v, dict), "a mapping", False),
}

_PROBE: dict[str, _Rule] = {
    "samples": _Rule(_are_names, "names, each once"),
    "scores": _Rule(_are_numbers, "numbers"),
    "groups": _Rule(lambda v: isinstance(v, list) and all(map(_is_whole, v)), "whole numbers"),
}

_PART: dict[str, _Rule] = {
    "kind": _Rule(lambda v: _is_text(v) and v in KINDS, f"one of {sorted(KINDS)}"),
    "density": _Rule(lambda v: _is_text(v) and v in DENSITIES, f"one of {sorted(DENSITIES)}"),
    "columns": _Rule(lambda v: _are_names(v) and len(v) > 0, "names, each once"),
    "dropped": _Rule(lambda v: _is_mapping(v, _is_text), "reasons by name"),
    "terms": _Rule(lambda v: _is_mapping(v, lambda x: isinstance(x, bool)), "flags", False),
    "floor": _Rule(lambda v: _is_text(v) and v in FLOORS, f"one of {sorted(FLOORS)}", False),
}

_EXPLANATION: dict[str, _Rule] = {
    "count": _Rule(_is_whole, "a count"),
    "layers": _Rule(_are_names, "names, each once"),
    "places": _Rule(lambda v: _is_mapping(v, _is_shape), "shapes by name"),
    "without": _Rule(_is_text, "text"),
}

_OPTIONS: dict[str, _Rule] = {
    "layers": _Rule(lambda v: v is None or _is_text(v) or _are_names(v), "None or patterns"),
    "granularity": _Rule(lambda v: v in get_args(Granularity), f"one of {get_args(Granularity)}"),
    "chunk_size": _Rule(lambda v: v is None or _is_whole(v, 1), "None or a count"),
    "calibration_fraction": _Rule(lambda v: _is_share(v, 1e-300, 1), "a share in (0, 1)"),
    "trim": _Rule(lambda v: _is_share(v, 0, 0.5), "a share in [0, 0.5)"),
    "seed": _Rule(_is_whole, "a whole number"),
    "minimum_group": _Rule(_is_whole, "a whole number"),
    "any_size": _Rule(lambda v: isinstance(v, bool), "a flag"),
    "source": _Rule(_is_text, "text"),
    "explain": _Rule(_is_whole, "a whole number"),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of which no detector can be made.

    Raises:
        ValueError: A key is missing, or a value is of another type or range.
    """
    for name, rule in _SETTINGS.items():
        if name in settings or rule.required:
            _check(rule, name, settings.get(name))
    options = settings["options"]
    if unknown := sorted(options.keys() - _OPTIONS.keys()):
        raise ValueError(f"Expected options of {sorted(_OPTIONS)}, got also {unknown}.")
    for name in options:
        _check(_OPTIONS[name], f"options.{name}", options[name])
    if (explanation := settings.get("explanation")) is not None:
        _check_mapping("explanation", explanation, _EXPLANATION)
    if (probe := settings.get("probe")) is not None:
        _check_mapping("probe", probe, _PROBE)
        if len({len(values) for values in probe.values()}) > 1:
            raise ValueError("Expected a score of each remembered sample, got fewer.")
    for i, part in enumerate(settings["parts"]):
        _check_part(f"parts[{i}]", part)
    if len({part["kind"] for part in settings["parts"]}) < len(settings["parts"]):
        raise ValueError("Expected each kind of part once, got one twice.")
    if ("groups" in settings) != ("large_groups" in settings):
        raise ValueError(
            "Expected groups with the large ones among them, got one without the other: if an "
            "earlier version has saved the detector, fit it again."
        )


def _check_mapping(told: str, value: Any, rules: Mapping[str, _Rule]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"Expected {told!r} to be a mapping, got {repr(value)[:80]}.")
    if unknown := sorted(value.keys() - rules.keys()):
        raise ValueError(f"Expected {told!r} with {sorted(rules)}, got also {unknown}.")
    for name, rule in rules.items():
        if name in value or rule.required:
            _check(rule, f"{told}.{name}", value.get(name))


def _check_part(told: str, part: Any) -> None:
    _check_mapping(told, part, _PART)
    columns, dropped = set(part["columns"]), part["dropped"].keys()
    if not dropped < columns:
        raise ValueError(
            f"Expected to drop some of the {len(columns)} columns, got {sorted(dropped)[:5]}."
        )
    if ("floor" in part) != (part["kind"] in OF_SQUARES):
        raise ValueError(f"Expected a floor of {sorted(OF_SQUARES)} alone, got {told!r} otherwise.")
    if "terms" in part and part["kind"] != "gradient_norms":
        raise ValueError(f"Expected terms of gradient norms alone, got them of {told!r}.")


def _check(rule: _Rule, name: str, value: Any) -> None:
    if not rule.holds(value):
        text = repr(value)
        raise ValueError(f"Expected {name!r} to be {rule.told}, got {text[:80]}.")


def check_arrays(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> None:
    """Refuse arrays that do not fit the settings, or each other.

    Args:
        arrays: By name, those of a part after its kind.
        settings: What :func:`check_settings` let pass.

    Raises:
        ValueError: An array is missing or too much, or of another type, shape or range.
    """
    shapes = _shapes(settings)
    if arrays.keys() != shapes.keys():
        raise ValueError(f"Expected arrays {sorted(shapes)}, got {sorted(arrays)}.")
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        _check_array(name, arrays[name], shape, sizes)
    for part in settings["parts"]:
        _check_terms(part, arrays)
    _check_layers(settings)
    count = settings.get("calibration_count", sizes["n"])
    if count != sizes["n"] or len(settings.get("groups", ())) not in (0, count):
        raise ValueError(f"Expected {count} calibration samples, got {sizes['n']}.")
    remembered = (settings.get("probe") or {}).get("scores", ())
    if not np.isin(remembered, arrays["calibration"]).all():
        raise ValueError("Expected remembered scores of calibration samples, got other scores.")
    if "grouped" in arrays and (np.sort(arrays["grouped"]) != arrays["calibration"]).any():
        raise ValueError("Expected the calibration scores by group too, got other scores.")


def _check_terms(part: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    sizes, terms = arrays.get(f"{part['kind']}.density.sizes"), _live_terms(part)
    if sizes is not None and sizes[0] != terms:
        raise ValueError(f"Expected a density of {terms} terms, got {sizes[0]}.")


def _check_layers(settings: Mapping[str, Any]) -> None:
    """Refuse layers that are not those of the parts, or that the model has no shape of."""
    layers = [layer for part in settings["parts"] for layer in _layers(part)]
    if settings["layers"] != layers:
        raise ValueError(f"Expected the layers of the parts, got {settings['layers'][:5]}.")
    for part in settings["parts"]:
        known = settings["parameters"].keys() | (part.get("terms") or {}).keys()
        for layer in _layers(part) if part["kind"] == "gradient_norms" else ():
            if layer.split("/", 1)[-1] not in known:
                raise ValueError(f"Expected a shape for each parameter, got none of {layer!r}.")


def _layers(part: Mapping[str, Any]) -> list[str]:
    """What the live columns of a part are of, in order."""
    live = [name for name in part["columns"] if name not in part["dropped"]]
    terms = [name for name, is_live in (part.get("terms") or {}).items() if is_live]
    return list(dict.fromkeys((*terms, *map(layer_of, live))))


def _live_terms(part: Mapping[str, Any]) -> int:
    return sum((part.get("terms") or {}).values())


def _check_array(name: str, array: np.ndarray, shape: _Shape, sizes: dict[str, int]) -> None:
    kind = name.rsplit(".", 1)[-1]
    expected_type = np.int64 if kind == "folds" else np.float64
    if array.dtype != expected_type:
        raise ValueError(f"Expected {name!r} as {expected_type.__name__}, got {array.dtype}.")
    expected = tuple(
        size if isinstance(size, int) else sizes.setdefault(size, found)
        for size, found in zip(shape, array.shape, strict=False)
    )
    if len(shape) != array.ndim or expected != array.shape:
        raise ValueError(f"Expected {name!r} of shape {shape}, got {array.shape}; {sizes}.")
    # Values of terms that are no features may be infinite, and with them the likelihood.
    if kind != "log_likelihood" and not np.isfinite(array).all():
        raise ValueError(f"Expected {name!r} to be finite, got {array[~np.isfinite(array)][0]}.")
    if kind in _RANGES and not _RANGES[kind](array):
        raise ValueError(f"Expected {name!r} in its range, got {array.ravel()[:5].tolist()}.")


def _positive(array: np.ndarray) -> bool:
    return bool((array > 0).all())


_RANGES: dict[str, Callable[[np.ndarray], bool]] = {
    **dict.fromkeys(
        ("floor", "layer_sd", "sd", "place_sd", "scale", "variances", "rest", "dof"), _positive
    ),
    "weights": lambda w: _positive(w) and bool(np.isclose(w.sum(), 1)),
    "precisions_cholesky": lambda p: _positive(np.diagonal(p, axis1=1, axis2=2)),
    "explained": lambda x: 0 < x[0] < 1,
    "folds": lambda x: 2 <= x[0] < 2**31,
    "largest_dof": lambda x: x[0] > 4,
    "shrinkage": lambda x: 0 < x[0] <= 1 or x[0] in (2, 3, 4),
    "options": lambda x: x[0] >= 0 and x[1] == int(x[1]) and 0 <= x[1] < 2**32,
    "tail": lambda x: bool((np.diff(x) >= 0).all()),
    "sizes": lambda x: x[0] >= 0 and 2 <= x[1] < 2**31 and (x == np.floor(x)).all(),
}


def _shapes(settings: Mapping[str, Any]) -> dict[str, _Shape]:
    """Of every array that the settings ask for."""
    layers = len(settings["layers"])
    shapes: dict[str, _Shape] = {
        "calibration": ("n",),
        "log_likelihood": ("n",),
        "layer_mean": (layers,),
        "layer_sd": (layers,),
    }
    if "groups" in settings:
        shapes["grouped"] = ("n",)
    if "explanation" in settings:
        shapes |= _named("explanation.", _of_explanation(settings["explanation"]))
    for part in settings["parts"]:
        kind = part["kind"]
        shapes |= _named(f"{kind}.", _of_part(part))
        if len(settings["parts"]) > 1:
            shapes[f"{kind}.tail"] = (settings["fit_count"],)
    return shapes


def _of_explanation(told: Mapping[str, Any]) -> dict[str, _Shape]:
    layers = (len(told["layers"]),)
    shapes: dict[str, _Shape] = {"floor": layers, "mean": layers, "sd": layers}
    for term, places in told["places"].items():
        shapes |= {f"{term}.place_mean": tuple(places), f"{term}.place_sd": tuple(places)}
    return shapes


def _of_part(part: Mapping[str, Any]) -> dict[str, _Shape]:
    columns, live = len(part["columns"]), len(part["columns"]) - len(part["dropped"])
    shapes: dict[str, _Shape] = {}
    if part["kind"] != "gradient_norms":
        shapes = {"centre": (live,), "scale": (live,)}
    if part["kind"] in {"gradient_norms", *OF_SQUARES}:
        shapes["floor"] = (columns,)
    density = _of_density(part["density"], _live_terms(part), live)
    shapes |= _named("density.", density)
    # Of sizes that only the arrays know, each part has its own.
    own = {letter: f"{part['kind']} {letter}" for letter in ("r", "K")}
    return {
        name: tuple(n if isinstance(n, int) else own.get(n, n) for n in shape)
        for name, shape in shapes.items()
    }


def _of_density(name: str, terms: int, norms: int) -> dict[str, _Shape]:
    """Of the state of a density of ``terms`` values of terms and ``norms`` other columns."""
    features = terms + norms
    independent: dict[str, _Shape] = {"mean": (features,), "sd": (features,)}
    match name:
        case "StudentT":
            wide: _Shape = (features,)
            return {"largest_dof": (1,), "mean": wide, "scale": wide, "dof": wide}
        case "ShrunkGaussian":
            return _gaussian(features, "shrinkage")
        case "PrincipalGaussian":
            return _gaussian(features, "explained")
        case "GaussianMixture":
            return _mixture(features)
        case "Maximum":
            parts = _named("0.", independent) | _named("1.", _gaussian(features, "shrinkage"))
            return {"location": (2,), "scale": (2,), "folds": (1,)} | parts
        case "TermsAndNorms":
            kinds = 2 if terms else 1
            parts = _named("norms.", _gaussian(norms, "shrinkage"))
            parts |= _named("terms.", _mixture(terms)) if terms else {}
            return {"location": (kinds,), "scale": (kinds,), "sizes": (2,)} | parts
    return independent


def _gaussian(features: int, option: str) -> dict[str, _Shape]:
    return {
        "mean": (features,),
        "sd": (features,),
        "axes": ("r", features),
        "variances": ("r",),
        "rest": (1,),
        option: (1,),
    }


def _mixture(features: int) -> dict[str, _Shape]:
    return {
        "mean": (features,),
        "sd": (features,),
        "weights": ("K",),
        "centres": ("K", features),
        "precisions_cholesky": ("K", features, features),
        "options": (2,),
    }


def _named(prefix: str, shapes: Mapping[str, _Shape]) -> dict[str, _Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}
