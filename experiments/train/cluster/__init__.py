"""Finds the processes that train together and brings them together, before JAX connects them."""
