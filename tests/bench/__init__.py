"""Measurements: `python -m tests.bench NAME` prints a table and writes `runs/bench/NAME.json`.

Machines are noisy, so the contenders of one measurement take turns within one run and what counts is the
median of each and the ratio of the medians.
"""
