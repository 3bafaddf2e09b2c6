"""Tests fold: what is folded, what is left and why, in linen and nnx."""
