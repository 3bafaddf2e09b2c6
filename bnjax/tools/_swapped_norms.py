"""bnjax's batch normalization in a linen model that was written with Flax's, without editing the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

import bnjax.linen
from bnjax.functional import _module
from bnjax.tools._described import is_flax, is_norm, own_class, unsaid
from bnjax.tools._frozen_norms import refuse_where_code_pauses
from bnjax.tools._layers import Call, handling, no_handling
from bnjax.tools._masked_norms import masked_norms
from bnjax.tools._swap import check_fields
from bnjax.tools._trees import show


@contextmanager
def swapped_norms(
    *,
    copies: Sequence[type[nn.Module]] = (),
    mask: jax.Array | Callable[[jax.Array], Any] | None = None,
    **fields: Any,
) -> Iterator[None]:
    r"""Runs `flax.linen.BatchNorm` layers as `bnjax.linen.BatchNorm` does, with the same variables.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    For a linen model that somebody else wrote: open it around `init` and `apply`, or inside the jitted function.
    Variables, names and shapes are Flax's, so that a checkpoint fits with it and without it. Masks are exact, those
    that the model passes and one that is given here, and one call gives all layers an `axis_name`, as
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does.

    It holds for one thread, and must be entered in an ordinary function, as :func:`frozen_norms`.

    Args:
      copies: classes that compute what `flax.linen.BatchNorm` does, with the same variables and names of fields: some
        packages have a copy of it. They run as bnjax's layer too, except in `init`.
      mask: for all layers to which the model gives none, as in :func:`masked_norms`.
      fields: fields for all the layers, as in :func:`swap`. With `debias`, `count_skipped`, and a `momentum` that is
        None or a function, the layers count batches in further variables: then `init` must run within it too.

    Returns:
      A context manager.

    Raises:
      ValueError: another field; or, when it runs, a layer with a running mean and variance that is neither Flax's,
        nor bnjax's, nor in `copies`.
      TypeError: `copies` holds something else than linen classes.
      RuntimeError: entered in a coroutine or a generator.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from bnjax import tools
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[1.0], [3.0], [jnp.nan]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> with tools.swapped_norms(momentum=0.5, mask=jnp.array([True, True, False])):
      ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
      >>> print(jnp.round(y[:2], 2).ravel(), updates["batch_stats"]["mean"])
      [-1.  1.] [1.]
    """
    check_fields(fields)
    copies = tuple(copies)
    if not all(isinstance(cls, type) and issubclass(cls, nn.Module) for cls in copies):
        raise TypeError(f"copies must hold classes of linen modules; got {copies}.")
    refuse_where_code_pauses("swapped_norms")

    def run(call: Call) -> jax.Array:
        module = call.module
        if isinstance(module, nnx.Module) or not is_norm(module):
            return call.run(call.x)
        if not is_flax(module) and not isinstance(module, copies):
            if unsaid(module):
                name = own_class(module).__name__
                raise ValueError(
                    f"{show(call.path)}: {name} holds a running mean and variance, is not Flax's BatchNorm, and "
                    f"would stay as it is. If it computes the same, write swapped_norms(copies=[{name}])."
                )
            return call.run(call.x)
        names = set(nn.BatchNorm.__dataclass_fields__) - {"parent", "name"}
        own = {name: getattr(module, name) for name in names if hasattr(module, name)}
        ours = bnjax.linen.BatchNorm(**{**own, **fields}, parent=module.scope)
        options = dict(call.options)
        if "use_running_average" in fields:
            options.pop("use_running_average", None)
        if not module.is_initializing():
            options["mask"] = _module.mask_around(call.x, options.get("mask"))
        with no_handling():
            return ours(call.x, **options)

    key = tuple(sorted((name, _hashable(value)) for name, value in fields.items()))
    with handling(run, key=("swapped", copies, key)), nullcontext() if mask is None else masked_norms(mask):
        yield


def _hashable(value: Any) -> Any:
    """Returns lists as tuples, so that the value can be hashed."""
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
