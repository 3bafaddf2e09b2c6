"""Trains a network with batch normalization on real images: `python -m experiments.train`."""
