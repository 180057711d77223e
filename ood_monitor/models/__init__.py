"""Reference generative models, for what no well-kept library carries."""

from ood_monitor.models.glow import Glow

__all__ = ["Glow"]
