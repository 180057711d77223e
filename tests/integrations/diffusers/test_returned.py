"""What a call returns is what is scored, whatever a pipeline or its user does after a step."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline
from support.pipeline_cases import (
    FEW,
    case_of,
    certain,
    ddim,
    inpaint_arguments,
    seeded_call,
    stable_diffusion,
    text_unet,
)
from support.pipeline_cases import PipelineCase as Case
from support.read_pipeline_cases import READ
from torch import Tensor

import ood_monitor as om

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

LEVEL = 500
TEXT, CONTROLLED = case_of("stable-diffusion"), case_of("controlnet")


def blending() -> Any:
    """Inpainting by a denoiser of text alone: what the mask keeps is put back after each step."""
    kind = diffusers.StableDiffusionInpaintPipeline
    return certain(stable_diffusion(kind, ddim(), network=text_unet))


BLENDED = Case("inpaint-blended", blending, inpaint_arguments, TEXT.predict)


def detector_of(pipe: Any, case: Case, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"levels": (LEVEL,), "seed": 0, "explain": FEW, "progress": False}
    settings |= {"method": "gradient_norms", "watches": "outputs", "call": case.call_of_one()}
    return fit_pipeline(pipe, [case.images(44)], **(settings | options))


def watched(case: Case, **options: Any) -> Any:
    pipe = case()
    monitor = om.Monitor(detector_of(pipe, case, **options), fpr=0.05)
    return monitor_pipeline(pipe, monitor, raise_on_error=True)


def latents_and_images(pipe: Any, arguments: dict[str, Any]) -> tuple[Tensor, np.ndarray]:
    """What a plain pipeline returns, as latents and as images."""
    latents = pipe(**seeded_call(arguments | {"output_type": "latent"}))[0]
    return latents, np.asarray(pipe(**seeded_call(arguments))[0])


def halved(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 0.5 * tensors["latents"]}


def in_place(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"].mul_(0.5)
    return {}


def looking(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    assert tensors.keys() == {"prompt_embeds"}
    return {}


class Halving(PipelineCallback):  # type: ignore[misc]
    tensor_inputs: ClassVar = ["latents"]

    def callback_fn(self, pipe: Any, step: Any, time: Any, tensors: Any) -> dict[str, Any]:
        return halved(pipe, step, time, tensors)


#: What a user gives beside the arguments.
CALLBACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "other latents": {"callback_on_step_end": halved},
    "written in place": {"callback_on_step_end": in_place},
    "an object of diffusers'": {"callback_on_step_end": Halving(cutoff_step_ratio=1.0)},
    "of other tensors": {
        "callback_on_step_end": looking,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("case", [TEXT, BLENDED], ids=lambda case: case.name)
def test_the_latents_that_are_decoded_are_scored(case: Case, name: str) -> None:
    arguments = case.arguments() | CALLBACKS[name]
    latents, images = latents_and_images(case(), arguments)
    pipe = watched(case)
    output = pipe(**seeded_call(arguments))
    assert np.array_equal(np.asarray(output[0]), images)
    expected = case.loss(pipe, latents, LEVEL, case.arguments())
    torch.testing.assert_close(output.ood.log_likelihood.float(), expected, rtol=1e-4, atol=0)


def test_a_call_that_is_interrupted_is_counted_and_not_scored() -> None:
    def interrupted(pipe: Any, step: int, time: Any, tensors: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    pipe = watched(TEXT)
    output = pipe(**seeded_call(TEXT.arguments()), callback_on_step_end=interrupted)
    assert not hasattr(output, "ood")
    counts = pipe.ood_monitor.counts
    assert (counts.interrupted, counts.scored, counts.failures) == (2, 0, 0)
    assert pipe(**seeded_call(TEXT.arguments())).ood.valid.all()


def test_a_control_that_ends_before_the_last_step_is_no_part_of_the_score() -> None:
    ended = {"control_guidance_end": 0.5}
    arguments = CONTROLLED.arguments() | ended
    pipe = watched(CONTROLLED, call=CONTROLLED.call_of_one() | ended)
    latents, _ = latents_and_images(CONTROLLED(), arguments)
    expected = TEXT.loss(pipe, latents, LEVEL, arguments)
    found = pipe(**seeded_call(arguments)).ood.log_likelihood
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"controlnet\.conditioning_scale"):
        pipe(**seeded_call(CONTROLLED.arguments()))


def test_a_prompt_of_another_length_is_scored() -> None:
    pipe, plain = watched(TEXT), TEXT()
    for length in (5, 9):
        arguments = TEXT.arguments()
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            arguments[name] = torch.randn(2, length, 8)
        latents, _ = latents_and_images(plain, arguments)
        expected = TEXT.loss(plain, latents, LEVEL, arguments)
        found = pipe(**seeded_call(arguments)).ood.log_likelihood
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=0)


def test_prompts_that_are_padded_by_batch_are_scored_with_their_mask_and_without() -> None:
    # Where nothing is padded the pipeline gives no mask at all.
    case = next(case for case in READ if case.name == "qwen-image")
    pipe, plain = watched(case), case()
    full = {"prompt_embeds_mask": torch.ones(2, 7, dtype=torch.int64)}
    for arguments in (case.arguments(), case.arguments() | full):
        latents, _ = latents_and_images(plain, arguments)
        expected = case.loss(plain, latents, LEVEL, arguments)
        found = pipe(**seeded_call(arguments)).ood.log_likelihood
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=0)


# Calls, and what becomes of them.


class Listing(diffusers.DDIMPipeline):
    """A pipeline that gives a list."""

    def __call__(self, **arguments: Any) -> Any:
        return list(super().__call__(**arguments).images)


def test_a_pipeline_that_gives_a_list_gives_it_still() -> None:
    made = case_of("ddim")()
    pipe = Listing(made.unet, made.scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = case_of("ddim").images(44)
    options: dict[str, Any] = {"levels": (LEVEL,), "explain": FEW, "progress": False}
    detector = fit_pipeline(pipe, [images], watches="outputs", call={"batch_size": 1}, **options)
    call = seeded_call({"batch_size": 2, "num_inference_steps": 3, "output_type": "np"})
    plain = pipe(**call)
    monitor = om.Monitor(detector, fpr=0.05)
    output = monitor_pipeline(pipe, monitor)(**seeded_call(call))
    assert isinstance(output, list)
    assert np.array_equal(np.asarray(output), np.asarray(plain))
    assert pipe.ood_monitor.counts.scored == 2


def without_denoiser(pipe: Any) -> None:
    pipe.__dict__["unet"] = None


@pytest.mark.parametrize("change", [without_denoiser], ids=["no denoiser"])
def test_what_is_raised_is_the_pipelines_own(change: Callable[[Any], None]) -> None:
    plain, pipe = TEXT(), watched(TEXT)
    pipe.ood_monitor._raise_on_error = False
    raised = []
    for each in (plain, pipe):
        change(each)
        with pytest.raises(AttributeError) as error:
            each(**seeded_call(TEXT.arguments()))
        raised.append(str(error.value))
    assert raised[0] == raised[1]
    assert pipe.ood_monitor.counts.failures == 1


def test_failures_are_counted_by_kind_and_each_is_warned_of_once(caplog: Any) -> None:
    case = BLENDED
    pipe = watched(case)
    pipe.ood_monitor._raise_on_error = False
    for _ in range(2):
        for size in (32, 24):
            more: dict[str, Any] = {"height": size, "width": size}
            more["mask_image"] = torch.zeros(2, 1, size, size)
            more["image"] = torch.zeros(2, 3, size, size)
            pipe(**seeded_call(case.arguments() | more))
    [(kind, count)] = pipe.ood_monitor.failures.items()
    assert kind.startswith("ValueError: Expected samples as the detector was fitted on")
    assert count == pipe.ood_monitor.counts.failures == 4
    assert caplog.text.count("was not scored") == 1


# Copies.


def test_a_deep_copy_of_a_watched_pipeline_is_another_s_own() -> None:
    pipe = watched(TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = copy.deepcopy(pipe)
    assert type(other) is diffusers.StableDiffusionPipeline
    assert other.unet is not pipe.unet
    output = other(**seeded_call(TEXT.arguments()))
    assert not hasattr(output, "ood")
    found = pipe(**seeded_call(TEXT.arguments()))
    assert found.ood.valid.all()
    assert np.array_equal(np.asarray(output[0]), np.asarray(found[0]))
    assert pipe.ood_monitor.monitor.samples_seen == 2


def test_a_watched_pipeline_is_pickled_as_a_plain_one() -> None:
    pipe = watched(TEXT)
    other = pickle.loads(pickle.dumps(pipe))  # noqa: S301  # our own
    assert type(other) is diffusers.StableDiffusionPipeline
    assert not hasattr(other(**seeded_call(TEXT.arguments())), "ood")
