"""Whether alerts arrive."""
