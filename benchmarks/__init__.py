"""What is claimed, measured: `python -m benchmarks.<name> [--quick] [--json FILE]`."""
