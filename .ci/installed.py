"""Run by .ci/run where the wheel alone is installed: it works, and brought in what it says it needs and no more."""

import re
from importlib import metadata

import jax
import jax.numpy as jnp

import bnjax
from bnjax import tools

assert "site-packages" in bnjax.__file__, bnjax.__file__
needed = {re.split(r"[^\w-]", r)[0] for r in metadata.requires("bnjax") or () if "extra" not in r}
assert needed == {"jax", "flax", "optax", "chex"}, needed
assert not {d.metadata["Name"] for d in metadata.distributions()} & {"pytest", "matplotlib", "torch", "grain", "tyro"}

norm, x = bnjax.BatchNorm(use_running_average=False), jnp.arange(12.0).reshape(4, 3)
variables = norm.init(jax.random.key(0), x)
y, updates = norm.apply(variables, x, mutable=["batch_stats"])
assert jnp.allclose(y.mean(0), 0, atol=1e-6) and jnp.allclose(y.std(0), 1, atol=1e-3)
print(tools.inspect(variables | updates))
