"""Batch normalization as flax.linen modules."""

from bnjax.linen.batch_norm import BatchNorm as BatchNorm
