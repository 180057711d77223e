"""Two transformers of one call, for much noise and for little, are one detector's experts."""

import copy
import logging
from typing import Any

import pytest
import torch
from ood_monitor_integrations.diffusers import (
    WatchingPlan,
    fit_pipeline,
    monitor_pipeline,
    replayed_bound,
)
from ood_monitor_integrations.diffusers.denoisers import denoiser_of
from ood_monitor_integrations.diffusers.recorded_call import record_call
from support.model_case import perturbed
from support.pipeline_cases import FEW, PipelineCase, seeded_call
from support.video_pipeline_cases import VIDEOS, wan22

import ood_monitor as om
from ood_monitor.statistics import denoiser_statistics

pytestmark = pytest.mark.slow

CASE = next(case for case in VIDEOS if case.name == "wan22")

#: Levels of little noise and of much, by whose transformer denoises them.
OF = {"transformer": {"t=749"}, "transformer_2": {"t=98", "t=530"}}


def made(**options: Any) -> Any:
    return PipelineCase("", lambda: wan22(**options), CASE.arguments, CASE.predict)()


def fitted(pipe: Any, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"explain": FEW, "progress": False, "watches": "both"} | options
    return fit_pipeline(pipe, [CASE.images(44)], call=CASE.call_of_one(), **settings)


def monitor_of(detector: om.Detector) -> om.Monitor:
    return om.Monitor(detector, fpr=0.05)


def statistics(bound: Any) -> dict[str, torch.Tensor]:
    found = record_call(made(), seeded_call(CASE.arguments()), 0)
    given = denoiser_statistics(bound, bound.batch(found.call, found.count))
    return given.output_layer | given.energies


def test_levels_are_those_of_both() -> None:
    pipe = CASE()
    bound = replayed_bound(pipe, call=CASE.arguments())
    found = record_call(pipe, seeded_call(CASE.arguments()), 0)
    levels = {name for name, _ in bound.residuals(bound.batch(found.call, found.count))}
    assert levels == OF["transformer"] | OF["transformer_2"]
    assert bound.levels == (20, 100, 300, 500, 749)


@pytest.mark.parametrize("name", OF)
def test_a_change_of_one_shows_at_its_own_levels_and_no_others(name: str) -> None:
    pipe = CASE()
    bound = replayed_bound(pipe, call=CASE.arguments())
    before = statistics(bound)
    perturbed(getattr(pipe, name))
    after = statistics(bound)
    assert before.keys() == after.keys()
    changed = {key.split("/")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == OF[name]


@pytest.mark.parametrize("name", OF)
def test_energies_are_of_the_layers_that_a_level_calls(name: str) -> None:
    found = statistics(replayed_bound(CASE(), call=CASE.arguments()))
    layers = {key.split("input.")[1] for key in found if key.split("/input.")[0] in OF[name]}
    assert {layer.split(".")[0] for layer in layers if "." in layer} == {name}


@pytest.mark.parametrize("name", OF)
def test_a_change_of_one_is_told_as_stale(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = CASE()
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    watched(**seeded_call(CASE.arguments()))
    assert not watched.ood_monitor.stale
    perturbed(getattr(pipe, name))
    assert watched.ood_monitor.stale
    with caplog.at_level(logging.WARNING):
        watched(**seeded_call(CASE.arguments()))
        assert watched.ood_monitor.flush(30)
    assert "Stale calibration" in caplog.text


def test_another_second_transformer_is_refused() -> None:
    pipe = CASE()
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    pipe.transformer_2 = copy.deepcopy(pipe.transformer_2)
    with pytest.raises(ValueError, match="another Experts in its place"):
        watched(**seeded_call(CASE.arguments()))


def test_gradient_norms_are_of_the_parameters_that_a_term_reaches() -> None:
    pipe = CASE()
    detector = fitted(pipe, method="both", levels=(500, 800))
    [part] = [part for part in detector.fitted.joined.parts if part.kind == "gradient_norms"]
    terms = {"t=500": "transformer_2", "t=800": "transformer"}
    layers = [name.split("/", 1) for name in part.layers if "/" in name]
    assert {term for term, _ in layers} == set(terms)
    assert all(parameter.startswith(f"{terms[term]}.") for term, parameter in layers)
    scores = detector.score(detector.adapter.batch(*recorded(pipe)))
    assert scores.score.isfinite().all()


def recorded(pipe: Any) -> tuple[Any, int]:
    found = record_call(pipe, seeded_call(CASE.arguments()), 0)
    return found.call, found.count


def test_a_saved_detector_is_loaded_for_both(tmp_path: Any) -> None:
    pipe = CASE()
    detector = fitted(pipe)
    detector.save_pretrained(tmp_path, card=False)
    again = CASE()
    adapter = replayed_bound(again, call=CASE.call_of_one())
    loaded = om.Detector.from_pretrained(tmp_path, adapter)
    batch = detector.adapter.batch(*recorded(pipe))
    assert torch.equal(loaded.score(batch).score, detector.score(batch).score)


@pytest.mark.parametrize("budget", [1_000.0, 0.02])
def test_a_budget_leaves_both_a_level(budget: float, tmp_path: Any) -> None:
    pipe, call = CASE(), CASE.call_of_one()
    detector = fitted(pipe, max_overhead=budget, explain=0)
    plan = WatchingPlan.of(detector)
    assert plan is not None
    assert (plan.ratios, plan.sample_rate < 1) == (2, budget < 1)
    levels = {name.split("/")[1] for name in detector.fitted.layers}
    assert levels == OF["transformer"] | OF["transformer_2"]
    detector.save_pretrained(tmp_path / "saved", card=False)
    adapter = replayed_bound(pipe, call=call, ratios=plan.ratios)
    loaded = om.Detector.from_pretrained(tmp_path / "saved", adapter)
    assert loaded.fitted.layers == detector.fitted.layers


def test_one_that_is_not_called_is_left_out() -> None:
    pipe = made(boundary_ratio=None)
    assert denoiser_of(pipe) is pipe.transformer
    arguments = {k: v for k, v in CASE.arguments().items() if k != "guidance_scale_2"}
    bound = replayed_bound(pipe, call=arguments)
    assert bound.module is pipe.transformer
    found = record_call(pipe, seeded_call(arguments), 0)
    batch = bound.batch(found.call, found.count)
    alone = replayed_bound(made(boundary_ratio=None, transformer_2=None), call=arguments)
    expected, terms = dict(alone.log_likelihood(batch)), dict(bound.log_likelihood(batch))
    assert all(torch.equal(terms[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": (20, 500)}, "levels with a noise level of `transformer`"),
        ({"ratios": (0.33, 3.4)}, "ratios with a noise level of `transformer`"),
        ({"levels": (800,)}, "levels with a noise level of `transformer_2`"),
    ],
)
def test_levels_of_one_alone_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replayed_bound(CASE(), call=CASE.arguments(), **options)


def test_a_call_in_which_one_does_not_denoise_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a call in which both transformers denoise"):
        replayed_bound(made(boundary_ratio=0.0), call=CASE.arguments())


def test_a_boundary_that_the_calls_do_not_keep_is_refused() -> None:
    pipe = CASE()
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    pipe.register_to_config(boundary_ratio=0.5)
    with pytest.raises(ValueError, match="Expected `transformer` to denoise at times from 900 on"):
        watched(**seeded_call(CASE.arguments()))
