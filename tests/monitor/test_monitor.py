"""The monitor on streams: what it raises and when, what it remembers, and what it survives."""

import functools
import json
import math
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from support.small_cases import SMALL, Walled
from torch import Tensor

import ood_monitor as om
from ood_monitor.alerts import Alert, Summary

BRANCHES = SMALL["branches"]
LONG = 30.0  # seconds: only a broken monitor waits for so long


def fitted(n: int = 1000, data: int = 100, **options: Any) -> om.Detector:
    detector = om.Detector(BRANCHES(), **options)
    return detector.fit([BRANCHES.data(n, seed=data)], progress=False)


DETECTOR = fitted()


def monitor(**options: Any) -> om.Monitor:
    return om.Monitor(options.pop("detector", DETECTOR), **{"ert": 1000, **options})


def usual(n: int, seed: int = 0) -> Tensor:
    return BRANCHES.data(n, seed=seed)


def shifted(n: int, seed: int = 0) -> Tensor:
    return usual(n, seed) + torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0])


def far(n: int, seed: int = 0) -> Tensor:
    return 30 * usual(n, seed)


def invalid(n: int) -> Tensor:
    return torch.full((n, 6), math.nan, dtype=torch.float64)


def feed(watch: om.Monitor, x: Tensor, size: int = 1) -> list[Alert]:
    return [alert for batch in x.split(size) for alert in watch.update(batch)]


def kinds(alerts: Sequence[Alert]) -> list[str]:
    return [alert.kind for alert in alerts]


def moments(alerts: Sequence[Alert], *of: str) -> list[tuple[str, int]]:
    return [(alert.kind, alert.samples_seen) for alert in alerts if alert.kind in of]


def remembered(watch: om.Monitor) -> dict[str, Any]:
    """All but where its numbers began."""
    return watch.state_dict() | {"said": None}


def drifted(**options: Any) -> om.Monitor:
    """Just after its first drift alert."""
    watch = monitor(**options)
    for sample in shifted(500).split(1):
        if "drift" in kinds(watch.update(sample)):
            return watch
    raise AssertionError("no drift alert")


class Recorder:
    """A sink that takes all there is."""

    def __init__(self) -> None:
        self.alerts: list[Alert] = []
        self.summaries: list[Summary] = []
        self.closed = 0

    def __call__(self, alert: Alert) -> None:
        self.alerts.append(alert)

    def summarise(self, summary: Summary) -> None:
        self.summaries.append(summary)

    def close(self) -> None:
        self.closed += 1


# The promises


@pytest.mark.parametrize("seed", range(5))
def test_stream_in_distribution_has_not_drifted(seed: int) -> None:
    watch = monitor(ert=1e6)  # an alarm within 1 000 samples has a chance of at most 1 in 1 000
    assert "drift" not in kinds(feed(watch, usual(1000, seed), 100))
    assert watch.status != "ALERT"
    assert watch.samples_seen == 1000


def test_share_fpr_of_the_stream_is_flagged() -> None:
    watch = monitor(ert=1e6, fpr=0.05, summary_every=1000, sinks=[sink := Recorder()])
    feed(watch, usual(1000), 100)
    assert watch.flush(LONG)
    slack = 4 * math.sqrt(0.05 * 0.95 / 500)  # the luck of 500 calibration samples
    low, high = binom.ppf(1e-6, 1000, 0.05 - slack), binom.isf(1e-6, 1000, 0.05 + slack)
    assert low <= 1000 * (sink.summaries[0].flagged_rate or 0.0) <= high


CHANGES: dict[str, Callable[[int], Tensor]] = {
    "shift": shifted,
    "shrinking": lambda n: 0.3 * usual(n),
    "wider": lambda n: 2 * usual(n),
    "one number stuck": lambda n: torch.cat([usual(n)[:, :5], torch.full((n, 1), 3.0)], 1),
    "every fifth far off": lambda n: usual(n) * (1 + 9 * (torch.arange(n) % 5 == 0))[:, None],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("size", [1, 40])
def test_change_raises_one_drift_alert_soon(change: Callable[[int], Tensor], size: int) -> None:
    watch = monitor()
    before = feed(watch, usual(200, seed=1), 50)
    after = feed(watch, change(200), size)
    assert "drift" not in kinds(before)
    [(_, at)] = moments(after, "drift")
    assert 200 < at <= 400
    assert watch.status == "ALERT"


@pytest.mark.parametrize("seed", [0, 1])
def test_seed_decides_the_tie_breakers(seed: int) -> None:
    first, second = monitor(), monitor(seed=seed)
    feed(first, usual(50), 50)
    feed(second, usual(50), 50)
    assert (first.log_e_value == second.log_e_value) == (seed == 0)


def test_monitors_of_one_detector_are_apart() -> None:
    one, other, alone = monitor(), monitor(name="other"), monitor()
    for batch, changed in zip(usual(100).split(10), shifted(100).split(10), strict=True):
        one.update(batch)
        other.update(changed)
        alone.update(batch)
    assert remembered(one) == remembered(alone)
    assert one.status != other.status == "ALERT"


def test_baseline_is_frozen() -> None:
    detector = fitted()
    watch, frozen = monitor(detector=detector), monitor()
    detector.fit([shifted(1000)], progress=False)
    feed(watch, usual(100), 50)
    feed(frozen, usual(100), 50)
    assert remembered(watch) == remembered(frozen)


# Alerts are transitions


def test_one_drift_alert_while_it_stands() -> None:
    watch = drifted(recovery=300)
    rest = feed(watch, torch.cat([shifted(600, seed=1), far(100)]), 50)
    assert rest == []
    assert watch.status == "ALERT"


@pytest.mark.parametrize("recovery", [1, 120])
def test_stream_recovers_after_quiet_samples(recovery: int) -> None:
    watch = drifted(recovery=recovery, ert=1e5)
    at, took = watch.samples_seen, watch.state_dict()["needed"]
    assert 20 < took < 150
    recovery = max(recovery, took)  # at least four times what the evidence took to gather
    alerts = feed(watch, usual(200, seed=2))
    assert moments(alerts, "recovered", "drift") == [("recovered", at + recovery)]
    assert watch.status != "ALERT"


def test_alarm_while_drift_stands_puts_recovery_off() -> None:
    watch = drifted(recovery=150)
    assert feed(watch, shifted(140, seed=1), 10) == []
    assert "recovered" not in kinds(feed(watch, usual(100, seed=2), 10))
    assert "recovered" in kinds(feed(watch, usual(100, seed=3), 10))


def test_stream_may_drift_again() -> None:
    watch = drifted(recovery=50)
    alerts = feed(watch, torch.cat([usual(100, seed=2), shifted(100, seed=1)]), 10)
    assert kinds([a for a in alerts if a.kind != "sample"]) == ["recovered", "drift"]


def test_one_sample_alert_an_update() -> None:
    x = usual(20)
    x[[3, 8, 15]] = far(3)
    batch, singles = monitor(cooldown=0).update(x), feed(monitor(cooldown=0), x)
    assert kinds(batch) == ["sample"]
    assert moments(singles, "sample") == [("sample", 4), ("sample", 9), ("sample", 16)]


def test_sample_alert_is_of_the_most_anomalous() -> None:
    watch, x = monitor(fpr=0.2, ert=1e6), usual(100)
    [alert] = watch.update(x)
    assert watch.last is not None
    assert alert.evidence.p_value == watch.last.p_value.min()


@pytest.mark.parametrize("x", [far(1), 0 * usual(1)], ids=["large", "zero"])
def test_sample_is_flagged_if_it_is_far_off(x: Tensor) -> None:
    watch = monitor()
    assert kinds(watch.update(x)) == ["sample"]
    assert watch.status == "WARN"


def test_warning_ends_after_quiet_samples() -> None:
    watch, x = monitor(recovery=20, fpr=0.01), usual(400)
    quiet = x[DETECTOR.score(x).p_value > 0.01]
    watch.update(far(1))
    assert feed(watch, quiet[:19]) == []
    assert watch.status == "WARN"
    assert feed(watch, quiet[19:20]) == []
    assert watch.status == "OK"


def test_flag_while_drift_stands_is_no_sample_alert_later() -> None:
    x = torch.cat([far(1), usual(100, seed=2)])
    singles, batch = feed(drifted(recovery=30), x), drifted(recovery=30).update(x)
    assert kinds(singles) == kinds(batch) == ["recovered"]


# Batches and singles


STREAM = torch.cat([usual(80), shifted(60), usual(120, seed=2), shifted(40, seed=3)])
OPTIONS: dict[str, Any] = {"recovery": 60, "ert": 500}


@pytest.fixture(scope="module")
def one_by_one() -> tuple[om.Monitor, list[Alert]]:
    watch = monitor(**OPTIONS)
    return watch, feed(watch, STREAM)


@pytest.mark.slow
@given(cuts=st.lists(st.integers(1, 299), min_size=3, max_size=12, unique=True))
@settings(deadline=None, max_examples=15)
def test_batches_raise_what_singles_raise(
    one_by_one: tuple[om.Monitor, list[Alert]], cuts: list[int]
) -> None:
    singles, expected = one_by_one
    watch = monitor(**OPTIONS)
    alerts = [a for batch in STREAM.tensor_split(sorted(cuts)) for a in watch.update(batch)]
    transitions = moments(expected, "drift", "recovered")
    assert [kind for kind, _ in transitions] == ["drift", "recovered", "drift"]
    assert moments(alerts, "drift", "recovered") == transitions
    assert watch.log_e_value == pytest.approx(singles.log_e_value, rel=1e-9)
    assert watch.samples_seen == 300


STREAM_WITH_ALL = torch.cat([usual(150), far(1), STREAM, invalid(2), usual(60, seed=4)])


@functools.cache
def states_of_singles(recovery: int) -> list[dict[str, Any]]:
    """The state after each sample."""
    singles = monitor(recovery=recovery, ert=500, fpr=0.05)
    states = []
    for sample in STREAM_WITH_ALL.split(1):
        singles.update(sample)
        states.append(singles.state_dict())
    return states


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 32])
@pytest.mark.parametrize("recovery", [3, 10, 60])
def test_batches_leave_the_state_that_singles_leave(size: int, recovery: int) -> None:
    batches = monitor(recovery=recovery, ert=500, fpr=0.05)
    singles, statuses, seen = states_of_singles(recovery), set(), 0
    for batch in STREAM_WITH_ALL.split(size):
        batches.update(batch)
        seen += len(batch)
        found, expected = batches.state_dict(), singles[seen - 1]
        statuses.add(expected["status"])
        for name in ("status", "quiet", "valid_run", "samples_seen", "invalid", "seen", "flags"):
            assert found[name] == expected[name], name
        assert found["layers"]["counts"] == expected["layers"]["counts"]
        assert np.allclose(found["layers"]["sums"], expected["layers"]["sums"])
        for name in ("scores", "log_e_value"):
            assert found[name] == (expected[name] and pytest.approx(np.array(expected[name])))
    assert statuses == {"OK", "WARN", "ALERT"}


@pytest.mark.parametrize("size", [1, 9, 50])
def test_warning_ends_at_the_same_sample_in_any_batch(size: int) -> None:
    quiet = usual(400)[DETECTOR.score(usual(400)).p_value > 0.01]
    watch = monitor(recovery=30, ert=1e6, summary_every=1, sinks=[sink := Recorder()])
    feed(watch, torch.cat([quiet[:4], far(1), quiet[4:45]]), size)
    assert watch.flush(LONG)
    assert [s.status for s in sink.summaries] == ["OK"] * 4 + ["WARN"] * 30 + ["OK"] * 12


def test_last_scores_are_the_detectors() -> None:
    watch, x = monitor(), usual(5)
    watch.update(x)
    expected = DETECTOR.score(x)
    assert watch.last is not None
    assert torch.equal(watch.last.score, expected.score)
    assert torch.equal(watch.last.p_value, expected.p_value)


# Invalid samples


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_invalid_samples_change_nothing_for_the_others(bad: float) -> None:
    x, rows = usual(12), [1, 2, 11]
    valid = [i for i in range(12) if i not in rows]
    watch, clean = monitor(), monitor()
    clean.update(x[valid])
    x[rows, 4] = bad
    alerts = watch.update(x)
    assert watch.last is not None
    assert clean.last is not None
    assert watch.last.valid.tolist() == [i in valid for i in range(12)]
    for found, expected in [
        (watch.last.score, clean.last.score),
        (watch.last.p_value, clean.last.p_value),
        (watch.last.log_likelihood, clean.last.log_likelihood),
        *zip(watch.last.layers.values(), clean.last.layers.values(), strict=True),
        *zip(watch.last.z.values(), clean.last.z.values(), strict=True),
    ]:
        assert found[rows].isnan().all()
        assert torch.equal(found[valid], expected)
    assert kinds(alerts) == ["invalid_input"]
    assert (watch.invalid, watch.samples_seen) == (3, 12)
    assert watch.state_dict()["drift"] == clean.state_dict()["drift"]


def test_batch_of_invalid_samples_alone_leaves_the_drift_test() -> None:
    watch = monitor()
    feed(watch, usual(30), 30)
    before = remembered(watch)
    assert kinds(watch.update(invalid(4))) == ["invalid_input"]
    after = remembered(watch)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"samples_seen", "invalid", "valid_run", "validity"}
    assert (watch.samples_seen, watch.invalid) == (34, 4)


def test_batch_of_invalid_samples_alone_has_scores() -> None:
    watch = monitor()
    watch.update(invalid(4))
    assert watch.last is not None
    assert watch.last.valid.tolist() == [False] * 4
    assert watch.last.p_value.isnan().all()


def test_any_tensor_of_a_batch_may_be_invalid() -> None:
    x, weight = usual(100, seed=100), torch.ones(100)
    detector = om.Detector(BRANCHES()).fit([[x, weight]], progress=False)
    weight[2] = math.nan
    watch = monitor(detector=detector, fpr=0.05)
    watch.update([x[:5], weight[:5]])
    assert watch.last is not None
    assert watch.last.valid.tolist() == [True, True, False, True, True]


def test_sample_that_the_model_cannot_score_is_invalid() -> None:
    def square_root(module: Any, x: Tensor) -> Tensor:
        return module.log_prob(x) * (x[:, 0] + 9).sqrt()

    adapter, x = om.LogLikelihood(BRANCHES.model(), square_root), usual(5)
    watch = monitor(detector=om.Detector(adapter).fit([usual(200, 100)], progress=False), fpr=0.05)
    x[2, 0] = -10.0
    assert "invalid_input" in kinds(watch.update(x))
    assert watch.last is not None
    assert watch.last.valid.tolist() == [True, True, False, True, True]
    assert (watch.invalid, watch.state_dict()["drift"]["data"]["n"]) == (1, 4)


def test_invalid_input_is_news_once() -> None:
    watch = monitor(recovery=30)
    first = feed(watch, torch.cat([invalid(2), usual(10), invalid(1)]))
    later = feed(watch, torch.cat([usual(29), invalid(1)]))
    news = feed(watch, torch.cat([usual(30), invalid(1)]))
    assert [kinds(a).count("invalid_input") for a in (first, later, news)] == [1, 0, 1]
    assert watch.invalid == 5


def test_invalid_input_alert_counts_its_own_sample() -> None:
    [(_, at)] = moments(feed(monitor(), torch.cat([usual(6), invalid(1)])), "invalid_input")
    assert at == 7


# Infinite scores of a user's own density


@pytest.fixture(scope="module")
def walled() -> om.Detector:
    return fitted(density=Walled(math.inf))


def test_impossible_sample_is_flagged(walled: om.Detector) -> None:
    watch = monitor(detector=walled)
    [alert] = watch.update(torch.cat([usual(5), far(1)]))
    assert (watch.invalid, watch.status) == (0, "WARN")
    assert (alert.kind, alert.evidence.p_value) == ("sample", 1 / 501)
    assert alert.evidence.score_mean is alert.evidence.score_p95 is None
    assert sum(top.share or 0 for top in alert.top_layers) == pytest.approx(1.0)
    assert Alert.from_json(alert.to_json()) == alert


def test_impossible_samples_are_a_drift(walled: om.Detector) -> None:
    watch = monitor(detector=walled)
    alerts = feed(watch, torch.cat([usual(50), far(30)]), 10)
    [(_, at)] = moments(alerts, "drift")
    assert 50 < at < 65
    assert all(Alert.from_json(alert.to_json()) == alert for alert in alerts)


def test_sample_normal_beyond_all_is_not_flagged() -> None:
    watch = monitor(detector=fitted(density=Walled(-math.inf)))
    assert watch.update(far(1)) == []
    assert (watch.invalid, watch.status, watch.state_dict()["flags"]) == (0, "OK", [False])
    json.dumps(watch.state_dict(), allow_nan=False)


def test_resumes_after_infinite_scores(walled: om.Detector) -> None:
    watch = monitor(detector=walled)
    feed(watch, torch.cat([usual(60), far(1), usual(20, seed=2)]))
    copy = resumed(watch.state_dict(), detector=walled)
    assert remembered(copy) == remembered(watch)
    rest = torch.cat([far(1), usual(60, seed=3), shifted(30)])
    assert said(feed(copy, rest)) == said(feed(watch, rest))
    assert remembered(copy) == remembered(watch)


# Memory


def resumed(state: dict[str, Any], **options: Any) -> om.Monitor:
    watch = monitor(**options)
    feed(watch, shifted(30, seed=9), 30)
    watch.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
    return watch


def said(alerts: list[Alert]) -> list[dict[str, Any]]:
    unlike = dict.fromkeys(("time", "id", "number"))
    return [json.loads(a.to_json()) | unlike for a in alerts]


@pytest.mark.parametrize("at", [0, 1, 6, 8, 10, 14, 19, 26, 29])
def test_resumes_to_the_bit(at: int) -> None:
    stream = STREAM.clone()
    stream[::37] = math.nan
    batches = stream.split(10)
    watch = monitor(**OPTIONS)
    for batch in batches[:at]:
        watch.update(batch)
    copy = resumed(watch.state_dict(), **OPTIONS, seed=5)
    assert remembered(copy) == remembered(watch)
    for batch in batches[at:]:
        assert said(copy.update(batch)) == said(watch.update(batch))
    assert remembered(copy) == remembered(watch)
    assert (copy.status, copy.log_e_value) == (watch.status, watch.log_e_value)


def test_resumes_with_a_detector_from_its_files(tmp_path: Any) -> None:
    DETECTOR.save_pretrained(tmp_path)
    loaded = om.Detector.from_pretrained(tmp_path, BRANCHES())
    watch = monitor()
    feed(watch, usual(40), 20)
    copy = resumed(watch.state_dict(), detector=loaded)
    assert said(copy.update(shifted(50))) == said(watch.update(shifted(50)))
    assert remembered(copy) == remembered(watch)


def test_state_is_a_copy() -> None:
    watch = monitor()
    feed(watch, usual(20), 20)
    state = watch.state_dict()
    before = json.dumps(state)
    feed(watch, usual(20), 20)
    assert json.dumps(state) == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: monitor(detector=fitted(data=7)), "another calibration"),
        (lambda: monitor(detector=fitted(density=om.DiagonalGaussian())), "another calibration"),
        (lambda: monitor(ert=999), "another ert: expected 1000.0, got 999.0"),
    ],
    ids=["data", "density", "ert"],
)
def test_state_of_another_monitor_is_refused(other: Callable[[], om.Monitor], message: str) -> None:
    assert_refused(other().state_dict(), message)


def assert_refused(state: Any, message: str) -> None:
    watch = monitor()
    feed(watch, usual(30), 30)
    before = watch.state_dict()
    with pytest.raises(ValueError, match=message):
        watch.load_state_dict(state)
    assert watch.state_dict() == before


@pytest.mark.parametrize("key", list(monitor().state_dict()))
def test_state_without_a_part_is_refused(key: str) -> None:
    state = monitor().state_dict()
    del state[key]
    assert_refused(state, "state")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("format", 5),
        ("status", "FINE"),
        ("samples_seen", "many"),
        ("samples_seen", -1),
        ("scores", [None]),
        ("scores", [math.nan]),
        ("flags", [True]),
        ("layers", {"counts": [1], "sums": [[[0.0] * 3, [0.0] * 3]]}),
        ("layers", {"counts": [1], "sums": []}),
        ("layers", {"counts": [0], "sums": [[[0.0], [0.0]]]}),
        ("layers", [[0.0], [0.0, 1.0]]),
        ("said", -1),
        ("said", "many"),
        ("drift", {}),
        ("drift", 3),
        ("log_e_value", math.nan),
    ],
    ids=str,
)
def test_malformed_state_is_refused(key: str, value: Any) -> None:
    assert_refused(monitor().state_dict() | {key: value}, "state")


@pytest.mark.parametrize("state", [None, [], "text", {}], ids=repr)
def test_what_is_no_state_is_refused(state: Any) -> None:
    assert_refused(state, "state")


# Errors


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (usual(3)[:, :5], r"got \(5,\) torch.float64"),
        (usual(3).float(), r"got \(6,\) torch.float32"),
        (invalid(3)[:, :5], r"got \(5,\) torch.float64"),
        (usual(0), r"got 0|empty"),
        (torch.tensor(1.0), r"tensors of shape \(B, ...\), got a tensor of shape \(\)"),
        ("text", "batch of tensors"),
        (None, "batch of tensors"),
    ],
    ids=["shape", "precision", "shape, invalid", "empty", "scalar", "text", "nothing"],
)
def test_monitor_is_unchanged_after_an_error(batch: Any, message: str) -> None:
    watch = monitor(sinks=[sink := Recorder()])
    feed(watch, usual(20), 20)
    before, last = watch.state_dict(), watch.last
    with pytest.raises(ValueError, match=message):
        watch.update(batch)
    assert watch.state_dict() == before
    assert watch.last is last
    assert watch.flush(LONG)
    assert sink.alerts == []


def test_model_that_raises_leaves_the_monitor_as_it_was() -> None:
    detector = fitted()
    watch = monitor(detector=detector)
    feed(watch, usual(20), 20)
    before = watch.state_dict()
    del detector.adapter.module.left
    with pytest.raises(AttributeError, match="left"):
        watch.update(usual(5))
    assert watch.state_dict() == before


@pytest.mark.parametrize(("fpr", "needed"), [(0.001, 999), (1 / 502, 501)])
def test_fpr_too_small_for_the_calibration_names_what_it_needs(fpr: float, needed: int) -> None:
    with pytest.raises(ValueError, match=f"needs at least {needed} calibration samples, got 500"):
        monitor(fpr=fpr)


def test_smallest_fpr_flags_what_is_beyond_all_calibration_samples() -> None:
    assert kinds(monitor(fpr=1 / 501).update(far(1))) == ["sample"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fpr": 0.0}, r"fpr in \(0, 1\), got 0.0"),
        ({"fpr": 1.0}, r"fpr in \(0, 1\), got 1.0"),
        ({"ert": 1}, r"ert in \[2, inf\], got 1"),
        ({"ert": math.inf}, "finite ert"),
        ({"recovery": 0}, "recovery of at least 1, got 0"),
        ({"recovery": timedelta()}, "recovery time above 0"),
        ({"summary_every": 0}, "summary_every of at least 1, got 0"),
        ({"thin": 0}, "thin of at least 1, got 0"),
        ({"cooldown": -1}, "cooldown of at least 0, got -1"),
        ({"weights_every": -1}, "weights_every of at least 0, got -1"),
        ({"identify": "name"}, "identify None or 'hash', got 'name'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor(**option)


def test_sink_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="sink that can be called"):
        monitor(sinks=["console"])


# Sinks


def test_sinks_get_the_alerts_in_order() -> None:
    one, two = Recorder(), Recorder()
    with monitor(sinks=[one, two], recovery=50) as watch:
        stream = torch.cat([usual(30), invalid(1), far(1), shifted(80), usual(200, seed=2)])
        alerts = feed(watch, stream, 7)
    assert {"invalid_input", "sample", "drift", "recovered"} <= set(kinds(alerts))
    assert one.alerts == two.alerts == alerts


@pytest.mark.filterwarnings("error")
def test_sink_that_raises_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def broken(alert: Alert) -> None:
        raise OSError("no route to the host")

    with monitor(sinks=[broken, sink := Recorder()]) as watch:
        alerts = watch.update(far(1))
        undisturbed = monitor()
        undisturbed.update(far(1))
        assert remembered(watch) == remembered(undisturbed)
    assert sink.alerts == alerts
    assert "no route to the host" in caplog.text


def test_update_waits_for_no_sink() -> None:
    go = threading.Event()
    watch = monitor(sinks=[lambda alert: go.wait(LONG)])
    assert kinds(watch.update(far(1))) == ["sample"]
    assert not watch.flush(0.01)
    go.set()
    assert watch.flush(LONG)
    watch.close()


@pytest.mark.parametrize("error", [None, KeyError])
def test_leaving_the_context_closes_the_sinks(error: type[Exception] | None) -> None:
    sink = Recorder()
    try:
        with monitor(sinks=[sink]) as watch:
            watch.update(far(1))
            if error is not None:
                raise error
    except KeyError:
        pass
    assert kinds(sink.alerts) == ["sample"]
    assert sink.closed == 1
    watch.close()
    assert sink.closed == 1


@pytest.mark.parametrize("size", [1, 7, 50, 125])
def test_summaries_come_every_so_many_samples(size: int) -> None:
    with monitor(sinks=[sink := Recorder()], summary_every=50, name="lobby") as watch:
        feed(watch, usual(250), size)
    every, status = [50, 100, 150, 200, 250], "OK"
    for summary in sink.summaries:  # the others say that the status has changed
        assert summary.samples_seen in every or summary.status != status
        status = summary.status
    assert {s.samples_seen for s in sink.summaries} >= set(every)
    assert {s.stream for s in sink.summaries} == {"lobby"}


def test_summaries_come_from_a_stream_of_invalid_samples_too() -> None:
    with monitor(sinks=[sink := Recorder()], summary_every=10) as watch:
        feed(watch, torch.cat([usual(9), invalid(11)]), 3)
    assert [s.samples_seen for s in sink.summaries] == [10, 19, 20]  # with 10 invalid: ALERT
    assert [sum(s.invalid.values()) for s in sink.summaries] == [1, 10, 11]


def test_summary_is_of_the_stream_so_far() -> None:
    with monitor(sinks=[sink := Recorder()], summary_every=60) as watch:
        x = usual(60)
        x[::20] = math.nan
        watch.update(x)
    [summary] = sink.summaries
    scores = DETECTOR.score(x[x.isfinite().all(1)])
    assert summary.score_mean == pytest.approx(scores.score.mean().item())
    assert summary.score_p95 == pytest.approx(np.quantile(scores.score, 0.95))
    assert summary.flagged_rate == (scores.p_value <= 0.01).double().mean()
    assert summary.log_e_value == watch.log_e_value
    assert sum(summary.invalid.values()) == watch.invalid == 3


def test_threads_may_share_a_monitor() -> None:
    watch = monitor(ert=1e9)
    threads = [
        threading.Thread(target=lambda seed=seed: feed(watch, usual(60, seed), 6))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.samples_seen == watch.state_dict()["drift"]["data"]["n"] == 240


# What an alert says


@pytest.mark.parametrize("n", [40, 1200])
def test_evidence_of_a_sample_alert_adds_up(n: int) -> None:
    watch = monitor(ert=1e6, fpr=0.03)
    x = torch.cat([usual(n - 1), far(1)])
    scores = DETECTOR.score(x)
    alert = feed(watch, x, n)[-1]
    evidence, window = alert.evidence, min(n, 1000)
    flagged = int((scores.p_value[-window:] <= 0.03).sum())
    assert (evidence.window, evidence.flagged) == (window, flagged)
    assert evidence.flagged_rate == flagged / window
    interval = evidence.flagged_rate_low, evidence.flagged_rate_high
    exact = binomtest(flagged, window).proportion_ci(0.95)
    assert interval == pytest.approx(tuple(exact), abs=1e-9)
    assert evidence.score_mean == pytest.approx(scores.score[-window:].mean().item())
    assert evidence.score_p95 == pytest.approx(np.quantile(scores.score[-window:], 0.95))
    assert evidence.log_e_value == watch.log_e_value
    assert (evidence.ert, evidence.fpr) == (1e6, 0.03)
    assert evidence.p_value == pytest.approx(1 / 501)


def test_evidence_of_a_drift_alert_is_of_what_came_since() -> None:
    watch = monitor()
    [alert] = [a for a in feed(watch, shifted(200)) if a.kind == "drift"]
    evidence = alert.evidence
    scores = DETECTOR.score(shifted(200)[(evidence.since or 0) - 1 : alert.samples_seen])
    assert evidence.window == len(scores.score)
    assert evidence.flagged == int((scores.p_value <= 0.01).sum())
    assert evidence.score_mean == pytest.approx(scores.score.mean().item())
    assert (evidence.log_e_value or 0.0) >= math.log(1000)
    assert evidence.p_value is None


def test_next_episode_begins_after_a_drift_alert() -> None:
    watch = drifted(recovery=20, cooldown=0)
    at = watch.samples_seen
    x = torch.cat([usual(100, seed=2), far(1)])
    [over, alert] = feed(watch, x, 101)
    assert (over.kind, alert.kind) == ("recovered", "sample")
    assert alert.evidence.window == alert.samples_seen - over.samples_seen
    assert alert.samples_seen == at + 101


def test_alert_names_its_stream_detector_and_model() -> None:
    [alert] = monitor(name="lobby").update(far(1))
    assert alert.stream == "lobby"
    assert alert.detector == DETECTOR.fitted.fingerprint
    assert alert.model == DETECTOR.fitted.model
    assert Alert.from_json(alert.to_json()) == alert


@pytest.mark.parametrize(
    ("kind", "severity"),
    [
        ("sample", "warning"),
        ("drift", "critical"),
        ("recovered", "info"),
        ("invalid_input", "warning"),
    ],
)
def test_severity_says_how_much_it_matters(kind: str, severity: str) -> None:
    stream = torch.cat([invalid(1), far(1), shifted(80), usual(200, seed=2)])
    alerts = feed(monitor(recovery=50), stream)
    assert {a.severity for a in alerts if a.kind == kind} == {severity}


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize(("branch", "columns"), [("left", [0, 1, 2]), ("right", [3, 4, 5])])
@pytest.mark.parametrize("kind", ["drift", "sample"])
def test_top_layers_are_those_that_moved(
    granularity: Any, branch: str, columns: list[int], kind: str
) -> None:
    x = usual(200)
    x[:, columns] *= 4.0 if kind == "drift" else 100.0
    watch = monitor(detector=fitted(300, granularity=granularity))
    alerts = [a for a in feed(watch, x if kind == "drift" else x[:1]) if a.kind == kind]
    first, second, *others = alerts[0].top_layers
    moved = {f"log_likelihood/{branch}.weight", f"log_likelihood/{branch}.bias"}
    assert {first.layer, second.layer} == moved
    assert len(others) == 2
    assert min(abs(first.z or 0), abs(second.z or 0)) > 2 * max(abs(o.z or 0) for o in others)


def test_shares_of_the_layers_are_of_the_score() -> None:
    watch = monitor()
    [alert] = watch.update(far(1))
    assert watch.last is not None
    against = {layer: max(0.0, part.item()) for layer, part in watch.last.layers.items()}
    for top in alert.top_layers:
        assert top.share == pytest.approx(against[top.layer] / sum(against.values()))
        assert top.z == pytest.approx(watch.last.z[top.layer].item())
    assert sum(top.share or 0 for top in alert.top_layers) == pytest.approx(1.0)


def test_shares_lie_between_0_and_1() -> None:
    # As LayerShare documents, also where a correlation makes a layer's part negative.
    detector = fitted(density=om.ShrunkGaussian())
    for sample in far(20).split(1):
        for alert in monitor(detector=detector).update(sample):
            assert all(0 <= (top.share or 0) <= 1 for top in alert.top_layers)


# Autocorrelation that are alike


def test_a_thinned_drift_test_sees_every_kth_valid_sample() -> None:
    x = usual(90)
    x[[4, 20]] = math.nan
    thinned, plain = monitor(thin=3), monitor()
    feed(thinned, x, size=7)
    valid = x[~x.isnan().any(1)]
    feed(plain, valid[::3])
    assert thinned.log_e_value == plain.log_e_value
    assert thinned.samples_seen == 90


def test_thinning_goes_on_after_a_resumption() -> None:
    x, first, second = usual(80), monitor(thin=4), monitor(thin=4)
    feed(first, x)
    feed(second, x[:37])
    state, resumed = json.loads(json.dumps(second.state_dict())), monitor(thin=4)
    resumed.load_state_dict(state)
    feed(resumed, x[37:])
    assert resumed.log_e_value == first.log_e_value


def repeated(n: int, times: int) -> Tensor:
    return usual(n, seed=5).repeat_interleave(times, 0)


def test_neighbours_that_are_alike_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = monitor(ert=1e9)
    feed(watch, repeated(100, 3), size=10)
    feed(watch, repeated(100, 3), size=10)
    [record] = [r for r in caplog.records if "are alike" in r.message]
    assert "Pass `thin=`" in record.message
    assert watch.name in record.message


@pytest.mark.parametrize(
    ("thin", "x"), [(3, repeated(300, 3)), (1, usual(600, seed=6))], ids=["thinned", "sound"]
)
def test_a_sound_stream_is_not_warned_of(
    thin: int, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    feed(monitor(thin=thin, ert=1e9), x, size=10)
    assert not [r for r in caplog.records if "are alike" in r.message]


def test_scores_taken_before_are_observed_as_their_batch_would_be() -> None:
    batch = torch.cat([usual(30), invalid(1), shifted(100)])
    at_once, later = monitor(), monitor()
    scores = later.score(batch)
    assert later.samples_seen == 0
    assert kinds(later.observe(scores)) == kinds(at_once.update(batch))
    assert remembered(at_once) == remembered(later)
    assert (later.invalid, later.status) == (1, "ALERT")


@pytest.mark.parametrize("given", [None, "runs/detector", om.Detector])
def test_what_is_no_detector_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a fitted `om\.Detector` to watch by"):
        om.Monitor(given)
