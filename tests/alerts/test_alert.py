import json
import logging
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from importlib import resources
from typing import Any, get_args

import numpy as np
import pytest
from support.alert_cases import ALERT, EVIDENCE, Recorder, summary

from ood_monitor.alerts import (
    Alert,
    AlertEvidence,
    AlertKind,
    FlaggedSample,
    LayerShare,
    LoggingSink,
    Severity,
    Status,
    SummarySink,
    TracePoint,
)

# The records


def test_json_round_trip_is_equal() -> None:
    again = Alert.from_json(ALERT.to_json())
    assert again == ALERT
    assert again.to_json() == ALERT.to_json()
    assert Alert.from_json(ALERT.to_json(indent=2)) == ALERT


def test_json_is_plain() -> None:
    record = json.loads(ALERT.to_json())
    assert record["kind"] == "drift"
    assert record["evidence"]["flagged_rate"] == 2 / 3
    assert record["evidence"]["p_value"] is None
    assert record["top_layers"][0] == {"layer": "up.0.weight", "share": 0.62, "z": 8.1}
    assert datetime.fromisoformat(record["time"]) == ALERT.time
    assert "\n" not in ALERT.to_json()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_null(value: float) -> None:
    layer = LayerShare("w", share=value, z=value)
    odd = replace(
        ALERT, evidence=replace(EVIDENCE, log_e_value=value, ert=value), top_layers=(layer,)
    )
    record = json.loads(odd.to_json(), parse_constant=pytest.fail)
    assert record["evidence"]["log_e_value"] is None
    assert record["evidence"]["ert"] is None
    assert record["top_layers"] == [{"layer": "w", "share": None, "z": None}]
    assert Alert.from_json(odd.to_json()) == odd


def test_numbers_of_numpy_become_plain() -> None:
    evidence = replace(EVIDENCE, score_mean=np.float32(0.5), flagged=np.int64(7))
    odd = replace(ALERT, samples_seen=np.int64(8), evidence=evidence)
    assert Alert.from_json(odd.to_json()) == odd
    assert (type(odd.samples_seen), type(odd.evidence.flagged)) == (int, int)
    assert type(odd.evidence.score_mean) is float


def test_summary_is_plain() -> None:
    odd = replace(summary(np.int64(3)), score_mean=np.float32("nan"), score_p95=np.float32(0.5))
    assert (odd.samples_seen, odd.score_mean, odd.score_p95) == (3, None, 0.5)
    assert type(odd.samples_seen) is int
    with pytest.raises(ValueError, match="Expected status to be one of OK, WARN, ALERT, got 'BAD'"):
        replace(odd, status="BAD")


def test_time_is_utc_and_aware() -> None:
    east = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5)))
    moved = replace(ALERT, time=east)
    assert moved.time == east
    assert moved.time.tzinfo is UTC
    assert Alert.from_json(moved.to_json()).time == east
    with pytest.raises(ValueError, match="time zone"):
        replace(ALERT, time=datetime(2026, 1, 2))


def test_each_alert_has_an_id_and_a_time() -> None:
    given = {name: value for name, value in vars(ALERT).items() if name not in {"id", "time"}}
    before = datetime.now(UTC)
    first, second = Alert(**given), Alert(**given)
    assert first.id != second.id
    assert len(bytes.fromhex(first.id)) == 16
    assert before <= first.time <= second.time <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "panic"}, "Expected kind to be one of sample"),
        ({"severity": "bad"}, "Expected severity"),
        ({"status": "FINE"}, "Expected status"),
    ],
)
def test_unknown_words_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ALERT, **change)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        ALERT.to_json().replace('"format": 5', '"format": 99'),
        ALERT.to_json().replace('"samples_seen": 1234', '"samples_seen": 1.5'),
        ALERT.to_json().replace('"samples_seen": 1234', '"samples_seen": Infinity'),
        ALERT.to_json().replace('"kind"', '"sort"'),
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Expected the JSON of an alert, got"):
        Alert.from_json(text)


# The schema


def assert_follows(schema: dict[str, Any], value: Any, where: str = "alert") -> None:
    """The few words of JSON Schema that ours uses, and no others."""
    known = {"$schema", "title", "description", "format", "type", "enum", "const"}
    known |= {"required", "properties", "additionalProperties", "items"}
    known |= {"minimum", "maximum", "minLength", "maxLength", "maxItems"}
    assert schema.keys() <= known, where
    if "const" in schema:
        assert value == schema["const"], where
    if "enum" in schema:
        assert value in schema["enum"], where
    assert_has_type(schema, value, where)
    if isinstance(value, dict):
        assert schema["additionalProperties"] is False, where
        assert set(schema["required"]) <= value.keys() <= schema["properties"].keys(), where
        for name, part in value.items():
            assert_follows(schema["properties"][name], part, f"{where}.{name}")
    if isinstance(value, list):
        for part in value:
            assert_follows(schema["items"], part, f"{where}[]")


def assert_has_type(schema: dict[str, Any], value: Any, where: str) -> None:
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float}
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    allowed = [None if name == "null" else kinds[name] for name in names]
    if value is None:
        assert None in allowed, where
    elif allowed:
        assert isinstance(value, tuple(kind for kind in allowed if kind)), where
    if isinstance(value, int | float):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), where
    if isinstance(value, str | list):
        limits = schema.get("minLength", 0), schema.get("maxLength", schema.get("maxItems", 1e9))
        assert limits[0] <= len(value) <= limits[1], where


SCHEMA = json.loads((resources.files("ood_monitor.alerts") / "alert.schema.json").read_text())
EMPTY = replace(
    ALERT,
    kind="stale_calibration",
    evidence=AlertEvidence(
        **{f.name: None for f in fields(AlertEvidence)} | {"flagged": 0, "window": 0}
    ),
    top_layers=(LayerShare("w", None, None),),
    top_terms=(),
    samples=(FlaggedSample(1, None, None),),
    trace=(TracePoint(1, None),),
)


@pytest.mark.parametrize("alert", [ALERT, EMPTY], ids=["full", "empty"])
def test_json_follows_the_schema_in_the_docs(alert: Alert) -> None:
    assert_follows(SCHEMA, json.loads(alert.to_json()))


@pytest.mark.parametrize(
    ("part", "record"),
    [
        ("top", ALERT),
        ("evidence", ALERT.evidence),
        ("top_layers", ALERT.top_layers[0]),
        ("top_terms", ALERT.top_terms[0]),
        ("samples", ALERT.samples[0]),
        ("trace", ALERT.trace[0]),
    ],
)
def test_the_schema_has_every_field_and_no_other(part: str, record: Any) -> None:
    schema = SCHEMA if part == "top" else SCHEMA["properties"][part]
    properties = schema.get("items", schema)["properties"]
    assert properties.keys() - {"format", "help"} == {field.name for field in fields(record)}


def test_the_schema_has_the_words_of_the_class() -> None:
    for name, words in (("kind", AlertKind), ("severity", Severity), ("status", Status)):
        assert SCHEMA["properties"][name]["enum"] == list(get_args(words))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"kind": "panic"}, "alert.kind"),
        ({"samples_seen": -1}, "alert.samples_seen"),
        ({"top_terms": [{"term": "t"}]}, r"alert.top_terms\[\]"),
        ({"image": [1, 2]}, "alert"),
        ({"evidence": None}, "alert.evidence"),
    ],
)
def test_what_does_not_follow_would_be_noticed(change: dict[str, Any], where: str) -> None:
    with pytest.raises(AssertionError, match=where):
        assert_follows(SCHEMA, json.loads(ALERT.to_json()) | change)


# Older and newer ones


@pytest.mark.parametrize(
    ("version", "lacks"), [(1, ("status", "top_terms", "samples")), (2, ()), (3, ()), (4, ())]
)
def test_the_json_of_formats_before_is_read(version: int, lacks: tuple[str, ...]) -> None:
    lacks += ("help",) if version == 4 else ("trace", "number", "explains", "help")
    lacks += ("standing",)
    record = json.loads(ALERT.to_json()) | {"format": version}
    before = {name: value for name, value in record.items() if name not in lacks}
    usual = {f.name: f.default for f in fields(Alert) if f.name in lacks and f.name != "status"}
    assert Alert.from_json(json.dumps(before)) == replace(ALERT, **usual)


def test_a_newer_format_is_refused_by_its_number() -> None:
    text = ALERT.to_json().replace('"format": 5', '"format": 6')
    with pytest.raises(ValueError, match="its format is 6, and this release reads"):
        Alert.from_json(text)


@pytest.mark.parametrize(
    ("kind", "status"), [("recovered", "OK"), ("drift", "ALERT"), ("invalid_input", "WARN")]
)
def test_an_alert_without_a_status_has_that_of_its_kind(kind: Any, status: str) -> None:
    given = {name: value for name, value in vars(ALERT).items() if name not in {"status", "kind"}}
    assert Alert(kind=kind, **given).status == status


def test_summary_sink_is_recognised() -> None:
    assert isinstance(Recorder(), SummarySink)
    assert not isinstance(LoggingSink(), SummarySink)


# The log


@pytest.mark.parametrize(
    ("kind", "severity", "level"),
    [
        ("drift", "critical", logging.ERROR),
        ("sample", "warning", logging.WARNING),
        ("stale_calibration", "info", logging.INFO),
        ("recovered", "critical", logging.INFO),
    ],
)
def test_logging_sink_writes_one_line(
    kind: str, severity: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("somewhere.else")
    with caplog.at_level(logging.INFO, logger.name):
        LoggingSink(logger)(replace(ALERT, kind=kind, severity=severity, message="Two\n lines %s."))
    (record,) = caplog.records
    assert (record.levelno, record.name) == (level, logger.name)
    text = record.getMessage()
    assert "\n" not in text
    for part in (kind, "Two lines %s.", "production", "sample 1234", "20 of 30", "up.0.weight"):
        assert part in text, part
