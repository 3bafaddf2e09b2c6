"""Tests of the programs in experiments/."""
