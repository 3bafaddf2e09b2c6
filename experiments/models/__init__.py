"""The networks that experiments train; each takes its normalization as an argument."""
