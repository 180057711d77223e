"""What a monitor tells people.

An alert holds figures and names, never data: no sample, and nothing that a sample can be rebuilt
from. `alert.schema.json`, beside this module, describes its JSON.
"""

import json
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, Self, get_args
from uuid import uuid4

from ood_monitor.alerts.plain import check_word, make_plain, make_text, make_whole
from ood_monitor.escaping import utf8

__all__ = [
    "CALM",
    "Alert",
    "AlertEvidence",
    "AlertKind",
    "FlaggedSample",
    "LayerShare",
    "Severity",
    "Status",
    "TermShare",
    "TracePoint",
    "severity_of",
]

#: What happened.
AlertKind = Literal[
    "sample",
    "drift",
    "recovered",
    "invalid_input",
    "stale_calibration",
    "accepted",
    "explanation",
]
#: Kinds that tell of nothing wrong: of an end, or of more about an alert before.
CALM: tuple[AlertKind, ...] = ("recovered", "accepted", "explanation")

#: How much an alert matters.
Severity = Literal["info", "warning", "critical"]
#: Where a stream stands.
Status = Literal["OK", "WARN", "ALERT"]
DriftOf = Literal["data", "mix"]

#: Version of an alert's JSON; 1 had no status, terms or samples, 2 not what a drift is of, 3 no
#: number, trace or explanations, 4 no help, and not what stands.
_FORMAT = 5
_READ = (1, 2, 3, 4, _FORMAT)

#: Characters of a sample's id that an alert carries.
_LONGEST_ID = 256

#: Flagged samples, and how many times the promised rate, from which on flags are critical.
_MANY, _TIMES = 5, 2


@dataclass(frozen=True)
class LayerShare:
    """How much one layer speaks for an alert.

    Attributes:
        layer: The parameter's name, as in the model.
        share: The part of the score that is this layer's, between 0 and 1.
        z: This layer's log squared gradient norm, in standard deviations from its in-distribution
            mean.
    """

    layer: str
    share: float | None
    z: float | None

    def __post_init__(self) -> None:
        make_text(self, "layer")
        make_plain(self, "share", "z")


@dataclass(frozen=True)
class TermShare:
    """How much one term of the likelihood speaks for an alert, such as a noise level.

    Attributes:
        term: The term's name, as the adapter gives it.
        share: The part of the score that is of its layers and its value, between 0 and 1.
    """

    term: str
    share: float | None

    def __post_init__(self) -> None:
        make_text(self, "term")
        make_plain(self, "share")


@dataclass(frozen=True)
class FlaggedSample:
    """A sample that was flagged: where it stood, and what its owner calls it; never itself.

    Attributes:
        position: Its place in the stream, from 1.
        p_value: Its conformal p-value.
        id: As it was given to the monitor, at most 256 characters of it, or the sample's SHA-256;
            None if neither was asked for.
    """

    position: int
    p_value: float | None
    id: str | None = None

    def __post_init__(self) -> None:
        make_whole(self, "position")
        make_plain(self, "p_value")
        if self.id is not None:
            object.__setattr__(self, "id", utf8(str(self.id))[:_LONGEST_ID])


@dataclass(frozen=True)
class TracePoint:
    """One sample of the stream as the drift test saw it.

    Attributes:
        position: Its place in the stream, from 1.
        p_value: Its rank among the samples before, between 0 and 1: even while nothing has changed.
    """

    position: int
    p_value: float | None

    def __post_init__(self) -> None:
        make_whole(self, "position")
        make_plain(self, "p_value")


_LISTS = {
    "top_layers": LayerShare,
    "top_terms": TermShare,
    "samples": FlaggedSample,
    "trace": TracePoint,
}


@dataclass(frozen=True, kw_only=True)
class AlertEvidence:
    """The figures behind an alert. A figure that is not defined, or not finite, is None.

    Attributes:
        log_e_value: Natural logarithm of the drift test's e-value.
        ert: Promised mean number of samples between false drift alarms.
        fpr: Promised share of in-distribution samples that are flagged, between 0 and 1.
        flagged: Samples flagged among the last `window`.
        window: Samples that the figures cover: of a drift alert those since the evidence began, of
            all else those since the drift test last did; at most the latest thousand.
        flagged_rate: `flagged / window`.
        flagged_rate_low: Lower end of the exact binomial interval of `flagged_rate`.
        flagged_rate_high: Its upper end.
        score_mean: Mean anomaly score over the window (higher = more anomalous).
        score_p95: 95th percentile of the anomaly score over the window.
        p_value: Conformal p-value of the most anomalous sample that triggered; None for drift.
        drift_of: What a drift is of: the ``"data"``, or the ``"mix"`` of groups; None of all else.
        since: Of a drift, the sample of the stream with which the evidence most likely began; a
            gradual change or a false alarm has no such sample.
        since_earliest: The first of those that nine tenths of the evidence may have begun with.
        since_latest: The last of them.
        correlation: Of neighbouring tested samples before a drift alert, by their ranks; None where
            it may be chance.
        ert_if_correlated: Mean number of tested samples between false drift alarms to be expected
            if neighbours were as much alike while nothing is wrong.
    """

    log_e_value: float | None
    ert: float | None
    fpr: float | None
    flagged: int
    window: int
    flagged_rate: float | None
    flagged_rate_low: float | None
    flagged_rate_high: float | None
    score_mean: float | None
    score_p95: float | None
    p_value: float | None = None
    drift_of: DriftOf | None = None
    since: int | None = None
    since_earliest: int | None = None
    since_latest: int | None = None
    correlation: float | None = None
    ert_if_correlated: float | None = None

    def __post_init__(self) -> None:
        counts, places = {"flagged", "window"}, {"since", "since_earliest", "since_latest"}
        other = counts | places | {"drift_of"}
        make_plain(self, *(f.name for f in fields(self) if f.name not in other))
        make_whole(self, *counts, *(name for name in places if vars(self)[name] is not None))
        if self.drift_of is not None:
            check_word("drift_of", self.drift_of, get_args(DriftOf))


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something a person should know about a stream.

    Attributes:
        kind: What happened.
        severity: How much it matters.
        stream: The stream's name.
        samples_seen: Samples of that stream so far, the triggering one included.
        message: One sentence for people.
        evidence: The figures.
        top_layers: The layers that say the most, the strongest first.
        top_terms: The terms of the likelihood (noise levels, latent levels) that do, the strongest
            first; empty if the model has one.
        samples: Samples by name, in the order of the stream, at most twenty: the flagged ones that
            a sample alert is of, the latest flagged since a drift's evidence began, or those that
            an explanation is from.
        trace: Of a drift alert, at most two hundred tested samples, evenly taken from the latest
            thousand.
        number: Its place in all that its monitor has said, running figures included. Numbers only
            grow, also across restarts, whatever the clock does; 0 where nobody has numbered it.
        explains: Of an explanation, the id of the alert that it is of.
        standing: The kinds that stand with this alert, itself included, the gravest first: a stale
            calibration, under which nothing else can be trusted, a drift, many samples that could
            not be scored. What is not among them is over, or was of single samples.
        detector: Fingerprint of the detector.
        model: Fingerprint of the model.
        method: What the detector goes by, such as ``"gradient_norms"`` or ``"forward"``; None in
            alerts of before there was a choice.
        status: The stream's, with this alert. By default OK with a recovery or what was accepted,
            ALERT with a drift, else WARN.
        time: When it happened; any time zone, kept as UTC.
        id: 32 hexadecimal digits, the same through every delivery.

    Raises:
        ValueError: If `kind`, `severity` or `status` is unknown, or `time` has no time zone.
    """

    kind: AlertKind
    severity: Severity
    stream: str
    samples_seen: int
    message: str
    evidence: AlertEvidence
    top_layers: tuple[LayerShare, ...] = ()
    top_terms: tuple[TermShare, ...] = ()
    samples: tuple[FlaggedSample, ...] = ()
    trace: tuple[TracePoint, ...] = ()
    number: int = 0
    explains: str | None = None
    standing: tuple[AlertKind, ...] = ()
    detector: str
    model: str
    method: str | None = None
    status: Status = None  # type: ignore[assignment]  # never None once made
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    id: str = field(default_factory=lambda: uuid4().hex)

    def __post_init__(self) -> None:
        check_word("kind", self.kind, get_args(AlertKind))
        check_word("severity", self.severity, get_args(Severity))
        object.__setattr__(self, "status", vars(self)["status"] or _usual_status(self.kind))
        check_word("status", self.status, get_args(Status))
        if self.time.utcoffset() is None:
            raise ValueError(f"Expected a time with a time zone, got {self.time!r}.")
        object.__setattr__(self, "time", self.time.astimezone(UTC))
        for name in (*_LISTS, "standing"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for kind in self.standing:
            check_word("standing", kind, get_args(AlertKind))
        make_whole(self, "samples_seen", "number")
        make_text(self, "stream", "message")

    @property
    def help(self) -> str:
        """Where the documentation says what this kind of alert means, and what to do now."""
        return f"docs/alerts.md#{self.kind}"

    def to_json(self, *, indent: int | None = None) -> str:
        """The alert as one JSON object; `from_json` gives an equal alert back."""
        record = {"format": _FORMAT, **vars(self), "time": self.time.isoformat()}
        record["help"] = self.help
        return json.dumps(record, indent=indent, allow_nan=False, default=vars)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The alert that `to_json` wrote, in this release or before.

        Raises:
            ValueError: If `text` is not such an alert.
        """
        try:
            return cls(**_parsed(json.loads(text)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"Expected the JSON of an alert, got {text[:60]!r} ({cause})."
            ) from error


def severity_of(kind: AlertKind, evidence: AlertEvidence) -> Severity:
    """How much an alert matters, from its evidence alone.

    A drift is *critical*: its e-value has reached the promised run time. A flagged sample is a
    *warning*, and *critical* if flags come more often than promised and not by chance: at least
    five in the window, and the lower end of their rate's interval above twice `fpr`. Invalid input
    and a stale calibration are a *warning*; a recovery, an explanation and what was accepted are
    *info*.
    """
    if kind in CALM:
        return "info"
    rate, fpr = evidence.flagged_rate_low, evidence.fpr
    is_many = evidence.flagged >= _MANY and rate is not None and rate > _TIMES * (fpr or 0.0)
    return "critical" if kind == "drift" or (kind == "sample" and is_many) else "warning"


def _usual_status(kind: AlertKind) -> Status:
    return {"recovered": "OK", "accepted": "OK", "drift": "ALERT"}.get(kind, "WARN")  # type: ignore[return-value]


def _parsed(record: dict[str, Any]) -> dict[str, Any]:
    version = record.pop("format")
    record.pop("help", None)  # which the kind says
    if version not in _READ:
        raise ValueError(f"its format is {version!r}, and this release reads {_READ}")
    return record | {
        "time": datetime.fromisoformat(record["time"]),
        "evidence": AlertEvidence(**record["evidence"]),
        **{name: tuple(of(**part) for part in record.get(name, ())) for name, of in _LISTS.items()},
    }
