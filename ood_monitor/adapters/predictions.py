"""What networks of diffusion models predict, and what they should have predicted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ood_monitor.adapters.schedules import NoiseSchedule, stated_prediction

__all__ = ["PREDICTIONS", "Prediction", "prediction_of"]


@dataclass(frozen=True)
class Prediction:
    """What a network predicts.

    Attributes:
        target: Of (x, noise, alpha, sigma).
        scale: Of (alpha, sigma): an error of the prediction times this is one of x.
    """

    target: Callable[[Tensor, Tensor, Any, Any], Tensor]
    scale: Callable[[float, float], float]


PREDICTIONS = {
    "epsilon": Prediction(
        lambda x, noise, alpha, sigma: noise,
        lambda alpha, sigma: sigma / alpha if alpha else math.inf,
    ),
    "sample": Prediction(lambda x, noise, alpha, sigma: x, lambda alpha, sigma: 1.0),
    "v_prediction": Prediction(
        lambda x, noise, alpha, sigma: alpha * noise - sigma * x,
        lambda alpha, sigma: sigma / (alpha**2 + sigma**2),
    ),
    "edm": Prediction(
        lambda x, noise, alpha, sigma: sigma * x - alpha * noise,
        lambda alpha, sigma: sigma / (alpha**2 + sigma**2),
    ),
    "flow_prediction": Prediction(
        lambda x, noise, alpha, sigma: noise - x, lambda alpha, sigma: sigma / (alpha + sigma)
    ),
    "velocity": Prediction(
        lambda x, noise, alpha, sigma: x - noise, lambda alpha, sigma: sigma / (alpha + sigma)
    ),
}


def prediction_of(given: str | None, stated: Any, schedule: NoiseSchedule) -> str:
    """The name of what the argument says, the foreign schedule of itself, or our own."""
    name = stated_prediction(stated) if given is None else given
    silent = not isinstance(stated, Tensor) and schedule.prediction_type == "epsilon"
    if name is None and silent:
        raise ValueError(
            f"Expected {type(stated).__name__} to say what its network predicts, by `config`'s "
            "`prediction_type` or by `objective`, got neither: pass `prediction_type=`."
        )
    name = schedule.prediction_type if name is None else name
    if not isinstance(name, str) or name not in PREDICTIONS:
        raise ValueError(
            f"Expected a prediction type of {sorted(PREDICTIONS)}, got {name!r}: pass "
            "`prediction_type=`."
        )
    return name
