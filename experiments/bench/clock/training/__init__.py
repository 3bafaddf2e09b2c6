"""`python -m experiments.bench.clock.training`: a training step of ResNet-20 in every library."""
