"""The paragraph that an alert leaves in a run's note, between marks of its own."""

import re

from ood_monitor.alerts import (
    Alert,
    FlaggedSample,
    LayerShare,
    TermShare,
    gravest_of,
    guidance_of,
    since_of,
)
from ood_monitor.escaping import markdown_code, markdown_text
from ood_monitor_integrations.alert_files import place_of

__all__ = ["REPORT", "note_with", "with_report"]

#: Where a run keeps the report of its stream.
REPORT = "ood/report.html"

_BEGIN, _END = "<!-- ood-monitor:begin -->", "<!-- ood-monitor:end -->"
# No begin mark inside: if a user deleted an end mark, the text after it is the user's.
_BLOCK = re.compile(f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.DOTALL)
_HEX, _NUMBER = re.compile("[0-9a-f]{32}"), re.compile("[0-9]+")
_NOTE_LIMIT = 8000  # MLflow cuts longer tag values, which would cut the user's text
_NAMED = 5  # layers, terms and samples that are named, of each


def note_with(note: str, alert: Alert, run_id: str = "", graver: Alert | None = None) -> str | None:
    """A note with what it says of `alert` in the place of what it said of the one before.

    What a user wrote stays as it is. None if there is no room. With the run's id it has a picture,
    and with the alert of what is graver and stands, since when that does.
    """
    block = _block(alert, run_id, graver)
    changed, found = _BLOCK.subn(lambda _: block, note, count=1)
    if not found:
        changed = f"{note}\n\n{block}" if note else block
    return None if len(changed) > _NOTE_LIMIT else changed


def with_report(note: str, experiment_id: str, run_id: str) -> str:
    """A note whose paragraph of ours links the run's report, in its first lines.

    It links MLflow's own page of the file, which shows it; the file's address downloads it.
    """
    if not (_NUMBER.fullmatch(experiment_id) and _HEX.fullmatch(run_id)):
        return note
    address = f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{REPORT}"

    def linked(found: re.Match[str]) -> str:
        first, mark, rest = found[0].partition("\n\n")
        return found[0] if address in first else f"{first} [Report]({address}).{mark}{rest}"

    changed = _BLOCK.sub(linked, note, count=1)
    return note if len(changed) > _NOTE_LIMIT else changed


def _block(alert: Alert, run_id: str, graver: Alert | None) -> str:
    """What the note says of `alert`, in Markdown, between our marks.

    MLflow's page shows four lines until it is asked for more: these have status, since when, and
    what to do.
    """
    time, guidance = alert.time.isoformat(" ", "seconds"), guidance_of(gravest_of(alert))
    place = place_of(alert)
    text = (
        f"**ood-monitor: {alert.status}** since {markdown_text(since_of(alert))} ({alert.kind}, "
        f"stream {markdown_code(alert.stream)}, {alert.samples_seen:,} samples seen, {time}). "
        f"{_standing(alert, graver)}**Do now:** {markdown_text(guidance.do)}\n\n"
        f"{_picture(alert, run_id)}{markdown_text(alert.message)}\n\n"
        f"{markdown_code(guidance.command)}\n\n{markdown_text(guidance.means_not)}\n\n"
        f"{_layers(alert.top_layers)}{_terms(alert.top_terms)}{_samples(alert.samples)}"
        f"Evidence: {markdown_code(f'{place}.json')}, picture: "
        f"{markdown_code(f'{place}.png')}, help: {markdown_code(alert.help)}"
    )
    return f"{_BEGIN}\n{text}\n{_END}"


def _standing(alert: Alert, graver: Alert | None) -> str:
    """What is graver than the alert, and stands; since when, if that is known."""
    first = gravest_of(alert)
    if first == alert.kind:
        return ""
    since = ""
    if graver is not None and graver.kind == first:
        since = f" since {markdown_text(since_of(graver))}"
    means = markdown_text(guidance_of(first).means)
    return f"**{first.replace('_', ' ')} stands{since}:** {means} "


def _picture(alert: Alert, run_id: str) -> str:
    """The alert's figure, by an address below the tracking server's own page."""
    if not (_HEX.fullmatch(run_id) and _HEX.fullmatch(alert.id)):
        return ""  # of another form, which may be more than an id
    path = f"{place_of(alert)}.png"
    return f"![Picture of the alert](get-artifact?path={path}&run_uuid={run_id})\n\n"


def _layers(layers: tuple[LayerShare, ...]) -> str:
    named = [markdown_code(layer.layer) for layer in layers[:_NAMED]]
    return f"Layers: {', '.join(named)}\n\n" if named else ""


def _terms(terms: tuple[TermShare, ...]) -> str:
    named = [f"{markdown_code(term.term)} {term.share or 0:.0%}" for term in terms[:_NAMED]]
    return f"Terms: {', '.join(named)}\n\n" if named else ""


def _samples(samples: tuple[FlaggedSample, ...]) -> str:
    named = [markdown_code(sample.id) for sample in samples if sample.id is not None][-_NAMED:]
    return f"Samples: {', '.join(named)}\n\n" if named else ""
