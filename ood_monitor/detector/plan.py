"""What a detector measures: its method by one word, its parts, and why these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

from ood_monitor.adapters.base import SampleKind
from ood_monitor.checks import having, items, word
from ood_monitor.densities import Density
from ood_monitor.densities.parts import CHOSEN, OF_CALLS, OF_DENOISERS, Kind, Method, Part
from ood_monitor.gradients import Granularity
from ood_monitor.saving.fitted import Fitted

__all__ = ["Parts", "Plan", "check_any_size", "checked_method", "planned", "without_statistics"]

#: Parts that a user chooses, by themselves or by their kind.
Parts: TypeAlias = Sequence[Part | Kind]

#: The method where none is chosen, by what a sample is: for each kind it was measured on models
#: that nothing was tuned on, see docs/evidence.md. Of any other kind it was not.
DEFAULTS: dict[SampleKind | None, Method] = {
    "image": "forward",
    "sequence": "forward",
    "row": "forward",
    "diffusion": "forward",
    None: "gradient_norms",
}

_KINDS: Mapping[SampleKind | None, str] = {
    "image": "samples are images",
    "sequence": "samples are sequences",
    "row": "samples are rows of a table",
    "diffusion": "samples are a diffusion model's",
    None: "the adapter does not say what a sample is",
}


@dataclass(frozen=True)
class Plan:
    """What is measured of samples, and how it is scored.

    Attributes:
        method: The word for it; ``"parts"`` if these were chosen one by one.
        parts: Unfitted.
        sample: What a sample is, as the adapter says.
        reason: Why these, in words.
    """

    method: Method | Literal["parts"]
    parts: tuple[Part, ...]
    sample: SampleKind | None
    reason: str

    @classmethod
    def of(cls, fitted: Fitted) -> Self:
        """What a fitted detector measures."""
        parts = tuple(Part(it.kind, it.density, it.floor) for it in fitted.joined.parts)
        return cls(fitted.method, parts, fitted.sample, fitted.reason)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of a detector that fits the same."""
        if self.method == CHOSEN:
            return {"parts": self.parts}
        norms = (part.density for part in self.parts if part.kind == "gradient_norms")
        density = next(norms, None)
        return {"method": self.method, "density": density}

    @property
    def kinds(self) -> frozenset[Kind]:
        """Those of its parts."""
        return frozenset(part.kind for part in self.parts)

    def has(self, kind: Kind) -> bool:
        """Whether it has a part of a kind."""
        return kind in self.kinds

    @property
    def of_forward(self) -> frozenset[Kind]:
        """The kinds of its parts that a pass of the likelihood gives."""
        kinds = {part.kind for part in self.parts if not part.needs_gradients}
        return frozenset(kinds - OF_DENOISERS - OF_CALLS)

    @property
    def of_denoiser(self) -> frozenset[Kind]:
        """The kinds of its parts that passes without noise give."""
        return OF_DENOISERS & self.kinds


def planned(
    sample: SampleKind | None,
    method: Method | None,
    density: Density | None,
    parts: Parts | None,
    *,
    has_null: bool = False,
) -> Plan:
    """The plan for samples of a kind.

    Args:
        sample: What a sample is, None if that is not known.
        method: As the user chose it, or None.
        density: Of gradient norms, as the user chose it, or None.
        parts: As the user chose them, or None.
        has_null: Whether a diffusion model's adapter has a null condition.
    """
    if parts is not None:
        chosen = tuple(part if isinstance(part, Part) else Part(part) for part in parts)
        return Plan(CHOSEN, chosen, sample, "chosen")
    reason = "chosen" if method else f"default where {_KINDS[sample]}"
    word = method or DEFAULTS[sample]
    return Plan(word, _parts(word, sample, density, has_null), sample, reason)


def without_statistics(sample: SampleKind | None) -> Plan:
    """The default of a model whose forward passes do not give what is measured of its kind."""
    reason = "default where no convolution or linear map is called as a module"
    if sample == "diffusion":
        reason = "default where passes without noise cannot be measured"
    return Plan("gradient_norms", (Part("gradient_norms"),), sample, reason)


def checked_method(
    method: Method | None, density: Density | None, parts: Parts | None, granularity: Granularity
) -> Method | None:
    """The method that was chosen, by its word or by what belongs to it; None if none was.

    Raises:
        ValueError: A word that is none, or choices that speak of the same thing, or of what is not
            measured.
        TypeError: A density without its methods, or parts that are not several.
    """
    if method is not None:
        word("method", method, get_args(Method))
    word("granularity", granularity, get_args(Granularity))
    if density is not None:
        having("density", density, "fit", "score")
    if parts is not None:
        _check_parts(parts, method)
    if density is not None and (method == "forward" or parts is not None):
        raise ValueError(
            f"Expected no `density=`, which is of gradient norms, with "
            f"{'parts' if parts is not None else repr(method)}; "
            "give each part its own: `parts=[om.Part('expected_norms', density=...)]`."
        )
    has_norms = method != "forward" if parts is None else "gradient_norms" in map(_kind_of, parts)
    if granularity != "tensor" and not has_norms:
        raise ValueError(
            f"Expected no granularity of gradient norms, which are not measured, got "
            f"{granularity!r} with {'parts' if parts is not None else repr(method)}."
        )
    is_of_norms = parts is None and (density is not None or granularity != "tensor")
    return method or ("gradient_norms" if is_of_norms else None)


def check_any_size(plan: Plan) -> None:
    """Refuse a detector for samples of any size whose parts are others at each.

    Raises:
        ValueError: A part of its plan is not of a denoiser's passes without noise.
    """
    if not plan.kinds <= OF_DENOISERS:
        raise ValueError(
            "Expected any_size=True with method='forward' of a denoiser alone, whose means over "
            f"positions are the same at any size, got {plan.method!r} with "
            f"{sorted(plan.kinds)}, {plan.reason}: fit a detector for each size."
        )


def _check_parts(parts: Parts, method: Method | None) -> None:
    kinds = [_kind_of(part) for part in items("parts", parts)]
    if method is not None or not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"Expected parts of different kinds and no `method=` beside them, got {kinds} and "
            f"method={method!r}."
        )


def _kind_of(part: Part | Kind) -> Kind:
    return part.kind if isinstance(part, Part) else Part(part).kind


def _parts(
    method: Method, sample: SampleKind | None, density: Density | None, has_null: bool
) -> tuple[Part, ...]:
    norms = (Part("gradient_norms", density),)
    if method == "gradient_norms":
        return norms
    forward = _of_forward(sample, has_null)
    return forward if method == "forward" else (*forward, *norms)


def _of_forward(sample: SampleKind | None, has_null: bool) -> tuple[Part, ...]:
    if sample == "row":  # which has no paradox, and its layers no positions
        return Part("log_likelihood"), Part("expected_norms", floor="mean")
    if sample == "diffusion":
        condition = (Part("condition"),) if has_null else ()
        return Part("output_layer"), Part("energies"), *condition
    return Part("values"), Part("expected_norms")
