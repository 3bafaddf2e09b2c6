"""Kernels of convolutions without a mean, for layers that divide by a quadratic mean and subtract nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from bnjax.tools import _trees

if TYPE_CHECKING:
    import chex


def centre_kernels(params: chex.ArrayTree, *, layers: Sequence[str] | None = None) -> Any:
    r"""Subtracts from the kernels of convolutions their mean, for each output channel (weight centralization).

    .. math:: \tilde w_{s,i,o} = w_{s,i,o} - \frac{1}{SI} \sum_{s', i'} w_{s',i',o}

    over positions s and input channels i. MABN is published with it: :class:`bnjax.linen.MovingAverageBatchNorm`
    divides by the quadratic mean and subtracts no mean, so the kernel in front of it does, and without that it is
    another method. Use it inside the loss, so that the gradient passes through, and in evaluation; or store the centred
    kernels when training is over.

    Args:
      params: parameters of any shapes: a linen `params` collection, all the variables, an nnx state or an nnx module.
        Layers that scan or vmap stacked have one axis more: for their part of the tree use `jax.vmap(centre_kernels)`.
      layers: patterns of the layers whose kernels are centred, such as `["Conv_*", "stem"]`; by default all whose
        `kernel` has three axes or more. Those of `MultiHeadDotProductAttention` and of a `DenseGeneral` have as many:
        name the convolutions where there are such.

    Returns:
      The parameters, in their dtypes, with centred kernels; for an nnx module a new module.

    Raises:
      ValueError: there is no such kernel, or a pattern fits none.

    Examples:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, bnjax
      >>> from bnjax import tools
      >>> norm = bnjax.linen.MovingAverageBatchNorm(use_running_average=False)
      >>> model, x = nn.Sequential([nn.Conv(4, (3, 3), use_bias=False), norm]), jnp.ones((2, 8, 8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> params = variables.pop("params")
      >>> def loss(params):
      ...     centred = {**variables, "params": tools.centre_kernels(params)}
      ...     y, updates = model.apply(centred, x, mutable=["batch_stats"])
      ...     return y.var(), updates
      >>> grads, updates = jax.grad(loss, has_aux=True)(params)
      >>> bool(jnp.allclose(grads["layers_0"]["kernel"].mean((0, 1, 2)), 0, atol=1e-6))
      True

      The same for nnx:

      >>> from flax import nnx
      >>> norm = bnjax.nnx.MovingAverageBatchNorm(4, rngs=nnx.Rngs(1))
      >>> model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0)), norm)
      >>> graph, params, rest = nnx.split(model, nnx.Param, ...)
      >>> def loss(params):
      ...     centred = nnx.merge(graph, tools.centre_kernels(params), rest, copy=True)
      ...     return centred(x).var(), nnx.state(centred, nnx.BatchStat)
      >>> grads, updates = jax.grad(loss, has_aux=True)(params)
      >>> nnx.update(model, updates)

    References:
      Yan, Wan, Zhang, Zhang, Wei & Sun 2020, "Towards Stabilizing Batch Statistics in Backward Propagation of Batch
      Normalization", https://arxiv.org/abs/2001.06838; in the authors' program (https://github.com/megvii-model/MABN)
      `CenConv2d` takes the place of every convolution.
    """
    flat = _trees.flatten(params)
    kernels = {name[:-1]: i for i, name in enumerate(flat.names) if name[-1:] == ("kernel",)}
    kernels = {layer: i for layer, i in kernels.items() if layers is not None or jnp.ndim(flat.leaves[i]) > 2}
    if not kernels:
        raise ValueError("params holds no kernel of a convolution: no leaf 'kernel' with three axes or more.")
    leaves = list(flat.leaves)
    for layer in _trees.select(kernels, layers):
        kernel = leaves[kernels[layer]]
        leaves[kernels[layer]] = kernel - kernel.mean(range(kernel.ndim - 1), keepdims=True)
    return flat.build(leaves)
