"""One short text for all the bits of a training state: two runs that show the same one are the same run."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import RunError


def fingerprint(state: Any) -> str:
    """Twelve hexadecimal digits that depend on every bit of every array, the same on every device that holds it.

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
