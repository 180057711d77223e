"""A report in words: what is as it should be, and what to look at."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ood_monitor.calibration.conformal import binomial_interval
from ood_monitor.report.samples import Drift, HeldOut, Stream
from ood_monitor.saving.fitted import Fitted

__all__ = ["Finding", "findings_of"]

#: Share of layers that may be badly fitted.
_POOR_SHARE = 0.2

#: Share of features that may be left out.
_DROPPED = 0.5


_ORDER = ("problem", "note", "good")


@dataclass(frozen=True)
class Finding:
    """One sentence or two.

    Attributes:
        verdict: How it is meant.
        text: The sentences.
    """

    verdict: Literal["good", "note", "problem"]
    text: str


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
        found += _of_held_out(held_out)
    if stream is not None:
        found += _of_stream(stream, fpr)
    if drift is not None:
        found += _of_drift(drift, ert)
    return sorted(found, key=lambda finding: _ORDER.index(finding.verdict))


def _of_calibration(fitted: Fitted, fpr: float) -> Iterator[Finding]:
    count, smallest = len(fitted.calibration.scores), fitted.calibration.smallest
    text = f"{count:,} calibration samples: the smallest p-value is {smallest:.2g}"
    if smallest > fpr:
        yield Finding("problem", f"{text}, above fpr {fpr:g}: no sample can be flagged.")
    elif smallest > fpr / 2:
        yield Finding("note", f"{text}, so that fpr {fpr:g} leaves no room; more would be better.")
    else:
        yield Finding("good", f"{text}, well below fpr {fpr:g}.")


def _of_features(fitted: Fitted) -> Iterator[Finding]:
    names, dropped = fitted.joined.all_names, fitted.joined.dropped
    share = len(dropped) / len(names)
    text = f"{len(dropped):,} of {len(names):,} features were left out as dead or constant"
    if share > _DROPPED:
        yield Finding("note", f"{text}: more than half. Check the model and its precision.")
    else:
        yield Finding("good", f"{text}.")


def _of_held_out(held_out: HeldOut) -> Iterator[Finding]:
    distances = held_out.distances()
    poor = [name for name, distance in distances.items() if distance > held_out.limit]
    text = (
        f"{len(poor):,} of {len(distances):,} layers are badly fitted (Kolmogorov-Smirnov distance "
        f"above {held_out.limit:.2g} on {held_out.count:,} held-out samples)"
    )
    if len(poor) > _POOR_SHARE * len(distances):
        yield Finding("problem", f"{text}: are these samples like those that it was fitted on?")
    else:
        yield Finding("good", f"{text}.")
    if len(distances) > 1 and held_out.count > 2:
        off = held_out.correlation()[~np.eye(len(distances), dtype=bool)]
        mean = float(np.abs(off).mean())
        yield Finding("note", f"The mean absolute correlation between layers is {mean:.2f}.")
    if held_out.diagnosis is not None:
        problems = held_out.diagnosis.problems
        yield from (Finding("problem", problem) for problem in problems)
        if not problems:
            yield Finding("good", "The diagnosis of the model found no problem.")


def _of_stream(stream: Stream, fpr: float) -> Iterator[Finding]:
    valid, flagged = int(stream.valid.sum()), len(stream.flagged(fpr))
    if invalid := len(stream.ids) - valid:
        text = f"{invalid:,} of {len(stream.ids):,} samples could not be read or scored."
        yield Finding("problem", text)
    if not valid:
        return
    low, high = binomial_interval(flagged, valid)
    text = (
        f"{flagged:,} of {valid:,} samples are flagged: {flagged / valid:.2%}, with 95 % "
        f"confidence {low:.2%} to {high:.2%}; of normal samples it would be at most {fpr:.2%} on "
        "average"
    )
    yield Finding("problem" if low > fpr else "good", f"{text}.")


def _of_drift(drift: Drift, ert: float) -> Iterator[Finding]:
    promise = f"one false alarm in {ert:,.0f} normal samples on average"
    if drift.alarms:
        at = ", ".join(f"{alarm:,}" for alarm in drift.alarms[:5])
        more = f" and {len(drift.alarms) - 5:,} more" if len(drift.alarms) > 5 else ""
        yield Finding("problem", f"Drift: an alarm at sample {at}{more} ({promise}).")
        return
    most = max((v for v in drift.log_e_values.tolist() if math.isfinite(v)), default=-math.inf)
    reached = f"e^{most:.1f}" if math.isfinite(most) else "nothing"
    text = f"No drift: the evidence reached {reached} of e^{math.log(ert):.1f}"
    yield Finding("good", f"{text} ({promise}).")
