"""What each kind of alert means, and what to do now, for whoever is woken by it.

`docs/alerts.md` has a section for each kind, which says the same; its address goes with the alert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from ood_monitor.alerts.alert import Alert, AlertKind
from ood_monitor.checks import text
from ood_monitor.escaping import terminal

__all__ = ["Guidance", "gravest_of", "guidance_of", "since_of", "told"]


@dataclass(frozen=True)
class Guidance:
    """What to make of an alert.

    Attributes:
        means: What it says, in a sentence.
        means_not: What it does not say.
        causes: The three usual causes, the most frequent first.
        do: What to do now, in a sentence.
        command: What to run next; words in capitals are yours to fill in.
    """

    means: str
    means_not: str
    causes: tuple[str, str, str]
    do: str
    command: str


_BY_KIND: Mapping[AlertKind, Guidance] = {
    "sample": Guidance(
        means="One sample looks stranger than all but a few of the normal ones.",
        means_not="It does not say that the sample is wrong: of normal samples a promised share is "
        "flagged too, one in a hundred by default.",
        causes=(
            "A normal sample that is rare: at the promised rate these come whatever happens.",
            "One sample of another kind or damaged: a wrong file, a wrong crop, noise.",
            "The first samples of a drift, where flags begin to come more often than promised.",
        ),
        do="Look at the flagged samples beside normal ones; one alone needs nothing else.",
        command="ood-monitor report DETECTOR report.html --stream FOLDER --held-out NORMAL",
    ),
    "drift": Guidance(
        means="The stream as a whole is no longer like the samples that were called normal.",
        means_not="It does not say that the model is worse on it, nor that any one sample is "
        "wrong; now and then, as seldom as was promised, it is a false alarm.",
        causes=(
            "What comes before the model has changed: a resize, a crop, a codec or a sensor.",
            "The world has changed: another season, product, user or language.",
            "The normal samples were not as the stream is: another time, source or selection.",
        ),
        do="Find what changed upstream at the sample that is named, and look at samples from "
        "before and after it; if the change is right, recalibrate and accept it.",
        command="ood-monitor report DETECTOR report.html --stream FOLDER --held-out NORMAL",
    ),
    "recovered": Guidance(
        means="What an alert before told of has ended: the stream, the weights or the input are as "
        "they were.",
        means_not="It does not say what the cause was, nor that it will not come back.",
        causes=(
            "The cause was found and mended upstream.",
            "What had changed went by, such as one batch or one user.",
            "The alarm was false, which the promised rate allows.",
        ),
        do="Close the incident, and note what was changed.",
        command="ood-monitor watch DETECTOR FOLDER --state STATE",
    ),
    "invalid_input": Guidance(
        means="Samples came that cannot be scored: they cannot be read, or hold values that the "
        "model does not take.",
        means_not="It does not say that they are anomalous: nothing at all is known of them, and "
        "no test counts them.",
        causes=(
            "Files that are damaged, empty, of another format or still being written.",
            "Not-a-number or infinite values from a step before.",
            "Another shape, value range or vocabulary than the model's.",
        ),
        do="Read why each cannot be scored, and mend what feeds the model.",
        command="ood-monitor score DETECTOR FOLDER --output scores.csv",
    ),
    "stale_calibration": Guidance(
        means="The model has other weights than the detector was fitted on, so that its p-values "
        "and alarms promise nothing.",
        means_not="It does not say that the data or the new weights are bad: the detector does not "
        "know these weights.",
        causes=(
            "The model was trained further or replaced, and the detector was not fitted again.",
            "Adapters, pruning, quantisation or another precision changed the weights in place.",
            "The detector's folder is that of another model or version.",
        ),
        do="Fit the detector again on normal samples for these weights, or bring the old weights "
        "back; trust no figure until then.",
        command="ood-monitor fit MODEL NORMAL DETECTOR --overwrite",
    ),
    "accepted": Guidance(
        means="A person has said that the stream as it is now is right, and watching began anew.",
        means_not="It does not say that the detector has learned the new stream: only another "
        "calibration does that.",
        causes=(
            "A change upstream was meant, and the detector was recalibrated for it.",
            "An alarm was judged to be false.",
            "Somebody wished the alert away: read the reason.",
        ),
        do="Nothing, if the reason in the message is good; look at what the detector was "
        "calibrated on.",
        command="ood-monitor show DETECTOR",
    ),
    "explanation": Guidance(
        means="It names the layers of the model that are least as usual in the samples of an alert "
        "before.",
        means_not="It does not name a cause: a layer says where in the model a sample looks "
        "strange, not why.",
        causes=(
            "Early layers: pixels, tokens or values look strange, such as noise, scale or codec.",
            "Late layers: content looks strange, such as an object or a subject never seen.",
            "All layers alike: the weights or the precision changed, or the input is of another "
            "kind.",
        ),
        do="Read it beside the alert that it explains, and do what that one says.",
        command="ood-monitor report DETECTOR report.html --stream FOLDER --held-out NORMAL",
    ),
}


def guidance_of(kind: AlertKind) -> Guidance:
    """What to make of an alert of a kind.

    Raises:
        ValueError: There is no such kind.
        TypeError: It is no text.
    """
    if text("kind", kind) not in _BY_KIND:
        known = ", ".join(get_args(AlertKind))
        raise ValueError(f"Expected a kind of alert, one of {known}, got {kind!r}.")
    return _BY_KIND[kind]


def gravest_of(alert: Alert) -> AlertKind:
    """The kind to act on first: of all that stands with an alert the gravest, or its own."""
    return alert.standing[0] if alert.standing else alert.kind


def since_of(alert: Alert) -> str:
    """Since when an alert's cause is there, as far as the alert knows, in words."""
    evidence, places = alert.evidence, [sample.position for sample in alert.samples]
    if evidence.since is not None:
        low, high = evidence.since_earliest, evidence.since_latest
        is_wide = low is not None and high is not None and low < high
        between = f", most likely between {low:,} and {high:,}" if is_wide else ""
        return f"about sample {evidence.since:,}{between}"
    if alert.kind == "sample" and places:
        return f"sample {places[0]:,}" + (f" to {places[-1]:,}" if len(places) > 1 else "")
    if alert.kind == "stale_calibration":
        seen = alert.samples_seen
        where = f"sample {seen:,} or before" if seen else "the first sample or before"
        return f"{where}, when the weights were looked at"
    return f"sample {alert.samples_seen:,}"


def told(alert: Alert) -> str:
    """An alert's answer to what, since when and what now, as one line for a terminal."""
    first = gravest_of(alert)
    stands = "" if first == alert.kind else f"{first} stands: {guidance_of(first).means} "
    line = (
        f"{alert.status} {alert.kind} (stream {alert.stream}): {alert.message} Since "
        f"{since_of(alert)}. {stands}Do now: {guidance_of(first).do} More: ood-monitor guide "
        f"{first}"
    )
    return terminal(" ".join(line.split()))
