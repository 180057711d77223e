"""What the tests have in common: lists of cases, small models, servers and processes."""
