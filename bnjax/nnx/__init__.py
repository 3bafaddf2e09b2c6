"""Batch normalization as flax.nnx modules."""

from bnjax.nnx.batch_norm import BatchNorm as BatchNorm
