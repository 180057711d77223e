"""Accelerate: a detector in a loop of one's own, and alerts in its trackers.

::

    watch = AcceleratorMonitor(accelerator, model, adapter, sinks=[AcceleratorSink(accelerator)])
    watch.calibrate(held_out)
    alerts = watch.watch(shard)
"""

from ood_monitor_integrations.accelerate.monitor import AcceleratorMonitor
from ood_monitor_integrations.accelerate.sink import AcceleratorSink
from ood_monitor_integrations.accelerate.tracker import FileTracker

__all__ = ["AcceleratorMonitor", "AcceleratorSink", "FileTracker"]
