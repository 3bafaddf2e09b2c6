"""Adaptation at test time, and teachers that follow a student."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped, unused-ignore]

from bnjax.tools import _trees
from bnjax.tools._decay_mask import affine_labels
from bnjax.tools._moments import gathered
from bnjax.tools._passes import Passes
from bnjax.tools._sound import check_variances
from bnjax.tools._trees import show


def adapt_statistics(
    apply_fn: Callable[..., Any],
    variables: Any,
    x: Any,
    *,
    prior: float,
    samples: float | None = None,
    layers: Sequence[str] | None = None,
) -> Any:
    r"""Mixes the statistics of training with those of the data met now; the old ones weigh as `prior` samples.

    .. math::
        \mathrm{mean} = \frac{N \mu_s + n \mu_t}{N + n}, \qquad
        \mathrm{var} = \frac{N \sigma^2_s + n \sigma^2_t}{N + n}

    The source s is the training data, the target t what `x` holds: often a few images of a shifted distribution (blur,
    noise, another camera). The model runs once, and each layer normalises by its mixed statistics, so that the layers
    behind it meet the input that they will meet in evaluation. The variances are averaged as they are, without the
    distance of the means: what is wanted is the statistics of one of the two distributions, not of both together.

    It may run inside `jit` and `vmap`; outside, one program is compiled for each function and shape.

    Args:
      apply_fn: as in :func:`recalibrate`: for linen `apply_fn(variables, x)` returning `(output, updates)`, such as
        `functools.partial(model.apply, train=False, mutable=["batch_stats"])`; for an nnx module `apply_fn(module, x)`.
      variables: linen variables, or an nnx module.
      x: what `apply_fn` takes: all the target data that counts, as one batch.
      prior: N, the samples that the statistics of training are worth: 0 uses the target alone, and with N far above
        n nothing changes. Choose it on data that was not trained on.
      samples: n, the samples (images, not positions) in `x`; by default the size of its first axis.
      layers: patterns of the layers to adapt; all by default. The others normalise by the statistics that they have.

    Returns:
      The variables (for an nnx module a new module) with mixed statistics. A channel in which no row counted, or not
      all were finite, keeps its own, and so does a layer whose statistics are constants (FrozenBatchNorm).

    Raises:
      ValueError: no statistics in the tree, or broken ones; a layer that does not run or whose class does not say what
        it computes; prior or samples negative, or both zero, or samples unknown.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> norm, x = bnjax.linen.BatchNorm(use_running_average=True), jnp.array([[2.0], [6.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> apply_fn = functools.partial(norm.apply, mutable=["batch_stats"])
      >>> tools.adapt_statistics(apply_fn, variables, x, prior=6)["batch_stats"]
      {'mean': Array([1.], dtype=float32), 'var': Array([1.75], dtype=float32)}

    References:
      Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation",
      https://arxiv.org/abs/2006.16971, section 3.
    """
    samples = _samples_in(x) if samples is None else samples
    if not (prior >= 0 and samples >= 0 and prior + samples > 0):
        raise ValueError(f"prior and samples must not be negative, nor both zero; got {prior} and {samples}.")
    passes = Passes(apply_fn, variables, layers, progress=False)
    check_variances(passes.tree)
    share = prior / (prior + samples)
    mixed = {}
    for layer, stats in passes.step(dict.fromkeys(passes.chosen, share), x).items():
        old = passes.tree.stats(layer)
        met = gathered(stats, is_complex=jnp.iscomplexobj(old["mean"]))
        m = met.moments
        good = (m.count > 0) & jnp.isfinite(m.mean) & jnp.isfinite(m.var) & (met.constant == 0)
        mixed[layer] = {
            # not old + (1 − share)·(new − old): that is not exact at share = 0
            role: jnp.where(good, share * old[role] + (1 - share) * new, old[role])
            for role, new in (("mean", m.mean), ("var", m.var))
        }
    return passes.replaced(mixed)


def _samples_in(x: Any) -> int:
    """Returns the size of the first axis of all arrays in a batch."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "samples must say how many samples are in x, whose arrays have "
            f"{'first axes of different size' if sizes else 'no axis'}: pass samples=..."
        )
    return int(sizes.pop()[0])


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
      The new variables of the teacher, in their dtypes. Integers, and the counters `steps` and `skipped` of the layers,
      are the student's.

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

    Differences: none in what is averaged; the authors' program too copies the student's counter, `num_batches_tracked`.
    But here a counter may matter: with `debias`, `momentum=None` or a schedule it says how much the student's averages
    have taken, and the teacher's trail those. So let a teacher follow, and do not train it on.
    """
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= float(momentum) <= 1:
        raise ValueError(f"momentum is the weight of the OLD value and must be in [0, 1]; got {momentum!r}.")
    old, new = _trees.flatten_with_layers(teacher), _trees.flatten_with_layers(student)
    shapes = [dict(zip(t.names, map(jnp.shape, t.leaves), strict=True)) for t in (old, new)]
    if shapes[0] != shapes[1]:
        differing = sorted(show(n) for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
        raise ValueError(f"teacher and student must have the same leaves; they differ in {differing}.")

    counters = {at for roles in old.layers.values() for role, at in roles.items() if role in ("steps", "skipped")}

    def step(i: int, a: jax.Array, b: jax.Array) -> jax.Array:
        if i in counters or not jnp.issubdtype(jnp.result_type(a), jnp.inexact):
            return b
        wide = jnp.promote_types(jnp.result_type(a), jnp.float32)  # in bfloat16 a step of 1 − m is lost
        return (momentum * jnp.asarray(a, wide) + (1 - momentum) * jnp.asarray(b, wide)).astype(jnp.result_type(a))

    return old.build([step(i, *pair) for i, pair in enumerate(zip(old.leaves, new.leaves, strict=True))])
