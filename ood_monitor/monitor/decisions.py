"""What a monitor decides: from the scores of a stream, one by one, to alerts.

Nothing here scores, waits or delivers. A step is taken on a copy, which then replaces what was
there: whatever interrupts it, samples are either taken in, with their alerts owed, or not at all.
"""

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

from ood_monitor.alerts.alert import (
    Alert,
    AlertEvidence,
    AlertKind,
    FlaggedSample,
    severity_of,
)
from ood_monitor.alerts.figures import Summary
from ood_monitor.densities import Array
from ood_monitor.drift.change import KEPT, Since
from ood_monitor.drift.evidence import Evidence
from ood_monitor.drift.stream import StreamTest
from ood_monitor.monitor.autocorrelation import OFTEN, ONCE, Neighbours, neighbours_of
from ood_monitor.monitor.explanations import Found
from ood_monitor.monitor.memory import Episode, Memory, Row, top_layers, top_terms
from ood_monitor.monitor.rules import Rules
from ood_monitor.saving.fitted import Fitted

__all__ = ["Decisions"]

#: Version of what :meth:`Decisions.dump` gives; 3 had no numbers, and other means of layers.
_STATE_FORMAT = 4

#: Of the latest hundred samples, as many that cannot be scored are an incident.
_MANY_INVALID = 10

#: Latest tested samples that are looked at for neighbours, and traced.
_RANKS = 1000

#: A drift counts as over after so many times the samples that its evidence took to gather.
_TIMES = 4


@dataclass
class Decisions:
    """Where a stream stands, and what follows from its next samples.

    Attributes:
        rules: How it is decided.
        fitted: What scores are judged by.
        test: For a drift.
        seen_at: When the latest samples came, of a clock that never steps back, in seconds.
        memory: All else that is remembered.
        neighbours: How much neighbouring samples were alike when they first surely were.
        next_look: Samples from which on the weights are looked at again.
    """

    rules: Rules
    fitted: Fitted
    test: StreamTest
    seen_at: float
    memory: Memory
    neighbours: Neighbours | None = None
    next_look: int = 0

    @classmethod
    def of(cls, rules: Rules, fitted: Fitted, *, seed: int) -> Self:
        """Of a stream that begins, judged by what a detector has learned."""
        test = _stream_test(fitted, ert=rules.ert, seed=seed)
        # Above all that a monitor of the same stream has said before, which nobody remembers.
        memory = Memory(said=time.time_ns() // 1000)
        return cls(rules, fitted, test, time.monotonic(), memory)

    def copy(self) -> Self:
        """Decisions that go on from here, and change nothing of these."""
        found = copy.copy(self)
        found.test, found.memory = self.test.copy(), self.memory.copy()
        return found

    def dump(self) -> dict[str, Any]:
        """All that is remembered, as primitives that JSON can hold."""
        state = {"format": _STATE_FORMAT, "model": self.fitted.model}
        return state | {"drift": self.test.state_dict()} | self.memory.dump()

    def resumed(self, state: Mapping[str, Any], *, with_test: bool = True) -> Self:
        """Decisions that go on where :meth:`dump` was called.

        Args:
            state: What it gave.
            with_test: Whether the drift test goes on too, which has the same calibration then.

        Raises:
            ValueError: Something else, or of another format, weights, calibration or ``ert``.
        """
        found = state.get("format") if isinstance(state, Mapping) else None
        if found != _STATE_FORMAT:
            raise ValueError(f"Expected a state of format {_STATE_FORMAT}, got {found!r}.")
        if state.get("model") != self.fitted.model:
            raise ValueError(
                f"Expected the state of a monitor of the weights {self.fitted.model}, got one of "
                f"{state.get('model')!r}: load it with the detector that it was saved with."
            )
        resumed = replace(self.copy(), next_look=0)
        try:
            resumed.memory = Memory.parse(state, len(self.fitted.layers))
            drift = dict(state["drift"])
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"Expected the state of a monitor, got {error!r}.") from error
        resumed.memory.said = max(resumed.memory.said, self.memory.said)
        if with_test:
            resumed.test.load_state_dict(drift)
            if len(resumed.memory.episode.tested) < min(resumed.test.n, KEPT):
                raise ValueError("Expected the state of a monitor, got fewer samples than tested.")
        return resumed

    def take(self, rows: Iterable[Row], *, stale: bool | None) -> list[Summary]:
        """Take in samples in their order; what they raise is owed in the memory.

        Args:
            rows: The samples.
            stale: Whether the model has other weights than the detector; None if nobody looked.

        Returns:
            The running figures that are due: now and then, and with each change of the status.
        """
        memory, flagged, is_due = self.memory, list[Row](), False
        summaries, status = list[Summary](), memory.overall
        self._count_time()
        self._look_at_weights(stale)
        for row in rows:
            memory.samples_seen += 1
            memory.since_told = None if memory.since_told is None else memory.since_told + 1
            sample = self._flagged(row)
            self._take_valid(row, sample) if row.valid else self._take_invalid(row)
            if memory.status == "ALERT":
                is_due = False  # the drift alert speaks for them
                flagged.clear()
                memory.untold.clear()
            elif sample is not None:
                memory.disturb("WARN")
                if not memory.muted:
                    flagged.append(row)
                    is_due = self._is_due(sample) or is_due
            self._count_muted()
            is_time = memory.samples_seen % self.rules.summary_every == 0
            if is_time or memory.overall != status:
                summaries.append(self.summary())
                status = memory.overall
            if is_time:
                self._look_at_neighbours()
        if is_due:
            self._owe(self._sample_alert(flagged))
        return summaries

    def accept(self, reason: str) -> Summary:
        """Begin a new episode: what the stream is now is what it should be."""
        memory = self.memory
        self._begin_anew()
        memory.log_e_value = -math.inf  # what was found is no evidence any more
        memory.disturb("OK")
        memory.needed, memory.blind, memory.since_told, memory.valid_run = 0, False, None, None
        memory.validity.clear()
        memory.untold.clear()
        memory.held.clear()
        self._owe(self._alert("accepted", f"Accepted: {reason}"))  # muted or not
        return self.summary()

    def mute(self, samples: int) -> None:
        """Owe nothing of so many samples; what was held back so far is owed if it stands."""
        self.memory.muted = samples + 1
        self._count_muted()

    def explain(self, found: Found) -> None:
        """Owe the explanation of an alert, with the alert's figures."""
        explanation = replace(
            self._alert("explanation", found.message, samples=found.samples),
            top_layers=found.layers,
            evidence=found.alert.evidence,
            explains=found.alert.id,
        )
        self._owe(explanation)

    def figures(self) -> Summary:
        """The running figures as they are now; not said, and so without a number."""
        evidence, memory = self._evidence(), self.memory
        return Summary(
            stream=self.rules.name,
            samples_seen=memory.samples_seen,
            status=memory.overall,
            score_mean=evidence.score_mean,
            score_p95=evidence.score_p95,
            flagged_rate=evidence.flagged_rate,
            log_e_value=evidence.log_e_value,
            invalid={"not scored": memory.invalid},
            ert=self.rules.ert,
            fpr=self.rules.fpr,
        )

    def summary(self) -> Summary:
        """They are said now, and numbered so."""
        self.memory.said += 1
        return replace(self.figures(), number=self.memory.said)

    def _owe(self, alert: Alert) -> None:
        """It is said now, and numbered so."""
        self.memory.said += 1
        self.memory.owed.append(replace(alert, number=self.memory.said))

    def _count_time(self) -> None:
        before, self.seen_at = self.seen_at, time.monotonic()
        if isinstance(self.rules.recovery, timedelta):
            self.memory.quiet_seconds += self.seen_at - before

    def _look_at_weights(self, stale: bool | None) -> None:
        memory = self.memory
        if stale is None or stale == memory.stale:
            return
        memory.stale = stale
        if stale:
            message = "Stale calibration: the model has not the weights that the detector knows."
            self._begin("stale", self._alert("stale_calibration", message))
        else:
            message = "Recovered: the model has the detector's weights again."
            self._end("stale", self._alert("recovered", message))

    def _flagged(self, row: Row) -> FlaggedSample | None:
        if not row.valid or row.p_value > self.rules.fpr:
            return None
        return FlaggedSample(self.memory.samples_seen, row.p_value, row.id)

    def _is_due(self, sample: FlaggedSample) -> bool:
        """Whether an alert of a flagged sample is."""
        memory = self.memory
        memory.untold.append(sample)
        if memory.since_told is not None and memory.since_told < self.rules.cooldown:
            return False
        memory.since_told = 0
        return True

    def _take_valid(self, row: Row, sample: FlaggedSample | None) -> None:
        """The drift test, the figures, and what follows from them."""
        memory = self.memory
        memory.episode.add(row, sample)
        memory.validity.append(True)
        memory.valid_run = None if memory.valid_run is None else memory.valid_run + 1
        self._look_at_validity()
        if (memory.samples_seen - memory.invalid - 1) % self.rules.thin:
            return  # says nothing of a recovery either
        memory.quiet += 1
        evidence = self.test.update(row.score, row.group)
        memory.log_e_value = evidence.log_e_value
        memory.episode.test(memory.samples_seen)
        if evidence.alarm:
            self._alarm(evidence)
        elif memory.status != "OK" and self.rules.is_over(
            memory.quiet, memory.quiet_seconds, memory.needed
        ):
            self._recover()

    def _take_invalid(self, row: Row) -> None:
        memory = self.memory
        is_news = memory.valid_run is None or memory.valid_run >= self.rules.valid_again
        memory.invalid, memory.valid_run = memory.invalid + 1, 0
        memory.validity.append(False)
        if is_news and not memory.muted:
            message = f"Invalid input: sample {memory.samples_seen:,} could not be scored."
            sample = FlaggedSample(memory.samples_seen, None, row.id)
            self._owe(self._alert("invalid_input", message, samples=[sample]))
        self._look_at_validity()

    def _look_at_validity(self) -> None:
        """A run of samples that cannot be scored is an incident, until they can be again."""
        memory, invalid = self.memory, self.memory.validity.count(False)
        if not memory.blind and invalid >= _MANY_INVALID:
            memory.blind = True
            message = (
                f"Invalid input: {invalid} of the latest {len(memory.validity)} samples could not "
                f"be scored, {memory.invalid:,} of {memory.samples_seen:,} in all."
            )
            alert = self._alert("invalid_input", message)
            self._begin("blind", replace(alert, severity="critical"))
        elif memory.blind and not invalid:
            memory.blind = False
            count = len(memory.validity)
            message = f"Recovered: the latest {count} samples could all be scored."
            self._end("blind", self._alert("recovered", message))

    def _alarm(self, evidence: Evidence) -> None:
        memory, stands = self.memory, self.memory.status == "ALERT"
        self._look_at_neighbours()
        memory.disturb("ALERT")
        since = self.test.since(evidence.cause)
        memory.needed = max(memory.needed, _TIMES * (since.estimate + 1))
        if not stands:
            self._begin("drift", self._drift_alert(evidence, since))
        # The history now holds samples from after the change; see EDetector.restart.
        self._begin_anew(grow=False)

    def _begin_anew(self, *, grow: bool = True) -> None:
        self.test.restart(grow=grow)
        self.memory.episode = Episode()

    def _drift_alert(self, evidence: Evidence, since: Since) -> Alert:
        """With the figures, layers and flagged samples since the evidence began."""
        episode, tested = self.memory.episode, self.memory.episode.tested
        began, latest = tested[-1 - since.estimate], since.estimate * self.rules.thin + 1
        ranks = self.test.latest_ranks(_RANKS)
        alike = neighbours_of(ranks, self.rules.ert, ONCE)
        message = _drift_message(evidence, self.rules.ert, began)
        message += "" if alike is None else f" {alike}"
        flagged = [sample for sample in episode.flagged if sample.position >= began]
        alert = self._alert("drift", message, episode.layers.mean(latest), flagged)
        figures = replace(
            self._evidence(latest),
            drift_of=evidence.cause,
            since=began,
            since_earliest=tested[-1 - since.earliest],
            since_latest=tested[-1 - since.latest],
            correlation=None if alike is None else alike.correlation,
            ert_if_correlated=None if alike is None else alike.ert,
        )
        return replace(alert, evidence=figures, trace=episode.trace(ranks))

    def _look_at_neighbours(self) -> None:
        if self.neighbours is None:  # it is told once
            self.neighbours = neighbours_of(self.test.latest_ranks(_RANKS), self.rules.ert, OFTEN)

    def _recover(self) -> None:
        memory = self.memory
        was, memory.status, memory.needed = memory.status, "OK", 0
        if was == "ALERT":
            self._begin_anew()
            message = f"Recovered: {self.rules.told_recovery}."
            self._end("drift", self._alert("recovered", message))

    def _sample_alert(self, flagged: Sequence[Row]) -> Alert:
        row, untold = min(flagged, key=lambda row: row.p_value), self.memory.untold
        message = f"Anomalous sample: p-value {row.p_value:.3g}, at most fpr {self.rules.fpr:g}."
        if len(untold) > 1:
            message += f" {len(untold)} flagged since the last alert."
        alert = self._alert("sample", message, row.layers, untold)
        untold.clear()
        return replace(alert, evidence=replace(alert.evidence, p_value=row.p_value))

    def _begin(self, incident: str, alert: Alert) -> None:
        """Owe the alert of an incident that begins, or hold it while nothing is said."""
        if self.memory.muted:
            self.memory.held[incident] = alert
        else:
            self._owe(alert)

    def _end(self, incident: str, alert: Alert) -> None:
        """The same of one that ends; of one that nobody was told of there is nothing to say."""
        memory = self.memory
        begun = memory.held.pop(incident, None)
        if not memory.muted:
            self._owe(alert)
        elif begun is None or begun.kind == "recovered":
            memory.held[incident] = alert

    def _count_muted(self) -> None:
        """When the muted samples have passed, owe what began or ended meanwhile, and stands so."""
        memory = self.memory
        memory.muted = max(0, memory.muted - 1)
        if memory.muted == 0 and memory.held:
            for alert in sorted(memory.held.values(), key=lambda alert: alert.samples_seen):
                self._owe(alert)
            memory.held.clear()

    def _alert(
        self,
        kind: AlertKind,
        message: str,
        layers: Array | None = None,
        samples: Iterable[FlaggedSample] = (),
    ) -> Alert:
        evidence, names = self._evidence(), self.fitted.layers
        return Alert(
            kind=kind,
            severity=severity_of(kind, evidence),
            stream=self.rules.name,
            samples_seen=self.memory.samples_seen,
            message=message,
            evidence=evidence,
            top_layers=() if layers is None else top_layers(names, layers),
            top_terms=() if layers is None else top_terms(names, layers),
            samples=tuple(samples),
            detector=self.fitted.fingerprint,
            model=self.fitted.model,
            method=self.fitted.method,
            standing=self.memory.standing,
            status=self.memory.overall,
        )

    def _evidence(self, latest: int | None = None) -> AlertEvidence:
        memory, rules = self.memory, self.rules
        figures = {"log_e_value": memory.log_e_value, "ert": rules.ert, "fpr": rules.fpr}
        return memory.episode.evidence(**figures, latest=latest)


def _stream_test(fitted: Fitted, *, ert: float, seed: int) -> StreamTest:
    """The drift test against what a detector was calibrated on, within its groups."""
    grouped = fitted.grouped
    if grouped is None:
        return StreamTest(fitted.calibration.scores, ert=ert, seed=seed)
    return StreamTest(
        grouped.scores,
        ert=ert,
        seed=seed,
        groups=grouped.indices(grouped.labels, len(grouped.scores)),
        group_count=len(grouped.large) + 1,
        mix=not fitted.groups_of_adapter,
    )


def _drift_message(evidence: Evidence, ert: float, since: int) -> str:
    what = "Drift" if evidence.cause == "data" else "Drift of the mix of groups"
    return (
        f"{what}: evidence e^{evidence.log_e_value:.1f} against the calibration data reached "
        f"the promised run time {ert:,.0f} after {evidence.n:,} samples, since about sample "
        f"{since:,}."
    )
