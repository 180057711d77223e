"""The monitor: a detector on a stream, which decides, remembers and tells the sinks."""

from ood_monitor.monitor.discoveries import Discoveries
from ood_monitor.monitor.monitor import Monitor

__all__ = ["Discoveries", "Monitor"]
