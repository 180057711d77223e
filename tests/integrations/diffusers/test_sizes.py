"""Pipelines of several sizes and adapters, watched by one detector."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ood_monitor_integrations.diffusers import (
    Counts,
    fit_pipeline,
    monitor_pipeline,
    replayed_bound,
)
from ood_monitor_integrations.diffusers.groups import adapters_in
from support.pipeline_cases import case_of, seeded_call
from torch import Tensor

import ood_monitor as om

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # Of the second adapter that a model gets.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

TEXT = case_of("stable-diffusion")

SIDES = (16, 24)

OPTIONS: dict[str, Any] = {
    "levels": (500,),
    "minimum_group": 10,
    "explain": 0,
    "progress": False,
}


def arguments(side: int, count: int = 12, *, seed: int = 0) -> dict[str, Any]:
    """Of a call for images of a size."""
    embeds = torch.randn(count, 7, 8, generator=torch.Generator().manual_seed(100 + seed))
    changed = {"height": side, "width": side, "prompt_embeds": embeds}
    return TEXT.arguments() | changed | {"negative_prompt_embeds": torch.zeros(count, 7, 8)}


def images(side: int, count: int = 30, *, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def own() -> tuple[Any, om.Detector]:
    """A pipeline that nothing changes, and a detector of its own samples of two sizes."""
    pipe = TEXT()
    calls = [arguments(side) for side in SIDES]
    return pipe, fit_pipeline(pipe, call=calls, samples=96, **OPTIONS)


@pytest.fixture
def watched(own: Any, tmp_path: Path) -> Iterator[Any]:
    """As a service starts: with a detector from its files, made of a call of one size."""
    pipe, detector = own
    detector.save_pretrained(tmp_path, card=False)
    adapter = replayed_bound(pipe, call=arguments(16, 1), levels=(500,))
    monitor = om.Monitor(om.Detector.from_pretrained(tmp_path, adapter), fpr=0.1)
    with monitor_pipeline(pipe, monitor) as found:
        yield found


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    names = ("ood_monitor_integrations",)
    return [r.getMessage() for r in caplog.records if r.name.startswith(names)]


def test_calls_of_several_shapes_make_a_detector_for_any_size(own: Any) -> None:
    _, detector = own
    assert detector.any_size
    assert detector.fitted.groups_of_adapter
    assert detector.fitted.grouped.large == ("4x12x12", "4x8x8")
    assert len(detector.fitted.grouped.labels) == 48


def test_both_sizes_are_watched_and_a_third_is_new(
    watched: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for n, side in enumerate(SIDES, 1):
        output = watched(**seeded_call(arguments(side, 4, seed=n), seed=n))
        assert output.ood.valid.all()
        assert output.ood.group.tolist() == [2 - n] * 4
        assert watched.ood_monitor.counts == Counts(scored=4 * n)
    assert not warnings_in(caplog)
    seen = watched.ood_monitor.monitor.samples_seen
    new = seeded_call(arguments(32, 3), seed=9)
    output = watched(**new)
    assert torch.equal(output.images, TEXT()(**seeded_call(arguments(32, 3), seed=9)).images)
    assert output.ood.p_value.isnan().all()
    assert not output.ood.valid.any()
    watched(**seeded_call(arguments(32, 3), seed=10))
    assert watched.ood_monitor.counts == Counts(scored=8, new=6)
    assert watched.ood_monitor.monitor.samples_seen == seen
    [told] = warnings_in(caplog)
    assert "not fitted on: 4x16x16" in told
    watched(**seeded_call(arguments(24, 2), seed=11))
    assert watched.ood_monitor.counts == Counts(scored=10, new=6)


def test_in_the_background_what_is_new_is_counted_at_once(own: Any) -> None:
    pipe, detector = own
    with monitor_pipeline(pipe, om.Monitor(detector, fpr=0.1), mode="background") as watched:
        watched(**seeded_call(arguments(32, 2)))
        assert watched.ood_monitor.counts == Counts(new=2)
        watched(**seeded_call(arguments(24, 2)))
        assert watched.ood_monitor.flush(60)
        assert watched.ood_monitor.counts == Counts(scored=2, new=2)


def test_a_detector_of_one_size_refuses_another() -> None:
    pipe = TEXT()
    detector = fit_pipeline(pipe, call=arguments(16), samples=48, **OPTIONS)
    assert not detector.any_size
    with monitor_pipeline(pipe, om.Monitor(detector, fpr=0.1)) as watched:
        watched(**seeded_call(arguments(24, 2)))
        assert watched.ood_monitor.counts == Counts(failures=1)
        [kind] = watched.ood_monitor.failures
        assert "Expected samples as the detector was fitted on" in kind


def test_images_of_several_sizes_are_fitted_with_their_own_calls() -> None:
    pairs = [
        (images(side, 12, seed=n), {"height": side, "width": side})
        for n, side in enumerate(SIDES * 4)
    ]
    call = TEXT.call_of_one()
    detector = fit_pipeline(TEXT(), pairs, call=call, any_size=True, **OPTIONS)
    assert detector.fitted.grouped is not None
    assert detector.fitted.grouped.large == ("4x12x12", "4x8x8")
    with pytest.raises(ValueError, match=r"one size, got \(4, 8, 8\) and \(4, 12, 12\).*any_size"):
        fit_pipeline(TEXT(), pairs[:2], call=call, **OPTIONS)
    with pytest.raises(ValueError, match="a size with minimum_group=60 calibration samples, got"):
        fit_pipeline(TEXT(), pairs, call=call, any_size=True, **OPTIONS | {"minimum_group": 60})


#: What cannot be fitted to calls of two sizes, and what is said of it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too few": (
        {"samples": 40},
        "at least 66 samples, so that each of 2 sizes has minimum_group=10",
    ),
    "one size": ({"any_size": False}, "Expected samples of one size"),
    "method": ({"method": "both"}, "any_size=True with method='forward'"),
    "images too": ({"data": [images(16)]}, "several calls without images, got 2"),
}


@pytest.mark.parametrize(("options", "told"), REFUSED.values(), ids=REFUSED)
def test_what_calls_of_two_sizes_cannot_be_fitted_with(options: Any, told: str) -> None:
    calls = [arguments(side) for side in SIDES]
    with pytest.raises(ValueError, match=told):
        fit_pipeline(TEXT(), call=calls, **({"samples": 96} | OPTIONS | options))


def test_calls_of_one_size_in_turn_make_a_detector_of_that_size() -> None:
    calls = [arguments(16, 6, seed=n) for n in range(2)]
    detector = fit_pipeline(TEXT(), call=calls, samples=44, **OPTIONS)
    assert not detector.any_size
    assert detector.fitted.provenance.adapter["conditions"] == {"encoder_hidden_states": 12}


# Adapters.


def styled(unet: Any, *names: str) -> None:
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        unet.add_adapter(config, adapter_name=name)


def test_adapters_are_told_by_name_and_scale() -> None:
    unet = TEXT().unet
    assert not adapters_in(unet)
    styled(unet, "style", "line")
    unet.set_adapters(["style"], [0.35])
    first = adapters_in(unet)
    unet.set_adapters(["style", "line"], [0.35, 1.0])
    assert first.startswith("style:")
    assert adapters_in(unet) == f"line:{4 * 1.0:g} {first}"
    unet.disable_adapters()
    assert not adapters_in(unet)


def test_adapters_that_are_on_are_groups(caplog: pytest.LogCaptureFixture) -> None:
    pipe = TEXT()
    styled(pipe.unet, "style", "line")
    pipe.unet.disable_adapters()

    def batches() -> Iterator[Tensor]:
        for n in range(8):
            switch(pipe, "style" if n % 2 else "")
            yield images(16, 12, seed=n)
        switch(pipe, "")

    options = OPTIONS | {"any_size": True, "watches": "outputs"}
    detector = fit_pipeline(pipe, batches(), call=TEXT.call_of_one(), **options)
    assert detector.fitted.grouped is not None
    assert detector.fitted.grouped.large == ("4x8x8", "4x8x8 style:4")
    with monitor_pipeline(pipe, om.Monitor(detector, fpr=0.1)) as watched:
        for n, name in enumerate(("", "style", "line", "line")):
            switch(pipe, name)
            output = watched(**seeded_call(TEXT.arguments(), seed=n))
            assert output.ood.valid.all() == (name != "line")
        assert watched.ood_monitor.counts == Counts(scored=4, new=4)
        assert not watched.ood_monitor.stale
    [told] = warnings_in(caplog)
    assert "not fitted on: 4x8x8 line:4" in told


def switch(pipe: Any, name: str) -> None:
    if name:
        pipe.unet.enable_adapters()
        pipe.unet.set_adapters([name])
    else:
        pipe.unet.disable_adapters()


def test_samples_whose_adapters_were_changed_before_they_were_scored_are_not() -> None:
    pipe = TEXT()
    styled(pipe.unet, "style")
    options = OPTIONS | {"any_size": True, "watches": "outputs"}
    detector = fit_pipeline(pipe, [images(16, 48)], call=TEXT.call_of_one(), **options)
    with monitor_pipeline(pipe, om.Monitor(detector, fpr=0.1), mode="background") as watched:
        taken = watched.ood_monitor._worker.submit
        late: list[Any] = []
        watched.ood_monitor._worker.submit = lambda task: late.append(task) or True
        watched(**seeded_call(TEXT.arguments()))
        pipe.unet.disable_adapters()
        taken(late.pop())
        assert watched.ood_monitor.flush(60)
        [kind] = watched.ood_monitor.failures
    assert "adapters were changed before" in kind
