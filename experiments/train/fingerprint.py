"""Hashes a training state into a short text: two runs with the same text have the same bits in every array."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import RunError


def fingerprint(state: Any) -> str:
    """Returns twelve hexadecimal digits of a hash over every array; raises if two devices hold different values.

    Args:
        state: any tree of arrays, replicated over their devices.

    Raises:
        RunError: two devices of this process hold different values.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(state):
        first, *others = [np.asarray(shard.data).tobytes() for shard in jnp.asarray(leaf).addressable_shards]
        if any(other != first for other in others):
            raise RunError(f"the devices of this process hold different values of {jax.tree_util.keystr(path)}")
        digest.update(first)
    return digest.hexdigest()[:12]
