"""Pipelines as they are deployed: compiled, cached, offloaded, with adapters; and the refused."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline
from ood_monitor_integrations.diffusers.caches import caches_in, without_caches
from support.pipeline_cases import FEW, case_of, known, seeded_call, text_unet
from torch import nn

import ood_monitor as om

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXT, FLUX, PIXELS = case_of("stable-diffusion"), case_of("flux"), case_of("ddpm")


def fitted(pipe: Any, case: Any = TEXT, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"levels": (500,), "explain": FEW, "progress": False}
    settings |= {"watches": "both"} | options
    return fit_pipeline(pipe, [case.images(44)], call=case.call_of_one(), **settings)


def watch(pipe: Any, case: Any = TEXT, detector: Any = None, **options: Any) -> Any:
    monitor = om.Monitor(detector or known(pipe, case), fpr=0.05)
    return monitor_pipeline(pipe, monitor, **({"raise_on_error": True} | options))


def call(pipe: Any, case: Any = TEXT, seed: int = 0, **more: Any) -> Any:
    return pipe(**seeded_call(case.arguments() | more, seed))


@pytest.fixture(scope="module")
def expected() -> om.Scores:
    """Of a call of the text pipeline as it is."""
    found: om.Scores = call(watch(TEXT())).ood
    return found


def check_as_before(pipe: Any, plain: Any, expected: Any, case: Any = TEXT) -> None:
    """The same images as unwatched, and the scores of the plain denoiser."""
    output = call(pipe, case)
    assert np.array_equal(np.asarray(output[0]), np.asarray(plain[0]))
    torch.testing.assert_close(output.ood.score, expected.score, rtol=1e-4, atol=1e-3)


# What is scored as if it were not deployed in its way.


@pytest.mark.slow
@pytest.mark.both_methods
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_denoiser_is_scored_as_what_was_compiled(when: str, expected: om.Scores) -> None:
    pipe = TEXT()
    detector = known(pipe, TEXT)
    compiled = torch.compile(pipe.unet, backend="eager")
    if when == "before":
        pipe.unet = compiled
    watched = watch(pipe, detector=detector)
    if when == "after":
        pipe.unet = compiled
    check_as_before(watched, call(TEXT()), expected)
    watched.ood_monitor.detach()
    assert not compiled._forward_pre_hooks
    assert not detector.adapter.module._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor
def test_a_denoiser_compiled_by_inductor_gives_the_images_that_it_gives_unwatched() -> None:
    pipe, original = PIXELS(), PIXELS()
    detector, expected = known(pipe, PIXELS), call(watch(original, PIXELS), PIXELS).ood
    pipe.unet = torch.compile(pipe.unet)
    plain = call(pipe, PIXELS)
    output = call(watch(pipe, PIXELS, detector), PIXELS)
    assert np.array_equal(np.asarray(output[0]), np.asarray(plain[0]))
    # Of other images, in the last bits, than the uncompiled denoiser makes.
    torch.testing.assert_close(output.ood.score, expected.score, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
@pytest.mark.both_methods
@pytest.mark.parametrize("part", ["", "up_blocks.1"])
def test_a_denoiser_compiled_in_place_is_scored_as_before(part: str, expected: om.Scores) -> None:
    pipe, plain = TEXT(), call(TEXT())
    detector = known(pipe, TEXT)
    watched = watch(pipe, detector=detector)
    pipe.unet.get_submodule(part).compile(backend="eager")
    check_as_before(watched, plain, expected)
    check_as_before(watched, plain, expected)
    watched.ood_monitor.detach()
    in_background = watch(pipe, detector=detector, mode="background")
    output = call(in_background)
    assert in_background.ood_monitor.flush()
    assert np.array_equal(np.asarray(output[0]), np.asarray(plain[0]))
    in_background.ood_monitor.detach()


def test_a_denoiser_in_train_mode_is_watched_in_the_background() -> None:
    """Its calls leave a registry of hooks without any hook."""
    pipe = FLUX()
    pipe.transformer.train()
    watched = watch(pipe, FLUX, known(pipe, FLUX), mode="background", queue_size=8)
    for _ in range(8):  # most of which find the one before being scored
        call(watched, FLUX)
    assert watched.ood_monitor.flush(60)
    assert watched.ood_monitor.failures == {}
    assert watched.ood_monitor.counts.scored == 16


def test_a_cached_denoiser_in_train_mode_is_refused_in_the_background() -> None:
    pipe = FLUX()
    detector = known(pipe, FLUX)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e3))
    pipe.transformer.train()
    with pytest.raises(ValueError, match=r"eval mode with .* train mode: call its `eval\(\)`"):
        watch(pipe, FLUX, detector, mode="background")


#: Caches, each set so that a call's last step takes from an earlier one.
CACHES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "first block": (
        "apply_first_block_cache",
        lambda pipe: diffusers.FirstBlockCacheConfig(threshold=1e3),
    ),
    "attention broadcast": (
        "apply_pyramid_attention_broadcast",
        lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
    ),
    "taylor seer": (
        "apply_taylorseer_cache",
        lambda pipe: diffusers.TaylorSeerCacheConfig(
            cache_interval=5, disable_cache_before_step=1, max_order=1
        ),
    ),
    "magnitudes": (
        "apply_mag_cache",
        lambda pipe: diffusers.MagCacheConfig(
            threshold=1e3, retention_ratio=0.0, num_inference_steps=3, mag_ratios=[1.0] * 3
        ),
    ),
    "faster": (
        "apply_faster_cache",
        lambda pipe: diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(-1, 990),  # not of the first step
            current_timestep_callback=lambda: int(pipe._current_timestep),
            attention_weight_callback=lambda module: 0.5,
            is_guidance_distilled=True,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("is_flagged", [True, False], ids=["enabled", "applied"])
@pytest.mark.parametrize("name", CACHES)
def test_what_a_cache_makes_is_returned_and_scored_without_it(name: str, is_flagged: bool) -> None:
    apply, config_for = CACHES[name]
    pipe, other, plain = FLUX(), FLUX(), FLUX()
    for each in (pipe, other):
        if is_flagged:
            each.transformer.enable_cache(config_for(each))
        else:
            getattr(diffusers.hooks, apply)(each.transformer, config_for(each))
    hooks = caches_in(pipe.transformer)
    chains = [dict(vars(hook.fn_ref)) for hook in hooks]
    cached, uncached = call(other, FLUX), call(plain, FLUX)
    assert not np.array_equal(np.asarray(cached[0]), np.asarray(uncached[0])), "no cache at all"
    detector = fitted(pipe, FLUX, method="gradient_norms")
    watched = watch(pipe, FLUX, detector)
    for _ in range(2):
        output = call(watched, FLUX)
        assert np.array_equal(np.asarray(output[0]), np.asarray(cached[0]))
    latents = call(other, FLUX, output_type="latent")[0]
    expected = FLUX.loss(plain, latents, 500, FLUX.arguments(), seed=detector.adapter.seed)
    torch.testing.assert_close(output.ood.log_likelihood.float(), expected, rtol=1e-3, atol=0)
    watched.ood_monitor.detach()
    in_background = watch(pipe, FLUX, detector, mode="background")
    assert np.array_equal(np.asarray(call(in_background, FLUX)[0]), np.asarray(cached[0]))
    assert in_background.ood_monitor.flush(60)
    found = in_background.ood_monitor.monitor.last.log_likelihood
    torch.testing.assert_close(found, output.ood.log_likelihood)
    assert [dict(vars(hook.fn_ref)) for hook in hooks] == chains


def test_other_threads_go_through_a_cache_that_one_goes_round() -> None:
    pipe = FLUX()
    diffusers.hooks.apply_first_block_cache(
        pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=1e3)
    )
    cached = np.asarray(call(pipe, FLUX)[0])
    with without_caches(pipe.transformer), ThreadPoolExecutor(1) as pool:
        with without_caches(pipe.transformer):
            assert not np.array_equal(np.asarray(call(pipe, FLUX)[0]), cached)
        assert np.array_equal(np.asarray(pool.submit(call, pipe, FLUX).result()[0]), cached)
    assert np.array_equal(np.asarray(call(pipe, FLUX)[0]), cached)


def test_model_offloading_is_undone_for_scoring_and_done_again(expected: om.Scores) -> None:
    pytest.importorskip("accelerate")
    pipe, original = TEXT(), TEXT()
    detector = known(pipe, TEXT)
    pipe.enable_model_cpu_offload(device="cpu")
    watched = watch(pipe, detector=detector)
    for _ in range(2):
        check_as_before(watched, call(original), expected)
    assert hasattr(pipe.unet, "_hf_hook")
    watched.ood_monitor.detach()
    with pytest.raises(ValueError, match="Expected mode='sync' with model offloading"):
        watch(pipe, detector=detector, mode="background")


TILED: list[Callable[[Any], None]] = [
    lambda pipe: pipe.vae.enable_slicing(),
    lambda pipe: pipe.vae.enable_tiling(),
    lambda pipe: pipe.enable_attention_slicing(),
    lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    lambda pipe: pipe.unet.requires_grad_(False),
]


@pytest.mark.slow
@pytest.mark.both_methods
@pytest.mark.parametrize("change", TILED, ids=range(len(TILED)))
def test_ways_to_save_memory_change_no_score(
    change: Callable[[Any], None], expected: om.Scores
) -> None:
    pipe, original = TEXT(), TEXT()
    watched = watch(pipe)
    change(pipe)
    change(original)
    check_as_before(watched, call(original), expected)
    assert not watched.ood_monitor.stale


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_caller_in_any_gradient_mode_gets_scores(mode: Any, expected: om.Scores) -> None:
    watched = watch(TEXT())
    with mode():
        output = call(watched)
    torch.testing.assert_close(output.ood.score, expected.score, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.both_methods
@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl", "sd3", "flux"])
def test_a_pipeline_in_sixteen_bits_is_scored(name: str) -> None:
    case = case_of(name)
    pipe, precise = case(), case()
    of_norms = fitted(precise, case, method="gradient_norms")
    expected = call(watch(precise, case, of_norms), case).ood.log_likelihood
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, torch.bfloat16)
    arguments = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in case.arguments().items()
    }
    one = {
        k: arguments[k][:1] if isinstance(v, torch.Tensor | list) else v
        for k, v in arguments.items()
    }
    detector = fit_pipeline(
        pipe,
        [case.images(44)],
        call=one,
        levels=(500,),
        method="both",
        progress=False,
        watches="outputs",
    )
    found = watch(pipe, case, detector)(**seeded_call(arguments)).ood
    assert found.valid.all()
    torch.testing.assert_close(found.log_likelihood, expected, rtol=0.05, atol=0)


# What changes the model.


def lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def fused_lora(pipe: Any) -> None:
    lora(pipe)
    pipe.unet.fuse_lora()


def swapped(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.1)


CHANGES: list[Callable[[Any], None]] = [
    swapped,
    lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    lambda pipe: pipe.fuse_qkv_projections(),
    lora,
    fused_lora,
]


@pytest.mark.slow
@pytest.mark.both_methods
@pytest.mark.parametrize(
    "change", CHANGES, ids=["weights", "freeu", "fused-qkv", "lora", "fused-lora"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_changed_since_the_fit_is_told_of_once(
    change: Callable[[Any], None], when: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = TEXT()
    detector = known(pipe, TEXT)
    if when == "before":
        change(pipe)
    watched = watch(pipe, detector=detector, raise_on_error=False)
    assert watched.ood_monitor.stale == (when == "before")
    if when == "after":
        change(pipe)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            call(watched)
    assert watched.ood_monitor.stale
    assert caplog.text.count("Stale calibration") == 1


def test_a_change_that_is_undone_is_no_change() -> None:
    pipe = TEXT()
    watched = watch(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert watched.ood_monitor.stale
    pipe.disable_freeu()
    assert not watched.ood_monitor.stale


def test_a_detector_fitted_with_freeu_is_of_the_model_with_freeu() -> None:
    pipe = TEXT()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not watch(pipe).ood_monitor.stale


# What is refused, by name, before a call.


def with_component(name: str) -> Any:
    pipe = TEXT()
    pipe.register_modules(**{name: text_unet()})
    return pipe


def with_scheduler(scheduler: Any) -> Any:
    pipe = PIXELS()
    pipe.scheduler = scheduler
    return pipe


def grouped(pipe: Any) -> Any:
    pytest.importorskip("accelerate")
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return pipe


def cast_by_layer(pipe: Any) -> Any:
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    return pipe


def sequential(pipe: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    return pipe


def quantised(pipe: Any) -> Any:
    weight = torch.zeros_like(pipe.unet.conv_in.weight, dtype=torch.uint8)
    pipe.unet.conv_in.weight = nn.Parameter(weight, requires_grad=False)
    return pipe


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no denoiser": (
        lambda: diffusers.DDPMPipeline(None, diffusers.DDPMScheduler()),
        "Expected a pipeline with a denoiser",
    ),
    "two stages": (lambda: with_component("prior"), "one denoiser, got .* with prior"),
    "two transformers": (lambda: with_component("transformer_2"), "one denoiser"),
    "tokens": (lambda: with_scheduler(diffusers.AmusedScheduler(0)), "whose noise is discrete"),
    "trigflow": (lambda: with_scheduler(diffusers.SCMScheduler()), "prediction_type='trigflow'"),
    "scores": (
        lambda: with_scheduler(diffusers.ScoreSdeVeScheduler()),
        "Expected a schedule as a NoiseSchedule",
    ),
}

#: As deployed, after the fit: refused where gradients are taken.
DEPLOYED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "group offloading": (grouped, "group offloading"),
    "layerwise casting": (cast_by_layer, "layerwise casting"),
    "sequential offloading": (sequential, "sequential offloading"),
    "quantised weights": (quantised, "got 'conv_in.weight' of torch.uint8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_cannot_be_replayed_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    pipe = make()
    with pytest.raises((TypeError, ValueError), match=message):
        fit_pipeline(pipe, [torch.rand(44, 3, 8, 8)], progress=False)


@pytest.mark.parametrize("name", DEPLOYED)
def test_a_deployment_that_cannot_be_scored_is_refused_by_name(name: str) -> None:
    change, message = DEPLOYED[name]
    pipe = TEXT()
    detector = known(pipe, TEXT, method="gradient_norms")
    with pytest.raises(ValueError, match=message):
        watch(change(pipe), detector=detector)
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.both_methods
def test_a_denoiser_whose_weights_come_and_go_is_watched_without_gradients() -> None:
    pipe, whole = TEXT(), TEXT()
    expected = call(watch(whole, detector=known(whole, TEXT, method="forward"))).ood
    watched = watch(grouped(pipe), detector=known(pipe, TEXT, method="forward"))
    check_as_before(watched, call(grouped(TEXT())), expected)
    assert not watched.ood_monitor.stale
    watched.ood_monitor.detach()
    with pytest.raises(ValueError, match="Expected mode='sync' with group offloading"):
        watch(pipe, detector=known(pipe, TEXT, method="forward"), mode="background")


@pytest.mark.slow
@pytest.mark.both_methods
def test_a_denoiser_that_is_cast_by_layer_is_watched_without_gradients() -> None:
    pipe = cast_by_layer(TEXT())
    watched = watch(pipe, detector=fitted(pipe, method="forward"))
    assert call(watched).ood.valid.all()
    assert np.array_equal(np.asarray(call(watched)[0]), np.asarray(call(cast_by_layer(TEXT()))[0]))


@pytest.mark.parametrize("name", ["group offloading", "layerwise casting"])
def test_a_deployment_refused_later_breaks_no_call(name: str) -> None:
    change, _ = DEPLOYED[name]
    pipe = TEXT()
    norms = known(pipe, TEXT, method="gradient_norms")
    watched = watch(pipe, detector=norms, raise_on_error=False)
    change(watched)
    assert call(watched).images.shape == (2, 3, 16, 16)
    assert watched.ood_monitor.counts.failures == 1


def test_the_remaining_layers_of_a_quantised_denoiser_are_refused_only_where_they_are_chosen() -> (
    None
):
    pipe = TEXT()
    detector = fitted(pipe, layers=["conv_out.*"], method="gradient_norms")
    pipe.unet.register_parameter(
        "codes", nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    )
    watched = watch(pipe, detector=detector)
    assert call(watched).ood.valid.all()
