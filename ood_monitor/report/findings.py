"""A report in words: what is as it should be, what to look at, and what nobody can tell."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ood_monitor.calibration.conformal import binomial_interval, samples_for
from ood_monitor.report.course import Drift
from ood_monitor.report.samples import HeldOut, Stream
from ood_monitor.saving.fitted import Fitted

__all__ = ["Finding", "can_flag", "findings_of"]

Verdict = Literal["problem", "unknown", "note", "good"]

#: Share of layers that may be badly fitted.
_POOR_SHARE = 0.2

#: Share of features that may be left out.
_DROPPED = 0.5

#: Held-out samples of which a bad fit can be told at all: with fewer, chance looks as bad.
_FEWEST = 10

#: Evidence of a drift that is told of before it is an alarm: with a chance of at most this at the
#: end, at most that before, or so many nats below the threshold.
_SELDOM, _VERY_SELDOM, _NEAR = 0.1, 0.01, 1.0

#: A bound of a chance that says nothing.
_OFTEN = 0.5

#: Times the promised rate that a stream must be long enough to tell from it.
_TIMES = 10

_ORDER: tuple[Verdict, ...] = ("problem", "unknown", "note", "good")


@dataclass(frozen=True)
class Finding:
    """One sentence for everybody, and the figures behind it.

    Attributes:
        verdict: How it is meant; ``"unknown"`` where it cannot be told.
        text: The sentence.
        detail: The figures; empty if there are none.
    """

    verdict: Verdict
    text: str
    detail: str = ""


def findings_of(
    fitted: Fitted,
    held_out: HeldOut | None,
    stream: Stream | None,
    drift: Drift | None,
    *,
    fpr: float,
    ert: float,
) -> list[Finding]:
    """All that can be said, problems first."""
    found = [*_of_calibration(fitted, fpr), *_of_features(fitted)]
    if held_out is not None:
        found += [*_of_held_out(held_out), *_of_diagnosis(held_out)]
    if stream is not None:
        found += [*_of_samples(stream, fpr), *_of_flags(fitted, stream, fpr)]
        found += _of_drift(drift, ert) if drift is not None else _of_no_drift_test(stream)
    return sorted(found, key=lambda finding: _ORDER.index(finding.verdict))


def can_flag(fitted: Fitted, fpr: float) -> bool:
    """Whether any sample can be flagged: there are enough calibration samples, in some group."""
    return samples_for(fpr) <= _largest(fitted)


def _largest(fitted: Fitted) -> int:
    """Calibration samples, of a detector with groups those of the largest."""
    grouped = fitted.grouped
    return len(fitted.calibration.scores) if grouped is None else grouped.most


def _of_calibration(fitted: Fitted, fpr: float) -> Iterator[Finding]:
    count = _largest(fitted)
    smallest, where = 1 / (count + 1), "" if fitted.grouped is None else " in the largest group"
    detail = f"{count:,} calibration samples{where}: the smallest p-value is {smallest:.2g}"
    if not can_flag(fitted, fpr):
        yield Finding(
            "problem",
            "The detector has seen too few normal samples to call any sample anomalous.",
            f"{detail}, above fpr {fpr:g}: no sample can be flagged. It takes "
            f"{samples_for(fpr):,} of them, or a larger fpr.",
        )
    elif smallest > fpr / 2:
        yield Finding(
            "note",
            "The detector has seen just enough normal samples: only what is further off than all "
            "of them is flagged.",
            f"{detail}, so that fpr {fpr:g} leaves no room; more would be better.",
        )
    else:
        yield Finding(
            "good",
            "The detector has seen enough normal samples to tell which are anomalous.",
            f"{detail}, well below fpr {fpr:g}.",
        )
    yield from _of_groups(fitted, fpr)


def _of_groups(fitted: Fitted, fpr: float) -> Iterator[Finding]:
    never = {} if fitted.grouped is None else fitted.grouped.never_flagged(fpr)
    if never and can_flag(fitted, fpr):
        named = ", ".join(f"{group} ({size:,})" for group, size in list(never.items())[:_TIMES])
        yield Finding(
            "unknown",
            "In some groups no sample can be called anomalous: too few normal ones were seen.",
            f"At fpr {fpr:g} a group needs {samples_for(fpr):,} calibration samples; fewer have: "
            f"{named}.",
        )


def _of_features(fitted: Fitted) -> Iterator[Finding]:
    names, dropped = fitted.joined.all_names, fitted.joined.dropped
    if not dropped:
        yield Finding(
            "good",
            "Every part of the model that the detector could look at, it looks at.",
            f"{len(names):,} features, none left out.",
        )
        return
    why = sorted(set(dropped.values()))
    detail = f"{len(dropped):,} of {len(names):,} features were left out ({', '.join(why)})"
    many = len(dropped) > _DROPPED * len(names)
    yield Finding(
        "note",
        f"{'Most' if many else 'Some'} parts of the model say nothing, and the detector does not "
        "look at them.",
        f"{detail}{'. Check the model and its precision' if many else ''}; they are listed below.",
    )


def _of_held_out(held_out: HeldOut) -> Iterator[Finding]:
    distances = held_out.distances()
    if held_out.unknown:
        yield Finding(
            "unknown",
            "Of some parts of the model nobody can tell how they fit normal samples.",
            f"Without a finite value: {_listed(held_out.unknown)}.",
        )
    if not distances or held_out.count < _FEWEST:
        yield Finding(
            "unknown",
            "Whether the detector fits normal samples cannot be told.",
            f"Known are {len(distances):,} layers and {held_out.count:,} held-out samples; it "
            f"takes at least one and {_FEWEST}.",
        )
        return
    yield _of_fit(held_out, distances)
    names, correlation = held_out.correlation()
    if names:
        mean = float(np.abs(correlation[~np.eye(len(names), dtype=bool)]).mean())
        yield Finding(
            "note",
            "Parts of the model that move together count as one for the default density."
            if mean > _POOR_SHARE
            else "The parts of the model that are watched say different things.",
            f"The mean absolute correlation between layers is {mean:.2f}.",
        )


def _of_fit(held_out: HeldOut, distances: dict[str, float]) -> Finding:
    poor = [name for name, distance in distances.items() if distance > held_out.limit]
    detail = (
        f"{len(poor):,} of {len(distances):,} layers are badly fitted (Kolmogorov-Smirnov distance "
        f"above {held_out.limit:.2g} on {held_out.count:,} held-out samples)"
    )
    if len(poor) > _POOR_SHARE * len(distances):
        return Finding(
            "problem",
            "These samples are not like those that the detector was fitted on.",
            f"{detail}: are they normal, and of the same source?",
        )
    if poor:
        return Finding(
            "note",
            "The detector fits normal samples, but for a few parts of the model.",
            f"{detail}: {_listed(poor)}.",
        )
    return Finding("good", "The detector fits normal samples.", f"{detail}.")


def _of_diagnosis(held_out: HeldOut) -> Iterator[Finding]:
    diagnosis = held_out.diagnosis
    if isinstance(diagnosis, str):
        yield Finding("unknown", "The model itself was not examined.", diagnosis)
    elif diagnosis is not None and diagnosis.problems:
        text = "The examination of the model found something that hurts detection."
        yield from (Finding("problem", text, problem) for problem in diagnosis.problems)
    elif diagnosis is not None:
        yield Finding(
            "good", "The examination of the model found nothing wrong.", str(diagnosis).strip()
        )


def _of_samples(stream: Stream, fpr: float) -> Iterator[Finding]:
    """What came, and by which rate it was judged before."""
    total, valid = len(stream.ids), int(stream.valid.sum())
    if invalid := total - valid:
        yield Finding(
            "problem",
            "Some samples could not be judged at all."
            if valid
            else "No sample could be judged at all.",
            f"{invalid:,} of {total:,} samples could not be read or scored.",
        )
    if not total:
        yield Finding("unknown", "There is no sample to judge.", "The stream is empty.")
    if stream.fpr is not None and stream.fpr != fpr:
        yield Finding(
            "note",
            "This report calls other samples anomalous than the file of scores does.",
            f"The file was flagged at fpr {stream.fpr:g}; this report was asked for fpr {fpr:g}.",
        )


def _of_flags(fitted: Fitted, stream: Stream, fpr: float) -> Iterator[Finding]:
    valid, flagged = int(stream.valid.sum()), len(stream.flagged(fpr))
    if not valid:
        return
    low, high = binomial_interval(flagged, valid)
    detail = (
        f"{flagged:,} of {valid:,} samples are flagged: {flagged / valid:.2%}, with 95 % "
        f"confidence {low:.2%} to {high:.2%}; of normal samples it would be at most {fpr:.2%} on "
        "average."
    )
    if not can_flag(fitted, fpr):
        text = "Whether any sample is anomalous cannot be told, as none can be flagged."
        yield Finding("unknown", text, detail)
    elif low > fpr:
        text = "More samples are anomalous than a stream of normal ones would have."
        yield Finding("problem", text, detail)
    elif high > _TIMES * fpr:
        text = "There are too few samples to tell whether anomalous ones come too often."
        yield Finding("unknown", text, detail)
    else:
        text = "No more samples are flagged than a stream of normal ones would have."
        yield Finding("good", text, detail)


def _of_no_drift_test(stream: Stream) -> Iterator[Finding]:
    why = (
        "The detector has groups, and the stream does not say which sample is of which; `score` "
        "writes it since this release."
        if stream.valid.any()
        else "No sample has a score."
    )
    yield Finding("unknown", "Whether the stream has changed cannot be told.", why)


def _of_drift(drift: Drift, ert: float) -> Iterator[Finding]:
    promise = f"one false alarm in {ert:,.0f} normal samples on average"
    if drift.drifts:
        yield _of_alarms(drift, promise)
        return
    last, course = drift.last, f"{_course(drift, ert)} ({promise})."
    if not drift.is_long_enough:
        text = "The stream is too short to tell whether it has changed."
        more = "Not even as many samples as anomalous as can be would have raised an alarm."
        yield Finding("unknown", text, f"{more} {course}")
    elif drift.chance(last) <= _SELDOM or _is_near(drift, last, ert):
        text = "There is no alarm of a drift yet, but what came last speaks for one: keep watching."
        yield Finding("note", text, course)
    elif drift.chance(drift.highest) <= _VERY_SELDOM or _is_near(drift, drift.highest, ert):
        text = "There was no alarm of a drift; for a while the stream looked like one."
        yield Finding("note", text, course)
    else:
        yield Finding("good", "The stream looks like the samples that were called normal.", course)


def _is_near(drift: Drift, sample: int, ert: float) -> bool:
    return drift.value(sample) >= math.log(ert) - _NEAR


def _of_alarms(drift: Drift, promise: str) -> Finding:
    first, alarms = drift.drifts[0], drift.alarms
    at = ", ".join(f"{alarm:,}" for alarm in alarms[:5])
    more = f" and {len(alarms) - 5:,} more" if len(alarms) > 5 else ""
    stands = (
        "has not recovered by the end" if drift.status == "ALERT" else "had recovered by the end"
    )
    return Finding(
        "problem",
        f"The stream is no longer like the samples that were called normal, since about sample "
        f"{first.evidence.since or first.samples_seen:,}.",
        f"Drift: an alarm at sample {at}{more} ({promise}); the stream {stands}.",
    )


def _course(drift: Drift, ert: float) -> str:
    """How the evidence went, without an alarm."""
    most, last = drift.highest, drift.last
    top, now, bar = drift.value(most), drift.value(last), math.log(ert)
    said = f"No drift alarm: the evidence reached e^{top:.1f} of e^{bar:.1f} at sample {most:,}"
    if now < top - _NEAR:
        said += f" and has fallen to e^{now:.1f} at the end"
    elif last > 1:
        said += f", and it stands at e^{now:.1f} at the end"
    chance = drift.chance(most)
    if chance >= _OFTEN:
        return f"{said}; a normal stream of this length may well reach as much"
    return f"{said}; of a normal stream the chance of as much is at most {chance:.2g}"


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
