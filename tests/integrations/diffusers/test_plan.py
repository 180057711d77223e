"""A budget decides how calls are watched, by counted passes of the denoiser."""

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from ood_monitor_integrations.diffusers import (
    WatchingPlan,
    fit_pipeline,
    monitor_pipeline,
    replayed_bound,
    wrap,
)
from ood_monitor_integrations.diffusers.plan import ONE_LEVEL, SampleCost, planned, together
from ood_monitor_integrations.diffusers.planning import rows_of
from support.pipeline_cases import case_of, seeded_call

import ood_monitor as om

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXT, IMAGE, PIXELS = case_of("stable-diffusion"), case_of("img2img"), case_of("ddim")
SETTINGS: dict[str, Any] = {"explain": 0, "progress": False, "samples": 44}

#: Of a network whose watched passes take a tenth more than plain ones.
COSTS = (SampleCost(2, 2.2), SampleCost(ONE_LEVEL, 1.1))

#: A budget that no way keeps to on any machine, and one that all do.
TIGHT, LOOSE = 0.02, 1_000.0


# By counts alone.


@pytest.mark.parametrize(
    ("rows", "max_overhead", "watched", "expected"),
    [
        (100, 0.1, 1, (2, 1.0, "sync")),  # 50 guided steps
        (50, 0.1, 1, (2, 1.0, "sync")),
        (50, 0.03, 1, (ONE_LEVEL, 1.0, "sync")),
        (50, 0.05, 2, (ONE_LEVEL, 1.0, "sync")),
        (8, 0.3, 1, (2, 1.0, "sync")),  # 4 guided steps
        (8, 0.15, 1, (ONE_LEVEL, 1.0, "sync")),
        (8, 0.1, 1, (ONE_LEVEL, 0.727, "background")),
        (4, 0.3, 1, (ONE_LEVEL, 1.0, "sync")),
        (4, 0.3, 2, (ONE_LEVEL, 0.545, "background")),
        (4, 0.1, 1, (ONE_LEVEL, 0.363, "background")),
        (2, 0.1, 1, (ONE_LEVEL, 0.181, "background")),  # 1 guided step
        (1, 0.1, 1, (ONE_LEVEL, 0.09, "background")),
        (1, 2.2, 1, (2, 1.0, "sync")),
    ],
)
def test_the_first_way_within_the_budget_is_taken(
    rows: float, max_overhead: float, watched: int, expected: Any
) -> None:
    plan = planned(max_overhead, rows, COSTS, watched=watched)
    assert (plan.ratios, plan.sample_rate, plan.mode) == expected
    assert plan.overhead <= max_overhead
    assert plan.overhead == pytest.approx(plan.sample_rate * watched * plan.forwards / rows)


def test_a_share_is_scored_in_line_where_nothing_else_can_be() -> None:
    plan = planned(0.1, 4, COSTS, in_background=False)
    assert (plan.sample_rate, plan.mode) == (0.363, "sync")


def test_a_budget_for_less_than_a_sample_of_a_thousand_is_refused() -> None:
    assert planned(0.0011, 1, COSTS).sample_rate == 0.001
    with pytest.raises(ValueError, match=r"max_overhead of 0\.0011 at least.*got 0\.001"):
        planned(0.001, 1, COSTS)


def test_what_is_given_up_is_told() -> None:
    whole, one, share = (planned(budget, 8, COSTS) for budget in (0.3, 0.15, 0.1))
    assert whole.gives_up == ()
    assert "ratios=2, sample_rate=1, mode='sync'" in str(whole)
    assert "27.50% of a call's time on average, of max_overhead=0.3: 2.2 passes" in str(whole)
    assert str(whole).endswith("beside the call's 8. Given up: nothing.")
    assert [told.split()[0] for told in one.gives_up] == ["a"]
    assert [told.split()[0] for told in share.gives_up] == ["a", "27.3%", "scores"]
    assert "a drift is found after 1.38 times as many" in str(share)


def test_two_detectors_keep_to_the_smaller_budget_together() -> None:
    outputs, inputs = planned(0.1, 50, COSTS), planned(0.05, 50, COSTS)
    assert (outputs.sample_rate, inputs.sample_rate) == (1, 1)
    both = together([outputs, inputs])
    assert both.sample_overhead == pytest.approx(0.088)
    assert (both.sample_rate, both.mode) == (0.568, "sync")
    assert together([outputs, replace(outputs, max_overhead=0.2)]).sample_rate == 1
    assert together([outputs]) is outputs


# Of pipelines.


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("named", [False, True], ids=["number", "times"])
def test_rows_are_counted_in_a_whole_call(steps: int, guided: bool, named: bool) -> None:
    pipe, arguments = TEXT(), TEXT.arguments()
    arguments["guidance_scale"] = 6.0 if guided else 1.0
    arguments["num_inference_steps"] = steps
    if named:
        times = list(range(20 * steps, 0, -20))
        arguments = {**arguments, "timesteps": times, "num_inference_steps": None}
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert rows_of(pipe, arguments, 2, seed=0) == steps * (2 if guided else 1)


def test_rows_of_the_default_and_of_a_share_of_the_steps_are_counted() -> None:
    arguments = PIXELS.arguments()
    del arguments["num_inference_steps"]
    assert rows_of(PIXELS(), arguments, 2, seed=0) == 50
    half = IMAGE.arguments() | {"num_inference_steps": 8, "strength": 0.5}
    assert rows_of(IMAGE(), half, 2, seed=0) == 8  # four guided steps


def fitted(pipe: Any, **options: Any) -> om.Detector:
    return fit_pipeline(pipe, call={"num_inference_steps": 3}, **SETTINGS, **options)


def plan_of(detector: om.Detector) -> WatchingPlan:
    plan = WatchingPlan.of(detector)
    assert plan is not None
    return plan


@pytest.mark.parametrize("budget", [TIGHT, LOOSE])
def test_a_plan_is_told_saved_and_gone_by(budget: float, caplog: pytest.LogCaptureFixture) -> None:
    pipe = PIXELS()
    with caplog.at_level(logging.INFO):
        detector = fitted(pipe, max_overhead=budget)
    plan = plan_of(detector)
    cost = SampleCost(plan.ratios, plan.forwards)
    assert plan == planned(budget, 3, [cost])
    # Which is cheaper is measured, and on a machine that is busy either may seem to be.
    assert plan.ratios in ([2] if budget == LOOSE else [2, ONE_LEVEL])
    code = " [OOD605]" if plan.gives_up else ""
    assert f"Calls are watched {plan}{code}" in caplog.messages
    state = detector.state_dict()
    call = {"num_inference_steps": 3}
    adapter = replayed_bound(pipe, call=call, ratios=plan.ratios)
    loaded = om.Detector.from_state_dict(state, adapter)
    assert plan_of(loaded) == plan
    origin = json.loads(json.dumps(loaded.fitted.provenance.adapter["origin"]))
    assert WatchingPlan.parse(origin["plan"]) == plan
    with monitor_pipeline(pipe, om.Monitor(loaded, fpr=0.05), raise_on_error=True) as watched:
        assert watched.ood_monitor.plan == plan
        watched(batch_size=200, num_inference_steps=3, output_type="np")
        assert watched.ood_monitor.flush(60)
        counts = watched.ood_monitor.counts
    assert counts.failures == 0
    # Of 200 at a rate below .02: 30 or more have a probability of 1e-15.
    assert counts.scored == 200 if budget == LOOSE else counts.scored < 30


def test_what_the_user_says_is_done() -> None:
    pipe = PIXELS()
    detector = fitted(pipe, max_overhead=TIGHT)
    said: dict[str, Any] = {"mode": "sync", "sample_rate": 1.0}
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05), raise_on_error=True, **said)
    assert watched(batch_size=4, num_inference_steps=3).ood.valid.all()
    plan = watched.ood_monitor.plan
    assert plan == replace(plan_of(detector), sample_rate=1.0, mode="sync")
    assert plan.overhead > plan.max_overhead
    watched.ood_monitor.detach()
    with wrap(pipe, om.Monitor(detector, fpr=0.05)) as wrapped:
        assert wrapped.plan == replace(plan_of(detector), mode="sync")


def test_without_a_budget_nothing_is_planned() -> None:
    pipe = PIXELS()
    detector = fitted(pipe)
    assert WatchingPlan.of(detector) is None
    assert "plan" not in detector.fitted.provenance.adapter["origin"]
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05), raise_on_error=True)
    assert watched.ood_monitor.plan is None
    assert watched(batch_size=4, num_inference_steps=3).ood.valid.all()


def test_a_shorter_call_than_planned_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = PIXELS()
    watched = monitor_pipeline(pipe, om.Monitor(fitted(pipe, max_overhead=LOOSE), fpr=0.05))
    for steps in (3, 2, 2, 4):
        watched(batch_size=1, num_inference_steps=steps)
    told = [text for text in caplog.messages if "rows a sample" in text]
    assert len(told) == 1
    assert told[0].startswith("A call that gives its denoiser 2 rows")


def test_outputs_and_inputs_of_one_detector_cost_twice() -> None:
    pipe, call = IMAGE(), IMAGE.call_of_one()
    options = {key: value for key, value in SETTINGS.items() if key != "samples"}
    detector = fit_pipeline(
        pipe, [IMAGE.images(44)], call=call, watches="both", max_overhead=LOOSE, **options
    )
    plan = plan_of(detector)
    assert plan.watched == 2
    assert plan.overhead == pytest.approx(2 * plan.forwards / plan.call_rows)
    monitors = {what: om.Monitor(detector, fpr=0.05) for what in ("outputs", "inputs")}
    watched = monitor_pipeline(pipe, monitors, what="both", raise_on_error=True)
    assert watched.ood_monitor.plan == plan
    output = watched(**seeded_call(IMAGE.arguments()))
    assert output.ood.valid.all()
    assert output.ood_inputs.valid.all()


def test_of_two_detectors_one_budget_alone_is_refused() -> None:
    pipe, call = IMAGE(), IMAGE.call_of_one()
    options = {key: value for key, value in SETTINGS.items() if key != "samples"}
    images = [IMAGE.images(44)]
    plain = fit_pipeline(pipe, images, call=call, **options)
    budgeted = fit_pipeline(
        pipe, images, call=call, watches="outputs", max_overhead=LOOSE, **options
    )
    monitors = {
        "outputs": om.Monitor(budgeted, fpr=0.05),
        "inputs": om.Monitor(plain, fpr=0.05),
    }
    with pytest.raises(ValueError, match="two detectors with a budget or none, got one"):
        monitor_pipeline(pipe, monitors, what="both")
    said: dict[str, Any] = {"mode": "sync", "sample_rate": 1.0}
    watched = monitor_pipeline(pipe, monitors, what="both", **said)
    assert watched.ood_monitor.plan is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratios", 3),
        ("ratios", 2),
        ("levels", (500,)),
        ("method", "gradient_norms"),
        ("method", "both"),
        ("parts", ["energies"]),
        ("granularity", "row"),
        ("density", om.ShrunkGaussian()),
    ],
)
def test_what_the_budget_is_to_choose_is_refused_beside_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"max_overhead= to choose .* got {name}="):
        fitted(PIXELS(), max_overhead=0.1, **{name: value})


@pytest.mark.parametrize("budget", [0, -0.1, float("inf"), 1e-9])
def test_no_budget_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="max_overhead"):
        fitted(PIXELS(), max_overhead=budget)


def test_planning_leaves_no_trace() -> None:
    pipe, other = PIXELS(), PIXELS()
    fitted(pipe, max_overhead=TIGHT)
    mine, its = (
        p(generator=torch.Generator().manual_seed(1), num_inference_steps=3, output_type="np")
        for p in (pipe, other)
    )
    assert (mine.images == its.images).all()
