"""Accelerate: loops of one's own, in one process or in several."""
