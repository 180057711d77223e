"""Detectors for pipelines: fitted on images or the pipeline's samples, kept, and what they cost."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, ModularPipeline
from ood_monitor_integrations.diffusers import (
    OODBlock,
    fit_pipeline,
    monitor_pipeline,
    plan_costs,
    replayed_bound,
)
from ood_monitor_integrations.diffusers.inputs import encoded
from support.pipeline_cases import FEW, SD_SCHEDULE, case_of, seeded_call

import ood_monitor as om
from ood_monitor.testing import check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXT, PIXELS, DIT = case_of("stable-diffusion"), case_of("ddim"), case_of("dit")


def fitted(pipe: Any, data: Any, case: Any = TEXT, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"levels": (500,), "explain": FEW, "progress": False}
    settings |= {"watches": "both"} | options
    return fit_pipeline(pipe, data, call=case.call_of_one(), **settings)


def scores(pipe: Any, detector: om.Detector, case: Any = TEXT) -> om.Scores:
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05), raise_on_error=True)
    found: om.Scores = watched(**seeded_call(case.arguments())).ood
    watched.ood_monitor.detach()
    return found


@pytest.fixture(scope="module")
def on_images() -> tuple[Any, om.Detector]:
    """A pipeline, left as it is by all that follows, and a detector of it."""
    pipe = TEXT()
    return pipe, fitted(pipe, [TEXT.images(44)])


# What it is fitted on.


@pytest.mark.slow
def test_images_of_every_kind_are_the_same_images() -> None:
    pipe, images = TEXT(), TEXT.images(44)
    # On the grid of 256 values, which PIL images are on.
    images = (images * 255).round() / 255
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [PIL.Image.fromarray((a * 255).round().astype(np.uint8)) for a in arrays]
    expected = scores(pipe, fitted(pipe, [images])).score
    for data in (list(images.split(11)), [arrays], [pictures]):
        found = scores(pipe, fitted(pipe, data)).score
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.both_methods
def test_each_batch_has_conditions_of_its_own() -> None:
    pipe = DIT()
    common = {"num_inference_steps": 2, "output_type": "np"}
    labels = [[i % 7 for i in range(k, k + 11)] for k in range(4)]
    batches = [DIT.images(11, seed=k) for k in range(4)]
    pairs = [(b, {"class_labels": own}) for b, own in zip(batches, labels, strict=True)]
    options: dict[str, Any] = {"levels": (500,), "explain": FEW, "progress": False}
    options["watches"] = "outputs"
    detector = fit_pipeline(pipe, pairs, call=common, **options)
    all_the_same = [(b, {"class_labels": [3]}) for b in batches]
    other = fit_pipeline(pipe, all_the_same, call=common, **options)
    assert not np.array_equal(detector.fitted.calibration.scores, other.fitted.calibration.scores)
    assert scores(pipe, detector, DIT).valid.all()


def test_conditions_of_another_number_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="conditions for 1 or all 44 images of a batch, got 2"):
        fit_pipeline(TEXT(), [TEXT.images(44)], call=TEXT.arguments(), progress=False)


def as_bytes(case: Any) -> torch.Tensor:
    return (case.images(44) * 255).to(torch.uint8)


def picture(mode: str, value: Any) -> PIL.Image.Image:
    return PIL.Image.new(mode, (8, 8), value)


#: Images of another kind than the pipeline takes, and what is said of them.
OTHER_IMAGES: dict[str, tuple[Any, str]] = {
    "bytes": (as_bytes, "floating-point samples, got .*uint8"),
    "bytes as real numbers": (lambda case: as_bytes(case).float(), r"values in \[0, 1\].*to 25"),
    "from -1 to 1": (lambda case: 2 * case.images(44) - 1, r"\[0, 1\].*map values in \[-1, 1\]"),
    "arrays of bytes": (lambda case: as_bytes(case).permute(0, 2, 3, 1).numpy(), "uint8"),
    "flipped arrays of bytes": (
        lambda case: as_bytes(case).permute(0, 2, 3, 1).double().numpy()[:, ::-1],
        r"values in \[0, 1\]",
    ),
    "a list of bytes": (lambda case: list(as_bytes(case)), "uint8"),
    "bits": (lambda case: case.images(44) > 0.5, "torch.bool"),
    "one beyond": (lambda case: case.images(44).index_fill(0, torch.tensor(9), 1.5), "to 1.5"),
    "16 bits": (lambda case: [picture("I;16", 40_000)] * 44, "got mode 'I;16'"),
    "black and white": (lambda case: [picture("1", 1)] * 44, "got mode '1'"),
    "a palette": (lambda case: [picture("P", 7)] * 44, "got mode 'P'"),
}


@pytest.mark.parametrize("case", [TEXT, PIXELS], ids=["latents", "pixels"])
@pytest.mark.parametrize(("make", "told"), OTHER_IMAGES.values(), ids=OTHER_IMAGES)
def test_images_of_another_range_are_refused(case: Any, make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fitted(case(), [make(case)], case)


def test_inputs_of_another_range_are_refused() -> None:
    pipe = case_of("img2img")()
    like = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"floating-point samples, got .*uint8"):
        encoded(pipe, as_bytes(case_of("img2img")), like)
    latents = 9 * torch.randn(2, 4, 8, 8)
    assert torch.equal(encoded(pipe, latents, like), latents), "latents have no range"


def test_four_channels_without_an_autoencoder_are_pixels() -> None:
    images = torch.rand(2, 4, 8, 8)
    found = encoded(SimpleNamespace(), images, torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(found, 2 * images - 1)


def test_no_data_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected held-out batches"):
        fitted(TEXT(), [])


@pytest.mark.slow
@pytest.mark.both_methods
def test_images_of_another_size_come_out_in_the_pipelines(on_images: tuple[Any, Any]) -> None:
    pipe, detector = on_images
    images = torch.nn.functional.interpolate(TEXT.images(44), scale_factor=2)
    expected = scores(pipe, detector).score
    torch.testing.assert_close(scores(pipe, fitted(pipe, [images])).score, expected)


@pytest.mark.slow
@pytest.mark.both_methods
def test_without_data_it_is_fitted_on_the_pipelines_own_samples_and_says_so() -> None:
    pipe = PIXELS()
    detector = fitted(pipe, None, PIXELS, samples=44)
    assert detector.source == "the pipeline's own samples"
    # As usual as what it was fitted on; the images of another source are not.
    p_values = torch.cat([scores(pipe, detector, PIXELS).p_value for _ in range(2)])
    assert (p_values > 0.05).all()
    foreign = fitted(pipe, [PIXELS.images(44)], PIXELS)
    assert foreign.source == "held-out images"
    assert scores(pipe, foreign, PIXELS).p_value.max() < p_values.min()


def test_fitting_leaves_the_pipeline_as_it_was() -> None:
    pipe = TEXT()
    before = [dict(part.__dict__) for part in (pipe, pipe.unet, pipe.scheduler)]
    state, configuration = torch.get_rng_state(), pipe.config
    fitted(pipe, [TEXT.images(44)])
    for part, was in zip((pipe, pipe.unet, pipe.scheduler), before, strict=True):
        assert part.__dict__.keys() == was.keys()
        assert all(part.__dict__[name] is value for name, value in was.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.config == configuration


def test_a_watched_pipeline_can_be_fitted_again(on_images: tuple[Any, Any]) -> None:
    pipe, detector = on_images
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05))
    fitted(watched, [TEXT.images(44, seed=6)])
    assert watched.ood_monitor.monitor.samples_seen == 0
    watched.ood_monitor.detach()


# What is kept, and what it costs.


def test_a_saved_detector_scores_as_before(on_images: tuple[Any, Any], tmp_path: Path) -> None:
    pipe, detector = on_images
    detector.save_pretrained(tmp_path)
    other = TEXT()
    adapter = replayed_bound(other, call=TEXT.arguments(), levels=(500,))
    loaded = om.Detector.from_pretrained(tmp_path, adapter)
    assert torch.equal(scores(other, loaded).score, scores(pipe, detector).score)


OTHERS: dict[str, tuple[Any, Any]] = {
    "prediction": (
        EulerDiscreteScheduler(**SD_SCHEDULE),
        EulerDiscreteScheduler(prediction_type="v_prediction", **SD_SCHEDULE),
    ),
    "preconditioned": (EDMEulerScheduler(), EDMEulerScheduler(prediction_type="v_prediction")),
    "scale": (EDMEulerScheduler(), EDMEulerScheduler(0.004, 160.0, 1.0)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_detector_beside_a_scheduler_of_another_network_warns(name: str, tmp_path: Path) -> None:
    pipe, (own, other) = TEXT(), OTHERS[name]
    pipe.scheduler = own
    call = TEXT.call_of_one() | {"num_inference_steps": 4}
    fit_pipeline(
        pipe, [TEXT.images(44)], call=call, explain=FEW, progress=False, watches="outputs"
    ).save_pretrained(tmp_path)
    om.Detector.from_pretrained(tmp_path, replayed_bound(pipe, call=call))  # warns of nothing
    pipe.scheduler = other
    with pytest.warns(UserWarning, match="Another adapter: .*scheduler="):
        om.Detector.from_pretrained(tmp_path, replayed_bound(pipe, call=call))


def test_default_levels_are_those_of_a_schedule_of_any_length() -> None:
    pipe = TEXT()
    pipe.scheduler = EDMEulerScheduler(num_train_timesteps=500)
    assert replayed_bound(pipe, call=TEXT.arguments()).levels == (10, 50, 150, 250)


@pytest.mark.slow
def test_the_bound_is_an_adapter_as_any_other() -> None:
    pipe = TEXT()
    adapter = replayed_bound(pipe, call=TEXT.arguments(), levels=(50, 500))
    batch = {"sample": torch.randn(3, 4, 8, 8), "encoder_hidden_states": torch.randn(3, 7, 8)}
    check_adapter(adapter, batch)
    adapter.seed = 3
    check_adapter(adapter, batch)
    assert [term for term, _ in adapter.log_likelihood(batch)] == ["t=50", "t=500"]


def test_a_call_of_another_size_is_refused_by_name() -> None:
    flux = case_of("flux")
    pipe = flux()
    watched = monitor_pipeline(
        pipe, om.Monitor(fitted(pipe, [flux.images(44)], flux), fpr=0.05), raise_on_error=True
    )
    with pytest.raises(ValueError, match="Expected samples as the detector was fitted on"):
        watched(**seeded_call(flux.arguments() | {"height": 32}))


@pytest.mark.slow
@pytest.mark.both_methods
def test_a_call_with_another_scale_is_refused_by_name() -> None:
    case = case_of("controlnet")
    pipe = case()
    monitor = om.Monitor(fitted(pipe, [case.images(44)], case), fpr=0.05)
    watched = monitor_pipeline(pipe, monitor, raise_on_error=True)
    with pytest.raises(ValueError, match=r"with the controlnet\.conditioning_scale that the"):
        watched(**seeded_call(case.arguments() | {"controlnet_conditioning_scale": 0.3}))


def test_plans_are_measured_beside_a_forward_pass() -> None:
    end = ["conv_out.*"]
    plans = plan_costs(
        TEXT(), call=TEXT.arguments(), levels=[(500,), (50, 500)], layers=[None, end], rounds=2
    )
    assert [(plan.method, plan.levels, plan.layers) for plan in plans] == [
        ("forward", (), None),
        ("gradient_norms", (500,), None),
        ("gradient_norms", (500,), end),
        ("gradient_norms", (50, 500), None),
        ("gradient_norms", (50, 500), end),
    ]
    assert all(plan.milliseconds > 0 and plan.forwards > 0 for plan in plans)


# Modular pipelines, and several processes.


def modular(watch: bool, monitor: Any = None) -> Any:
    """SDXL's denoising and decoding blocks, with the components of the tiny pipeline."""
    from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
        StableDiffusionXLAutoBlocks,
    )

    blocks = StableDiffusionXLAutoBlocks()
    for name in list(blocks.sub_blocks):
        if name not in ("denoise", "decode"):
            blocks.sub_blocks.pop(name)
    if watch:
        denoise = blocks.sub_blocks["denoise"]
        blocks.sub_blocks["denoise"] = OODBlock(denoise, monitor, raise_on_error=True)
    return blocks


def run_modular(blocks: Any, components: dict[str, Any], arguments: dict[str, Any]) -> Any:
    pipe: ModularPipeline = blocks.init_pipeline()
    pipe.update_components(**{k: v for k, v in components.items() if k in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {name: arguments[name] for name in (*names, *pooled)}
    return pipe(
        **given,
        num_inference_steps=3,
        height=16,
        width=16,
        generator=generator,
        output_type="pt",
    )


def test_a_block_watches_a_modular_pipeline() -> None:
    case = case_of("sdxl")
    pipe = case()
    detector = fitted(pipe, [case.images(44)], case, method="gradient_norms")
    monitor = om.Monitor(detector, fpr=0.05)
    plain = run_modular(modular(False), pipe.components, case.arguments())
    state = run_modular(modular(True, monitor), pipe.components, case.arguments())
    assert torch.equal(state.get("images"), plain.get("images"))
    expected = case.loss(
        pipe, plain.get("latents"), 500, case.arguments(), seed=monitor.detector.adapter.seed
    )
    found = state.get("ood").log_likelihood
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=0)


WORKER = """
import json, sys
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from ood_monitor_integrations.diffusers import fit_pipeline, wrap
from support.pipeline_cases import case_of, seeded_call
import ood_monitor as om

torch.set_num_threads(1)
case, state = case_of("stable-diffusion"), PartialState(cpu=True)
pipe = case()
call = case.call_of_one()
options = {"levels": (500,), "progress": False, "watches": "outputs"}
detector = fit_pipeline(pipe, [case.images(44)], call=call, **options)
monitor = om.Monitor(detector, fpr=0.05)
found = []
with state.split_between_processes(list(range(7))) as seeds:
    with wrap(pipe, monitor, raise_on_error=True) as watched:
        for seed in seeds:
            found.append((seed, watched(**seeded_call(call, seed)).ood.score.tolist()))
found = gather_object(found)
if state.is_main_process:
    print("FOUND", json.dumps(sorted(found)))
"""


@pytest.mark.slow
def test_two_processes_score_as_one_does() -> None:
    pytest.importorskip("accelerate")
    found = []
    for processes in (1, 2):
        ranks = [worker(rank, processes, 29531 + processes) for rank in range(processes)]
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
        assert not any(process.returncode for process in ranks), outputs
        found += [line for output in outputs for line in output.splitlines() if "FOUND" in line]
    assert found[0] == found[1]


def worker(rank: int, processes: int, port: int) -> subprocess.Popen[str]:
    alone = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    # One thread: several sum in another order.
    network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tests = str(Path(__file__).parents[2])
    path = {"PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER],
        env=os.environ | path | network | (alone if processes > 1 else {}),
        stdout=subprocess.PIPE,
        text=True,
    )
