"""A table of the batch normalization layers, with what is wrong and what to do."""
