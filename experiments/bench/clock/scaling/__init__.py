"""Measures how the time of a layer grows: `python -m experiments.bench.clock.scaling`."""
