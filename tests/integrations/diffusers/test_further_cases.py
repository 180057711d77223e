"""What a case says of its denoiser is what the plain pipeline asks of it, without our code."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.further_pipeline_cases import FURTHER
from support.pipeline_cases import Arguments, PipelineCase, seeded_call
from torch import Tensor

# diffusers' own, of schedulers that hand a tensor to numpy and of the T2I-Adapter's pipeline.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning"),
]

every_case = pytest.mark.parametrize("case", FURTHER, ids=lambda case: case.name)

#: Of the samples' rows that a step asks for, the place of the condition's and how many there are.
PLACES = {
    "instruct-pix2pix": (0, 3),
    "marigold-depth": (0, 1),
    "stable-diffusion-pag": (1, 3),
    "latent-consistency": (0, 1),
    "sd3-skip-layers": (1, 3),
    "lumina": (0, 2),
}
#: Pipelines that step by the negated output.
NEGATED = ("lumina",)


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: what the denoiser said for it, and of what it was asked.

    Attributes:
        outputs: The denoiser's, of all its calls since the last step.
        sample: The scheduler's, (B, ...), as it scales it for the denoiser.
        t: Its time, (B,).
    """

    outputs: Tensor
    sample: Tensor
    t: Tensor


def last_step(pipe: Any, arguments: Arguments) -> Step:
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    scheduler, step, steps = pipe.scheduler, pipe.scheduler.step, []
    outputs: list[Tensor] = []

    @functools.wraps(step)  # pipelines give it what its signature names
    def recorded(output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        scaled = getattr(scheduler, "scale_model_input", lambda sample, t: sample)(sample, t)
        times = torch.as_tensor(t).expand(len(sample))
        steps.append(Step(torch.cat(outputs), scaled.clone(), times))
        outputs.clear()
        return step(output, t, sample, *args, **kwargs)

    hook = denoiser.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    scheduler.step = recorded
    try:
        pipe(**seeded_call(arguments))
    finally:
        hook.remove()
        del scheduler.step
    assert len(steps) >= 3
    return steps[-1]


def far(found: Tensor, other: Tensor) -> bool:
    return bool((found - other).norm() > 1e-3 * other.norm())


@every_case
@torch.no_grad()
def test_a_prediction_is_the_condition_s_row_of_the_last_step(case: PipelineCase) -> None:
    pipe, arguments = case(), case.arguments()
    step = last_step(pipe, arguments)
    sign = -1 if case.name in NEGATED else 1
    rows = (sign * step.outputs[:, : step.sample.shape[1]]).split(len(step.sample))
    place, count = PLACES.get(case.name, (1, 2))
    assert len(rows) == count
    found = case.predict(pipe, step.sample, step.t, arguments)
    torch.testing.assert_close(found, rows[place], rtol=1e-3, atol=1e-5)
    assert all(far(found, other) for k, other in enumerate(rows) if k != place)


@every_case
@torch.no_grad()
def test_a_prediction_hangs_on_time_and_on_the_condition_of_its_own_sample(
    case: PipelineCase,
) -> None:
    pipe, arguments = case(), case.arguments()
    step = last_step(pipe, arguments)
    same = step.sample[:1].expand_as(step.sample)
    found = case.predict(pipe, same, step.t, arguments)
    assert far(found[0], found[1])
    assert far(found, case.predict(pipe, same, step.t + 100, arguments))


@every_case
@torch.no_grad()
def test_a_call_of_one_is_that_of_the_first_sample(case: PipelineCase) -> None:
    pipe, arguments, one = case(), case.arguments(), case.call_of_one()
    step = last_step(pipe, arguments)
    assert len(pipe(**seeded_call(one))[0]) == 1
    found = case.predict(pipe, step.sample[:1], step.t[:1], one)
    first = case.predict(pipe, step.sample, step.t, arguments)[:1]
    torch.testing.assert_close(found, first, rtol=1e-3, atol=1e-5)
