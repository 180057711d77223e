"""The monitor: a detector on a stream. It decides, remembers, and tells the sinks."""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from os import PathLike
from typing import Any, Literal, Self

from ood_monitor.adapters.base import Batch
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.alerts.alert import Alert, Status
from ood_monitor.alerts.dispatcher import Dispatcher
from ood_monitor.alerts.figures import Reading, Summary
from ood_monitor.alerts.sink import Sink
from ood_monitor.calibration.scores import Scores
from ood_monitor.checks import number, text, whole
from ood_monitor.detector.detector import Detector
from ood_monitor.monitor.decisions import Decisions
from ood_monitor.monitor.explanations import Explanations, Found
from ood_monitor.monitor.memory import rows_of
from ood_monitor.monitor.rules import Rules
from ood_monitor.monitor.scoring import first_sound, scored
from ood_monitor.monitor.staleness import Weights
from ood_monitor.processes import Lock
from ood_monitor.saving.fingerprints import hashes_where
from ood_monitor.saving.fitted import Fitted

__all__ = ["Monitor"]

#: More figures than a monitor shows after its last alert.
_STRIDE = 1_000_000

_log = logging.getLogger(__name__)


class Monitor:
    """Watches a stream of samples and raises alerts.

    There are these kinds of alerts:

    - *sample*: a p-value is at most ``fpr``. A share ``fpr`` of in-distribution samples is flagged.
    - *drift*: the stream as a whole has left the calibration data or, if the detector has groups,
      their mix has. While nothing changes, one comes at most every ``ert`` samples on average.
    - *recovered*: a drift has ended. No alarm came in ``recovery`` samples, nor in four times as
      many as the drift's evidence took.
    - *invalid_input*: a sample could not be scored. If ten of the latest hundred could not, another
      one says so, and stands until all of a hundred could be scored.
    - *stale_calibration*: the model has other weights than the detector was fitted on. A
      *recovered* alert tells when it has them again.

    An alert tells of a change. While a drift stands there is no sample alert, nor within
    ``cooldown`` samples of the last one; the next names what was flagged meanwhile. How a stream is
    cut into batches changes nothing but this: the sample alerts of an update become one at its end,
    for its most anomalous sample, and none if a drift alert follows in the same update.

    Both rates are promised if samples are exchangeable with the calibration data while nothing is
    wrong, and the model has the detector's weights. If an update is interrupted, either all of it
    counts, with its alerts still to be delivered, or nothing does.

    Args:
        detector: A fitted detector.
        ert: Expected run time to a false drift alarm, in samples.
        fpr: False-positive rate of single samples.
        sinks: Each is told of every alert, in a thread of its own, and never waited for.
        name: The stream's name in alerts.
        recovery: After how many tested samples without an alarm the stream counts as recovered. It
            may be a time instead, whatever the data say; if the drift lasts, you are told again.
        cooldown: For how many samples after a sample alert no other comes.
        summary_every: Samples between running figures, for sinks that show them.
        thin: Only every so many samples goes into the drift test, for streams in which neighbours
            are alike. ``ert`` and ``recovery`` then count the tested ones. If neighbours are alike,
            the log says so once, and a drift alert says by how much.
        seed: Seed of the drift test's tie-breakers.
        identify: ``"hash"`` names each flagged sample of :meth:`update` by its SHA-256, unless you
            give it an id.
        weights_every: The weights are compared with the detector's before the first sample, which
            takes about a second per gigabyte, and then every so many samples, which takes as long
            if they were written to and no time otherwise; 0 for never.
        spool: A folder of this monitor's own, where alerts are kept until every sink has them, also
            through a crash; see :class:`~ood_monitor.alerts.Dispatcher`.
        explain_budget: Seconds to explain, by layer, a drift alert or many flags; 0 for never. The
            explanation follows the alert as a message of its own. It is computed in the next call
            of :meth:`explain`, :meth:`update`, :meth:`flush` or :meth:`close`, and begins no
            further sample once these seconds have passed. If the detector scores by gradient norms,
            the alert itself names the layers.
        explain_keep: How many samples are kept in memory for explanations, the most anomalous of
            the latest ones. They are never saved.

    Attributes:
        last: Scores of the latest samples taken in; None before the first.

    Raises:
        RuntimeError: The detector is not fitted.
        ValueError: An option is out of range, or ``fpr`` too small for the calibration data.
        TypeError: An option is of another type.
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
        recovery: int | timedelta = 500,
        cooldown: int = 100,
        summary_every: int = 100,
        thin: int = 1,
        seed: int = 0,
        identify: Literal["hash"] | None = None,
        weights_every: int = 1000,
        spool: str | PathLike[str] | None = None,
        explain_budget: float = 5.0,
        explain_keep: int = 8,
    ) -> None:
        if not isinstance(detector, Detector):
            raise TypeError(f"Expected a fitted `om.Detector` to watch by, got {type(detector)}.")
        fitted = detector.fitted
        rules = Rules(
            name=name,
            fpr=fpr,
            ert=ert,
            recovery=recovery,
            cooldown=cooldown,
            summary_every=summary_every,
            thin=thin,
        )
        fitted.check_fpr(rules.fpr)
        if identify not in (None, "hash"):
            raise ValueError(f"Expected identify None or 'hash', got {identify!r}.")
        self.fpr, self.ert, self.name = rules.fpr, rules.ert, rules.name
        self._identify, self._seed = identify, whole("seed", seed)
        self._weights_every = whole("weights_every", weights_every)
        # A copy, so that the baseline stays what it is if the detector is fitted again.
        self._watched = _Watched(
            copy.copy(detector),
            Weights(detector.adapter.module, fitted.model),
            Decisions.of(rules, fitted, seed=seed),
        )
        budget = number("explain_budget", explain_budget, 0)
        keep = whole("explain_keep", explain_keep)
        has_layers = fitted.method == "gradient_norms"
        self._explanations = Explanations(keep, 0.0 if has_layers else budget)
        self._lock = Lock()
        self._good: Batch | None = None
        if weights_every:
            self._watched.weights.are_stale()  # the costly look, before the stream waits for it
        self._dispatcher = Dispatcher(sinks, spool=spool)
        if (told := self._dispatcher.spool) is not None:
            # Numbers go on above those of a process that had the folder before, figures included.
            memory = self._decisions.memory
            memory.said = max(memory.said, told.latest + _STRIDE)
        self.last: Scores | None = None

    @property
    def detector(self) -> Detector:
        """A copy of the detector as it was given, by which the stream is judged."""
        return self._watched.detector

    @property
    def _decisions(self) -> Decisions:
        return self._watched.decisions

    @property
    def status(self) -> Status:
        """OK, WARN or ALERT, as the alerts say that have not ended.

        WARN: a sample was flagged lately, or weights are stale. ALERT: a drift, or many of the
        latest samples could not be scored.
        """
        return self._decisions.memory.overall

    @property
    def samples_seen(self) -> int:
        """Samples so far, the invalid ones included."""
        return self._decisions.memory.samples_seen

    @property
    def invalid(self) -> int:
        """Samples so far that could not be scored."""
        return self._decisions.memory.invalid

    @property
    def log_e_value(self) -> float:
        """Natural logarithm of the drift test's e-value; an alarm is raised at log(ert).

        It is that of the latest tested sample, an alarm's own included; -inf before the first, and
        after :meth:`accept`.
        """
        return self._decisions.memory.log_e_value

    @property
    def dispatcher(self) -> Dispatcher:
        """What delivers the alerts; it counts what it could not."""
        return self._dispatcher

    def update(self, batch: Batch, ids: Sequence[Any] | None = None) -> list[Alert]:
        """Score B samples, in the order in which they came, and decide.

        A sample that cannot be scored is counted, gets score and p-value nan in :attr:`last`, and
        changes nothing for the others or for the drift test.

        Args:
            batch: As the detector's held-out batches were.
            ids: What B samples are called in alerts, as text; None for one that has no name.

        Returns:
            The alerts raised, which the sinks get too; before them the explanations of those that
            were raised before.

        Raises:
            ValueError: An empty batch, one of other shapes or types than the held-out data, or ids
                of another number; the monitor is then unchanged.
        """
        explanations = self.explain()
        scores = self.score(batch)
        ids = self.identify(batch, scores) if ids is None else ids
        return [*explanations, *self.observe(scores, ids, batch=batch)]

    def score(self, batch: Batch) -> Scores:
        """What :meth:`update` would take in of B samples, without taking it in.

        Returns:
            As :meth:`~ood_monitor.Detector.score`, with nan for a sample that is not finite.

        Raises:
            ValueError: As :meth:`update`.
        """
        self.explain()
        start = time.perf_counter()
        try:
            scores = scored(self.detector, batch, self._good)
            if self._good is None:
                self._good = first_sound(self._cuttable(batch), scores)
        except Exception:  # of any kind: it is counted, and raised on
            self._measure(failed=1)
            raise
        self._measure(seconds=time.perf_counter() - start)
        return scores

    def observe(
        self, scores: Scores, ids: Sequence[Any] | None = None, *, batch: Batch | None = None
    ) -> list[Alert]:
        """:meth:`update`, of samples that :meth:`score` has seen, maybe in another process.

        Args:
            scores: What it gave.
            ids: As of :meth:`update`.
            batch: The samples, of which a few may have to explain an alert. Without them none is
                explained.

        Returns:
            The alerts raised, which the sinks get too.

        Raises:
            ValueError: Ids of another number than the samples; the monitor is then unchanged.
        """
        ids = _listed(ids)
        if ids is not None and len(ids) != len(scores.score):
            raise ValueError(
                f"Expected an id for each of {len(scores.score)} samples, got {len(ids)}."
            )
        self._check_groups(scores)
        with self._lock:
            was_told, before = self._decisions.neighbours is not None, self.samples_seen
            alerts = self._step(lambda decisions: self._take(decisions, scores, ids))
            self.last = scores
            if batch is not None:
                self._explanations.take(self._cuttable(batch), scores, ids, before, alerts)
            if not was_told:
                self._warn_of_neighbours()
        self._measure(scores)
        return alerts

    def explain(self) -> list[Alert]:
        """Explain the alerts that wait for it now, before the next samples come.

        Returns:
            The explanations, which the sinks get too; none while the monitor is muted.
        """
        told: list[Alert] = []
        while not self._decisions.memory.muted and (asked := self._explanations.next()):
            asked.explain(self.detector, lambda found: told.extend(self._tell(found)))
        return told

    def accept(self, reason: str, detector: Detector | None = None) -> list[Alert]:
        """Begin a new episode: what the stream is now is what it should be.

        Figures, status and the drift test begin anew, counts go on, and an *accepted* alert with
        the reason goes to the sinks. Without a detector the stream is judged by the same
        calibration scores as before, and a change that goes on is found again: recalibrate on new
        data first, which are known to be normal.

        Args:
            reason: In words, for those who read the alerts.
            detector: The same detector, recalibrated; see
                :meth:`~ood_monitor.Detector.recalibrate`.

        Returns:
            The alert.

        Raises:
            ValueError: No reason, or a detector of other weights.
            TypeError: The reason is no text.
            RuntimeError: The detector is not fitted.
        """
        text("reason", reason)
        with self._lock:
            before = self._decisions
            fitted = before.fitted if detector is None else detector.fitted
            if fitted.model != before.fitted.model:
                raise ValueError(
                    f"Expected a detector of the weights {before.fitted.model}, got one of "
                    f"{fitted.model}: make a new monitor."
                )
            fitted.check_fpr(self.fpr)
            watched = self._watched
            if detector is not None:
                weights = Weights(detector.adapter.module, fitted.model)
                weights.in_background = watched.weights.in_background
                watched = replace(watched, detector=copy.copy(detector), weights=weights)
            self._explanations.forget()
            return self._step(lambda decisions: self._judge_by(decisions, fitted, reason), watched)

    def read_weights_in_background(self) -> None:
        """Wait for no reading of changed weights from now on: a thread reads them.

        A *stale_calibration* alert then comes with the first samples after they are read.
        """
        self._watched.weights.in_background = True

    def mute(self, samples: int) -> None:
        """Deliver nothing of the next samples, and still count: no alert, to no sink.

        An alert that still stands when they have passed is delivered then.

        Args:
            samples: How many; 0 to be told again at once.

        Raises:
            TypeError: ``samples`` is no whole number.
            ValueError: It is negative.
        """
        count = whole("samples", samples)
        with self._lock:
            self._step(lambda decisions: decisions.mute(count))

    @property
    def figures(self) -> Summary:
        """The running figures as they are now."""
        return self._decisions.figures()

    def summarise(self) -> None:
        """Give the running figures to the sinks that show them, out of their turn."""
        with self._lock:
            self._step(lambda decisions: [decisions.summary()])

    def _cuttable(self, batch: Batch) -> Batch:
        return without_ignored(self.detector.adapter, batch)

    def identify(self, batch: Batch, scores: Scores) -> list[str | None] | None:
        """Hashes of those of B samples that an alert could name, if the monitor was asked to."""
        return (
            hashes_where((scores.p_value <= self.fpr) | ~scores.valid, self._cuttable(batch))
            if self._identify
            else None
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the monitor remembers, as primitives that JSON can hold."""
        with self._lock:
            return self._decisions.dump()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume, to the bit, where :meth:`state_dict` was called.

        Raises:
            ValueError: A state of another format, detector or ``ert``; nothing is changed.
        """
        with self._lock:
            self._hand_over()  # what this monitor still owes is not the state's to drop
            resumed = self._decisions.resumed(state)
            self._explanations.forget()
            self._watched = replace(self._watched, decisions=resumed)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until the sinks have all that was sent; False if the time is up first."""
        self.explain()
        self._hand_over()
        return self._dispatcher.flush(timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what is left within ``timeout`` seconds, and close the sinks."""
        self.explain()
        self._hand_over()
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

    def _step(
        self,
        change: Callable[[Decisions], Iterable[Summary] | None],
        watched: "_Watched | None" = None,
    ) -> list[Alert]:
        """Change what was decided, and owe the alerts of it, in one assignment; then hand over."""
        decisions = self._decisions.copy()
        owed = len(decisions.memory.owed)
        summaries = change(decisions)
        alerts = list(decisions.memory.owed)[owed:]
        self._watched = replace(watched or self._watched, decisions=decisions)
        self._hand_over()
        for summary in summaries or ():
            self._dispatcher.summarise(summary)
        return alerts

    def _tell(self, found: Found) -> list[Alert]:
        with self._lock:
            return self._step(lambda decisions: decisions.explain(found))

    def _hand_over(self) -> None:
        """Give the dispatcher what is owed; what is interrupted is given again, with its id."""
        with self._lock:
            owed = self._decisions.memory.owed
            while owed:
                self._dispatcher.send(owed[0])
                owed.popleft()

    def _take(
        self, decisions: Decisions, scores: Scores, ids: Sequence[Any] | None
    ) -> list[Summary]:
        return decisions.take(
            rows_of(scores, decisions.fitted.layers, ids), stale=self._are_weights_stale(decisions)
        )

    def _judge_by(self, decisions: Decisions, fitted: Fitted, reason: str) -> list[Summary]:
        if fitted is not decisions.fitted:
            fresh = Decisions.of(decisions.rules, fitted, seed=self._seed)
            decisions.fitted, decisions.test = fitted, fresh.test
        return [decisions.accept(reason)]

    def _check_groups(self, scores: Scores) -> None:
        grouped = self._decisions.fitted.grouped
        if (grouped is None) == (scores.group is None) or not scores.valid.any():
            return
        which = ("with", "without") if grouped is not None else ("without", "with")
        raise ValueError(
            f"Expected scores of a detector {which[0]} groups, got some {which[1]}: take those of "
            "the monitor's own detector."
        )

    def _are_weights_stale(self, decisions: Decisions) -> bool | None:
        """Whether weights are others than the detector's; None if it is not the time to look."""
        seen = decisions.memory.samples_seen
        if not self._weights_every or 0 < seen < decisions.next_look:
            return None
        found = self._watched.weights.are_stale()
        if found is not None:
            decisions.next_look = seen + self._weights_every
        return found

    def _warn_of_neighbours(self) -> None:
        found = self._decisions.neighbours
        if found is not None:
            _log.warning(
                "Stream %r: %s Pass `thin=`, or one sample of each independent unit (a request, a "
                "user). [OOD302]",
                self.name,
                found,
            )

    def _measure(self, scores: Scores | None = None, **measured: Any) -> None:
        if not self._dispatcher.has_meters:
            return
        fitted = self._decisions.fitted
        names = {"detector": fitted.fingerprint, "model": fitted.model}
        if scores is not None:
            valid = scores.valid
            measured["scores"] = scores.score[valid].tolist()
            measured["p_values"] = scores.p_value[valid].tolist()
            measured["flagged"] = int((scores.p_value[valid] <= self.fpr).sum())
            measured["invalid"] = int((~valid).sum())
        self._dispatcher.measure(Reading(stream=self.name, **(names | measured)))


def _listed(ids: Iterable[Any] | None) -> list[Any] | None:
    """Ids in the order of the samples.

    Raises:
        TypeError: They have none, or are no ids.
    """
    if isinstance(ids, (set, frozenset)):
        raise TypeError("Expected ids in the order of the samples, got a set.")
    return None if ids is None else list(ids)


@dataclass(frozen=True)
class _Watched:
    """All that a step changes, so that it is changed in one assignment."""

    detector: Detector
    weights: Weights
    decisions: Decisions
