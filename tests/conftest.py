"""Configures pytest: eight simulated CPU devices, and implicit rank promotion in JAX is an error."""

import os

import jax

# Set before JAX creates a device. Processes that tests start set their own number of devices.
os.environ.pop("XLA_FLAGS", None)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
