"""What Prometheus scrapes of a watched stream."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from ood_monitor_integrations.prometheus import PrometheusSink, score_buckets
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parsed
from support.alert_cases import ALERT, LONG, summary
from support.small_cases import SMALL

import ood_monitor as om
from ood_monitor.alerts import AlertKind, Dispatcher, Reading

BRANCHES = SMALL["branches"]
LABELS = {"model": "m7", "detector": "d5"}
READING = Reading(
    stream="production",
    **LABELS,
    scores=[0.5, 2.0, 50.0],
    p_values=[0.6, 0.2, 0.002],
    flagged=1,
    invalid=2,
)


@pytest.fixture(scope="module")
def detector() -> om.Detector:
    return om.Detector(BRANCHES()).fit([BRANCHES.data(1000, seed=100)], progress=False)


def value(sink: PrometheusSink, name: str, **labels: str) -> float | None:
    return sink.registry.get_sample_value(f"ood_monitor_{name}", LABELS | labels)


def test_a_monitor_feeds_all_meters(detector: om.Detector) -> None:
    sink = PrometheusSink(model="flow", detector="prod", buckets=score_buckets(detector))
    x = BRANCHES.data(200, seed=1)
    x[:3] = float("nan")
    with om.Monitor(detector, sinks=[sink], ert=1000) as monitor:
        for batch in x.split(20):
            monitor.update(batch)
        with pytest.raises(ValueError, match="Expected samples"):
            monitor.update(x[:, :2])
        flagged = int((detector.score(x[3:]).p_value <= monitor.fpr).sum())
    labels = {"model": "flow", "detector": "prod"}
    verdicts = {"usual": 197 - flagged, "flagged": flagged, "invalid": 3}
    for verdict, count in verdicts.items():
        assert value(sink, "samples_total", **labels, verdict=verdict) == count
    assert value(sink, "score_count", **labels) == 197
    assert value(sink, "p_value_count", **labels) == 197
    assert value(sink, "p_value_sum", **labels) == pytest.approx(98.5, rel=0.2)
    assert value(sink, "scoring_seconds_count", **labels) == 10
    assert value(sink, "errors_total", **labels) == 1
    assert value(sink, "alerts_total", **labels, kind="invalid_input") == 1


def test_a_drift_shows_as_the_status_until_it_recovers(detector: om.Detector) -> None:
    sink = PrometheusSink()
    with om.Monitor(detector, sinks=[sink], ert=1000, recovery=30, summary_every=10) as monitor:
        labels = {"model": detector.fitted.model, "detector": detector.fitted.fingerprint}
        shown = []
        for x in (BRANCHES.data(50, seed=1), 2 + BRANCHES.data(50, seed=2)):
            monitor.update(x)
            assert monitor.flush(LONG)
            shown.append(value(sink, "status", **labels))
        monitor.update(BRANCHES.data(150, seed=3))
        assert monitor.flush(LONG)
    assert [*shown, value(sink, "status", **labels)] == [1, 2, 0]
    assert value(sink, "alerts_total", **labels, kind="drift") == 1
    assert value(sink, "alerts_total", **labels, kind="recovered") == 1


def test_scores_fall_into_their_buckets() -> None:
    sink = PrometheusSink(buckets=(1, 10))
    sink.measure(READING)
    found = [value(sink, "score_bucket", le=le) for le in ("1.0", "10.0", "+Inf")]
    assert found == [1, 2, 3]
    assert value(sink, "score_sum") == 52.5
    assert value(sink, "p_value_bucket", le="0.01") == 1


def test_an_alert_that_comes_again_is_counted_once() -> None:
    sink = PrometheusSink()
    sink(ALERT)
    sink(ALERT)
    sink(replace(ALERT, id="0" * 32))
    assert value(sink, "alerts_total", kind="drift") == 2


def test_a_restart_shows_the_status_with_the_next_figures() -> None:
    sink = PrometheusSink()
    sink.measure(READING)
    sink.summarise(replace(summary(100), status="ALERT"))
    assert value(sink, "status") == 2


def test_a_late_alert_counts_and_leaves_the_status() -> None:
    """After an outage, or with a clock that has stepped back: the number says which is later."""
    sink, earlier = PrometheusSink(), ALERT.time - timedelta(days=1)
    sink(replace(ALERT, kind="recovered", status="OK", number=20, time=earlier, id="0" * 32))
    sink(ALERT)
    assert value(sink, "status") == 0
    assert value(sink, "alerts_total", kind="drift") == 1
    sink(replace(ALERT, stream="another", id="1" * 32))
    assert value(sink, "status") == 2


def test_samples_that_others_dropped_are_counted() -> None:
    sink = PrometheusSink()
    sink.measure(READING)
    sink.dropped(4)
    assert value(sink, "dropped_total") == 4


def test_what_has_not_come_yet_stands_at_zero() -> None:
    """Prometheus sees no rise in a counter that begins with the first alert."""
    sink = PrometheusSink()
    sink.measure(READING)
    assert [value(sink, "alerts_total", kind=kind) for kind in get_args(AlertKind)] == [0] * 7
    assert value(sink, "dropped_total") == 0
    sink(ALERT)
    sink.dropped(2)
    sink.measure(READING)
    assert (value(sink, "alerts_total", kind="drift"), value(sink, "dropped_total")) == (1, 2)


def test_labels_are_the_model_and_the_detector_only() -> None:
    sink = PrometheusSink()
    with Dispatcher([sink]) as dispatcher:
        for number in range(20):
            dispatcher.send(replace(ALERT, stream=f"user-{number}", id=f"{number:032x}"))
            dispatcher.measure(replace(READING, stream=f"user-{number}", seconds=0.1))
    for family in parsed(generate_latest(sink.registry).decode()):
        for sample in family.samples:
            assert set(sample.labels) <= {"model", "detector", "verdict", "kind", "le"}
            assert sample.labels["model"] == "m7"


def test_registries_are_apart_by_default() -> None:
    first, second = PrometheusSink(), PrometheusSink()
    first.measure(READING)
    assert value(second, "samples_total", verdict="flagged") is None


def test_two_sinks_may_share_a_registry() -> None:
    registry = CollectorRegistry()
    for _ in range(2):
        sink = PrometheusSink(registry=registry)
        sink.measure(READING)
    assert value(sink, "samples_total", verdict="flagged") == 2


def test_foreign_meters_of_the_name_are_an_error_that_leaves_none_of_ours() -> None:
    registry = CollectorRegistry()
    Counter("ood_monitor_errors", "Somebody else's.", registry=registry)
    for _ in range(2):
        with pytest.raises(ValueError, match="Expected a registry without other meters named"):
            PrometheusSink(registry=registry)
    names = {family.name for family in registry.collect()}
    assert names == {"ood_monitor_errors"}


def test_buckets_of_a_detector_hold_its_scores(detector: om.Detector) -> None:
    buckets = score_buckets(detector)
    assert buckets == sorted(buckets)
    scores = detector.fitted.calibration.scores
    assert ((scores > buckets[0]) & (scores <= buckets[-1])).mean() > 0.95


@pytest.mark.slow
def test_processes_of_a_service_add_up(tmp_path: Path) -> None:
    script = """
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from ood_monitor_integrations.prometheus import PrometheusSink
from ood_monitor.alerts import Alert, Reading
sink = PrometheusSink(model="m", detector="d")
sink.measure(Reading(stream="s", detector="", model="", scores=[1.0], p_values=[0.5]))
if len(sys.argv) > 1:
    sink(Alert.from_json(sys.argv[1]))
"""
    scrape = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    text = ""
    for command in ([script], [script, ALERT.to_json()], [scrape]):
        ended = subprocess.run(
            [sys.executable, "-c", *command], env=env, capture_output=True, text=True, check=True
        )
        text = ended.stdout
    assert re.search(r"ood_monitor_samples_total\{.*usual.*\} 2.0", text)
    assert re.search(r"ood_monitor_status\{.*\} 2.0", text)


RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


def exposed() -> dict[str, dict[str, set[str]]]:
    """Of each meter, its labels with the values that they take."""
    sink = PrometheusSink()
    sink(ALERT)
    sink.measure(replace(READING, seconds=0.1))
    found: dict[str, dict[str, set[str]]] = {}
    for family in parsed(generate_latest(sink.registry).decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, of_label in sample.labels.items():
                labels.setdefault(label, set()).add(of_label)
    return found


def test_the_rules_of_the_recipe_name_meters_labels_and_kinds_that_are_there() -> None:
    known = {meter: set(labels) for meter, labels in exposed().items()}
    [group] = yaml.safe_load((RECIPES / "prometheus-rules.yml").read_text())["groups"]
    for rule in group["rules"]:
        meters = set(re.findall(r"ood_monitor_\w+", rule["expr"]))
        assert meters
        assert meters <= known.keys()
        said = " ".join(rule["annotations"].values())
        used = set(re.findall(r"\$labels\.(\w+)", said))
        assert used <= set.intersection(*(known[meter] for meter in meters))
        assert set(re.findall(r"ood-monitor guide (\w+)", said)) <= set(get_args(AlertKind))


def test_what_promtool_expects_is_what_the_rules_say() -> None:
    [group] = yaml.safe_load((RECIPES / "prometheus-rules.yml").read_text())["groups"]
    rules = {rule["alert"]: rule for rule in group["rules"]}
    [story] = yaml.safe_load((RECIPES / "prometheus-rules-test.yml").read_text())["tests"]
    told = set()
    for case in story["alert_rule_test"]:
        rule = rules[case["alertname"]]
        for expected in case.get("exp_alerts", ()):
            said = {
                name: text.replace("{{ $labels.detector }}", expected["exp_labels"]["detector"])
                for name, text in rule["annotations"].items()
            }
            assert expected["exp_annotations"] == said
            assert rule["labels"].items() <= expected["exp_labels"].items()
            told.add(case["alertname"])
    assert told == rules.keys()


DASHBOARD = json.loads((RECIPES / "grafana-dashboard.json").read_text())
OPERATORS = {"rate", "increase", "sum", "by", "round", "histogram_quantile", "label_values"}


def queries(found: Any) -> Iterator[str]:
    """All that Prometheus is asked for by a dashboard, its variables' queries too."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if key in ("expr", "definition"):
            yield value
        elif isinstance(value, dict | list):
            yield from queries(value)


def unknown_in(query: str) -> set[str]:
    """Meters that nobody exposes, and labels or values that these meters have not."""
    known, found = exposed(), set(re.findall(r"ood_monitor_\w+", query))
    of_all = [set(known[meter]) for meter in found & known.keys()]
    labels = set.intersection(*of_all) if of_all else set()
    wrong = found - known.keys()
    for meter, selector in re.findall(r"(ood_monitor_\w+)\{(.*?)\}", query):
        for label, _, asked in re.findall(r'(\w+)(=~|!=|=)"(.*?)"', selector):
            given = set() if asked == f"${label}" else set(asked.split("|"))
            wrong |= given - known.get(meter, {}).get(label, set())
            wrong |= {label} - known.get(meter, {}).keys()
    grouped = {name for names in re.findall(r"by \((.*?)\)", query) for name in names.split(", ")}
    wrong |= grouped - labels
    words = set(re.findall(r"[a-z_]{2,}", re.sub(r"ood_monitor_\w+|\{.*?\}|\$\w+", "", query)))
    return wrong | (words - OPERATORS - labels)


def test_the_dashboard_asks_for_meters_labels_and_values_that_are_there() -> None:
    asked = list(queries(DASHBOARD))
    assert {query: unknown for query in asked if (unknown := unknown_in(query))} == {}
    shown = {meter for query in asked for meter in re.findall(r"ood_monitor_\w+", query)}
    meters = {"samples_total", "status", "alerts_total", "errors_total", "dropped_total"}
    histograms = {"score_bucket", "p_value_bucket", "p_value_count", "scoring_seconds_bucket"}
    assert shown == {f"ood_monitor_{name}" for name in meters | histograms}


@pytest.mark.parametrize(
    ("query", "unknown"),
    [
        ("ood_monitor_statuses", "ood_monitor_statuses"),
        ('ood_monitor_samples_total{verdict="odd"}', "odd"),
        ('ood_monitor_status{verdict=~"$verdict"}', "verdict"),
        ("sum by (kind) (ood_monitor_status)", "kind"),
        ('ood_monitor_p_value_bucket{le="0.02"}', "0.02"),
        ("rates(ood_monitor_errors_total[1m])", "rates"),
    ],
)
def test_a_query_of_what_is_not_there_is_found(query: str, unknown: str) -> None:
    assert unknown in unknown_in(query)


def test_the_dashboards_panels_are_apart_and_say_what_they_show() -> None:
    """As Grafana lays them out: 24 columns."""
    taken = set[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        x, y, width, height = (panel["gridPos"][name] for name in "xywh")
        cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
        assert not cells & taken
        assert x + width <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
