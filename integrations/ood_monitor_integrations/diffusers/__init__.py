"""diffusers: an inference hook around any pipeline.

::

    detector = fit_pipeline(pipe, call={"num_inference_steps": 25})
    with monitor_pipeline(pipe, detector) as pipe:
        output = pipe(num_inference_steps=25)
        output.ood.p_value

What each call generates, or is given, is scored with the conditioning that the pipeline itself
built: the last call of its denoiser is captured, and the denoising bound replayed from it at the
detector's noise levels. How a pipeline calls its denoiser is read off a call, and verified by a
replay of its last step. The call itself is not changed: same images, bit for bit.
"""

from typing import TYPE_CHECKING, Any

from ood_monitor_integrations.diffusers.capture import Called, DenoiserCall, Step
from ood_monitor_integrations.diffusers.costs import PlanCost, plan_costs
from ood_monitor_integrations.diffusers.fitting import fit_pipeline, replayed_bound
from ood_monitor_integrations.diffusers.hook import monitor_pipeline, wrap
from ood_monitor_integrations.diffusers.pipeline_monitor import Counts, PipelineMonitor
from ood_monitor_integrations.diffusers.plan import WatchingPlan
from ood_monitor_integrations.diffusers.replay import ReplayedBound

__all__ = [
    "Called",
    "Counts",
    "DenoiserCall",
    "OODBlock",
    "PipelineMonitor",
    "PlanCost",
    "ReplayedBound",
    "Step",
    "WatchingPlan",
    "fit_pipeline",
    "monitor_pipeline",
    "plan_costs",
    "replayed_bound",
    "wrap",
]

if TYPE_CHECKING:
    from ood_monitor_integrations.diffusers.modular import OODBlock


def __getattr__(name: str) -> Any:
    """`OODBlock` when it is asked for: diffusers' modular pipelines are not in every release."""
    if name == "OODBlock":
        from ood_monitor_integrations.diffusers.modular import OODBlock

        return OODBlock
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "OODBlock"]
