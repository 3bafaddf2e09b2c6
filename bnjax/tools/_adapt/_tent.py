"""Adaptation at test time by the entropy of the predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped, unused-ignore]

from bnjax.tools._decay_mask import affine_labels

if TYPE_CHECKING:
    import chex


def entropy(logits: jax.Array, *, axis: int = -1) -> jax.Array:
    r"""Computes the entropy of the predictions, the loss of Tent.

    .. math:: H = -\sum_k p_k \log p_k, \qquad p = \mathrm{softmax}(\mathrm{logits})

    Args:
      logits: `[..., K]`, any real dtype.
      axis: the axis over the classes.

    Returns:
      `[...]`, in nats, float32 at least.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> print(tools.entropy(jnp.array([[0.0, 0.0, -jnp.inf], [30.0, 0.0, 0.0]])).round(3))
      [0.693 0.   ]

    References:
      Wang et al. 2021, "Tent: Fully test-time adaptation by entropy minimization", https://arxiv.org/abs/2006.10726.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jax.nn.log_softmax(logits, axis)
    log_p = jnp.where(jnp.isneginf(log_p), 0, log_p)  # a class that cannot be contributes nothing, nor to gradients
    return -jnp.sum(jax.nn.softmax(logits, axis) * log_p, axis)


def tent(
    optimizer: optax.GradientTransformation, params: chex.ArrayTree, batch_stats: Any
) -> optax.GradientTransformation:
    r"""Returns the optimizer of Tent, which trains the scale and bias of batch normalization and nothing else.

    .. math:: (\mathrm{scale}, \mathrm{bias}) \leftarrow (\mathrm{scale}, \mathrm{bias})
              - \eta\,\nabla\,\mathrm{mean}\,H(\text{model}(x))

    Each batch x of test data is normalised by its own statistics and takes a step that lowers the :func:`entropy` of
    its predictions. In bnjax that is `use_running_average=False, update_stats=False`: the running averages stay those
    of training, and a reset to `params` brings the model back.

    Args:
      optimizer: any transformation, such as `optax.sgd(1e-3, momentum=0.9)`; weight decay has no place here.
      params: parameters of any shapes: the linen collection, or an nnx state of `nnx.Param`.
      batch_stats: the statistics of the same model.

    Returns:
      An `optax.GradientTransformation` for `params`.

    Raises:
      ValueError: `batch_stats` holds no statistics, or those of another model; or no layer has a scale or a bias.

    Examples:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, bnjax
      >>> from bnjax import tools
      >>> model = nn.Sequential([bnjax.linen.BatchNorm(use_running_average=False), nn.Dense(3)])
      >>> x = jax.random.normal(jax.random.key(0), (32, 4))
      >>> params, stats = (model.init(jax.random.key(1), x)[k] for k in ("params", "batch_stats"))
      >>> optimizer = tools.tent(optax.sgd(0.1), params, stats)
      >>> def loss(params):
      ...     logits, _ = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
      ...     return tools.entropy(logits).mean()
      >>> updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
      >>> adapted = optax.apply_updates(params, updates)
      >>> bool(loss(adapted) < loss(params))
      True
      >>> bool((adapted["layers_1"]["kernel"] == params["layers_1"]["kernel"]).all())
      True

    References:
      Wang et al. 2021, "Tent: Fully test-time adaptation by entropy minimization", https://arxiv.org/abs/2006.10726,
      section 3.
    """
    labels = affine_labels(params, batch_stats)
    if "affine" not in jax.tree.leaves(labels):
        raise ValueError("Tent trains the scale and bias of batch normalization, but no layer of params has either.")
    return optax.multi_transform({"affine": optimizer, "rest": optax.set_to_zero()}, labels)
