"""Holds the variants of batch normalization, a file for each; `bnjax.functional` lists what is public."""
