"""The monitor: a detector on a stream. It decides, remembers, and tells the sinks."""

import copy
import logging
import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np
import torch

from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.alerts import (
    Alert,
    AlertEvidence,
    AlertKind,
    Dispatcher,
    LayerShare,
    Severity,
    Sink,
    Status,
    Summary,
)
from ood_monitor.calibration import (
    autocorrelation_bound,
    binomial_interval,
    lag1_autocorrelation,
)
from ood_monitor.densities import Array
from ood_monitor.detector import Detector
from ood_monitor.drift import EDetector, Evidence
from ood_monitor.gradients.norms import finite_samples
from ood_monitor.scores import Scores

__all__ = ["Monitor"]

_log = logging.getLogger(__name__)

#: Version of :meth:`Monitor.state_dict`.
_STATE_FORMAT = 1

#: Scores of the episode that the running figures cover, and samples that the layers' means do.
_RECENT_SCORES, _RECENT_LAYERS = 1000, 50

#: Scores that neighbours are compared in, and how sure a warning of them is: it is looked at often.
_SCORES_TO_CORRELATE, _CONFIDENCE = 200, 1 - 1e-6

#: What an infinite part of a score counts as, so that means and shares of layers stay finite.
_LARGEST_PART = 1e100


@dataclass
class _Episode:
    """Running figures since the last (re)start of the drift test."""

    seen: int = 0
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_SCORES))
    flags: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT_SCORES))
    layers: Array = field(default_factory=lambda: np.zeros((2, 0)))  # means of z and of parts

    def add(self, score: float, flagged: bool, layers: Array) -> None:
        self.seen += 1
        self.scores.append(score)
        self.flags.append(flagged)
        before = self.layers if self.layers.size else np.zeros_like(layers)
        self.layers = before + (layers - before) / min(self.seen, _RECENT_LAYERS)


@dataclass
class _State:
    """All that a monitor remembers, but for the drift test."""

    episode: _Episode = field(default_factory=_Episode)
    status: Status = "OK"
    samples_seen: int = 0
    invalid: int = 0
    log_e_value: float = -math.inf
    quiet: int = 0  # samples since the last alarm or flag
    valid_run: int | None = None  # samples since the last invalid one; None before the first


class Monitor:
    """Watches a stream of samples and raises alerts.

    A *sample* alert says that a p-value is at most ``fpr``: a share ``fpr`` of in-distribution
    samples is flagged. A *drift* alert says that the stream as a whole has left the calibration
    data: while it has not, one comes at most every ``ert`` samples on average. Alerts are
    transitions: none of a sample while a drift alert stands; after ``recovery`` samples without an
    alarm a *recovered* alert ends it. How a stream is cut into batches changes nothing, except that
    the sample alerts of an update become one at its end, of its most anomalous sample, and none if
    a drift alert follows in it. The condition of both promises: samples are exchangeable with the
    calibration data while nothing is wrong.

    Args:
        detector: Fitted.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        sinks: Told of every alert from a thread of the monitor's own; never waited for.
        name: The stream's name in alerts.
        recovery: Samples without an alarm after which the stream counts as recovered.
        summary_every: Samples between running figures for sinks that show them.
        thin: Every how many samples one goes into the drift test, for streams whose neighbours are
            alike; ``ert`` then counts these. A stream in control that shows such neighbours is
            warned of in the log, once.
        seed: Of the drift test's tie-breakers.

    Raises:
        RuntimeError: The detector is not fitted.
        ValueError: ``fpr`` or ``ert`` is out of range, or too small for the calibration data.

    Example:
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
        >>> images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> detector = om.Detector(om.LogLikelihood(flow)).fit([images[:200]], progress=False)
        >>> with om.Monitor(detector, ert=1_000, fpr=0.02) as monitor:
        ...     before = monitor.update(images[200:250])
        ...     after = monitor.update(images[250:] / 2)
        >>> [alert.kind for alert in before], [alert.kind for alert in after]
        (['sample'], ['drift'])
    """

    def __init__(
        self,
        detector: Detector,
        *,
        ert: float = 10_000,
        fpr: float = 0.01,
        sinks: Iterable[Sink] = (),
        name: str = "stream",
        recovery: int = 500,
        summary_every: int = 100,
        thin: int = 1,
        seed: int = 0,
    ) -> None:
        fitted = detector.fitted
        (fitted.grouped or fitted.calibration).check_fpr(fpr)
        if min(recovery, summary_every, thin) < 1:
            raise ValueError(
                "Expected recovery, summary_every and thin of at least 1, got "
                f"{recovery}, {summary_every} and {thin}."
            )
        # A copy, so that the baseline stays what it is if the detector is fitted again.
        self.detector = copy.copy(detector)
        self.fpr, self.ert, self.name = fpr, float(ert), name
        self._recovery, self._summary_every, self._thin = recovery, summary_every, thin
        self._warned = False
        self._drift = EDetector(fitted.calibration.scores, ert=ert, seed=seed)
        self._state = _State()
        self._dispatcher = Dispatcher(sinks)
        self._lock = threading.RLock()
        self._fingerprint, self._layers = fitted.fingerprint, fitted.layers
        self.last: Scores | None = None

    @property
    def status(self) -> Status:
        """OK, WARN (a sample was flagged lately) or ALERT (the stream has drifted)."""
        return self._state.status

    @property
    def samples_seen(self) -> int:
        """Samples so far, the invalid ones included."""
        return self._state.samples_seen

    @property
    def invalid(self) -> int:
        """Samples so far that could not be scored."""
        return self._state.invalid

    @property
    def log_e_value(self) -> float:
        """Natural logarithm of the drift test's e-value; an alarm is raised at log(ert)."""
        return self._state.log_e_value

    def update(self, batch: Batch) -> list[Alert]:
        """Score B samples, in the order in which they came, and decide.

        A sample with a value that is not finite is counted, gets score and p-value nan in
        :attr:`last`, and changes nothing for the others or for the drift test.

        Args:
            batch: As the detector's held-out batches were.

        Returns:
            The alerts raised, which the sinks get too.

        Raises:
            ValueError: An empty batch, or one of other shapes or types than the held-out data; the
                monitor is then unchanged.
        """
        return self.observe(self.score(batch))

    def score(self, batch: Batch) -> Scores:
        """What :meth:`update` would take in of B samples, without taking it in.

        Returns:
            As :meth:`~ood_monitor.Detector.score`, with nan for a sample that is not finite.

        Raises:
            ValueError: As :meth:`update`.
        """
        self.detector.check(batch)
        finite = finite_samples(batch)
        if finite.all():
            return self.detector.score(batch)
        if not finite.any():
            return Scores.none().among(len(finite), [])
        kept = map_tensors(lambda t: t[finite.to(t.device)], batch)
        return self.detector.score(kept).among(len(finite), finite)

    def observe(self, scores: Scores) -> list[Alert]:
        """:meth:`update`, of samples that :meth:`score` has seen, maybe in another process.

        Returns:
            The alerts raised, which the sinks get too.
        """
        with self._lock:
            self.last = scores
            alerts = self._advance(scores)
        for alert in alerts:
            self._dispatcher.send(alert)
        return alerts

    def state_dict(self) -> dict[str, Any]:
        """All that the monitor remembers, as primitives that JSON can hold."""
        with self._lock:
            state, episode = self._state, self._state.episode
            return {
                "format": _STATE_FORMAT,
                "drift": self._drift.state_dict(),
                "status": state.status,
                "samples_seen": state.samples_seen,
                "invalid": state.invalid,
                "log_e_value": state.log_e_value if math.isfinite(state.log_e_value) else None,
                "quiet": state.quiet,
                "valid_run": state.valid_run,
                "seen": episode.seen,
                "scores": [s if math.isfinite(s) else str(s) for s in episode.scores],
                "flags": list(episode.flags),
                "layers": episode.layers.tolist(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume, to the bit, where :meth:`state_dict` was called.

        Raises:
            ValueError: A state of another format, detector or ``ert``; nothing is changed.
        """
        found = state.get("format") if isinstance(state, Mapping) else None
        if found != _STATE_FORMAT:
            raise ValueError(f"Expected a state of format {_STATE_FORMAT}, got {found!r}.")
        try:
            restored = _restored(state, len(self._layers))
            drift = dict(state["drift"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the state of a monitor, got {error!r}.") from error
        with self._lock:
            self._drift.load_state_dict(drift)
            self._state = restored

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until the sinks have all that was sent; False if the time is up first."""
        return self._dispatcher.flush(timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what is left within ``timeout`` seconds, and close the sinks."""
        self._dispatcher.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _advance(self, scores: Scores) -> list[Alert]:
        alerts: list[Alert] = []
        flagged: list[_Row] = []
        for row in _rows(scores, self._layers):
            self._state.samples_seen += 1
            alerts += self._take(row) if row.valid else self._count_invalid()
            if self._state.status == "ALERT":
                flagged.clear()  # the drift alert speaks for them
            elif row.valid and row.p_value <= self.fpr:
                self._state.status, self._state.quiet = "WARN", 0
                flagged.append(row)
            self._maybe_summarise()
        return [*alerts, self._sample_alert(flagged)] if flagged else alerts

    def _take(self, row: "_Row") -> list[Alert]:
        """One valid sample: the drift test, the figures, and what follows from them."""
        state = self._state
        state.episode.add(row.score, row.p_value <= self.fpr, row.layers)
        state.quiet += 1
        state.valid_run = None if state.valid_run is None else state.valid_run + 1
        if (state.samples_seen - state.invalid - 1) % self._thin == 0:
            evidence = self._drift.update(row.score)
            state.log_e_value = evidence.log_e_value
            if evidence.alarm:
                return self._alarm(evidence)
        if state.status != "OK" and state.quiet >= self._recovery:
            return self._recover()
        return []

    def _alarm(self, evidence: Evidence) -> list[Alert]:
        state, stands = self._state, self._state.status == "ALERT"
        message = (
            f"Drift: evidence e^{evidence.log_e_value:.1f} against the calibration data reached "
            f"the promised run time {self.ert:,.0f} after {evidence.n:,} samples."
        )
        alert = self._alert("drift", "critical", message, _top(self._layers, state.episode.layers))
        state.status, state.quiet = "ALERT", 0
        # The history now holds samples from after the change; see EDetector.restart.
        self._drift.restart()
        state.episode, state.log_e_value = _Episode(), -math.inf
        return [] if stands else [alert]

    def _recover(self) -> list[Alert]:
        was, self._state.status = self._state.status, "OK"
        if was != "ALERT":
            return []
        message = f"Recovered: {self._recovery:,} samples without a new alarm."
        return [self._alert("recovered", "info", message, ())]

    def _sample_alert(self, flagged: Sequence["_Row"]) -> Alert:
        row = min(flagged, key=lambda row: row.p_value)
        message = f"Anomalous sample: p-value {row.p_value:.3g}, at most fpr {self.fpr:g}."
        top = _top(self._layers, row.layers)
        alert = self._alert("sample", "warning", message, top)
        return replace(alert, evidence=replace(alert.evidence, p_value=row.p_value))

    def _count_invalid(self) -> list[Alert]:
        state = self._state
        is_news = state.valid_run is None or state.valid_run >= self._recovery
        state.invalid, state.valid_run = state.invalid + 1, 0
        message = f"Invalid input: sample {state.samples_seen:,} could not be scored."
        return [self._alert("invalid_input", "warning", message, ())] if is_news else []

    def _alert(
        self, kind: AlertKind, severity: Severity, message: str, top: Sequence[LayerShare]
    ) -> Alert:
        return Alert(
            kind=kind,
            severity=severity,
            stream=self.name,
            samples_seen=self._state.samples_seen,
            message=message,
            evidence=self._evidence(),
            top_layers=tuple(top),
            detector=self._fingerprint,
            model=self.detector.fitted.model,
        )

    def _evidence(self) -> AlertEvidence:
        state, episode = self._state, self._state.episode
        window, flagged = len(episode.scores), sum(episode.flags)
        low, high = binomial_interval(flagged, window) if window else (math.nan, math.nan)
        mean, p95 = _mean_and_p95(episode.scores) if window else (None, None)
        return AlertEvidence(
            log_e_value=state.log_e_value,
            ert=self.ert,
            fpr=self.fpr,
            flagged=flagged,
            window=window,
            flagged_rate=flagged / window if window else None,
            flagged_rate_low=low,
            flagged_rate_high=high,
            score_mean=mean,
            score_p95=p95,
        )

    def _maybe_summarise(self) -> None:
        if self._state.samples_seen % self._summary_every:
            return
        self._maybe_warn_of_neighbours()
        evidence = self._evidence()
        self._dispatcher.summarise(
            Summary(
                stream=self.name,
                samples_seen=self._state.samples_seen,
                status=self._state.status,
                score_mean=evidence.score_mean,
                score_p95=evidence.score_p95,
                flagged_rate=evidence.flagged_rate,
                log_e_value=evidence.log_e_value,
                invalid={"not scored": self._state.invalid},
            )
        )

    def _maybe_warn_of_neighbours(self) -> None:
        # A drift, too, makes neighbours alike: only a stream in control tells.
        tested = list(self._state.episode.scores)[:: self._thin]
        if self._warned or self._state.status == "ALERT" or len(tested) < _SCORES_TO_CORRELATE:
            return
        finite = np.clip(tested, -_LARGEST_PART, _LARGEST_PART)
        found, bound = lag1_autocorrelation(finite), autocorrelation_bound(len(tested), _CONFIDENCE)
        if found > bound:
            self._warned = True
            _log.warning(
                "Neighbouring scores of stream %r are correlated (%.2f, expected at most %.2f): "
                "drift alarms come more often than promised. Pass `thin=`, or one sample of each "
                "independent unit (a request, a user).",
                self.name,
                found,
                bound,
            )


@dataclass(frozen=True)
class _Row:
    """One sample's part of :class:`Scores`; ``layers`` is z and parts of the score, (2, L)."""

    score: float
    p_value: float
    valid: bool
    layers: Array


def _mean_and_p95(scores: Sequence[float]) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):  # infinite scores make them infinite, or nan
        return float(np.mean(scores)), float(np.quantile(scores, 0.95))


def _rows(scores: Scores, names: Sequence[str]) -> list[_Row]:
    nothing = torch.full_like(scores.score, math.nan)
    z = torch.stack([scores.z.get(name, nothing) for name in names], 1)
    parts = torch.stack([scores.layers.get(name, nothing) for name in names], 1)
    parts = parts.clamp(-_LARGEST_PART, _LARGEST_PART)
    layers = torch.stack([z, parts], 1).numpy()
    numbers = zip(
        scores.score.tolist(), scores.p_value.tolist(), scores.valid.tolist(), strict=True
    )
    return [_Row(*sample, layers[i]) for i, sample in enumerate(numbers)]


def _top(names: Sequence[str], layers: Array, count: int = 10) -> list[LayerShare]:
    """The layers furthest from what is usual, with their share of a positive score."""
    z, parts = layers
    # Under a full covariance a layer's part may be negative: it speaks for the sample.
    against = np.maximum(parts, 0)
    total = against.sum()
    share = against / total if total > 0 else np.full_like(parts, math.nan)
    order = np.argsort(-np.abs(z), kind="stable")[:count]
    return [LayerShare(names[i], float(share[i]), float(z[i])) for i in order]


def _restored(state: Mapping[str, Any], layers: int) -> _State:
    log_e_value = -math.inf if state["log_e_value"] is None else float(state["log_e_value"])
    valid_run = None if state["valid_run"] is None else int(state["valid_run"])
    counts = [int(state[name]) for name in ("seen", "samples_seen", "invalid", "quiet")]
    episode = _Episode(counts[0])
    episode.scores.extend(map(float, state["scores"]))
    episode.flags.extend(map(bool, state["flags"]))
    episode.layers = np.asarray(state["layers"], dtype=np.float64).reshape(2, -1)
    sound = (
        state["status"] in get_args(Status)
        and min(counts) >= 0
        and not math.isnan(log_e_value)
        and not np.isnan(episode.scores).any()
        and len(episode.flags) == len(episode.scores) == min(counts[0], _RECENT_SCORES)
        and episode.layers.shape[1] == (layers if counts[0] else 0)
    )
    if not sound:
        raise ValueError("a state that no monitor of this detector has")
    return _State(
        episode=episode,
        status=state["status"],
        samples_seen=counts[1],
        invalid=counts[2],
        log_e_value=log_e_value,
        quiet=counts[3],
        valid_run=valid_run,
    )
