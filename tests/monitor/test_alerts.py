"""What a monitor's alerts name, when they come again, and what of them survives a crash."""

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.alert_cases import EVIDENCE, LONG, Broken, Recorder
from support.small_cases import SMALL
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.alerts import Alert, AlertEvidence, severity_of
from ood_monitor.saving import sample_hashes

BRANCHES = SMALL["branches"]


def fitted(adapter: om.Adapter | None = None, **options: Any) -> om.Detector:
    detector = om.Detector(adapter or BRANCHES(), **options)
    return detector.fit([BRANCHES.data(1000, seed=100)], progress=False)


DETECTOR = fitted()


def monitor(**options: Any) -> om.Monitor:
    return om.Monitor(options.pop("detector", DETECTOR), **{"ert": 1000, **options})


def usual(n: int, seed: int = 0) -> Tensor:
    return BRANCHES.data(n, seed=seed)


def quiet(n: int) -> Tensor:
    """None of which is flagged."""
    x = usual(4 * n, seed=3)
    return x[DETECTOR.score(x).p_value > 0.05][:n]


def far(n: int) -> Tensor:
    return 30 * usual(n)


def shifted(n: int, seed: int = 0) -> Tensor:
    return usual(n, seed) + torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0])


def feed(watch: om.Monitor, x: Tensor, size: int = 1) -> list[Alert]:
    return [alert for batch in x.split(size) for alert in watch.update(batch)]


def only(alerts: Sequence[Alert], kind: str) -> list[Alert]:
    return [alert for alert in alerts if alert.kind == kind]


# Cool-down


def with_flags(n: int, *positions: int) -> Tensor:
    x = quiet(n)
    for position in positions:
        x[position - 1] = far(1)[0]
    return x


@pytest.mark.parametrize(
    ("cooldown", "expected"),
    [
        (0, [10, 15, 20, 40, 60]),
        (5, [10, 15, 20, 40, 60]),
        (6, [10, 20, 40, 60]),
        (30, [10, 40]),
        (31, [10, 60]),
        (1000, [10]),
    ],
)
def test_no_sample_alert_comes_within_the_cooldown(cooldown: int, expected: list[int]) -> None:
    watch = monitor(cooldown=cooldown, ert=1e9)
    alerts = feed(watch, with_flags(70, 10, 15, 20, 40, 60))
    assert [alert.samples_seen for alert in only(alerts, "sample")] == expected


def test_a_flagged_stream_is_no_flood() -> None:
    watch = monitor(ert=1e300)
    alerts = feed(watch, far(150))
    assert len(only(alerts, "sample")) == 2


def test_the_next_alert_names_what_was_held_back() -> None:
    watch = monitor(cooldown=20, ert=1e9)
    first, second = feed(watch, with_flags(40, 5, 11, 12, 30))
    assert [sample.position for sample in first.samples] == [5]
    assert [sample.position for sample in second.samples] == [11, 12, 30]
    assert "3 flagged since the last alert" in second.message


def test_a_warning_stands_through_the_cooldown() -> None:
    watch = monitor(cooldown=100, recovery=10, ert=1e9)
    feed(watch, with_flags(12, 2, 12))
    assert watch.status == "WARN"


def test_cooldown_goes_on_after_a_resumption() -> None:
    x = with_flags(40, 5, 11, 12, 30)
    first, second = monitor(cooldown=20, ert=1e9), monitor(cooldown=20, ert=1e9)
    feed(first, x[:15])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    [alert] = feed(second, x[15:])
    assert [sample.position for sample in alert.samples] == [11, 12, 30]


# Samples


def test_a_sample_alert_names_the_samples_by_their_ids() -> None:
    x, watch = with_flags(20, 7, 15), monitor()
    [alert] = watch.update(x, ids=[f"{i}.png" for i in range(1, 21)])
    p_values = watch.last.p_value  # type: ignore[union-attr]
    assert [(s.position, s.id) for s in alert.samples] == [(7, "7.png"), (15, "15.png")]
    assert [s.p_value for s in alert.samples] == [p_values[6], p_values[14]]
    assert Alert.from_json(alert.to_json()) == alert


def test_ids_of_any_kind_are_text_and_some_samples_may_have_none() -> None:
    x, watch = with_flags(6, 2, 4, 6), monitor()
    [alert] = watch.update(x, ids=[None, 17, None, None, None, "x" * 1000])
    assert [sample.id for sample in alert.samples] == ["17", None, "x" * 256]


def test_ids_of_another_number_are_refused_and_nothing_changes() -> None:
    watch = monitor()
    before = watch.state_dict()
    with pytest.raises(ValueError, match="Expected an id for each of 3 samples, got 2"):
        watch.update(usual(3), ids=["a", "b"])
    assert watch.state_dict() == before


def test_observed_scores_may_have_ids_too() -> None:
    watch = monitor()
    [alert] = watch.observe(watch.score(with_flags(5, 3)), ids="abcde")
    assert [sample.id for sample in alert.samples] == ["c"]


def test_samples_have_hashes_if_asked_for() -> None:
    x = with_flags(9, 4, 8)
    [alert] = monitor(identify="hash").update(x)
    expected = [
        hashlib.sha256(b"torch.float64(6,)" + x[i].numpy().tobytes()).hexdigest() for i in (3, 7)
    ]
    assert [sample.id for sample in alert.samples] == expected
    assert [sample.id for sample in only(monitor().update(x), "sample")[0].samples] == [None, None]


def test_given_ids_win_over_hashes() -> None:
    [alert] = monitor(identify="hash").update(with_flags(2, 2), ids=["a", "b"])
    assert [sample.id for sample in alert.samples] == ["b"]


def test_a_hash_is_of_the_whole_sample_and_of_nothing_else() -> None:
    x, labels = torch.rand(3, 2, dtype=torch.bfloat16), torch.arange(3)
    whole = sample_hashes({"x": x, "y": labels}, range(3))
    assert len({*whole, *sample_hashes(x, range(3)), *sample_hashes(x.float(), range(3))}) == 9
    assert sample_hashes((x[1:2], labels[1:2]), [0]) == [whole[1]]
    assert sample_hashes(x.T.contiguous().T, [2]) == sample_hashes(x, [2])


def test_a_drift_alert_names_the_latest_flagged_samples() -> None:
    watch = monitor(fpr=0.2, cooldown=1000)
    x = shifted(200)
    [alert] = only(feed(watch, x, 10), "drift")
    flagged = (DETECTOR.score(x[: alert.samples_seen]).p_value <= 0.2).nonzero().flatten() + 1
    since = flagged[flagged >= alert.evidence.since]
    assert [sample.position for sample in alert.samples] == since[-20:].tolist()


def test_an_alert_names_twenty_samples_at_most() -> None:
    [alert] = monitor(ert=1e300).update(far(50))
    assert [sample.position for sample in alert.samples] == list(range(31, 51))


def test_an_alert_has_none_of_the_data() -> None:
    x = with_flags(20, 7)
    [alert] = monitor(identify="hash").update(x)
    numbers = {repr(value) for value in x.flatten().tolist()}
    assert not any(number in alert.to_json() for number in numbers)


# Terms


class TwoTerms(om.Adapter):
    """The left half of the numbers, and the right one."""

    def __init__(self) -> None:
        self.module = BRANCHES.model()
        self.module.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def log_likelihood(self, batch: Tensor) -> Any:
        parts = -0.5 * (batch * self.module.scale).square()
        yield "t=10", parts[:, :3].sum(1)
        yield "t=500", parts[:, 3:].sum(1)


@pytest.mark.parametrize(("term", "columns"), [("t=10", [0, 1, 2]), ("t=500", [3, 4, 5])])
@pytest.mark.parametrize("kind", ["sample", "drift"])
def test_top_terms_are_those_that_moved(kind: str, term: str, columns: list[int]) -> None:
    adapter = TwoTerms()
    detector = fitted(adapter, layers=["scale"])
    x = usual(200)
    x[:, columns] *= 6.0
    watch = monitor(detector=detector)
    [alert, *_] = only(feed(watch, x if kind == "drift" else x[:20]), kind)
    assert {share.term for share in alert.top_terms} == {"t=10", "t=500"}
    first, second = alert.top_terms
    assert first.term == term
    assert (first.share or 0) > 0.8
    assert (first.share or 0) + (second.share or 0) == pytest.approx(1.0)


def test_one_term_is_not_named() -> None:
    [alert] = monitor().update(far(1))
    assert alert.top_terms == ()
    assert alert.top_layers


# Severity and status


def evidence(flagged: int, window: int, low: float, fpr: float = 0.01) -> AlertEvidence:
    return AlertEvidence(
        **{f: None for f in ("log_e_value", "ert", "flagged_rate_high", "score_mean", "score_p95")},
        fpr=fpr,
        flagged=flagged,
        window=window,
        flagged_rate=flagged / window,
        flagged_rate_low=low,
    )


@pytest.mark.parametrize(
    ("kind", "found", "severity"),
    [
        ("sample", evidence(1, 1, 0.025), "warning"),
        ("sample", evidence(4, 40, 0.03), "warning"),
        ("sample", evidence(5, 40, 0.042), "critical"),
        ("sample", evidence(15, 1000, 0.0084), "warning"),
        ("drift", EVIDENCE, "critical"),
        ("recovered", EVIDENCE, "info"),
        ("invalid_input", EVIDENCE, "warning"),
        ("stale_calibration", EVIDENCE, "warning"),
    ],
)
def test_severity_follows_from_the_evidence(kind: Any, found: Any, severity: str) -> None:
    assert severity_of(kind, found) == severity


def test_a_share_of_flags_that_no_chance_gives_is_critical() -> None:
    watch = monitor(ert=1e300, cooldown=30)
    alerts = feed(watch, torch.cat([far(1), quiet(30), far(60)]))
    assert [alert.severity for alert in alerts] == ["warning", "warning", "critical"]


def test_an_alert_says_the_status() -> None:
    watch = monitor(recovery=50, ert=1e5)
    alerts = feed(watch, torch.cat([far(1), shifted(80), usual(200, seed=2)]))
    found = [(a.kind, a.status) for a in alerts if a.kind != "sample"]
    assert found == [("drift", "ALERT"), ("recovered", "OK")]
    assert (alerts[0].kind, alerts[0].status) == ("sample", "WARN")


# Stale weights


@pytest.fixture
def detector() -> om.Detector:
    """With a model of its own."""
    return fitted(om.LogLikelihood(BRANCHES.model()))


def weight(detector: om.Detector) -> Tensor:
    return next(iter(detector.adapter.module.parameters()))


def change(detector: om.Detector, by: float = 1e-3) -> None:
    with torch.no_grad():
        weight(detector).add_(by)


def test_a_stale_model_is_told_of_with_the_first_samples(detector: om.Detector) -> None:
    change(detector)
    watch = monitor(detector=detector, sinks=[sink := Recorder()])
    alerts = feed(watch, quiet(20), 5)
    assert [(a.kind, a.status, a.severity) for a in alerts] == [
        ("stale_calibration", "WARN", "warning")
    ]
    assert watch.status == "WARN"
    assert watch.flush(LONG)
    assert len(sink.seen) == 1


def test_weights_that_change_are_noticed_and_so_are_those_that_come_back(
    detector: om.Detector,
) -> None:
    watch = monitor(detector=detector, weights_every=10)
    before = weight(detector).detach().clone()
    assert feed(watch, quiet(15), 5) == []
    change(detector)
    [stale] = feed(watch, quiet(30), 5)
    assert (stale.kind, stale.samples_seen) == ("stale_calibration", 20)
    with torch.no_grad():
        weight(detector).copy_(before)
    [again] = feed(watch, quiet(30), 5)
    assert (again.kind, again.status, watch.status) == ("recovered", "OK", "OK")


def test_a_drift_outlives_the_end_of_staleness(detector: om.Detector) -> None:
    before = weight(detector).detach().clone()
    change(detector, 1e-9)
    watch = monitor(detector=detector, weights_every=1)
    feed(watch, shifted(100))
    with torch.no_grad():
        weight(detector).copy_(before)
    alerts = feed(watch, shifted(1))
    assert [(a.kind, a.status) for a in alerts] == [("recovered", "ALERT")]
    assert watch.status == "ALERT"


def test_replaced_parameters_are_noticed(detector: om.Detector) -> None:
    watch = monitor(detector=detector, weights_every=1)
    watch.update(quiet(1))
    module = detector.adapter.module
    name, old = next(iter(module.named_parameters()))
    owner = module.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(old.detach() + 1))
    assert [a.kind for a in only(watch.update(quiet(1)), "stale_calibration")]


def test_weights_are_hashed_only_when_they_were_touched(
    detector: om.Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = monitor(detector=detector, weights_every=1)
    monkeypatch.setattr("ood_monitor.monitor.staleness.digest", pytest.fail)
    feed(watch, quiet(10))


def test_weights_are_not_looked_at_if_not_asked_for(detector: om.Detector) -> None:
    change(detector)
    assert feed(monitor(detector=detector, weights_every=0), quiet(20), 5) == []


def test_a_resumed_monitor_tells_of_staleness_once(detector: om.Detector) -> None:
    change(detector)
    watch = monitor(detector=detector)
    watch.update(quiet(5))
    again = monitor(detector=detector)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again.update(quiet(5)) == []
    assert again.status == "WARN"


def test_weights_that_cannot_be_read_are_no_error(detector: om.Detector) -> None:
    class Elsewhere(nn.Module):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("sharded")

    from ood_monitor.monitor.staleness import Weights

    assert Weights(Elsewhere(), "0" * 12).are_stale() is False


# Crashes


STREAM = torch.cat(
    [usual(60), far(2), shifted(50), usual(90, seed=2), far(3), shifted(40, seed=3)]
).clone()
STREAM[[5, 6, 70, 160]] = math.nan
SCORES = monitor().score(STREAM)
IDS = sample_hashes(STREAM, range(len(STREAM)))


def observed(watch: om.Monitor, rows: Sequence[int]) -> list[Alert]:
    """What a batch of the stream raises; scored once for all, which takes the time."""
    at = slice(rows[0], rows[-1] + 1)
    parts = {"score", "p_value", "log_likelihood", "valid"}
    scores = om.Scores(
        **{name: getattr(SCORES, name)[at] for name in parts},
        layers={name: values[at] for name, values in SCORES.layers.items()},
        z={name: values[at] for name, values in SCORES.z.items()},
    )
    return watch.observe(scores, IDS[at])


def said(alerts: list[Alert]) -> list[dict[str, Any]]:
    unlike = dict.fromkeys(("time", "id", "number"))
    return [json.loads(a.to_json()) | unlike for a in alerts]


@given(
    cuts=st.lists(st.integers(1, len(STREAM) - 1), min_size=1, max_size=10, unique=True),
    crash=st.integers(0, 10),
    options=st.fixed_dictionaries(
        {
            "cooldown": st.sampled_from([0, 3, 40]),
            "recovery": st.sampled_from([5, 60]),
            "thin": st.sampled_from([1, 3]),
            "fpr": st.sampled_from([0.01, 0.2]),
        }
    ),
)
@settings(deadline=None, max_examples=20)
def test_a_crash_between_any_two_updates_changes_nothing(
    cuts: list[int], crash: int, options: dict[str, Any]
) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    batches = [range(a, b) for a, b in pairwise(edges)]
    at = min(crash, len(batches))
    watch = monitor(**options)
    for rows in batches[:at]:
        observed(watch, rows)
    state = json.dumps(watch.state_dict(), allow_nan=False)
    resumed = monitor(**options, seed=9)
    resumed.load_state_dict(json.loads(state))
    for rows in batches[at:]:
        assert said(observed(resumed, rows)) == said(observed(watch, rows))
        assert resumed.state_dict() | {"said": None} == watch.state_dict() | {"said": None}
    assert (resumed.status, resumed.samples_seen) == (watch.status, watch.samples_seen)


@pytest.mark.parametrize(
    ("key", "value"), [("untold", [3]), ("flagged", [["a", 0.1, None]]), ("since_told", "x")]
)
def test_malformed_new_parts_of_a_state_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="Expected the state of a monitor"):
        monitor().load_state_dict(monitor().state_dict() | {key: value})


def test_a_state_of_the_release_before_is_refused_with_its_format() -> None:
    with pytest.raises(ValueError, match="Expected a state of format 4, got 3"):
        monitor().load_state_dict(monitor().state_dict() | {"format": 3})


def test_a_monitors_spool_outlives_it(tmp_path: Path) -> None:
    broken = Broken()
    broken.name = "Recorder"  # type: ignore[attr-defined]
    with monitor(sinks=[broken], spool=tmp_path) as watch:
        [alert] = watch.update(far(1))
        watch.close(0.5)
        assert watch.dispatcher.undelivered_count == 1
    with monitor(sinks=[sink := Recorder()], spool=tmp_path) as watch:
        assert watch.flush(LONG)
    assert sink.seen == [alert.samples_seen]
