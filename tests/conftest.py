"""Configures pytest: eight simulated CPU devices, and implicit rank promotion in JAX is an error."""

import os

import jax

# Before any device is asked for. Processes that tests start must count their own devices.
os.environ.pop("XLA_FLAGS", None)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
