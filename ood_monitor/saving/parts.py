"""The parts of a detector as settings and arrays, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ood_monitor.densities import DENSITIES
from ood_monitor.densities.columns import Columns
from ood_monitor.densities.features import Features, LogNorms, TermValues
from ood_monitor.densities.joined import Joined, Tail
from ood_monitor.densities.parts import FittedPart

__all__ = ["arrays_of", "dump_part", "parse_joined"]


def dump_part(part: FittedPart) -> dict[str, Any]:
    """What a part is, JSON-able, but for its arrays.

    Raises:
        ValueError: A density of your own, which no file can name.
    """
    density, columns = type(part.density).__name__, part.columns
    if type(part.density) not in DENSITIES.values():
        raise ValueError(f"Expected a density of {sorted(DENSITIES)} to save, got {density}.")
    told: dict[str, Any] = {"kind": part.kind, "density": density}
    told |= {"columns": list(columns.all_names), "dropped": columns.dropped}
    if isinstance(columns, Columns):
        return told if columns.rule is None else told | {"floor": columns.rule}
    if columns.terms is None:
        return told
    names, live = columns.terms.names, columns.terms.live.tolist()
    return told | {"terms": dict(zip(names, live, strict=True))}


def arrays_of(joined: Joined) -> dict[str, np.ndarray]:
    """All that parts learned, by names that begin with the part's kind."""
    arrays: dict[str, np.ndarray] = {}
    for part in joined.parts:
        named = {f"density.{name}": value for name, value in part.density.state().items()}
        arrays |= {f"{part.kind}.{k}": v for k, v in (named | _of_columns(part.columns)).items()}
    for part, tail in zip(joined.parts, joined.tails, strict=False):
        arrays[f"{part.kind}.tail"] = tail.scores
    return arrays


def parse_joined(parts: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> Joined:
    """The parts whose settings and arrays these are."""
    fitted = tuple(_parse(part, _below(f"{part['kind']}.", arrays)) for part in parts)
    tails = (arrays[f"{part['kind']}.tail"] for part in parts) if len(parts) > 1 else ()
    return Joined(fitted, tuple(map(Tail, tails)))


def _parse(part: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> FittedPart:
    density = DENSITIES[part["density"]]().load_state(_below("density.", arrays))
    names, dropped = tuple(part["columns"]), dict(part["dropped"])
    columns: Features | Columns
    if part["kind"] == "gradient_norms":
        live = np.array([name not in dropped for name in names])
        columns = Features(LogNorms(names, live, arrays["floor"], dropped), _terms(part))
    else:
        scales = arrays.get("floor"), arrays["centre"], arrays["scale"]
        columns = Columns(part["kind"], names, dropped, *scales, part.get("floor"))
    return FittedPart(part["kind"], columns, density)


def _terms(part: Mapping[str, Any]) -> TermValues | None:
    if "terms" not in part:
        return None
    return TermValues(tuple(part["terms"]), np.array(list(part["terms"].values()), dtype=bool))


def _of_columns(columns: Features | Columns) -> dict[str, np.ndarray]:
    if isinstance(columns, Features):
        return {"floor": columns.log_norms.floor}
    floor = {} if columns.floor is None else {"floor": columns.floor}
    return {"centre": columns.centre, "scale": columns.scale, **floor}


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
