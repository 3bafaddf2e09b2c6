"""Adaptation at test time by the statistics of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bnjax.tools._recalibrate._moments import gathered
from bnjax.tools._recalibrate._passes import Passes
from bnjax.tools._sound import check_variances

if TYPE_CHECKING:
    import chex


def adapt_statistics(
    apply_fn: Callable[..., Any],
    variables: chex.ArrayTree,
    x: Any,
    *,
    prior: float,
    samples: float | None = None,
    layers: Sequence[str] | None = None,
) -> Any:
    r"""Adapts the statistics of training to the data met now; the old ones weigh as `prior` samples.

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
