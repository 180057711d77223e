"""Real pipelines: watched from outside, and the same to the bit."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from ood_monitor_integrations.diffusers import monitor_pipeline

import ood_monitor as om

PIPELINES = [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(params=PIPELINES, ids=lambda pair: pair[0].__name__)
def pipe(request: pytest.FixtureRequest) -> Iterator[Any]:
    pipeline, scheduler = request.param
    made = pipeline(tiny_unet(), scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def fitted(pipe: Any) -> om.Detector:
    held_out = torch.randn(60, 1, 8, 8)
    adapter = om.DenoisingBound(pipe.unet, pipe.scheduler)
    return om.Detector(adapter).fit([held_out], progress=False)


def generate(pipe: Any, **options: Any) -> Any:
    settings = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    return pipe(generator=torch.Generator().manual_seed(0), **(settings | options))


def test_images_and_random_state_are_the_same_to_the_bit(pipe: Any) -> None:
    plain, state = generate(pipe), torch.get_rng_state()
    detector = fitted(pipe)
    torch.set_rng_state(state)
    watched = generate(monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05)))
    assert np.array_equal(plain.images, watched.images)
    assert torch.equal(torch.get_rng_state(), state)
    assert watched.to_tuple()[0].shape == plain.to_tuple()[0].shape
    assert len(watched.to_tuple()) == len(plain.to_tuple())


def test_each_image_gets_the_score_of_the_final_sample(pipe: Any) -> None:
    detector = fitted(pipe)
    with monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05)) as watched:
        output = generate(watched)
    assert output.ood.p_value.shape == (2,)
    # The pipelines return the final sample clipped to [0, 1]; what was scored is what was clipped.
    assert output.ood.valid.all()


def test_a_tuple_stays_a_tuple_and_the_scores_are_at_the_monitor(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, om.Monitor(fitted(pipe), fpr=0.05))
    output = generate(watched, return_dict=False)
    assert isinstance(output, tuple)
    assert watched.ood_monitor.monitor.last.score.shape == (2,)


def test_detach_gives_everything_back(pipe: Any) -> None:
    detector = fitted(pipe)
    before, kind = dict(pipe.__dict__), type(pipe)
    with monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05)) as watched:
        generate(watched)
        assert isinstance(pipe, kind)
    assert type(pipe) is kind
    assert pipe.__dict__ == before
    assert "step" not in pipe.scheduler.__dict__


def test_save_pretrained_writes_what_it_always_did(pipe: Any, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path / "plain")
    monitor_pipeline(pipe, om.Monitor(fitted(pipe), fpr=0.05)).save_pretrained(tmp_path / "watched")
    names = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.*"))
    assert names == sorted(
        p.relative_to(tmp_path / "watched") for p in (tmp_path / "watched").rglob("*.*")
    )
    for name in names:
        plain, watched = (tmp_path / folder / name for folder in ("plain", "watched"))
        assert plain.read_bytes() == watched.read_bytes()


def test_a_failing_score_never_breaks_a_call(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    detector = om.Detector(om.DenoisingBound(pipe.unet, pipe.scheduler))
    detector.fit([torch.randn(60, 1, 16, 16)], progress=False)  # another size than the pipeline's
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05))
    assert generate(watched).images.shape == (2, 8, 8, 1)
    assert watched.ood_monitor.failures == 1
    assert "not scored" in caplog.text


def test_a_failing_score_is_raised_if_asked_for(pipe: Any) -> None:
    detector = om.Detector(om.DenoisingBound(pipe.unet, pipe.scheduler))
    detector.fit([torch.randn(60, 1, 16, 16)], progress=False)
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05), raise_on_error=True)
    with pytest.raises(ValueError, match="Expected samples as the detector was fitted on"):
        generate(watched)
    assert "step" not in pipe.scheduler.__dict__


def test_a_detector_of_another_model_is_refused(pipe: Any) -> None:
    other = DDPMPipeline(tiny_unet(), DDPMScheduler())
    with pytest.raises(ValueError, match=r"Expected a detector of .* UNet2DModel"):
        monitor_pipeline(other, om.Monitor(fitted(pipe), fpr=0.05))


def test_watching_twice_is_refused(pipe: Any) -> None:
    monitor = om.Monitor(fitted(pipe), fpr=0.05)
    monitor_pipeline(pipe, monitor)
    with pytest.raises(ValueError, match="not watched yet"):
        monitor_pipeline(pipe, monitor)


def test_a_conditional_denoiser_is_refused_at_attach_time() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())

    class WithZeros(om.Adapter):
        module = unet

        def log_likelihood(self, batch: Any) -> Any:
            context = batch.new_zeros(len(batch), 1, 8)
            t = batch.new_zeros(len(batch))
            output = unet(batch, t, encoder_hidden_states=context).sample
            yield "t=0", -output.square().flatten(1).sum(1)

    detector = om.Detector(WithZeros()).fit([torch.randn(60, 1, 8, 8)], progress=False)
    with pytest.raises(ValueError, match="needs \\['encoder_hidden_states'\\]"):
        monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05))
