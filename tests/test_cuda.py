"""On a GPU as on the CPU: engine, detectors, training, pipelines. Skipped where there is none.

CUDA convolves in TF32 unless told otherwise, as here: norms are those of the CPU to its ten bits.
"""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline
from support.cases import MODELS, Gaussian, Model
from support.lightning_cases import QUIET, images, trained, watcher
from support.pipeline_cases import PIPELINES, PipelineCase, case_of, seeded_call
from support.small_cases import SMALL
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, map_tensors

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The fast path disagrees with the loop"),
]

GPU = torch.device("cuda")

models = pytest.mark.parametrize("case", MODELS, ids=lambda m: m.name)


def on_gpu(adapter: om.Adapter, batch: Batch) -> tuple[om.Adapter, Batch]:
    nn.Module.to(adapter.module, GPU)
    return adapter, map_tensors(lambda t: t.to(GPU), batch)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Norms that are rounding noise beside the largest of their term may differ."""
    assert list(found) == list(expected)
    largest: dict[str, float] = {}
    for key, norms in expected.items():
        term = key.split("/")[0]
        largest[term] = max(largest.get(term, 0.0), float(norms.max()))
    for key, norms in expected.items():
        noise = rtol**2 * largest[key.split("/")[0]]
        torch.testing.assert_close(found[key].cpu().double(), norms, rtol=rtol, atol=noise)


# The engine.


@models
def test_norms_are_those_of_the_cpu(case: Model) -> None:
    expected = om.gradient_norms(*case())
    found = om.gradient_norms(*on_gpu(*case()))
    assert_close(found, expected, 1e-4)  # diffusers embeds times in single precision


@models
def test_norms_in_single_precision_are_those_of_the_cpu(case: Model) -> None:
    expected = om.gradient_norms(*case())
    assert_close(om.gradient_norms(*on_gpu(*case(torch.float32))), expected, 0.05)


@models
def test_no_more_is_left_to_the_loop_than_on_the_cpu(case: Model) -> None:
    with warnings.catch_warnings(record=True, action="always") as caught:
        om.gradient_norms(*on_gpu(*case(torch.float32)))
    said = any("disagrees with the loop" in str(warning.message) for warning in caught)
    assert said == case.warns


def test_a_deep_flow_is_not_left_to_the_loop() -> None:
    flow = om.models.Glow(channels=3, size=32, levels=3, steps=32, hidden=64)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=noise)
    batch = 0.1 * torch.randn(4, 3, 32, 32, generator=noise)
    exact = om.gradient_norms(om.LogLikelihood(copy.deepcopy(flow).double()), batch.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = om.gradient_norms(om.LogLikelihood(flow.to(GPU)), batch)
    assert_close(found, exact, 0.3)


def test_the_generator_of_the_gpu_is_put_back() -> None:
    def noisy(module: nn.Module, x: Tensor) -> Tensor:
        torch.rand(1, device=x.device)
        output: Tensor = module(x)
        return output

    adapter, batch = on_gpu(Gaussian(nn.Linear(3, 2), noisy), torch.rand(4, 3))
    before = torch.cuda.get_rng_state()
    om.gradient_norms(adapter, batch)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# Detectors.


@pytest.mark.parametrize("name", SMALL)
def test_a_detector_fitted_on_the_gpu_scores_as_on_the_cpu(name: str) -> None:
    small = SMALL[name]
    plain = om.Detector(small()).fit([small.data(220)])
    detector = om.Detector(small.adapter(small.model().to(GPU))).fit([small.data(220)])
    x = small.data(6, seed=1)
    torch.testing.assert_close(
        torch.as_tensor(detector.score(x).score).cpu(),
        torch.as_tensor(plain.score(x).score),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_monitor_takes_batches_of_the_gpu() -> None:
    flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4).to(GPU)
    detector = om.Detector(om.LogLikelihood(flow)).fit([images(200)])
    monitor = om.Monitor(detector, fpr=0.05, ert=1000)
    for _ in range(30):
        monitor.update(torch.full((8, 1, 4, 4), 0.999, device=GPU))
    assert monitor.status == "ALERT"


# Training.


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_run_with_the_callback_is_the_run_without(precision: Any) -> None:
    options = {"accelerator": "gpu", "devices": 1, "precision": precision}
    plain = trained(**options).state_dict()
    callback = watcher()
    watched = trained(callback, **options).state_dict()
    assert callback.detector is not None
    for name, value in plain.items():
        assert torch.equal(watched[name], value), name


# Pipelines.


def given(pipe: Any, arguments: dict[str, Any], dtype: Any = None) -> dict[str, Any]:
    """Arguments of a call where the pipeline computes."""
    device = pipe._execution_device
    return {k: v.to(device, dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def fitted(pipe: Any, case: PipelineCase) -> om.Detector:
    one = given(pipe, case.call_of_one())
    options: dict[str, Any] = {"levels": (500,), "progress": False, "watches": "both"}
    return fit_pipeline(pipe, [case.images(44)], call=one, **options)


def watch(pipe: Any, case: PipelineCase, detector: Any = None, **options: Any) -> Any:
    monitor = om.Monitor(detector or fitted(pipe, case), fpr=0.05)
    return monitor_pipeline(pipe, monitor, **({"raise_on_error": True} | options))


def call(pipe: Any, case: PipelineCase) -> Any:
    return pipe(**seeded_call(given(pipe, case.arguments()), 0))


def same(one: Any, other: Any) -> bool:
    images = [np.asarray(torch.as_tensor(output[0]).cpu()) for output in (one, other)]
    return np.array_equal(*images)


TEXT = case_of("stable-diffusion")


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
def test_a_pipelines_images_are_those_without(case: PipelineCase) -> None:
    pipe = case().to(GPU)
    plain = call(pipe, case)
    output = call(watch(pipe, case), case)
    assert same(output, plain)
    assert np.isfinite(np.asarray(output.ood.score)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_pipeline_in_half_precision(dtype: torch.dtype) -> None:
    pipe = TEXT().to(GPU, dtype)
    # NumPy has no bfloat16.
    arguments = given(pipe, TEXT.arguments() | {"output_type": "pt"}, dtype)
    plain = pipe(**seeded_call(arguments, 0))
    output = watch(pipe, TEXT)(**seeded_call(arguments, 0))
    assert torch.equal(output[0], plain[0])
    assert np.isfinite(np.asarray(output.ood.score)).all()


def test_a_pipeline_of_the_gpu_has_the_scores_of_the_cpu() -> None:
    expected = call(watch(TEXT(), TEXT), TEXT).ood.score
    found = call(watch(TEXT().to(GPU), TEXT), TEXT).ood.score
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0.05, atol=1)


def test_an_offloaded_pipeline() -> None:
    pytest.importorskip("accelerate")
    pipe = TEXT()
    detector = fitted(pipe.to(GPU), TEXT)
    pipe.to("cpu").enable_model_cpu_offload()
    plain = call(pipe, TEXT)
    watched = watch(pipe, TEXT, detector)
    for _ in range(2):
        output = call(watched, TEXT)
        assert same(output, plain)
        assert np.isfinite(np.asarray(output.ood.score)).all()


def test_a_pipeline_watched_in_the_background() -> None:
    pipe = TEXT().to(GPU)
    plain = call(pipe, TEXT)
    watched = watch(pipe, TEXT, mode="background")
    assert same(call(watched, TEXT), plain)
    watched.ood_monitor.flush()
    assert watched.ood_monitor.monitor.samples_seen == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor
def test_a_denoiser_compiled_for_the_gpu() -> None:
    pipe, case = case_of("ddim")().to(GPU), case_of("ddim")
    detector = fitted(pipe, case)
    expected = call(watch(pipe, case, detector), case).ood.score
    pipe.ood_monitor.detach()
    pipe.unet = torch.compile(pipe.unet)
    plain = call(pipe, case)
    output = call(watch(pipe, case, detector), case)
    assert same(output, plain)
    found = torch.as_tensor(output.ood.score)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0.05, atol=1)
