"""Experiments with bnjax: real data, every device, numbers that can be checked. `python -m experiments` lists them."""
