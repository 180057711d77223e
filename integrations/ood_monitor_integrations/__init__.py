"""One module per framework; each imports its framework plainly and nothing else does."""
