"""A mask for all batch normalization layers of a model that passes none on."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax

from bnjax.functional import _module
from bnjax.tools._described import is_norm, own_class
from bnjax.tools._frozen_norms import refuse_where_code_pauses
from bnjax.tools._layers import Call, handling
from bnjax.tools._trees import show


@contextmanager
def masked_norms(mask: jax.Array | Callable[[jax.Array], Any]) -> Iterator[None]:
    r"""Gives a mask to all batch normalization layers of a model that passes none on, while the context is open.

    .. math:: \mathrm{mean} = \frac{\sum_i m_i x_i}{\sum_i m_i}, \qquad
              \mathrm{var} = \frac{\sum_i m_i\,|x_i - \mathrm{mean}|^2}{\sum_i m_i}

    For padded rows, frames or nodes in a model that somebody else wrote. In linen it reaches bnjax's layers and Flax's,
    which open :func:`swapped_norms` beside it makes exact; in nnx those of bnjax, which :func:`swap` puts in. Layers to
    which the model gives a mask keep that one, and `init` needs none. Only statistics leave the padding out: a
    convolution still reads what lies there.

    Open it inside the jitted function, with the mask among its arguments; around it, each opening compiles anew. It
    holds for one thread, and must be entered in an ordinary function, as :func:`frozen_norms`.

    Args:
      mask: non-negative weights as in :func:`bnjax.batch_norm`, of the first axes of every x: `[N]` for rows, `[N, T]`
        or `[N, T, 1]` for frames. Or a function that is given the x of each layer and returns a mask that is
        broadcastable to it, for networks whose layers meet several sizes.

    Returns:
      A context manager.

    Raises:
      ValueError: the mask does not fit to the x of a layer, a layer takes none, or no layer was met.
      RuntimeError: entered in a coroutine or a generator.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from bnjax import tools
      >>> model = nn.Sequential([nn.BatchNorm(use_running_average=False, momentum=0.0), nn.relu])
      >>> x, rows = jnp.array([[1.0], [3.0], [jnp.nan]]), jnp.array([True, True, False])
      >>> variables = model.init(jax.random.key(0), x)
      >>> with tools.swapped_norms(), tools.masked_norms(rows):
      ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
      >>> print(updates["batch_stats"]["layers_0"]["mean"])
      [2.]
    """
    refuse_where_code_pauses("masked_norms")
    before = _module.times_asked()
    with handling(_run), _module.masking(mask):
        yield
        if _module.times_asked() == before:
            raise ValueError(
                "no batch normalization layer asked for the mask. In nnx only bnjax's do: tools.swap(model) puts them "
                "in."
            )


def _run(call: Call) -> jax.Array:
    """Runs a layer with the mask around it: in linen, and in nnx where a tool looks on (otherwise those of nnx ask)."""
    if not is_norm(call.module):
        return call.run(call.x)
    starting = isinstance(call.module, nn.Module) and call.module.is_initializing()
    mask = None if starting else _module.mask_around(call.x, call.options.get("mask"))
    if mask is None:
        return call.run(call.x)
    cls = own_class(call.module)
    if "mask" in inspect.signature(cls.__call__).parameters:
        return call._replace(options={**call.options, "mask": mask}).run(call.x)
    before = _module.times_asked()
    y = call.run(call.x)  # perhaps swapped for a layer that asks
    if _module.times_asked() == before:
        raise ValueError(f"{show(call.path)}: the __call__ of {cls.__name__} takes no mask.")
    return y
