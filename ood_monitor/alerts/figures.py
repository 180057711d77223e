"""What a monitor shows between alerts: running figures of a stream, and readings of each call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import get_args

from ood_monitor.alerts.alert import Status
from ood_monitor.alerts.plain import check_word, make_plain, make_text, make_whole

__all__ = ["Reading", "Summary"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The running figures of a stream, for a sink to show between alerts.

    A figure that is not defined, or not finite, is None.

    Attributes:
        stream: The stream's name.
        samples_seen: Samples of that stream so far.
        status: OK, WARN or ALERT.
        score_mean: Running mean of the anomaly score (higher = more anomalous).
        score_p95: Running 95th percentile of the anomaly score.
        flagged_rate: Running share of flagged samples, between 0 and 1.
        log_e_value: Natural logarithm of the drift test's e-value.
        invalid: Samples that could not be scored so far, by cause.
        number: As an alert's: what a monitor says is numbered in one order.
        time: When these were the figures, as UTC.
        ert: Promised mean number of samples between false drift alarms; the test alarms at its
            logarithm.
        fpr: Promised share of in-distribution samples that are flagged, between 0 and 1.
    """

    stream: str
    samples_seen: int
    status: Status
    score_mean: float | None
    score_p95: float | None
    flagged_rate: float | None
    log_e_value: float | None
    invalid: Mapping[str, int] = field(default_factory=dict)
    number: int = 0
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    ert: float | None = None
    fpr: float | None = None

    def __post_init__(self) -> None:
        check_word("status", self.status, get_args(Status))
        make_plain(self, "score_mean", "score_p95", "flagged_rate", "log_e_value", "ert", "fpr")
        make_whole(self, "samples_seen", "number")
        make_text(self, "stream")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one call of a monitor measured, for a sink that keeps meters.

    Attributes:
        stream: The stream's name.
        detector: Fingerprint of the detector.
        model: Fingerprint of the model.
        scores: (B,), anomaly scores of the valid samples (higher = more anomalous).
        p_values: (B,), their conformal p-values.
        flagged: How many of them were flagged.
        invalid: Samples beside them that could not be scored.
        seconds: What scoring took, in wall time; None where the call decided only.
        failed: 1 if the call raised, so that nothing was scored.
    """

    stream: str
    detector: str
    model: str
    scores: Sequence[float] = ()
    p_values: Sequence[float] = ()
    flagged: int = 0
    invalid: int = 0
    seconds: float | None = None
    failed: int = 0

    def __post_init__(self) -> None:
        make_text(self, "stream")
