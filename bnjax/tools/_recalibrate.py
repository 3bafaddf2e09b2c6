"""Population statistics instead of running averages: precise batch normalization, and the moments behind it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.functional import Moments, merge_moments
from bnjax.tools import _trees
from bnjax.tools._layers import Program, program
from bnjax.tools._moments import Settled, layer_moments
from bnjax.tools._trees import Path, show

Progress = Callable[[int], None] | bool
Totals = dict[Path, Moments]

_EMPTY = "batches is empty: there is nothing to take statistics of."


def recalibrate(
    apply_fn: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    layerwise: bool = False,
    layers: Sequence[str] | None = None,
    progress: Progress = True,
) -> Any:
    r"""Statistics of the population instead of running averages (precise BN), for the weights as they are.

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
      statistics), https://arxiv.org/abs/1809.11096, section 4.1.
    """
    model = program(apply_fn, variables)
    passes = _Passes(model, batches, layers, progress)
    if not layerwise:
        return _with_stats(variables, passes.changing(passes.totals(model.state, {})))
    if isinstance(batches, Iterator):
        raise ValueError("layerwise goes through the batches once for each layer: pass a sequence, not an iterator.")
    state, settled = model.state, dict.fromkeys(passes.changing(passes.order()), False)
    for layer in settled:
        state = _with_stats(state, {layer: passes.totals(state, settled)[layer]})
        settled[layer] = True
    return _trees.flatten(variables).replace({layer: _trees.flatten(state).stats(layer) for layer in settled})


def collect_moments(
    apply_fn: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    use_running_average: bool = True,
    layers: Sequence[str] | None = None,
    progress: Progress = True,
) -> dict[str, Moments]:
    r"""The moments of the input of each batch normalization layer, over all rows of all batches.

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
    model = program(apply_fn, variables)
    settled = dict.fromkeys(_trees.flatten(model.state).layers, use_running_average)
    totals = _Passes(model, batches, layers, progress).totals(model.state, settled)
    return {show(layer): moments for layer, moments in totals.items()}


class _Passes:
    """Passes of one jitted program over the batches."""

    def __init__(self, model: Program, batches: Iterable[Any], layers: Sequence[str] | None, progress: Progress):
        self.batches, self.progress = batches, progress
        self.tree = _trees.flatten_with_layers(model.state)
        self.chosen = _trees.select(self.tree.layers, layers)
        self._ran: list[Path] = []
        self._constant: frozenset[Path] = frozenset()
        self._step = jax.jit(partial(self._add, model))

    def totals(self, state: Any, settled: Settled) -> Totals:
        """The moments of all the batches; `settled` layers normalise by their running averages."""
        settled = {layer: jnp.asarray(settled.get(layer, layer not in self.chosen)) for layer in self.tree.layers}
        start = totals = self._start()
        for batch in shown(self.batches, self.progress):
            totals = self._step(state, settled, totals, batch)
        if totals is start:
            raise ValueError(_EMPTY)
        return totals

    def changing(self, layers: dict[Path, Any]) -> dict[Path, Any]:
        """Without those whose statistics stay; known once the program was traced."""
        changing = {layer: value for layer, value in layers.items() if layer not in self._constant}
        if not changing:
            raise ValueError(
                f"{[show(layer) for layer in layers]} are of FrozenBatchNorm, whose statistics are constants: there is "
                "nothing to recalibrate. With BatchNorm in its place there is: the variables are the same."
            )
        return changing

    def order(self) -> dict[Path, None]:
        """The chosen layers in the order in which they run."""
        for batch in self.batches:
            settled = dict.fromkeys(self.tree.layers, jnp.asarray(False))
            self._step.eval_shape(self.tree.build(self.tree.leaves), settled, self._start(), batch)
            return dict.fromkeys(layer for layer in self._ran if layer in self.chosen)
        raise ValueError(_EMPTY)

    def _start(self) -> Totals:
        return {layer: _nothing(self.tree.stats(layer)["mean"]) for layer in self.chosen}

    def _add(self, model: Program, state: Any, settled: Settled, totals: Totals, batch: Any) -> Totals:
        found, self._constant = layer_moments(model, state, batch, settled)
        self._ran = list(found)
        missing = [show(layer) for layer in self.chosen if layer not in found]
        if missing:
            raise ValueError(
                f"apply_fn ran no Flax or bnjax BatchNorm for the statistics of {missing}. Name the layers that run in "
                "layers=[...]; statistics of modules of other classes cannot be recalibrated."
            )
        return {layer: merge_moments(totals[layer], found[layer]) for layer in self.chosen}


def _nothing(like: jax.Array) -> Moments:
    zero = jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32))
    return Moments(zero, zero.real, zero.real)  # the mean of complex inputs is complex, and nothing else


def _with_stats(variables: Any, totals: Totals) -> Any:
    empty = [show(layer) for layer, m in totals.items() if not bool(jnp.all(m.count > 0))]
    if empty:
        raise ValueError(
            f"no batch gave finite moments to some channels of {empty}: the activations there are NaN or infinite, or "
            "every position is masked. Check the weights before the first of these layers."
        )
    return _trees.flatten(variables).replace({layer: {"mean": m.mean, "var": m.var} for layer, m in totals.items()})


def shown(batches: Iterable[Any], progress: Progress) -> Iterator[Any]:
    """The batches, with a bar on the first process, or a call of `progress` after each."""
    if callable(progress):
        for done, batch in enumerate(batches, start=1):
            yield batch
            progress(done)
        return
    bar = _bar() if progress and jax.process_index() == 0 else None
    yield from batches if bar is None else bar(batches, desc="batches", disable=None)


def _bar() -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:  # a bar is a comfort: nothing depends on it
        return None
    return tqdm
