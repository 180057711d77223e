"""The monitor: a detector on a stream. It decides, remembers, and tells the sinks."""

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, Self

import numpy as np

from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.alerts.alert import (
    Alert,
    AlertEvidence,
    AlertKind,
    FlaggedSample,
    Reading,
    Sink,
    Status,
    Summary,
    severity_of,
)
from ood_monitor.alerts.dispatcher import Dispatcher
from ood_monitor.calibration.scores import Scores
from ood_monitor.detector.detector import Detector
from ood_monitor.drift.e_detector import EDetector, Evidence
from ood_monitor.gradients.norms import finite_samples
from ood_monitor.monitor.autocorrelation import Autocorrelation
from ood_monitor.monitor.memory import (
    Episode,
    Memory,
    Row,
    rows_of,
    top_layers,
    top_terms,
)
from ood_monitor.monitor.staleness import Weights
from ood_monitor.processes import Lock
from ood_monitor.saving.fingerprints import hashes_where

__all__ = ["Monitor"]

#: Version of :meth:`Monitor.state_dict`; 1 knew no flagged samples, cool-down or stale weights.
_STATE_FORMAT = 2


class Monitor:
    """Watches a stream of samples and raises alerts.

    A *sample* alert says that a p-value is at most ``fpr``: a share ``fpr`` of in-distribution
    samples is flagged. A *drift* alert says that the stream as a whole has left the calibration
    data: while it has not, one comes at most every ``ert`` samples on average. Alerts are
    transitions: none of a sample while a drift alert stands, nor within ``cooldown`` samples of the
    one before, which then names what was flagged meanwhile; after ``recovery`` samples without an
    alarm a *recovered* alert ends a drift. How a stream is cut into batches changes nothing, except
    that the sample alerts of an update become one at its end, of its most anomalous sample, and
    none if a drift alert follows in it. The condition of both promises: samples are exchangeable
    with the calibration data while nothing is wrong, and the model has the weights that the
    detector was fitted on; a *stale_calibration* alert says that it has not, and a *recovered* one
    that it has again.

    Args:
        detector: Fitted.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        sinks: Told of every alert from a thread of the monitor's own; never waited for.
        name: The stream's name in alerts.
        recovery: Samples without an alarm after which the stream counts as recovered.
        cooldown: Samples after a sample alert without another.
        summary_every: Samples between running figures for sinks that show them.
        thin: Every how many samples one goes into the drift test, for streams whose neighbours are
            alike; ``ert`` then counts these. A stream in control that shows such neighbours is
            warned of in the log, once.
        seed: Of the drift test's tie-breakers.
        identify: ``"hash"`` names each flagged sample of :meth:`update` by its SHA-256, unless it
            is given an id.
        weights_every: The weights are compared with the detector's before the first sample, which
            takes about a second per gigabyte, and then every so many samples, which takes as long
            if they were written to and no time otherwise; 0 for never.
        spool: A folder of this monitor's own, where alerts are kept until every sink has them, also
            through a crash; see :class:`~ood_monitor.alerts.Dispatcher`.

    Attributes:
        last: Scores of the latest samples taken in; None before the first.

    Raises:
        RuntimeError: The detector is not fitted.
        ValueError: ``fpr`` or ``ert`` is out of range, or too small for the calibration data.
        OSError: The spool cannot be used, or another process has it.

    Example:
        >>> import torch
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
        cooldown: int = 100,
        summary_every: int = 100,
        thin: int = 1,
        seed: int = 0,
        identify: Literal["hash"] | None = None,
        weights_every: int = 1000,
        spool: str | PathLike[str] | None = None,
    ) -> None:
        fitted = detector.fitted
        (fitted.grouped or fitted.calibration).check_fpr(fpr)
        if min(recovery, summary_every, thin) < 1:
            raise ValueError(
                "Expected recovery, summary_every and thin of at least 1, got "
                f"{recovery}, {summary_every} and {thin}."
            )
        if min(cooldown, weights_every) < 0 or identify not in (None, "hash"):
            raise ValueError(
                "Expected cooldown and weights_every of at least 0 and identify None or 'hash', "
                f"got {cooldown}, {weights_every} and {identify!r}."
            )
        # A copy, so that the baseline stays what it is if the detector is fitted again.
        self.detector = copy.copy(detector)
        self.fpr, self.ert, self.name = fpr, float(ert), name
        self._recovery, self._summary_every, self._thin = recovery, summary_every, thin
        self._cooldown, self._identify = cooldown, identify
        self._autocorrelation = Autocorrelation(name, thin)
        self._drift = EDetector(fitted.calibration.scores, ert=ert, seed=seed)
        self._state = Memory()
        self._lock = Lock()
        self._fingerprint, self._layers = fitted.fingerprint, fitted.layers
        self._weights = Weights(detector.adapter.module, fitted.model)
        self._weights_every, self._next_look = weights_every, 0
        if weights_every:
            self._weights.are_stale()  # the costly look, before the stream waits for it
        self._dispatcher = Dispatcher(sinks, spool=spool)
        self.last: Scores | None = None

    @property
    def status(self) -> Status:
        """OK, WARN (a sample was flagged lately, or stale weights) or ALERT (a drift)."""
        status = self._state.status
        return "WARN" if status == "OK" and self._state.stale else status

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

    @property
    def dispatcher(self) -> Dispatcher:
        """What delivers the alerts; it counts what it could not."""
        return self._dispatcher

    def update(self, batch: Batch, ids: Sequence[Any] | None = None) -> list[Alert]:
        """Score B samples, in the order in which they came, and decide.

        A sample with a value that is not finite is counted, gets score and p-value nan in
        :attr:`last`, and changes nothing for the others or for the drift test.

        Args:
            batch: As the detector's held-out batches were.
            ids: What B samples are called in alerts, as text; None for one that has no name.

        Returns:
            The alerts raised, which the sinks get too.

        Raises:
            ValueError: An empty batch, one of other shapes or types than the held-out data, or ids
                of another number; the monitor is then unchanged.
        """
        scores = self.score(batch)
        return self.observe(scores, self.identify(batch, scores) if ids is None else ids)

    def score(self, batch: Batch) -> Scores:
        """What :meth:`update` would take in of B samples, without taking it in.

        Returns:
            As :meth:`~ood_monitor.Detector.score`, with nan for a sample that is not finite.

        Raises:
            ValueError: As :meth:`update`.
        """
        start = time.perf_counter()
        try:
            scores = self._scored(batch)
        except Exception:  # of any kind: it is counted, and raised on
            self._measure(failed=1)
            raise
        self._measure(seconds=time.perf_counter() - start)
        return scores

    def _scored(self, batch: Batch) -> Scores:
        self.detector.check(batch)
        finite = finite_samples(batch)
        if finite.all():
            return self.detector.score(batch)
        if not finite.any():
            return Scores.none().among(len(finite), [])
        kept = map_tensors(lambda t: t[finite.to(t.device)], batch)
        return self.detector.score(kept).among(len(finite), finite)

    def observe(self, scores: Scores, ids: Sequence[Any] | None = None) -> list[Alert]:
        """:meth:`update`, of samples that :meth:`score` has seen, maybe in another process.

        Returns:
            The alerts raised, which the sinks get too.

        Raises:
            ValueError: Ids of another number than the samples; the monitor is then unchanged.
        """
        if ids is not None and len(ids) != len(scores.score):
            raise ValueError(
                f"Expected an id for each of {len(scores.score)} samples, got {len(ids)}."
            )
        with self._lock:
            self.last = scores
            alerts = self._advance(scores, ids)
        for alert in alerts:
            self._dispatcher.send(alert)
        self._measure(scores)
        return alerts

    def identify(self, batch: Batch, scores: Scores) -> list[str | None] | None:
        """Hashes of those of B samples that an alert could name, if the monitor was asked to."""
        return hashes_where(scores.p_value <= self.fpr, batch) if self._identify else None

    def state_dict(self) -> dict[str, Any]:
        """All that the monitor remembers, as primitives that JSON can hold."""
        with self._lock:
            drift = {"format": _STATE_FORMAT, "drift": self._drift.state_dict()}
            return drift | self._state.dump()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume, to the bit, where :meth:`state_dict` was called.

        Raises:
            ValueError: A state of another format, detector or ``ert``; nothing is changed.
        """
        found = state.get("format") if isinstance(state, Mapping) else None
        if found != _STATE_FORMAT:
            raise ValueError(f"Expected a state of format {_STATE_FORMAT}, got {found!r}.")
        try:
            restored = Memory.parse(state, len(self._layers))
            drift = dict(state["drift"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the state of a monitor, got {error!r}.") from error
        with self._lock:
            self._drift.load_state_dict(drift)
            self._state, self._next_look = restored, 0

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until the sinks have all that was sent; False if the time is up first."""
        return self._dispatcher.flush(timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what is left within ``timeout`` seconds, and close the sinks."""
        self._dispatcher.close(timeout)

    def __reduce__(self) -> Any:
        """Refuse to be pickled, as processes that are spawned would.

        Raises:
            TypeError: Always: its sinks, its place in the stream and its spool are one process's.
        """
        raise TypeError(
            f"Expected the monitor {self.name!r} to stay in its process, got it to pickle: save "
            "the detector, and make a monitor of it in each process."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _advance(self, scores: Scores, ids: Sequence[Any] | None) -> list[Alert]:
        alerts, flagged, is_due = self._look_at_weights(), list[Row](), False
        state = self._state
        for row in rows_of(scores, self._layers, ids):
            state.samples_seen += 1
            state.since_told = None if state.since_told is None else state.since_told + 1
            sample = self._flagged(row)
            alerts += self._take(row, sample) if row.valid else self._count_invalid()
            if state.status == "ALERT":
                is_due = False  # the drift alert speaks for them
                flagged.clear()
                state.untold.clear()
            elif sample is not None:
                flagged.append(row)
                is_due = self._warn_of(sample) or is_due
            self._maybe_summarise()
        return [*alerts, self._sample_alert(flagged)] if is_due else alerts

    def _look_at_weights(self) -> list[Alert]:
        state = self._state
        if not self._weights_every or 0 < state.samples_seen < self._next_look:
            return []
        self._next_look = state.samples_seen + self._weights_every
        before, state.stale = state.stale, self._weights.are_stale()
        if before == state.stale:
            return []
        if state.stale:
            message = "Stale calibration: the model has not the weights that the detector knows."
            return [self._alert("stale_calibration", message)]
        return [self._alert("recovered", "Recovered: the model has the detector's weights again.")]

    def _flagged(self, row: Row) -> FlaggedSample | None:
        if not row.valid or row.p_value > self.fpr:
            return None
        return FlaggedSample(self._state.samples_seen, row.p_value, row.id)

    def _warn_of(self, sample: FlaggedSample) -> bool:
        """Whether an alert of it is due."""
        state = self._state
        state.status, state.quiet = "WARN", 0
        state.untold.append(sample)
        if state.since_told is not None and state.since_told < self._cooldown:
            return False
        state.since_told = 0
        return True

    def _take(self, row: Row, sample: FlaggedSample | None) -> list[Alert]:
        """One valid sample: the drift test, the figures, and what follows from them."""
        state = self._state
        state.episode.add(row, sample)
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
        layers, samples = state.episode.layers, state.episode.flagged
        state.status, state.quiet = "ALERT", 0
        alert = self._alert("drift", message, layers, samples)
        # The history now holds samples from after the change; see EDetector.restart.
        self._drift.restart()
        state.episode, state.log_e_value = Episode(), -math.inf
        return [] if stands else [alert]

    def _recover(self) -> list[Alert]:
        was, self._state.status = self._state.status, "OK"
        if was != "ALERT":
            return []
        message = f"Recovered: {self._recovery:,} samples without a new alarm."
        return [self._alert("recovered", message)]

    def _sample_alert(self, flagged: Sequence[Row]) -> Alert:
        row, untold = min(flagged, key=lambda row: row.p_value), self._state.untold
        message = f"Anomalous sample: p-value {row.p_value:.3g}, at most fpr {self.fpr:g}."
        if len(untold) > 1:
            message += f" {len(untold)} flagged since the last alert."
        alert = self._alert("sample", message, row.layers, untold)
        untold.clear()
        return replace(alert, evidence=replace(alert.evidence, p_value=row.p_value))

    def _count_invalid(self) -> list[Alert]:
        state = self._state
        is_news = state.valid_run is None or state.valid_run >= self._recovery
        state.invalid, state.valid_run = state.invalid + 1, 0
        message = f"Invalid input: sample {state.samples_seen:,} could not be scored."
        return [self._alert("invalid_input", message)] if is_news else []

    def _alert(
        self,
        kind: AlertKind,
        message: str,
        layers: np.ndarray | None = None,
        samples: Iterable[FlaggedSample] = (),
    ) -> Alert:
        evidence = self._evidence()
        return Alert(
            kind=kind,
            severity=severity_of(kind, evidence),
            stream=self.name,
            samples_seen=self._state.samples_seen,
            message=message,
            evidence=evidence,
            top_layers=() if layers is None else top_layers(self._layers, layers),
            top_terms=() if layers is None else top_terms(self._layers, layers),
            samples=tuple(samples),
            detector=self._fingerprint,
            model=self.detector.fitted.model,
            method=self.detector.fitted.method,
            status=self.status,
        )

    def _evidence(self) -> AlertEvidence:
        state = self._state
        return state.episode.evidence(log_e_value=state.log_e_value, ert=self.ert, fpr=self.fpr)

    def _measure(self, scores: Scores | None = None, **measured: Any) -> None:
        if not self._dispatcher.has_meters:
            return
        names = {"detector": self._fingerprint, "model": self.detector.fitted.model}
        if scores is not None:
            valid = scores.valid
            measured["scores"] = scores.score[valid].tolist()
            measured["p_values"] = scores.p_value[valid].tolist()
            measured["flagged"] = int((scores.p_value[valid] <= self.fpr).sum())
            measured["invalid"] = int((~valid).sum())
        self._dispatcher.measure(Reading(stream=self.name, **(names | measured)))

    def _maybe_summarise(self) -> None:
        if self._state.samples_seen % self._summary_every:
            return
        if self._state.status != "ALERT":  # a drift, too, makes neighbours alike
            self._autocorrelation.look(self._state.episode.scores)
        evidence = self._evidence()
        self._dispatcher.summarise(
            Summary(
                stream=self.name,
                samples_seen=self._state.samples_seen,
                status=self.status,
                score_mean=evidence.score_mean,
                score_p95=evidence.score_p95,
                flagged_rate=evidence.flagged_rate,
                log_e_value=evidence.log_e_value,
                invalid={"not scored": self._state.invalid},
            )
        )
