"""bnjax's batch normalization in a linen model that was written with Flax's, without editing the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

import bnjax.linen
from bnjax.tools._described import is_flax
from bnjax.tools._frozen_norms import refuse_where_code_pauses
from bnjax.tools._layers import Call, handling, no_handling
from bnjax.tools._swap import check_fields


@contextmanager
def swapped_norms(**fields: Any) -> Iterator[None]:
    r"""Runs `flax.linen.BatchNorm` layers as `bnjax.linen.BatchNorm` does, with the same variables.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    For a linen model that somebody else wrote: open it around `init` and `apply`, or inside the jitted function.
    Variables, names and shapes are Flax's, so that a checkpoint fits with it and without it. Masks are exact, and one
    call gives all layers an `axis_name`, as `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does.

    It holds for one thread, and must be entered in an ordinary function, as :func:`frozen_norms`.

    Args:
      fields: fields for all the layers, as in :func:`swap`. With `debias`, `count_skipped`, and a `momentum` that is
        None or a function, the layers count batches in further variables: then `init` must run within it too.

    Returns:
      A context manager.

    Raises:
      ValueError: another field.
      RuntimeError: entered in a coroutine or a generator.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from bnjax import tools
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[1.0], [3.0], [jnp.nan]])
      >>> variables = model.init(jax.random.key(0), x[:2])
      >>> mask = jnp.array([[True], [True], [False]])
      >>> with tools.swapped_norms(momentum=0.5):
      ...     y, updates = model.apply(variables, x, mask=mask, mutable=["batch_stats"])
      >>> print(jnp.round(y[:2], 2).ravel(), updates["batch_stats"]["mean"])
      [-1.  1.] [1.]
    """
    check_fields(fields)
    refuse_where_code_pauses("swapped_norms")

    def run(call: Call) -> jax.Array:
        module = call.module
        if isinstance(module, nnx.Module) or not is_flax(module):
            return call.run(call.x)
        own = {k: getattr(module, k) for k in nn.BatchNorm.__dataclass_fields__ if k not in ("parent", "name")}
        ours = bnjax.linen.BatchNorm(**{**own, **fields}, parent=module.scope)
        options = dict(call.options)
        if "use_running_average" in fields:
            options.pop("use_running_average", None)
        with no_handling():
            return ours(call.x, **options)

    key = tuple(sorted((name, _hashable(value)) for name, value in fields.items()))
    with handling(run, key=("swapped", key)):
        yield


def _hashable(value: Any) -> Any:
    """Returns lists as tuples, so that the value can be hashed."""
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
