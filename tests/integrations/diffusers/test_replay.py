"""Every family of pipelines: watched, the same to the bit, and scored as it was trained."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, replayed_bound
from ood_monitor_integrations.diffusers.recorded_call import record_call
from support.further_pipeline_cases import FURTHER
from support.further_video_pipeline_cases import FURTHER_VIDEOS
from support.given_pipeline_cases import GIVEN
from support.pipeline_cases import FEW, PIPELINES, PipelineCase, seeded_call
from support.read_pipeline_cases import READ
from support.video_pipeline_cases import VIDEOS
from torch import Tensor

import ood_monitor as om

# diffusers' own, of schedulers that hand a tensor to numpy and of Flux's ControlNet.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

LEVEL = 500
CASES = PIPELINES + GIVEN + READ + FURTHER + VIDEOS + FURTHER_VIDEOS
#: Of networks that other cases have too: by the method that costs less.
VARIANTS = (
    *("hidream-unipc", "qwen-image-21-uncached", "cogview4-unshifted", "z-image-unguided"),
    *("animatediff-unguided", "cogvideox-dpm", "sdxl-edm-v"),
)
#: One of each way of calling a denoiser is tried at once.
FIRST = ("ddpm", "stable-diffusion", "controlnet", "sdxl", "sdxl-edm", "sd3", "flux", "dit")
every_pipeline = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in FIRST else [pytest.mark.slow])
        for case in CASES
    ],
)
with_inputs = pytest.mark.parametrize(
    "case", [case for case in CASES if case.inputs], ids=lambda case: case.name
)


def fitted(pipe: Any, case: PipelineCase, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"levels": case.levels, "seed": 0, "explain": FEW, "progress": False}
    settings |= {"watches": "both"}
    call = case.call_of_one() | ({"batch_size": 1} if "batch_size" in case.arguments() else {})
    return fit_pipeline(pipe, [case.images(44)], call=call, **(settings | options))


def monitor_of(detector: om.Detector) -> om.Monitor:
    return om.Monitor(detector, fpr=0.05)


def plain_call(pipe: Any, arguments: dict[str, Any]) -> tuple[np.ndarray, Tensor]:
    """Images, and what the scheduler's last step gives; of DiT's two copies, the first."""
    step, samples = pipe.scheduler.step, []

    @functools.wraps(step)  # pipelines look at what it takes
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        samples.append(output[0] if isinstance(output, tuple) else output.prev_sample)
        return output

    pipe.scheduler.step = recorded
    try:
        output = pipe(**arguments)
    finally:
        del pipe.scheduler.step
    return arrays(output), samples[-1][: len(output[0])].clone()


def arrays(output: Any) -> np.ndarray:
    return np.asarray(output[0])


@every_pipeline
def test_a_call_is_the_same_to_the_bit_and_scored_by_the_training_loss_of_its_sample(
    case: PipelineCase,
) -> None:
    pipe, start = case(), torch.get_rng_state()
    plain, sample = plain_call(pipe, seeded_call(case.arguments()))
    after = torch.get_rng_state()  # SD3's ControlNet draws from it
    expected = sum(case.loss(pipe, sample, level, case.arguments()) for level in case.levels)
    torch.set_rng_state(start)
    # Without noise there is no bound.
    detector = fitted(pipe, case, method="forward" if case.name in VARIANTS else "both")
    watched = monitor_pipeline(pipe, monitor_of(detector), raise_on_error=True)
    assert torch.equal(torch.get_rng_state(), start)
    assert "output_layer" in {part.kind for part in detector.fitted.joined.parts}
    output = watched(**seeded_call(case.arguments()))
    assert np.array_equal(arrays(output), plain)
    assert torch.equal(torch.get_rng_state(), after)
    assert output.ood.valid.all()
    assert output.ood.p_value.shape == (2,)
    if case.name not in VARIANTS:
        found = output.ood.log_likelihood.float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@with_inputs
def test_an_input_is_scored_by_the_training_loss_of_its_encoding(case: PipelineCase) -> None:
    pipe, arguments = case(), case.arguments()
    # An upscaler's is smaller than what is made of it.
    image = torch.nn.functional.interpolate(arguments["image"], size=case.size[1:])
    with torch.no_grad():
        latents = pipe.vae.encode(2 * image - 1).latent_dist.mean
    config = pipe.vae.config
    latents = (latents - (config.shift_factor or 0)) * config.scaling_factor
    if hasattr(pipe, "_pack_latents"):
        latents = pipe._pack_latents(latents, 2, 1, 8, 8)
    expected = case.loss(pipe, latents, LEVEL, arguments)
    monitor = monitor_of(fitted(pipe, case, method="gradient_norms"))
    watched = monitor_pipeline(pipe, monitor, what="inputs", raise_on_error=True)
    found = watched(**seeded_call(arguments)).ood.log_likelihood
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=0)


@every_pipeline
def test_residuals_are_those_of_the_training_target_without_noise(case: PipelineCase) -> None:
    pipe, arguments = case(), case.arguments()
    found = record_call(pipe, seeded_call(arguments), 0)
    bound = replayed_bound(pipe, call=arguments)
    batch = bound.batch(found.call, found.count)
    levels = []
    for name, residual in bound.residuals(batch):
        levels.append(int(name.removeprefix("t=")))
        expected = case.loss(pipe, batch["sample"], levels[-1], arguments, amount=0.0)
        torch.testing.assert_close(
            -0.5 * residual.square().flatten(1).sum(1), expected, rtol=1e-4, atol=0
        )
    assert len(levels) == case.residuals


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl", "sd3", "dit", "pixart", "controlnet"])
def test_a_check_of_the_condition_takes_the_null_one_of_the_same_call(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    pipe, arguments = case(), case.arguments()
    found = record_call(pipe, seeded_call(arguments), 0)
    bound = replayed_bound(pipe, call=arguments, condition_check=True)
    batch = bound.batch(found.call, found.count)
    conditions = [k for k in batch if k != "sample" and not k.startswith("null.")]
    assert conditions
    assert {f"null.{k}" for k in conditions} == {k for k in batch if k.startswith("null.")}
    *_, (level, own), (last, null) = bound.residuals(batch)
    assert last == f"{level}/null"
    unconditioned = batch | {k: batch[f"null.{k}"] for k in conditions}
    expected = dict(bound.residuals(unconditioned))[level]
    torch.testing.assert_close(null, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(null, own)


def test_a_null_condition_is_the_negative_prompt() -> None:
    case = next(case for case in PIPELINES if case.name == "stable-diffusion")
    pipe, arguments = case(), case.arguments()
    bound = replayed_bound(pipe, call=arguments, condition_check=True)
    found = record_call(pipe, seeded_call(arguments), 0)
    batch = bound.batch(found.call, found.count)
    expected = {"": "prompt_embeds", "null.": "negative_prompt_embeds"}
    for prefix, name in expected.items():
        assert torch.equal(batch[f"{prefix}encoder_hidden_states"], arguments[name])


def test_a_call_is_watched_with_a_check_of_its_condition() -> None:
    case = next(case for case in PIPELINES if case.name == "stable-diffusion")
    pipe, plain = case(), case()
    detector = fitted(pipe, case, condition_check=True, method="forward")
    assert detector.fitted.joined.parts[-1].kind == "condition"
    watched = monitor_pipeline(pipe, monitor_of(detector), raise_on_error=True)
    output = watched(**seeded_call(case.arguments()))
    assert output.ood.valid.all()
    assert np.array_equal(arrays(output), arrays(plain(**seeded_call(case.arguments()))))


@pytest.mark.parametrize("name", ["stable-diffusion-unguided", "ddpm", "flux"])
def test_a_check_is_refused_of_a_call_without_a_null_condition(name: str) -> None:
    case = next(case for case in PIPELINES if case.name == name)
    with pytest.raises(ValueError, match="Expected a guided call"):
        replayed_bound(case(), call=case.arguments(), condition_check=True)


@pytest.mark.parametrize("shape", [(3, 16, 16), (4, 5, 4, 4)], ids=["images", "of-other-frames"])
def test_what_are_no_latents_of_a_video_is_refused(shape: tuple[int, ...]) -> None:
    case = VIDEOS[0]
    with pytest.raises(ValueError, match="Expected latents of videos in the denoiser's own layout"):
        fit_pipeline(case(), [torch.rand(44, *shape)], call=case.call_of_one(), progress=False)
