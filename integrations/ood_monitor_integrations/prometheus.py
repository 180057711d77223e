"""Meters for Prometheus: scores, verdicts, the status, and what scoring takes.

::

    sink = PrometheusSink(registry=prometheus_client.REGISTRY)
    monitor = ood_monitor.Monitor(detector, sinks=[sink])
"""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ood_monitor import Detector
from ood_monitor.alerts import Alert, AlertKind, Reading, Summary
from ood_monitor.checks import items, number, text, whole
from ood_monitor.processes import Lock
from ood_monitor_integrations.latest import Latest
from ood_monitor_integrations.metrics import STATUSES

__all__ = ["PrometheusSink", "score_buckets"]

#: Upper ends of score buckets; a score's unit is the density's, see :func:`score_buckets`.
_SCORES = (-1000, -100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300, 1000, 10_000)
_P_VALUES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_LABELS = ("model", "detector")

#: Alerts whose ids are remembered, so that one that comes again is counted once.
_REMEMBERED = 1024


class PrometheusSink:
    """Keeps meters of every sample that a monitor sees, for Prometheus to scrape.

    - ``ood_monitor_score``, ``ood_monitor_p_value``: histograms of valid samples
    - ``ood_monitor_samples_total``: by ``verdict``, usual, flagged or invalid
    - ``ood_monitor_status``: 0 OK, 1 WARN, 2 ALERT, as was said last by its number
    - ``ood_monitor_alerts_total``: by ``kind``
    - ``ood_monitor_scoring_seconds``: histogram of calls
    - ``ood_monitor_errors_total``: calls that could not be scored
    - ``ood_monitor_dropped_total``: samples that nobody scored, as :meth:`dropped` is told

    All are labelled with the model and the detector, and nothing else that grows. Counters stand at
    zero from the first call on, so that Prometheus's ``increase`` sees the first alert of a kind.
    Sinks with one registry share its meters: give streams of one detector labels of their own.
    With ``PROMETHEUS_MULTIPROC_DIR`` in the environment, the processes of a service add up, and
    the status is the worst of those alive.

    Args:
        registry: Where the meters are; one of the sink's own by default.
        model: The model's label; its fingerprint by default.
        detector: The detector's label; likewise.
        buckets: Upper ends of the score's buckets; with the registry's first sink they are set.

    Attributes:
        registry: Where the meters are.
        name: ``"prometheus"``; a second one beside it needs another.

    Raises:
        ValueError: The registry has meters of these names that are not ours, an empty label, or
            buckets that are not in ascending order.
        TypeError: An option of another type.
    """

    def __init__(
        self,
        *,
        registry: CollectorRegistry | None = None,
        model: str | None = None,
        detector: str | None = None,
        buckets: Sequence[float] = _SCORES,
    ) -> None:
        for name, value in (("model", model), ("detector", detector)):
            if value is not None:
                text(name, value)
        self.name = "prometheus"
        self.registry = CollectorRegistry() if registry is None else registry
        if not isinstance(self.registry, CollectorRegistry):
            raise TypeError(f"Expected registry as a CollectorRegistry, got {registry!r}.")
        self._meters = _Meters.of(self.registry, _checked_buckets(buckets))
        self._names = model, detector
        self._seen: deque[str] = deque(maxlen=_REMEMBERED)
        self._latest: tuple[str, str] | None = None
        self._said = Latest()

    def __call__(self, alert: Alert, /) -> None:
        """Count `alert`, and show the stream's status."""
        labels = self._labels(alert.model, alert.detector)
        if alert.id not in self._seen:
            self._seen.append(alert.id)
            self._meters.alerts.labels(*labels, alert.kind).inc()
        self._show(labels, alert)

    def summarise(self, summary: Summary, /) -> None:
        """Show the stream's status, also after a restart."""
        if self._latest is not None:
            self._show(self._latest, summary)

    def measure(self, reading: Reading, /) -> None:
        """Take in what a call of the monitor measured."""
        meters, labels = self._meters, self._labels(reading.model, reading.detector)
        if labels != self._latest:
            meters.begin(labels)
        self._latest = labels
        usual = len(reading.scores) - reading.flagged
        counts = {"usual": usual, "flagged": reading.flagged, "invalid": reading.invalid}
        for verdict, count in counts.items():
            meters.samples.labels(*labels, verdict).inc(count)
        for score, p_value in zip(reading.scores, reading.p_values, strict=True):
            meters.score.labels(*labels).observe(score)
            meters.p_value.labels(*labels).observe(p_value)
        if reading.seconds is not None:
            meters.seconds.labels(*labels).observe(reading.seconds)
        meters.errors.labels(*labels).inc(reading.failed)

    def dropped(self, count: int = 1) -> None:
        """Count samples that were not scored for lack of time or room; of the latest model."""
        labels, count = self._latest or self._labels("unknown", "unknown"), whole("count", count)
        self._meters.dropped.labels(*labels).inc(count)

    def _show(self, labels: tuple[str, str], said: Alert | Summary) -> None:
        if self._said.is_news(said):
            self._meters.status.labels(*labels).set(STATUSES[said.status])
            self._said.took(said)

    def _labels(self, model: str, detector: str) -> tuple[str, str]:
        given = self._names
        return given[0] or model, given[1] or detector


def _checked_buckets(buckets: Sequence[float]) -> list[float]:
    ends = [number("a bucket's end", end) for end in items("buckets", buckets)]
    if not ends or ends != sorted(set(ends)):
        raise ValueError(f"Expected buckets in ascending order, each once, got {buckets!r}.")
    return ends


def score_buckets(detector: Detector) -> list[float]:
    """Upper ends of buckets for a detector's scores: quantiles of its calibration scores, and more.

    Raises:
        RuntimeError: The detector is not fitted.
    """
    scores = detector.fitted.calibration.scores
    finite = np.asarray(scores)[np.isfinite(scores)]
    inner = np.quantile(finite, [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0])
    width = max(float(inner[-1] - inner[3]), np.finfo(float).tiny)
    outer = [float(inner[-1]) + width * factor for factor in (1, 3, 10, 100)]
    return sorted({*map(float, inner), *outer})


_known: weakref.WeakKeyDictionary[CollectorRegistry, Any] = weakref.WeakKeyDictionary()
_lock = Lock()


@dataclass(frozen=True)
class _Meters:
    """The meters of one registry."""

    score: Histogram
    p_value: Histogram
    samples: Counter
    status: Gauge
    alerts: Counter
    seconds: Histogram
    errors: Counter
    dropped: Counter

    def begin(self, labels: tuple[str, str]) -> None:
        """Show the counters of what may never come: Prometheus sees no rise from nothing."""
        self.dropped.labels(*labels)
        for kind in get_args(AlertKind):
            self.alerts.labels(*labels, kind)

    @classmethod
    def of(cls, registry: CollectorRegistry, buckets: Sequence[float]) -> Self:
        """Those that the registry has, or new ones."""
        with _lock:
            if registry not in _known:
                _known[registry] = cls._made(registry, buckets)
            found: Self = _known[registry]
            return found

    @classmethod
    def _made(cls, registry: CollectorRegistry, buckets: Sequence[float]) -> Self:
        made: dict[str, Any] = {}

        def add(name: str, kind: Any, text: str, *labels: str, **options: Any) -> None:
            made[name] = kind(_name(name), text, (*_LABELS, *labels), registry=registry, **options)

        try:
            add("score", Histogram, "Anomaly score; higher is more anomalous.", buckets=buckets)
            add("p_value", Histogram, "Conformal p-value.", buckets=_P_VALUES)
            add("samples", Counter, "Samples seen.", "verdict")
            text = "Of the stream: 0 OK, 1 WARN, 2 ALERT."
            add("status", Gauge, text, multiprocess_mode="livemax")
            add("alerts", Counter, "Alerts raised.", "kind")
            add("seconds", Histogram, "Of a call's scoring.", buckets=_SECONDS)
            add("errors", Counter, "Calls that could not be scored.")
            add("dropped", Counter, "Samples that were not scored.")
        except ValueError as error:
            for collector in made.values():
                registry.unregister(collector)
            raise ValueError(
                f"Expected a registry without other meters named ood_monitor_*, got: {error}."
            ) from error
        return cls(**{field.name: made[field.name] for field in fields(cls)})


def _name(name: str) -> str:
    return f"ood_monitor_{'scoring_seconds' if name == 'seconds' else name}"
