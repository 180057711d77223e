"""Names of the tags that runs and logged models carry."""

__all__ = ["DETECTOR", "METHOD", "SINCE", "STATUS"]

STATUS, SINCE = "ood_monitor.status", "ood_monitor.since"
DETECTOR, METHOD = "ood_monitor.detector", "ood_monitor.method"
