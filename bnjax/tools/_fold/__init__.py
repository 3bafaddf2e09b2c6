"""Folding batch normalization into the layers around it: the flow of the traced model, the pairs, the arithmetic."""
