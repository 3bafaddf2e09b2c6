"""Passes of one compiled program over the batches; what the layers met is merged on the host in float64."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from bnjax.tools import _trees
from bnjax.tools._recalibrate._moments import Gathered, gathered, layers_in
from bnjax.tools._recalibrate._programs import compiled, refuse_missing
from bnjax.tools._recalibrate._progress import Progress, shown
from bnjax.tools._trees import Path, show

Array = np.ndarray[Any, Any]


class Total(NamedTuple):
    """The moments of a layer's input over all batches, each `[..., C]`, in float64; the mean may be complex."""

    mean: Array
    var: Array
    count: Array  # type: ignore[assignment]
    constant: bool  # whether the layer says that nothing changes its statistics
    dtype: Any  # in which JAX computed the variance


class Passes:
    """A model, its variables, and the layers whose moments are asked for."""

    def __init__(self, apply_fn: Callable[..., Any], variables: Any, layers: Sequence[str] | None, progress: Progress):
        self._graph, self._progress = None, progress
        if isinstance(variables, nnx.Module):
            self._graph, variables = nnx.split(variables)
        self.tree = _trees.flatten_with_layers(variables)
        self.chosen = _trees.select(self.tree.layers, layers)
        self._program = compiled(apply_fn, self._graph)

    def run(
        self, batches: Iterable[Any], weights: Mapping[Path, float], label: str, *, others_train: bool = False
    ) -> dict[Path, Total]:
        """Returns the moments that the chosen layers meet, over all batches; the layers in the order in which they run.

        Args:
          batches: what the model takes.
          weights: the weight of the running averages in the statistics that normalise, for layers where it is not 0.
          label: what the pass is about, for whoever waits.
          others_train: whether the layers that were not chosen normalise by the batch.
        """
        totals: dict[Path, Total] = {}
        ahead, order = None, self.chosen
        for batch in shown(batches, self._progress, label):
            # The batch was loaded while the device worked on the one before it. That one must have ended: all-reduces
            # of two programs at once would wait for each other where there are several processes.
            found = jax.block_until_ready(ahead)
            order = list(self._ran(batch, others_train)) if ahead is None else order
            ahead = self.step(weights, batch, others_train=others_train)
            if found is not None:
                totals = _added(totals, found)
        if ahead is None:
            raise ValueError(_EMPTY)
        totals = _added(totals, ahead)
        return {layer: totals[layer] for layer in order}

    def order(self, batches: Iterable[Any]) -> list[Path]:
        """Returns the chosen layers in the order in which they run, without those whose statistics are constants."""
        for batch in batches:
            ran = self._ran(batch, others_train=False)
            break
        else:
            raise ValueError(_EMPTY)
        refuse_missing([layer for layer, constant in ran.items() if constant is None])
        changing = [layer for layer, constant in ran.items() if not constant]
        _refuse_if_empty(changing, self.chosen)
        return changing

    def update(self, totals: Mapping[Path, Total]) -> None:
        """Puts the moments in the place of the running averages, except where these are constants.

        Raises:
          ValueError: there are only constants, or a channel has no moments.
        """
        changing = {layer: total for layer, total in totals.items() if not total.constant}
        _refuse_if_empty(changing, totals)
        unmet = [show(layer) for layer, total in changing.items() if not np.all(total.count > 0)]
        if unmet:
            raise ValueError(
                f"no batch gave finite moments to some channels of {unmet}: the activations there are NaN or infinite, "
                "or every position is masked. Check the weights before the first of these layers."
            )
        leaves = list(self.tree.leaves)
        for layer, total in changing.items():
            for role, new in (("mean", total.mean), ("var", total.var)):
                at = self.tree.layers[layer][role]
                leaves[at] = _in_place_of(leaves[at], in_jax(new, total.dtype))
        self.tree = self.tree._replace(leaves=leaves)

    def step(self, weights: Mapping[Path, float], batch: Any, *, others_train: bool = False) -> Any:
        """Runs the program on one batch; returns the widened statistics of the chosen layers, for `gathered`."""
        return self._program(*self._variables(weights), batch, others_train=others_train)

    def replaced(self, stats: Mapping[Path, Mapping[str, Any]]) -> Any:
        """Returns the variables, or a new module, with other statistics in the dtypes of the old ones."""
        return self._built(self.tree.replace(stats))

    def result(self) -> Any:
        """Returns the variables, or a new module, as they are after the updates."""
        return self._built(self.tree.build(self.tree.leaves))

    def _ran(self, batch: Any, others_train: bool) -> dict[Path, bool | None]:
        """Returns the chosen layers in the order in which they run, those that do not run last.

        The values say whether the statistics of a layer are constants; None where it does not run.
        """
        marks = layers_in(self._program.trace(*self._variables({}), batch, others_train=others_train).jaxpr.jaxpr)
        names = {layer: _name_among(layer, marks) for layer in self.chosen}
        place = {name: i for i, name in enumerate((*marks, None))}
        return {
            layer: marks.get(names[layer] or "") for layer in sorted(self.chosen, key=lambda layer: place[names[layer]])
        }

    def _built(self, tree: Any) -> Any:
        return tree if self._graph is None else nnx.merge(self._graph, tree)

    def _variables(self, weights: Mapping[Path, float]) -> tuple[Any, dict[Path, jax.Array]]:
        numbers = {layer: jnp.float32(weights.get(layer, 0)) for layer in self.chosen}
        return self.tree.build(self.tree.leaves), numbers


_EMPTY = "batches is empty: there is nothing to take statistics of."


def _refuse_if_empty(changing: Any, layers: Iterable[Path]) -> None:
    if not changing:
        raise ValueError(
            f"the statistics of {[show(layer) for layer in layers]} are constants, as in FrozenBatchNorm: there is "
            "nothing to recalibrate. With BatchNorm in its place there is: the variables are the same."
        )


def _name_among(layer: Path, ran: Mapping[str, bool]) -> str | None:
    """Returns the name by which a layer ran, None if it did not; a model may run below a prefix."""
    names = ["/".join(layer[i:]) or show(()) for i in range(len(layer) + 1)]
    return next((name for name in names if name in ran), None)


def _added(totals: dict[Path, Total], found: Mapping[Path, Mapping[str, jax.Array]]) -> dict[Path, Total]:
    """Returns the totals with what one batch added."""
    met = {layer: gathered({k: _on_host(v) for k, v in s.items()}, is_complex=True) for layer, s in found.items()}
    refuse_missing([layer for layer, g in met.items() if not g.calls.any()])
    new = {layer: _total(g) for layer, g in met.items()}
    return {layer: _merged(totals[layer], total) for layer, total in new.items()} if totals else new


def _total(g: Gathered) -> Total:
    """Returns the moments that one batch left; a channel that is not finite in it counts no rows."""
    mean, var, count = map(np.asarray, g.moments)
    good = np.isfinite(mean) & np.isfinite(var)
    mean = mean if g.imaginary.any() else mean.real
    mean, var, count = (np.where(good, v, 0) for v in (mean, var, count))
    return Total(mean, var, count, bool(g.constant.any()), np.float64 if g.double.any() else np.float32)


def _merged(p: Total, q: Total) -> Total:
    """Returns the moments of all rows of both, as :func:`bnjax.merge_moments` does."""
    count = p.count + q.count
    share = q.count / np.where(count > 0, count, 1)
    step = q.mean - p.mean
    var = (1 - share) * p.var + share * q.var + share * (1 - share) * np.abs(step) ** 2
    return q._replace(mean=p.mean + share * step, var=var, count=count)


def _on_host(array: jax.Array) -> Array:
    """Returns an array in float64, also where other processes hold parts of it."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, np.float64)


def in_jax(value: Array, dtype: Any) -> jax.Array:
    """Returns an array of the host in the precision of `dtype`, complex if it is."""
    return jnp.asarray(value, np.result_type(dtype, np.complex64) if np.iscomplexobj(value) else dtype)


def _in_place_of(old: Any, new: jax.Array) -> jax.Array:
    """Returns `new` where the statistic was, in at least its precision."""
    new = new.astype(jnp.promote_types(jnp.result_type(old), new.dtype))
    return jax.device_put(new, old.sharding) if getattr(old, "committed", False) else new
