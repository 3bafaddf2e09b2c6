"""Tests of the modules for flax.linen and flax.nnx."""
