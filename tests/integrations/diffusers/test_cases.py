"""What a case says of its denoiser is what the plain pipeline asks of it, without our code."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.further_pipeline_cases import FURTHER
from support.further_video_pipeline_cases import FURTHER_VIDEOS
from support.pipeline_cases import Arguments, PipelineCase, seeded_call
from support.read_pipeline_cases import READ
from support.video_pipeline_cases import VIDEOS
from torch import Tensor

# diffusers' own, of schedulers that hand a tensor to numpy, of the T2I-Adapter's pipeline and of
# Chroma.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

every_case = pytest.mark.parametrize(
    "case", READ + FURTHER + VIDEOS + FURTHER_VIDEOS, ids=lambda case: case.name
)

#: Of the samples' rows that a step asks for, the place of the condition's and how many there are,
#: if they are not the second of two.
PLACES = {
    **dict.fromkeys(("z-image", "lumina2", "lumina", "nucleus-moe"), (0, 2)),
    **dict.fromkeys(("qwen-image", "qwen-image-21", "qwen-image-21-uncached"), (0, 2)),
    **dict.fromkeys(("flux2-klein", "chroma", "cogview4", "cogview4-unshifted"), (0, 2)),
    **dict.fromkeys(("z-image-unguided", "flux2", "marigold-depth", "latent-consistency"), (0, 1)),
    **dict.fromkeys(("stable-diffusion-pag", "sd3-skip-layers"), (1, 3)),
    **dict.fromkeys(("wan", "wan22", "wan22-expanded", "wan22-of-images"), (0, 2)),
    **dict.fromkeys(("hunyuan-video", "kandinsky5-video", "kandinsky5-image"), (0, 2)),
    "animatediff-unguided": (0, 1),
    "instruct-pix2pix": (0, 3),
}
#: Pipelines that step by the negated output.
NEGATED = (
    *("z-image", "z-image-unguided", "lumina2", "lumina", "nucleus-moe"),
    *("hidream", "hidream-unipc"),
)


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: what the denoiser said for it, and of what it was asked.

    Attributes:
        outputs: The denoiser's, of all its calls since the last step, in the sample's layout.
        sample: The scheduler's, (B, ...), as it scales it for the denoiser.
        t: Its time, (B,).
    """

    outputs: Tensor
    sample: Tensor
    t: Tensor


def last_step(pipe: Any, arguments: Arguments) -> Step:
    denoisers = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    scheduler, step, steps = pipe.scheduler, pipe.scheduler.step, []
    outputs: list[Any] = []

    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines give it what its signature names
    def recorded(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        t, sample = given["timestep"], given["sample"]
        scaled = getattr(scheduler, "scale_model_input", lambda sample, t: sample)(sample, t)
        rows = torch.cat([rows_like(sample, each) for each in outputs])
        outputs.clear()
        scaled = scaled.clone()  # pipelines may write into it
        result = step(*args, **kwargs)
        steps.append(Step(rows, scaled, time_of(scheduler, t).expand(len(sample))))
        return result

    hooks = [
        denoiser.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
        for denoiser in denoisers
        if denoiser is not None
    ]
    scheduler.step = recorded
    try:
        pipe(**seeded_call(arguments))
    finally:
        for hook in hooks:
            hook.remove()
        del scheduler.step
    assert len(steps) >= 3
    return steps[-1]


def rows_like(sample: Tensor, output: Any) -> Tensor:
    """Rows in the layout of a sample: of one frame, of the first channels or the last tokens."""
    rows = torch.stack(output) if isinstance(output, list) else output
    if rows.ndim > sample.ndim:
        rows = rows.squeeze(2)
    length = sample.shape[1]
    return (rows[:, -length:] if sample.ndim == 3 else rows[:, :length]).clone()


def time_of(scheduler: Any, t: Any) -> Tensor:
    """The step's, by its sigma where a network is told what comes before the noise's shift."""
    is_shifted = scheduler.config.get("time_shift_type") == "linear"
    found = 1000 * scheduler.sigmas[scheduler.step_index - 1] if is_shifted else t
    return torch.as_tensor(found)


def far(found: Tensor, other: Tensor) -> bool:
    return bool((found - other).norm() > 1e-3 * other.norm())


@every_case
@torch.no_grad()
def test_a_prediction_is_the_condition_s_row_of_the_last_step(case: PipelineCase) -> None:
    pipe, arguments = case(), case.arguments()
    step = last_step(pipe, arguments)
    sign = -1 if case.name in NEGATED else 1
    rows = (sign * step.outputs).split(len(step.sample))
    place, count = PLACES.get(case.name, (1, 2))
    assert len(rows) == count
    found = case.predict(pipe, step.sample, step.t, arguments)
    torch.testing.assert_close(found, rows[place], rtol=1e-3, atol=1e-4)
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
    torch.testing.assert_close(found, first, rtol=1e-3, atol=1e-4)
