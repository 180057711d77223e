"""The paragraph that an alert leaves in a run's note, between marks of its own."""

import re

from ood_monitor.alerts import Alert, FlaggedSample, LayerShare, TermShare
from ood_monitor.alerts.guidance import gravest_of, guidance_of, since_of
from ood_monitor.escaping import markdown_code, markdown_text

__all__ = ["note_with"]

_BEGIN, _END = "<!-- ood-monitor:begin -->", "<!-- ood-monitor:end -->"
# No begin mark inside: if a user deleted an end mark, the text after it is the user's.
_BLOCK = re.compile(f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", re.DOTALL)
_NOTE_LIMIT = 8000  # MLflow cuts longer tag values, which would cut the user's text
_NAMED = 5  # layers, terms and samples that are named, of each


def note_with(note: str, alert: Alert) -> str | None:
    """A note with what it says of `alert` in the place of what it said of the one before.

    What a user wrote stays as it is. None if there is no room.
    """
    block = _block(alert)
    changed, found = _BLOCK.subn(lambda _: block, note, count=1)
    if not found:
        changed = f"{note}\n\n{block}" if note else block
    return None if len(changed) > _NOTE_LIMIT else changed


def _block(alert: Alert) -> str:
    """What the note says of `alert`, in Markdown, between our marks."""
    time = alert.time.isoformat(" ", "seconds")
    text = (
        f"**ood-monitor: {alert.status}** ({alert.kind}, stream {markdown_code(alert.stream)}, "
        f"{alert.samples_seen:,} samples seen, {time})\n\n{markdown_text(alert.message)}\n\n"
        f"**Since** {markdown_text(since_of(alert))}\n\n{_now(alert)}"
        f"{_layers(alert.top_layers)}{_terms(alert.top_terms)}{_samples(alert.samples)}"
        f"Evidence: {markdown_code(f'ood/alerts/{alert.id}.json')}, picture: "
        f"{markdown_code(f'ood/alerts/{alert.id}.png')}, help: {markdown_code(alert.help)}"
    )
    return f"{_BEGIN}\n{text}\n{_END}"


def _now(alert: Alert) -> str:
    """What to do first, and what it does not mean."""
    first = gravest_of(alert)
    guidance = guidance_of(first)
    stands = f"**{first.replace('_', ' ')} stands:** {markdown_text(guidance.means)}\n\n"
    return (
        f"{'' if first == alert.kind else stands}**Do now:** {markdown_text(guidance.do)}\n\n"
        f"{markdown_code(guidance.command)}\n\n"
        f"{markdown_text(guidance.means_not)}\n\n"
    )


def _layers(layers: tuple[LayerShare, ...]) -> str:
    named = [markdown_code(layer.layer) for layer in layers[:_NAMED]]
    return f"Layers: {', '.join(named)}\n\n" if named else ""


def _terms(terms: tuple[TermShare, ...]) -> str:
    named = [f"{markdown_code(term.term)} {term.share or 0:.0%}" for term in terms[:_NAMED]]
    return f"Terms: {', '.join(named)}\n\n" if named else ""


def _samples(samples: tuple[FlaggedSample, ...]) -> str:
    named = [markdown_code(sample.id) for sample in samples if sample.id is not None][-_NAMED:]
    return f"Samples: {', '.join(named)}\n\n" if named else ""
