"""What the callback and the inference hook add."""
