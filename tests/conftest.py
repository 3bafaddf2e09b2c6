"""Configures pytest: eight simulated CPU devices, and implicit rank promotion in JAX is an error."""

import os

import jax

# Set before JAX creates a device. Processes that tests start set their own number of devices.
os.environ.pop("XLA_FLAGS", None)
if isa := os.environ.get("MAX_ISA"):  # such as AVX2: the vector units of another processor round otherwise
    os.environ["XLA_FLAGS"] = f"--xla_cpu_max_isa={isa}"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
