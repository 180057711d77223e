"""What is claimed, measured: `python -m benchmarks.<folder>.<name> [--quick] [--json FILE]`."""
