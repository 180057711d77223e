"""What a monitor decides of scores: recoveries, runs of invalid samples, interrupts, operators."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from support.small_cases import SMALL

import ood_monitor as om
from ood_monitor.alerts import Alert
from ood_monitor.monitor import decisions as decisions_module
from ood_monitor.monitor.memory import rows_of
from ood_monitor.monitor.rules import Rules

BRANCHES = SMALL["branches"]


@cache
def detector(**options: Any) -> om.Detector:
    made = om.Detector(BRANCHES(), method="forward", **options)
    return made.fit([BRANCHES.data(1000, seed=9)], progress=False)


def monitor(**options: Any) -> om.Monitor:
    options = {"ert": 10_000, "weights_every": 0, **options}
    return om.Monitor(options.pop("detector", None) or detector(), **options)


def scores(values: Any, found: om.Detector | None = None) -> om.Scores:
    """As if a model had given them."""
    score = torch.as_tensor(np.asarray(values, dtype=np.float64))
    p = torch.from_numpy((found or detector()).fitted.calibration.p_value(score.numpy()))
    return om.Scores(score, p, torch.zeros_like(score), {}, {}, ~score.isnan())


def stream(n: int, shift: float = 0.0, seed: int = 0, correlation: float = 0.0) -> np.ndarray:
    """Scores drawn from the calibration scores; shifted, in their standard deviations."""
    known = detector().fitted.calibration.scores
    generator = np.random.default_rng(seed)
    if not correlation:
        return generator.choice(known, n) + shift * known.std()
    x = generator.normal(size=n)
    for t in range(1, n):
        x[t] = correlation * x[t - 1] + math.sqrt(1 - correlation**2) * x[t]
    uniform = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    return np.quantile(known, uniform)


def kinds(alerts: list[Alert], *but: str) -> list[str]:
    return [alert.kind for alert in alerts if alert.kind not in but]


# Recovery


@pytest.mark.parametrize("thin", [1, 10])
@pytest.mark.parametrize("shift", [0.3, 0.5, 1.0])
def test_there_is_no_recovery_while_a_shift_lasts(thin: int, shift: float) -> None:
    found = monitor(thin=thin).observe(scores(stream(20_000, shift)))
    assert kinds(found, "sample") == ["drift"]


@pytest.mark.parametrize("thin", [1, 3])
def test_a_stream_recovers_when_the_shift_is_over(thin: int) -> None:
    values = np.concatenate([stream(1500 * thin, 0.5), stream(4000 * thin, seed=1)])
    found = monitor(thin=thin, ert=1e6).observe(scores(values))  # a false alarm: 1 in 200
    assert kinds(found, "sample") == ["drift", "recovered"]


class Clock:
    """Stands in for `time.monotonic`, which no test can wait for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_recovery_may_be_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(decisions_module.time, "monotonic", clock.monotonic)
    watch = monitor(recovery=timedelta(hours=1))
    assert kinds(watch.observe(scores(stream(500, 2.0))), "sample") == ["drift"]
    clock.now = 3500.0
    assert watch.observe(scores(stream(1, seed=1))) == []
    state = json.dumps(watch.state_dict())
    clock.now = 3690.0
    resumed = monitor(recovery=timedelta(hours=1))
    resumed.load_state_dict(json.loads(state))
    clock.now = 3700.0
    for each in (watch, resumed):  # a time in which nothing runs does not count
        found = each.observe(scores(stream(1, seed=1)))
        assert kinds(found) == (["recovered"] if each is watch else [])
    clock.now = 3800.0
    [alert] = resumed.observe(scores(stream(1, seed=1)))
    assert alert.message == "Recovered: 1:00:00 without a new alarm."


# Neighbours that are alike


def test_an_alert_of_a_correlated_stream_says_so() -> None:
    # The chance that no bound is passed at correlation .8 is far below 1 in 1 000.
    told = 0
    for seed in range(20):
        found = monitor().observe(scores(stream(400, seed=seed, correlation=0.8)))
        drifts = [alert for alert in found if alert.kind == "drift"]
        told += any(alert.evidence.correlation is not None for alert in drifts)
        for alert in drifts:
            if (correlation := alert.evidence.correlation) is not None:
                assert f"Neighbouring samples are alike (correlation {correlation:.2f})" in (
                    alert.message
                )
                assert 40 < (alert.evidence.ert_if_correlated or 0) < 10_000
    assert told >= 15


def test_it_is_warned_of_in_alert_too(caplog: pytest.LogCaptureFixture) -> None:
    watch = monitor(recovery=10_000)
    watch.observe(scores(stream(300, 3.0)))
    assert watch.status == "ALERT"
    assert not [r for r in caplog.records if "are alike" in r.message]
    watch.observe(scores(stream(3000, correlation=0.8)))
    assert len([r for r in caplog.records if "are alike" in r.message]) == 1


def test_a_sound_streams_alert_says_nothing_of_neighbours() -> None:
    drifts = [monitor().observe(scores(stream(300, 1.5, seed)))[-1] for seed in range(10)]
    assert [alert.evidence.correlation for alert in drifts] == [None] * 10


# Since when


def test_a_drift_alert_says_since_which_sample_of_the_stream() -> None:
    values = np.concatenate([stream(600), stream(900, 1.5, seed=1)])
    values = np.insert(values, [100, 200], math.nan)  # the change is at sample 603
    for thin in (1, 3):
        alerts = monitor(thin=thin).observe(scores(values))
        evidence = next(alert for alert in alerts if alert.kind == "drift").evidence
        assert evidence.drift_of == "data"
        assert evidence.since is not None
        assert abs(evidence.since - 603) <= 10 * thin
        assert evidence.since_earliest <= evidence.since <= evidence.since_latest


def test_a_drift_alert_has_the_figures_since_then() -> None:
    values = np.concatenate([stream(600), stream(900, 1.5, seed=1)])
    values = np.insert(values, [100, 200], math.nan)
    for thin in (1, 3):
        alerts = monitor(thin=thin).observe(scores(values))
        alert = next(alert for alert in alerts if alert.kind == "drift")
        evidence = alert.evidence
        assert evidence.since is not None
        since = values[evidence.since - 1 : alert.samples_seen]
        flagged = scores(since).p_value <= 0.01
        assert evidence.window == len(since) < 100
        assert evidence.score_mean == pytest.approx(since.mean())
        assert evidence.score_p95 == pytest.approx(np.quantile(since, 0.95))
        assert evidence.flagged == flagged.sum()
        places = (evidence.since + flagged.nonzero().flatten()).tolist()
        assert [sample.position for sample in alert.samples] == places[-20:]
        assert len(alert.trace) == min(200, (alert.samples_seen - 2 + thin - 1) // thin)
        assert alert.trace[-1].position == alert.samples_seen
        assert {point.position for point in alert.trace}.isdisjoint({101, 202})


# Samples that cannot be scored


def test_a_run_of_invalid_samples_is_an_incident() -> None:
    watch = monitor()
    nothing = [math.nan] * 2000
    alerts = watch.observe(scores([*stream(50), *nothing]))
    assert [(a.kind, a.samples_seen, a.severity, a.status) for a in alerts] == [
        ("invalid_input", 51, "warning", "OK"),
        ("invalid_input", 60, "critical", "ALERT"),
    ]
    assert "10 of the latest 60 samples could not be scored" in alerts[1].message
    assert watch.status == "ALERT"
    resumed = monitor()
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert kinds(resumed.observe(scores(stream(99))), "sample") == []
    [over] = resumed.observe(scores(stream(1)))
    assert over.kind == "recovered"
    assert "ALERT" not in (over.status, resumed.status)


def test_odd_samples_now_and_then_are_no_incident() -> None:
    values = stream(2000)
    values[::20] = math.nan
    watch = monitor(fpr=0.005)
    assert "critical" not in {alert.severity for alert in watch.observe(scores(values))}
    assert watch.status != "ALERT"


# Interrupted


@contextmanager
def interrupted_at(line: int) -> Iterator[Callable[[], int]]:
    """A Ctrl-C at the n-th line of the monitor's own code; gives how many lines there were."""
    import sys

    folder, count = "ood_monitor/monitor/", 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if folder not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)


def test_an_interrupt_never_loses_an_alert() -> None:
    values = [*stream(20), *stream(80, 4.0)]
    with interrupted_at(0) as lines:
        monitor().observe(scores(values))
    # Every fifth line, from the last back: what is decided is owed, or nothing was taken in.
    for line in range(lines(), 0, -max(1, lines() // 60)):
        got: list[Alert] = []
        watch = monitor(sinks=[got.append])
        before = watch.state_dict()
        with suppress(KeyboardInterrupt), interrupted_at(line):
            watch.observe(scores(values))
        taken = watch.samples_seen > 0
        assert taken or watch.state_dict() == before
        watch.close()
        assert ("drift" in kinds(got)) == taken == (watch.status == "ALERT")


def test_what_is_owed_is_in_the_state() -> None:
    class Broken(RuntimeError):
        pass

    def raises(alert: Alert) -> None:
        raise Broken

    watch = monitor()
    watch.dispatcher.send = raises  # type: ignore[method-assign]
    with pytest.raises(Broken):
        watch.observe(scores(stream(300, 2.0)))
    got: list[Alert] = []
    resumed = monitor(sinks=[got.append])
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    resumed.close()
    assert "drift" in kinds(got)


def test_threads_share_one_order() -> None:
    got: list[Alert] = []
    watch = monitor(sinks=[got.append], cooldown=0)
    values = stream(2000, 0.5)
    threads = [
        threading.Thread(target=lambda i=i: [watch.observe(scores([v])) for v in values[i::4]])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    watch.close()
    assert watch.samples_seen == 2000
    places = [alert.samples_seen for alert in got]
    assert places == sorted(places)


# The evidence


def test_the_evidence_after_an_alarm_is_what_raised_it() -> None:
    """Until the next sample; so in the figures, in the state, and after a recovery."""
    watch = monitor()
    for value in stream(300, 2.0):
        alerts = watch.observe(scores([value]))
        if "drift" in kinds(alerts):
            break
    [alert] = [alert for alert in alerts if alert.kind == "drift"]
    assert watch.log_e_value == watch.figures.log_e_value == alert.evidence.log_e_value
    assert watch.log_e_value >= math.log(watch.ert)
    resumed = monitor()
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.log_e_value == watch.log_e_value
    found = watch.observe(scores(stream(1, 2.0, seed=1)))
    assert found == []
    assert watch.log_e_value < math.log(watch.ert)
    for value in stream(2000, seed=2):
        found = watch.observe(scores([value]))
        assert math.isfinite(watch.log_e_value)
        if "recovered" in kinds(found):
            break
    assert found[-1].evidence.log_e_value == watch.log_e_value


def test_an_alert_says_what_stands_the_gravest_first() -> None:
    rules = Rules(name="s", fpr=0.01, ert=10_000)
    decisions = decisions_module.Decisions.of(rules, detector().fitted, seed=0)
    names = detector().fitted.layers

    def take(values: Any, *, stale: bool | None = None) -> list[tuple[str, tuple[str, ...]]]:
        before = len(decisions.memory.owed)
        decisions.take(rows_of(scores(values), names, None), stale=stale)
        alerts = list(decisions.memory.owed)[before:]
        return [(alert.kind, alert.standing) for alert in alerts if alert.kind != "sample"]

    assert take(stream(100, 2.0)) == [("drift", ("drift",))]
    both = ("stale_calibration", "drift")
    assert take(stream(1), stale=True) == [("stale_calibration", both)]
    blind = take(np.full(20, math.nan))
    assert blind[-1] == ("invalid_input", (*both, "invalid_input"))
    assert take(stream(1), stale=False) == [("recovered", ("drift", "invalid_input"))]
    assert take(stream(100, seed=5))[0] == ("recovered", ("drift",))


# What an operator does


def test_accepting_begins_a_new_episode() -> None:
    got: list[Alert] = []
    watch = monitor(sinks=[got.append])
    watch.observe(scores(stream(300, 2.0)))
    [alert] = watch.accept("new camera, approved by Ada")
    assert (alert.kind, alert.severity, alert.status) == ("accepted", "info", "OK")
    assert alert.message == "Accepted: new camera, approved by Ada"
    assert (watch.status, watch.samples_seen, watch.log_e_value) == ("OK", 300, -math.inf)
    found = watch.observe(scores(stream(300, 2.0, seed=1)))
    assert "drift" in kinds(found)  # it is judged as before, and the change goes on
    watch.close()
    assert kinds(got, "sample") == ["drift", "accepted", "drift"]


def test_accepting_a_recalibrated_detector_ends_the_alarms() -> None:
    watch = monitor()
    watch.observe(scores(stream(300, 2.0)))
    fitted = detector().fitted
    new = replace(fitted, calibration=om.calibration.ConformalPValue.fit(stream(500, 2.0, seed=3)))
    other = om.Detector(BRANCHES(), method="forward")
    other._fitted = new
    watch.accept("the new normal", other)
    assert kinds(watch.observe(scores(stream(500, 2.0, seed=4), other)), "sample") == []
    resumed = monitor(detector=other)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.status == watch.status


def test_a_detector_of_other_weights_is_not_accepted() -> None:
    other = om.Detector(BRANCHES(), method="forward")
    other._fitted = replace(detector().fitted, model="0" * 12)
    watch = monitor()
    with pytest.raises(ValueError, match=r"Expected a detector of the weights .* make a new mon"):
        watch.accept("why not", other)
    assert watch.samples_seen == 0
    for reason in ("", 3):
        with pytest.raises((ValueError, TypeError), match="Expected reason as text"):
            watch.accept(reason)  # type: ignore[arg-type]


def test_a_muted_monitor_tells_nobody_and_counts() -> None:
    got: list[Alert] = []
    watch = monitor(sinks=[got.append])
    watch.mute(samples=400)
    assert watch.observe(scores(stream(300, 2.0))) == []
    assert (watch.status, watch.samples_seen) == ("ALERT", 300)
    resumed = monitor(sinks=[got.append])
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.observe(scores(stream(99, 2.0, seed=1))) == []
    [alert] = resumed.observe(scores(stream(1, 2.0, seed=1)))
    assert alert.kind == "drift"  # it stands when the time is over
    assert alert.samples_seen < 300
    resumed.close()
    assert got == [alert]


def test_what_is_over_when_a_muted_time_ends_is_not_told() -> None:
    watch = monitor()
    watch.mute(samples=3000)
    found = watch.observe(scores([*stream(200, 2.0), *stream(3800, seed=1)]))
    assert watch.status != "ALERT"
    assert kinds(found, "sample") == []


def test_unmuting_tells_at_once() -> None:
    got: list[Alert] = []
    watch = monitor(sinks=[got.append])
    watch.mute(samples=10_000)
    assert watch.observe(scores(stream(300, 2.0))) == []
    watch.mute(samples=0)
    watch.close()
    assert kinds(got) == ["drift"]


MUTED: dict[str, tuple[list[float], list[float], list[str]]] = {
    "a drift, and an odd sample later": (
        [],
        [*stream(500, 1.0), math.nan, *stream(100, 1.0, seed=1)],
        ["drift"],
    ),
    "a drift, and a run that is over": (
        [],
        [*stream(300, 1.0), *[math.nan] * 12, *stream(150, 1.0, seed=1)],
        ["drift"],
    ),
    "the end of what was told": (
        [*stream(60, 3.0)],
        [*stream(2500, seed=1)],
        ["recovered"],
    ),
    "what began and ended": ([], [*stream(60, 3.0), *stream(2500, seed=1)], []),
    "an end and a new begin": (
        [*stream(60, 3.0)],
        [*stream(2500, seed=1), *stream(100, 3.0, seed=2)],
        ["drift"],
    ),
    "two that stand": ([], [*stream(60, 3.0), *[math.nan] * 12], ["drift", "invalid_input"]),
}


@pytest.mark.parametrize("name", MUTED)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_mute_ends_with_what_stands_by_incident(name: str, size: int) -> None:
    before, muted, expected = MUTED[name]
    watch = monitor(ert=1e6, fpr=0.005)
    watch.observe(scores(before))
    watch.mute(len(muted))
    found = []
    for start in range(0, len(muted), size):
        assert found == []
        found = watch.observe(scores(muted[start : start + size]))
    assert kinds(found) == expected


@pytest.mark.parametrize("size", [1, 10, 50])
def test_a_sample_that_was_flagged_while_muted_is_never_told(size: int) -> None:
    values = np.sort(stream(50))[np.random.default_rng(0).permutation(50)]
    values[5] = 1e9
    watch = monitor(fpr=0.005, recovery=10)
    watch.mute(50)
    found = [watch.observe(scores(part)) for part in np.array_split(values, 50 // size)]
    assert [alert for alerts in found for alert in alerts] == []


def test_what_is_accepted_is_told_muted_or_not() -> None:
    got: list[Alert] = []
    watch = monitor(sinks=[got.append])
    watch.mute(100)
    assert kinds(watch.accept("by Ada")) == ["accepted"]
    watch.close()
    assert kinds(got) == ["accepted"]


def test_after_accepting_a_flagged_sample_is_news() -> None:
    watch = monitor(cooldown=1000)
    assert kinds(watch.observe(scores([1e9]))) == ["sample"]
    watch.accept("known")
    assert kinds(watch.observe(scores([1e9]))) == ["sample"]


def test_weights_of_the_detector_that_was_accepted_are_looked_at() -> None:
    watch = monitor(weights_every=1)
    new = om.Detector(BRANCHES(), method="forward")
    new._fitted = detector().fitted
    watch.accept("the same, elsewhere", new)
    assert watch.detector.adapter is new.adapter
    with torch.no_grad():
        next(new.adapter.module.parameters()).add_(1.0)
    assert kinds(watch.observe(scores(stream(1)))) == ["stale_calibration"]


def test_an_interrupt_does_not_put_the_look_at_weights_off() -> None:
    own = om.Detector(BRANCHES(), method="forward").fit([BRANCHES.data(200)], progress=False)
    watch = monitor(detector=own, weights_every=1000, fpr=0.05)
    watch.observe(scores(stream(1000)))
    with torch.no_grad():
        next(own.adapter.module.parameters()).add_(1.0)
    with pytest.raises(KeyboardInterrupt), interrupted_at(60):
        watch.observe(scores(stream(5)))
    assert watch.samples_seen == 1000
    assert "stale_calibration" in kinds(watch.observe(scores(stream(5))))


def test_a_state_drops_nothing_that_is_owed() -> None:
    got: list[Alert] = []
    watch = monitor(sinks=[got.append])
    state = watch.state_dict()
    watch._decisions.memory.owed.append(monitor().accept("owed")[0])
    watch.load_state_dict(state)
    watch.close()
    assert kinds(got) == ["accepted"]


def test_a_state_of_other_weights_is_refused() -> None:
    state = monitor().state_dict() | {"model": "0" * 12}
    with pytest.raises(ValueError, match="of a monitor of the weights"):
        monitor().load_state_dict(state)


@pytest.mark.parametrize("samples", [-1, 1.5, True, "10", None])
def test_muting_for_no_number_of_samples_is_refused(samples: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="Expected samples"):
        monitor().mute(samples)


# Groups


def grouped() -> om.Detector:
    x = torch.randn(1200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(1200) % 4 == 0).long()
    made = om.Detector(
        BRANCHES(), method="forward", groups=lambda batch: batch[1], minimum_group=50
    )
    return made.fit([(x * (1 + 2 * labels[:, None]), labels)], progress=False)


def test_a_change_of_the_mix_is_told_from_a_drift_of_the_data() -> None:
    found = grouped()
    for share, scale, cause in ((0.75, 1.0, "mix"), (0.25, 1.6, "data")):
        generator = torch.Generator().manual_seed(5)
        labels = (torch.rand(400, generator=generator) < share).long()
        x = torch.randn(400, 6, dtype=torch.float64, generator=generator)
        alerts = om.Monitor(found, ert=10_000).update(
            (scale * x * (1 + 2 * labels[:, None]), labels)
        )
        drift = next(alert for alert in alerts if alert.kind == "drift")
        assert drift.evidence.drift_of == cause
        assert drift.message.startswith("Drift of the mix" if cause == "mix" else "Drift: ")


def test_scores_of_a_detector_without_groups_are_no_scores_of_groups() -> None:
    watch = om.Monitor(grouped(), ert=1000, fpr=0.05)
    with pytest.raises(ValueError, match="Expected scores of a detector with groups, got some wi"):
        watch.observe(scores([0.0]))
    assert watch.samples_seen == 0
