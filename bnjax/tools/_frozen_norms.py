"""Batch normalization that runs on its running statistics in a model that trains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from bnjax.tools import _trees
from bnjax.tools._layers import Call, handling, is_norm


@contextmanager
def frozen_norms(layers: Sequence[str] | None = None) -> Iterator[None]:
    r"""Within it, linen batch normalization layers run on their running statistics and leave them as they are.

    .. math:: y = \frac{x - \mathrm{mean}_\text{running}}{\sqrt{\mathrm{var}_\text{running} + \epsilon}}
              \cdot \mathrm{scale} + \mathrm{bias}

    Fine-tuning with frozen batch normalization, for a model whose own `train` flag also turns dropout on. It may stand
    inside a jitted function or around its calls. Gradients still flow to scale and bias; see
    :func:`affine_labels` to freeze these. For nnx modules use
    `model.set_attributes(nnx.BatchNorm, use_running_average=True)`, and `False` to unfreeze.

    Args:
      layers: patterns of the layers to freeze, such as `"block1/*"`; all by default.

    Returns:
      A context manager.

    Raises:
      ValueError: `layers` is one string instead of a sequence.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> norm, x = bnjax.linen.BatchNorm(use_running_average=False), jnp.array([[4.0], [6.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> with tools.frozen_norms():
      ...     print(jnp.round(norm.apply(variables, x)).T)
      [[4. 6.]]
    """
    if isinstance(layers, str):
        raise ValueError(f"layers must be a sequence of patterns; got the string {layers!r}: write [{layers!r}].")

    chosen = None if layers is None else tuple(layers)

    def run(call: Call) -> jax.Array:
        named = chosen is None or any(_trees.matches(call.path, p) for p in chosen)
        if is_norm(call.module) and named:
            return call.run_on_running_average(call.x)
        return call.run(call.x)

    with handling(run, key=("frozen", chosen)):
        yield
