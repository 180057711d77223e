"""Names of the tags that runs, model versions and logged models carry."""

__all__ = [
    "ALERT_NUMBER",
    "DETECTOR",
    "METHOD",
    "NUMBER",
    "SINCE",
    "STATUS",
    "STATUS_OF",
    "STREAM",
    "of_stage",
]

STATUS, SINCE = "ood_monitor.status", "ood_monitor.since"
DETECTOR, METHOD = "ood_monitor.detector", "ood_monitor.method"

#: The stream that a run shows, the number of the latest that is shown of it, and the number of the
#: alert that the run's note tells of.
STREAM, NUMBER = "ood_monitor.stream", "ood_monitor.number"
ALERT_NUMBER = "ood_monitor.alert_number"

#: Of which model version a status is: a copy of a version carries the tags of its source.
STATUS_OF = "ood_monitor.status_of"


def of_stage(tag: str, stage: str | None) -> str:
    """A tag where several streams share a run: with the words of the stream behind it."""
    return tag if stage is None else f"{tag}.{stage.replace('/', '.')}"
