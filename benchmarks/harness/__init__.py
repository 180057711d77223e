"""What benchmarks share: time, memory, claims, models and pages."""
