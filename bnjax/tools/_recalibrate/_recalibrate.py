"""Population statistics instead of running averages: precise batch normalization, and the moments behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bnjax.functional import Moments
from bnjax.tools._recalibrate._passes import Passes, in_jax
from bnjax.tools._recalibrate._progress import Progress
from bnjax.tools._trees import Path, show

if TYPE_CHECKING:
    import chex


def recalibrate(
    apply_fn: Callable[..., Any],
    variables: chex.ArrayTree,
    batches: Iterable[Any],
    *,
    layerwise: bool = False,
    layers: Sequence[str] | None = None,
    progress: Progress = True,
) -> Any:
    r"""Replaces running averages by the statistics of the population (precise BN), for the weights as they are.

    .. math::
        \mathrm{mean} = \frac{\sum n_i m_i}{\sum n_i}, \qquad
        \mathrm{var} = \frac{\sum n_i \bigl(v_i + (m_i - \mathrm{mean})^2\bigr)}{\sum n_i}

    over the batches i, each weighing as much as it has rows: partial batches and masks included. The running average
    trails the weights, and has noise of its own; the population is what they estimate. Recalibrate after training,
    after averaging weights (SWA, EMA: the statistics of no checkpoint on the way fit the average), after pruning or
    quantizing, when the data changed, and for the "standing statistics" of a GAN's generator (batches of latents).

    One pass gives each layer the moments of its input while the layers before it normalise by the batch, as they do in
    training: exact for the first layer, for every layer if all the data is one batch, and with an error of the order of
    1/rows per batch else. `layerwise` makes one pass for each layer, in the order in which they run, while the layers
    before it use their new statistics: exact in every layer for the network as it will be evaluated, at L times the
    price. Layers stacked by scan have one path and count as one layer: among themselves they are as in one pass.

    The layers of other kinds in `bnjax.linen` and `bnjax.nnx` get the statistics that their evaluation means:
    GhostBatchNorm and BatchRenorm those above, PowerNorm and MovingAverageBatchNorm the quadratic mean of all rows (and
    mean 0); FrozenBatchNorm keeps and uses its own; SplitBatchNorm, with rows for several domains, is refused.

    Everything runs in one jitted program: give sharded batches (the same number on every process) and each process ends
    with the same statistics. For batches that differ by process use :func:`merge_stats` on the results.

    Args:
      apply_fn: for linen `apply_fn(variables, batch)` returning `(output, updates)`, such as
        `functools.partial(model.apply, train=False, mutable=["batch_stats"])`; for an nnx module
        `apply_fn(module, batch)`. It may run the model in either mode, which is that of dropout: batch normalization
        (Flax's or bnjax's) normalises by the batch here and changes nothing else. Random numbers must come from the
        batch (a key in it).
      variables: linen variables, or an nnx module; with statistics of any shapes.
      batches: what `apply_fn` takes, one after another; with `layerwise` a sequence or loader that can be gone through
        again. 10^3 to 10^4 rows are enough for most networks.
      layerwise: exact in every layer, one pass for each.
      layers: patterns of the layers to recalibrate, such as `"generator/*"`; by default all, and all must run. The
        others keep their statistics and normalise by them.
      progress: True shows a bar where tqdm is installed; a function is called with the number of batches done.

    Returns:
      The variables with new statistics (for an nnx module a new module), all else as it was. A batch in which a
      channel is not finite does not count for that channel.

    Raises:
      ValueError: no statistics in the tree, no batches, a layer that does not run or that no batch gave finite moments
        for, layers that are all frozen or one with several sets of statistics, or an iterator that cannot be gone
        through again.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> norm = bnjax.linen.BatchNorm(use_running_average=True)
      >>> variables = norm.init(jax.random.key(0), jnp.ones((1, 1)))
      >>> apply_fn = functools.partial(norm.apply, mutable=["batch_stats"])
      >>> batches = [jnp.array([[0.0], [2.0], [4.0]]), jnp.array([[6.0]])]
      >>> tools.recalibrate(apply_fn, variables, batches)["batch_stats"]
      {'mean': Array([3.], dtype=float32), 'var': Array([5.], dtype=float32)}

      The average of the weights of a run, evaluated: `variables = {"params": averaged, "batch_stats": any_of_them}`.

    References:
      Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", https://arxiv.org/abs/2105.07576, section 3.
      Izmailov et al. 2018 (SWA), https://arxiv.org/abs/1803.05407, section 3.2. Brock et al. 2019 (BigGAN, standing
      statistics), https://arxiv.org/abs/1809.11096.

    Differences: fvcore's `update_bn_stats` averages the means and the variances of the batches, each batch as heavy as
    the others, so that the variance between the batches' means is left out; PyTorch's variances are unbiased, which
    makes up for it where rows are independent. Here all rows count as one batch.
    """
    passes = Passes(apply_fn, variables, layers, progress)
    if not layerwise:
        passes.update(passes.run(batches, {}, "recalibrate"))
        return passes.result()
    if isinstance(batches, Iterator):
        raise ValueError("layerwise goes through the batches once for each layer: pass a sequence, not an iterator.")
    weights: dict[Path, float] = {}
    order = passes.order(batches)
    for number, layer in enumerate(order, start=1):
        label = f"{show(layer)} ({number} of {len(order)})"
        passes.update({layer: passes.run(batches, weights, label)[layer]})
        weights[layer] = 1.0
    return passes.result()


def collect_moments(
    apply_fn: Callable[..., Any],
    variables: chex.ArrayTree,
    batches: Iterable[Any],
    *,
    use_running_average: bool = True,
    layers: Sequence[str] | None = None,
    progress: Progress = True,
) -> dict[str, Moments]:
    r"""Returns the moments of the input of each batch normalization layer, over all rows of all batches.

    .. math:: n = \sum w, \qquad m = \frac1n \sum w x, \qquad v = \frac1n \sum w (x - m)^2

    Args:
      apply_fn: as in :func:`recalibrate`.
      variables: linen variables, or an nnx module; with statistics of any shapes.
      batches: what `apply_fn` takes, one after another.
      use_running_average: normalise by the running averages, as in evaluation; False: by each batch, as in training.
      layers: patterns of the layers to look at; all by default.
      progress: True shows a bar where tqdm is installed; a function is called with the number of batches done.

    Returns:
      `{"block1/norm": Moments(mean, var, count), ...}`, each of the shape of the layer's statistics; about zero, with
      mean 0, for PowerNorm and MovingAverageBatchNorm, which keep those.

    Raises:
      ValueError: as :func:`recalibrate`.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, bnjax
      >>> from bnjax import tools
      >>> norm = bnjax.linen.BatchNorm(use_running_average=True)
      >>> variables = norm.init(jax.random.key(0), jnp.ones((1, 1)))
      >>> apply_fn = functools.partial(norm.apply, mutable=["batch_stats"])
      >>> moments = tools.collect_moments(apply_fn, variables, [jnp.array([[0.0], [2.0]]), jnp.array([[4.0]])])
      >>> moments["(the root)"].mean, moments["(the root)"].count
      (Array([2.], dtype=float32), Array([3.], dtype=float32))
    """
    passes = Passes(apply_fn, variables, layers, progress)
    weights = dict.fromkeys(passes.chosen, float(use_running_average))
    totals = passes.run(batches, weights, "collect_moments", others_train=not use_running_average)
    return {
        show(layer): Moments(*(in_jax(v, total.dtype) for v in (total.mean, total.var, total.count)))
        for layer, total in totals.items()
    }
