"""What a pipeline's detector was fitted on, and so what it is for.

A pipeline's normal samples are unlike the images that it was trained on: fitted on the one, a
detector takes all of the other for drift. So are samples of other numbers of steps, or of another
guidance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias

from ood_monitor import Detector
from ood_monitor_integrations.diffusers.calls import parameters_in
from ood_monitor_integrations.diffusers.plan import WatchingPlan

__all__ = ["Origin", "What", "settings_in"]

#: What of a call is scored: what it generated, the image that it was given, or both.
What: TypeAlias = Literal["outputs", "inputs", "both"]

#: Arguments of a call on which its samples' look depends, whatever they show.
_SETTINGS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "guidance_scale",
    "true_cfg_scale",
    "image_guidance_scale",
    "guidance_rescale",
    "pag_scale",
    "strength",
    "eta",
    "denoising_start",
    "denoising_end",
)

_KEY = "origin"


@dataclass(frozen=True)
class Origin:
    """What a detector was fitted on.

    Attributes:
        watches: What it is for.
        samples: Whether the pipeline's own samples or held-out images.
        settings: Of the calls that made its own samples, by name.
        plan: How its calls are watched within a budget; None without one.
    """

    watches: What
    samples: Literal["own samples", "images"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: WatchingPlan | None = None

    @classmethod
    def of(cls, detector: Detector) -> Self | None:
        """As a detector says; None of one that is no pipeline's, or that an older version saved."""
        said = detector.fitted.provenance.adapter.get(_KEY)
        if said is None:
            return None
        return cls(**{**said, "plan": WatchingPlan.parse(said.get("plan"))})

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        said = {"watches": self.watches, "samples": self.samples, "settings": dict(self.settings)}
        return said if self.plan is None else said | {"plan": self.plan.dump()}

    def check(self, what: str) -> None:
        """Refuse to watch what the detector is not for.

        Raises:
            ValueError: It is not.
        """
        if self.watches in (what, "both"):
            return
        own = "fit without images, by `fit_pipeline(pipe, call=...)`"
        images = "fit on held-out images, by `fit_pipeline(pipe, images)`"
        raise ValueError(
            f"Expected a detector for {what}, got one fitted on {self.samples} for {self.watches}: "
            f"a pipeline's normal samples are unlike the images that it was trained on. To watch "
            f"{what}, {own if what == 'outputs' else images}; to compare {what} with "
            f"{self.samples} all the same, fit with watches={what!r}."
        )

    def others(self, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings of a call that its own samples were not made with, as (fitted, found)."""
        names = self.settings.keys() & settings.keys()
        return {
            name: (self.settings[name], settings[name])
            for name in sorted(names)
            if self.settings[name] != settings[name]
        }


def settings_in(kind: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's arguments, or a pipeline's defaults, on which samples depend."""
    parameters = parameters_in(kind)
    found = {}
    for name in _SETTINGS:
        if name in parameters:
            value = arguments.get(name, parameters[name].default)
            found[name] = list(value) if isinstance(value, list | tuple) else value
    return {k: v for k, v in found.items() if isinstance(v, int | float | list | None)}
