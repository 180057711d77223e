"""A detector watches what it was fitted on, or says otherwise."""

import logging
from typing import Any

import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, replayed_bound, wrap
from ood_monitor_integrations.diffusers.origin import Origin
from support.pipeline_cases import FEW, case_of, seeded_call

import ood_monitor as om

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIXELS, TEXT, IMAGE = case_of("ddim"), case_of("stable-diffusion"), case_of("img2img")
SETTINGS: dict[str, Any] = {"levels": (500,), "explain": FEW, "progress": False}


def on_images(pipe: Any, case: Any, **options: Any) -> om.Detector:
    return fit_pipeline(pipe, [case.images(44)], call=case.call_of_one(), **SETTINGS, **options)


def on_own_samples(pipe: Any, **options: Any) -> om.Detector:
    return fit_pipeline(pipe, call={"num_inference_steps": 3}, samples=44, **SETTINGS, **options)


def monitor_of(detector: om.Detector) -> om.Monitor:
    return om.Monitor(detector, fpr=0.05)


def test_images_are_for_inputs_and_own_samples_for_outputs() -> None:
    pipe = IMAGE()
    origin = Origin.of(on_images(pipe, IMAGE))
    assert origin is not None
    assert (origin.watches, origin.samples) == ("inputs", "images")
    own = Origin.of(on_own_samples(PIXELS()))
    assert own is not None
    assert (own.watches, own.samples) == ("outputs", "own samples")
    assert own.settings == {"num_inference_steps": 3, "eta": 0.0}


def test_outputs_are_not_watched_by_a_detector_of_images() -> None:
    pipe = TEXT()
    monitor = monitor_of(on_images(pipe, TEXT))
    message = "a detector for outputs, got one fitted on images for inputs"
    with pytest.raises(ValueError, match=message):
        monitor_pipeline(pipe, monitor)
    with pytest.raises(ValueError, match=message), wrap(pipe, monitor):
        pass
    assert "ood_monitor" not in pipe.__dict__


def test_inputs_are_not_watched_by_a_detector_of_own_samples() -> None:
    pipe = IMAGE()
    call = IMAGE.call_of_one()
    detector = fit_pipeline(pipe, call=call, samples=44, **SETTINGS)
    with pytest.raises(ValueError, match="for inputs, got one fitted on own samples"):
        monitor_pipeline(pipe, monitor_of(detector), what="inputs")
    monitor_pipeline(pipe, monitor_of(detector)).ood_monitor.detach()


@pytest.mark.slow
def test_outputs_and_inputs_are_watched_each_by_a_detector_of_their_own() -> None:
    pipe, call = IMAGE(), IMAGE.call_of_one()
    monitors = {
        "outputs": monitor_of(fit_pipeline(pipe, call=call, samples=44, **SETTINGS)),
        "inputs": monitor_of(on_images(pipe, IMAGE)),
    }
    watched = monitor_pipeline(pipe, monitors, what="both", raise_on_error=True)
    arguments = IMAGE.arguments()
    for length in (7, 9):  # the second is new to both
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            arguments[name] = torch.randn(2, length, 8)
        output = watched(**seeded_call(arguments))
        assert output.ood.valid.all()
        assert output.ood_inputs.valid.all()


def test_one_may_be_compared_with_the_other_where_that_is_said() -> None:
    pipe = TEXT()
    detector = on_images(pipe, TEXT, watches="outputs")
    watched = monitor_pipeline(pipe, monitor_of(detector), raise_on_error=True)
    assert watched(**seeded_call(TEXT.arguments())).ood.valid.all()


def test_a_saved_detector_knows_what_it_is_for() -> None:
    pipe = TEXT()
    state = on_images(pipe, TEXT).state_dict()
    adapter = replayed_bound(pipe, call=TEXT.call_of_one(), levels=(500,))
    loaded = om.Detector.from_state_dict(state, adapter)
    with pytest.raises(ValueError, match="for outputs, got one fitted on images"):
        monitor_pipeline(pipe, monitor_of(loaded))


def test_calls_of_other_settings_are_told_of_once_each(caplog: pytest.LogCaptureFixture) -> None:
    pipe = PIXELS()
    watched = monitor_pipeline(pipe, monitor_of(on_own_samples(pipe)), raise_on_error=True)
    with caplog.at_level(logging.WARNING):
        for steps in (3, 4, 4, 5, 3):
            output = watched(batch_size=2, num_inference_steps=steps)
            assert output.ood.valid.all()
    assert caplog.text.count("A call unlike those of the fit") == 2
    assert "num_inference_steps=4, not 3" in caplog.text


def test_what_it_watches_is_a_known_word() -> None:
    with pytest.raises(ValueError, match="watches"):
        on_images(TEXT(), TEXT, watches="everything")


@pytest.mark.parametrize(
    ("options", "told"),
    [({"seed": 3}, "seed=2403"), ({"levels": (100,)}, r"levels=\[500\]")],
    ids=["seed", "levels"],
)
def test_a_bound_of_another_seed_or_other_levels_is_told_of(
    options: dict[str, Any], told: str
) -> None:
    pipe = TEXT()
    state = on_images(pipe, TEXT).state_dict()
    adapter = replayed_bound(pipe, **({"call": TEXT.call_of_one(), "levels": (500,)} | options))
    with pytest.warns(UserWarning, match=f"Another adapter: the detector was fitted with {told}"):
        om.Detector.from_state_dict(state, adapter)
