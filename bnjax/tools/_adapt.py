"""Adaptation at test time, and teachers that follow a student."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped, unused-ignore]

from bnjax.tools import _trees
from bnjax.tools._decay_mask import affine_labels
from bnjax.tools._sound import check_variances
from bnjax.tools._trees import show


def adapt_statistics(variables: Any, moments: Mapping[str, Any], *, prior: float, samples: float) -> Any:
    r"""Mixes the statistics of training with those of the data met now; the old ones weigh as `prior` samples.

    .. math::
        \mathrm{mean} = \frac{N \mu_s + n \mu_t}{N + n}, \qquad
        \mathrm{var} = \frac{N \sigma^2_s + n \sigma^2_t}{N + n}

    The source s is the training data, the target t what `moments` is about: often a few images of a shifted
    distribution (blur, noise, another camera). The variances are averaged as they are, without the distance of the
    means: what is wanted is the statistics of one of the two distributions, not of both together.

    Args:
      variables: a tree with statistics of any shapes.
      moments: of the target, as :func:`collect_moments` gives them with `use_running_average=False`, or a training call
        of linen layers in the collection `moments`.
      prior: N, the samples that the statistics of training are worth: 0 uses the target alone, and with N far above
        n nothing changes. Choose it on data that was not trained on.
      samples: n, the samples (images, not positions) behind `moments`.

    Returns:
      The tree with mixed statistics. A channel that no row counted in keeps its own.

    Raises:
      ValueError: no statistics in the tree; layers or shapes of `moments` that do not fit; prior or samples negative,
        or both zero.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> variables = {"batch_stats": {"bn": {"mean": jnp.array([0.0]), "var": jnp.array([1.0])}}}
      >>> moments = {"bn": bnjax.Moments(jnp.array([4.0]), jnp.array([2.0]), jnp.array([64.0]))}
      >>> tools.adapt_statistics(variables, moments, prior=3, samples=1)["batch_stats"]
      {'bn': {'mean': Array([1.], dtype=float32), 'var': Array([1.25], dtype=float32)}}

    References:
      Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation",
      https://arxiv.org/abs/2006.16971, section 3.
    """
    if not (prior >= 0 and samples >= 0 and prior + samples > 0):
        raise ValueError(f"prior and samples must not be negative, nor both zero; got {prior} and {samples}.")
    tree = check_variances(_trees.flatten_with_layers(variables))
    layers = {show(layer): layer for layer in tree.layers}
    target = _trees.by_layer(moments)
    if set(layers) != set(target):
        raise ValueError(f"moments must be those of the layers {sorted(layers)}; got those of {sorted(target)}.")
    share = samples / (prior + samples)

    def mixed(name: str, role: str) -> jax.Array:
        source, m = tree.stats(layers[name])[role], target[name]
        if jnp.shape(m.mean) != source.shape:
            raise ValueError(f"moments of {name} have shape {jnp.shape(m.mean)}, its statistics {source.shape}.")
        met = (m.count > 0) & jnp.isfinite(m.mean) & jnp.isfinite(m.var)
        # not source + share·(target − source): that is not exact at share = 1
        return jnp.where(met, (1 - share) * source + share * getattr(m, role), source)

    return tree.replace({layers[name]: {role: mixed(name, role) for role in ("mean", "var")} for name in target})


def entropy(logits: jax.Array, *, axis: int = -1) -> jax.Array:
    r"""The entropy of the predictions: the loss of Tent.

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


def tent(optimizer: optax.GradientTransformation, params: Any, batch_stats: Any) -> optax.GradientTransformation:
    r"""The optimizer of Tent: trains the scale and bias of batch normalization and nothing else.

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


def follow(teacher: Any, student: Any, *, momentum: jax.Array | float = 0.999) -> Any:
    r"""A step of an EMA teacher whose statistics follow the student's, as its weights do (EMAN).

    .. math:: \theta_\text{teacher} \leftarrow m\,\theta_\text{teacher} + (1 - m)\,\theta_\text{student},
              \qquad \theta = (\mathrm{params}, \mathrm{mean}, \mathrm{var})

    The teacher then runs with `use_running_average=True`, and never on the statistics of its own batch: what those say
    about the other images of the batch leaks into self-supervised training, and statistics that the averaged weights
    have never met make it unstable.

    Args:
      teacher: all the variables of the teacher, leaves of any shapes; or an nnx state.
      student: those of the student, of the same structure.
      momentum: the weight of the OLD value, in [0, 1]; may be traced.

    Returns:
      The new variables of the teacher, in their dtypes. Integers are the student's.

    Raises:
      ValueError: no statistics in the tree, another structure or other shapes, or a momentum outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> teacher = {"params": {"scale": jnp.array([1.0])}, "batch_stats": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}
      >>> student = {"params": {"scale": jnp.array([2.0])}, "batch_stats": {"mean": jnp.ones(1), "var": jnp.ones(1)}}
      >>> teacher = tools.follow(teacher, student, momentum=0.75)
      >>> print(teacher["params"]["scale"], teacher["batch_stats"]["mean"])
      [1.25] [0.25]

    References:
      Cai et al. 2021, "Exponential Moving Average Normalization for Self-supervised and Semi-supervised Learning",
      https://arxiv.org/abs/2101.08482, section 3.2.
    """
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= float(momentum) <= 1:
        raise ValueError(f"momentum is the weight of the OLD value and must be in [0, 1]; got {momentum!r}.")
    old, new = _trees.flatten_with_layers(teacher), _trees.flatten_with_layers(student)
    shapes = [dict(zip(t.names, map(jnp.shape, t.leaves), strict=True)) for t in (old, new)]
    if shapes[0] != shapes[1]:
        differing = sorted(show(n) for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
        raise ValueError(f"teacher and student must have the same leaves; they differ in {differing}.")

    def step(a: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.result_type(a), jnp.inexact):
            return b
        wide = jnp.promote_types(jnp.result_type(a), jnp.float32)  # in bfloat16 a step of 1 − m is lost
        return (momentum * jnp.asarray(a, wide) + (1 - momentum) * jnp.asarray(b, wide)).astype(jnp.result_type(a))

    return old.build([step(a, b) for a, b in zip(old.leaves, new.leaves, strict=True)])
