"""Judging a listener: a benchmark of our own, scorers and baselines, a map of what it hears, the report."""
