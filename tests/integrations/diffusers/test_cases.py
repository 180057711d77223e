"""What cases say of pipelines, seen in what the plain pipelines do."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.pipeline_cases import PipelineCase, seeded_call
from support.read_pipeline_cases import READ
from torch import Tensor

# diffusers' own, of Chroma.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

every_case = pytest.mark.parametrize("case", READ, ids=lambda case: case.name)


@dataclass
class Step:
    """A step of a scheduler, and the outputs of the denoiser that it went by, a row a sample."""

    sample: Tensor
    time: Tensor
    direction: Tensor
    outputs: list[Tensor] = field(default_factory=list)


def steps_of(pipe: Any, arguments: dict[str, Any]) -> tuple[list[Step], Any]:
    """Of a call of the plain pipeline, and its images."""
    steps: list[Step] = []
    outputs: list[Any] = []
    step = pipe.scheduler.step

    def recorded(direction: Tensor, t: Tensor, sample: Tensor, **options: Any) -> Any:
        rows = torch.cat([rows_like(sample, output) for output in outputs])
        outputs.clear()
        result = step(direction, t, sample, **options)
        time = time_of(pipe.scheduler, t).expand(len(sample))
        steps.append(Step(sample, time, direction, list(rows.split(len(sample)))))
        return result

    hook = pipe.transformer.register_forward_hook(
        lambda module, args, output: outputs.append(output[0])
    )
    pipe.scheduler.step = recorded
    images = pipe(**arguments).images
    hook.remove()
    del pipe.scheduler.step
    return steps, images


def rows_like(sample: Tensor, output: Any) -> Tensor:
    """Rows in the layout of a sample: of one frame, and of the last tokens where text is first."""
    rows = torch.stack(output) if isinstance(output, list) else output
    if rows.ndim > sample.ndim:
        rows = rows.squeeze(2)
    return rows[:, -sample.shape[1] :].clone()


def time_of(scheduler: Any, t: Tensor) -> Tensor:
    """1000 sigma of the step just made, or the whole number that a scheduler makes of it."""
    return 1000 * scheduler.sigmas[scheduler.step_index - 1] if t.is_floating_point() else t


def with_other_prompts(arguments: dict[str, Any]) -> dict[str, Any]:
    prompts = {
        name: [prompt + 1 for prompt in value] if isinstance(value, list) else value + 1
        for name, value in arguments.items()
        if "prompt_embeds" in name and not name.startswith("negative") and "mask" not in name
    }
    return arguments | prompts


def condition_of(case: PipelineCase) -> int:
    """Which of the outputs of a step goes by the prompts."""
    calls = [case.arguments(), with_other_prompts(case.arguments())]
    first, other = (steps_of(case(), seeded_call(call))[0][0] for call in calls)
    assert torch.equal(first.sample, other.sample)
    pairs = zip(first.outputs, other.outputs, strict=True)
    [condition] = [i for i, (own, changed) in enumerate(pairs) if not torch.equal(own, changed)]
    return condition


@every_case
def test_a_prediction_is_what_the_pipeline_asks_for_with_the_condition(case: PipelineCase) -> None:
    pipe, arguments, condition = case(), case.arguments(), condition_of(case)
    steps, images = steps_of(pipe, seeded_call(arguments))
    assert len(steps) >= 3
    assert images.shape == (2, *case.size)
    for step in steps:
        with torch.no_grad():
            found = case.predict(pipe, step.sample, step.time, arguments)
        own = step.outputs.pop(condition)
        [null] = step.outputs or [own]
        sign = torch.sign(((3 * own - 2 * null) * step.direction).sum())
        torch.testing.assert_close(found, sign * own, rtol=1e-3, atol=1e-4)
        # Without guidance in rows or calls there is no other.
        assert null is own or (own - null).norm() > 0.02 * own.norm()


@every_case
def test_arguments_of_one_sample_are_those_of_the_first(case: PipelineCase) -> None:
    pipe = case()
    last = steps_of(pipe, seeded_call(case.arguments()))[0][-1]
    predict = torch.no_grad()(case.predict)
    both = predict(pipe, last.sample, last.time, case.arguments())
    first = predict(pipe, last.sample[:1], last.time[:1], case.call_of_one())
    torch.testing.assert_close(first, both[:1], rtol=1e-3, atol=1e-4)
