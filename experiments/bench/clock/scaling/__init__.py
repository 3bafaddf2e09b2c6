"""`python -m experiments.bench.clock.scaling`: how the time of a layer grows."""
