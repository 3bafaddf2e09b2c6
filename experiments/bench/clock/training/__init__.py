"""Times a training step of ResNet-20 in every library: `python -m experiments.bench.clock.training`."""
