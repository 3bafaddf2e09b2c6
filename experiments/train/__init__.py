"""The main job: `python -m experiments.train` trains a network with batch normalization on real images."""
