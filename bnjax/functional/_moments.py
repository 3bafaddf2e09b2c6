"""Mean and variance of a batch, exact on every batch: weighted, pooled over devices, safe from cancellation.

Moments about a pivot K that all devices share add up: one all-reduce of Σw, Σw(x − K), Σw(x − K)² gives

    mean = K + e,   e = Σw(x − K) / W,   var = Σw(x − K)² / W − e²,   W = Σw.

The subtraction loses about e²/var in accuracy. With the running mean as K nothing is lost; for K = 0, or a batch that
is far from its pivot, a guard looks at the pooled moments and, where e² > 16·var in any channel, sums again about the
mean just found: one more read of x and one more all-reduce, in a branch that all devices take together or not at all.
The same branch rescales where squares overflow.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.functional import _axes, _collectives, _kernels

# The guard's threshold on e²/var. The sums are right to a few units of 6e-8, so var is right to 16 times that.
_GUARD = 16.0


class Moments(NamedTuple):
    r"""Mean, biased variance and count (the sum of weights) of a batch, per channel; float32 at least.

    .. math::
        \mathrm{count} = \sum w, \qquad \mathrm{mean} = \frac{\sum w x}{\mathrm{count}}, \qquad
        \mathrm{var} = \frac{\sum w (x - \mathrm{mean})^2}{\mathrm{count}}

    Attributes:
      mean: `[C]`, the feature shape; complex where x is.
      var: `[C]`, real.
      count: `[C]`, real: rows, or the sum of their weights.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> mean, var, count = bnjax.batch_moments(jnp.array([[1.0], [3.0]]))
      >>> print(mean, var, count)
      [2.] [1.] [2.]
    """

    mean: jax.Array  # [C] (the feature shape)
    var: jax.Array  # [C]
    count: jax.Array  # type: ignore[assignment]  # [C]; hides tuple.count, which nobody wants here


class Centred(NamedTuple):
    """Moments kept as they are computed: mean = pivot + rest; var = (scaled_var / unit) / unit."""

    pivot: jax.Array  # K, constant under differentiation
    rest: jax.Array  # e = mean − K
    scaled_var: jax.Array  # variance of unit·x: finite where the variance itself is not
    unit: jax.Array  # a power of two, 1 unless squares overflow
    count: jax.Array  # type: ignore[assignment]  # W

    @property
    def mean(self) -> jax.Array:
        return self.pivot + self.rest

    def rstd(self, epsilon: float) -> jax.Array:
        """1/√(var + ε).

        Where squares overflow, ε is nothing. There the variance is at least e²: about the second pivot, e is the
        rounding of the mean, and a constant channel of 1e30 has no other variance. Over 1e37 it is NaN, where y
        would be 0.
        """
        tiny = jnp.finfo(self.unit.dtype).tiny
        rest = jnp.where(self.unit == 1, 0, self.rest * self.unit)
        least = jnp.maximum((rest * rest.conj()).real, tiny)
        rstd = self.unit * lax.rsqrt(jnp.maximum(self.scaled_var + epsilon * self.unit * self.unit, least))
        return jnp.where(rstd >= tiny, rstd, jnp.nan)

    def moments(self) -> Moments:
        once = jnp.minimum(self.scaled_var / self.unit, jnp.finfo(self.unit.dtype).max)  # or XLA divides by unit², 0
        return Moments(self.mean, once / self.unit, self.count)


class Reduction(NamedTuple):
    """What is static about a reduction over rows."""

    layout: _axes.Layout
    group: _collectives.Group
    floor: float  # variances below this need no accuracy of their own: 0, or a fraction of epsilon


def batch_moments(
    x: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    mask: jax.Array | None = None,
    pivot: jax.Array | None = None,
    axis_name: _collectives.AxisName = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    r"""Mean, biased variance and count of each channel over all rows of all devices.

    With weights :math:`w` (1 without a mask), :math:`W = \sum w`:

    .. math:: \mathrm{mean} = \frac1W \sum w x, \qquad \mathrm{var} = \frac1W \sum w (x - \mathrm{mean})^2

    Differentiable in x to any order; no gradient flows to `mask` or `pivot`. One read of x and one all-reduce of at
    most 3C numbers; one more of each in batches that lie more than 4 standard deviations from the pivot.

    Args:
      x: `[..., C]`, any dtype; statistics are computed in float32 at least. A complex x has a complex mean and the
        real variance E\|x − mean\|², as in Flax.
      axis: the feature axis or axes; all others are reduced over.
      mask: non-negative weights (bool, integer or float), broadcastable to x. Positions of weight zero take no part,
        even where they hold NaN or Inf. A weight that is negative, NaN or Inf is an error in a NumPy array or list; in
        a jax.Array, whose values a trace cannot see, it makes the moments of its channels NaN.
      pivot: `[C]`, a guess of the mean; the running mean is the usual one. It changes the rounding and the time, not
        the value. Unless its type says that all devices hold the same, zero is taken: it counts under plain jit and in
        shard_map(check_vma=True), not in pmap, vmap and check_vma=False.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) whose rows are pooled. None under
        plain `jit`, where a sharded array is pooled over all its shards anyway.
      axis_index_groups: groups of indices along `axis_name`, of one size, that pool among themselves.

    Returns:
      `Moments(mean, var, count)`, each of the feature shape. With a count of zero, mean is the pivot (or 0) and var 0.

    Raises:
      ValueError: axes, mask, pivot or groups do not fit x, or `axis_name` is not bound.
      TypeError: mask is complex, or pivot where x is not.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0], [jnp.nan, 0.0]])
      >>> m = bnjax.batch_moments(x, mask=jnp.array([[True], [True], [False]]))
      >>> print(m.mean, m.var, m.count)
      [ 2. 20.] [  1. 100.] [2. 2.]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1. Chan, Golub & LeVeque 1983, "Algorithms for
      Computing the Sample Variance", on shifted data.
    """
    x = _axes.as_input(x)
    layout = _axes.layout_of(x, axis)
    group = _collectives.group_of(axis_name, axis_index_groups, x.shape)
    mask = _axes.as_mask(mask, x)
    pivot = _axes.as_optional("pivot", pivot, layout, x)
    return _batch_moments(Reduction(layout, group, 0.0), x, mask, pivot)


@partial(jax.jit, static_argnums=0, inline=True)
def _batch_moments(reduction: Reduction, x: jax.Array, mask: jax.Array | None, pivot: jax.Array | None) -> Moments:
    return moments_of(reduction, x, mask, start_pivot(x, pivot, reduction.layout)).moments()


def start_pivot(x: jax.Array, pivot: jax.Array | None, layout: _axes.Layout) -> jax.Array:
    """The pivot of the first sums, in the dtype of the statistics: `pivot` where it is finite, else 0."""
    dtype = _axes.statistics_dtype(x)
    if pivot is None:
        return jnp.zeros(layout.shape, dtype)
    pivot = lax.stop_gradient(pivot).astype(dtype)
    pivot = jnp.where(jnp.isfinite(pivot), pivot, 0)
    return lax.complex(_coarse(pivot.real), _coarse(pivot.imag)) if jnp.iscomplexobj(pivot) else _coarse(pivot)


def _coarse(K: jax.Array) -> jax.Array:
    """K rounded to a multiple of 8 units in its last place, through its bits.

    XLA may derive K = sum/n again in the loop that writes y, and contract it with x − K unrounded: then y uses another
    K than e does, and a constant bfloat16 channel at 99840 gives 0.65 instead of 0. It does not look through the bits.
    Rounding to nearest also restores a constant of few digits exactly, from a mean that is off by a few units.
    """
    bits = lax.bitcast_convert_type(K, jnp.int64 if K.dtype == jnp.float64 else jnp.int32)
    return lax.bitcast_convert_type((bits + 4) & ~7, K.dtype)


def moments_of(reduction: Reduction, x: jax.Array, weights: jax.Array | None, K: jax.Array) -> Centred:
    """The moments of x, real or complex."""
    return (_complex_moments if jnp.iscomplexobj(x) else centred_moments)(reduction, x, weights, K)


def _complex_moments(reduction: Reduction, x: jax.Array, weights: jax.Array | None, K: jax.Array) -> Centred:
    """Real and imaginary part are two channels with a mean each and one variance: E|x − mean|² is the sum of theirs."""
    layout = reduction.layout
    of_pairs = _axes.Layout((*layout.features, x.ndim), layout.rows, (*layout.shape, 2))
    weights = None if weights is None else weights[..., None]
    s = centred_moments(reduction._replace(layout=of_pairs), _pair(x), weights, _pair(K))
    unit = s.unit.min(-1)
    scaled_var = jnp.sum(s.scaled_var * (unit[..., None] / s.unit) ** 2, -1)
    pivot, rest = (lax.complex(v[..., 0], v[..., 1]) for v in (s.pivot, s.rest))
    return Centred(pivot, rest, scaled_var, unit, s.count[..., 0])


def _pair(z: jax.Array) -> jax.Array:
    return jnp.stack([z.real, z.imag], -1)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def centred_moments(reduction: Reduction, x: jax.Array, weights: jax.Array | None, K: jax.Array) -> Centred:
    """The moments of x: about K where that is near enough to the mean, else about the mean itself.

    Channels for which K is near enough keep what they have when others must sum again: none depends, to the last bit,
    on what another one holds. That is chosen outside of the branch: chosen within it, two equal calls would not be one.
    """
    if not _collectives.is_shared(K, x, reduction.group):
        K = jnp.zeros_like(K)  # sums about different pivots do not add up
    W, S1, S2 = _pooled_sums(reduction, x, weights, _kernels.row_sums, K)
    # Without the barrier XLA:GPU makes these sums twice, for the branch and for what follows it: one read of x more.
    first = lax.optimization_barrier(_centred(K, jnp.ones_like(K), W, S1, S2))
    accurate = first.rest**2 <= _GUARD * (first.scaled_var + reduction.floor)
    safe = accurate & jnp.isfinite(first.scaled_var)
    found = lax.cond(jnp.all(safe), lambda: first, lambda: _moments_again(reduction, x, weights, first))
    return jax.tree.map(partial(jnp.where, safe), first, found)


def _moments_again(reduction: Reduction, x: jax.Array, weights: jax.Array | None, first: Centred) -> Centred:
    """The guard's branch: sums about the mean that was found, scaled down where the squares overflowed."""
    K = _coarse(jnp.where(jnp.isfinite(first.mean), first.mean, 0))
    shrink = 2.0 ** -(jnp.finfo(K.dtype).maxexp * 5 // 8)  # 2⁻⁸⁰ in float32: squares of what overflowed fit well
    unit = jnp.where(jnp.isfinite(first.scaled_var), 1, shrink).astype(K.dtype)
    _, S1, S2 = _pooled_sums(reduction, x, weights, _kernels.scaled_row_sums, K, unit, W=first.count)
    return _centred(K, unit, first.count, S1, S2)


def _pooled_sums(
    reduction: Reduction,
    x: jax.Array,
    weights: jax.Array | None,
    kernel: Callable[..., tuple[jax.Array, jax.Array]],
    *vectors: jax.Array,
    W: jax.Array | None = None,
) -> list[jax.Array]:
    """W and the sums that `kernel` makes of x, over the whole group in one all-reduce; W only if it is not known."""
    layout, group, _ = reduction
    sums = [S.reshape(layout.shape) for S in kernel(x, weights, *map(layout.expand, vectors))]
    if W is None and weights is not None:
        sums = [_collectives.match(_kernels.weight_sum(x, weights, layout, sums[0].dtype), sums[0]), *sums]
        W, *sums = _collectives.pool(jnp.stack(sums), group)
        least = jnp.finfo(W.dtype).tiny / jnp.finfo(W.dtype).eps  # weights that over- or underflow are none
        return [jnp.where((W == 0) | ((least < W) & jnp.isfinite(W)), W, jnp.nan), *sums]
    pooled = _collectives.pool(jnp.stack(sums), group)
    if W is None:
        rows = math.prod(x.shape[a] for a in layout.rows) * _collectives.group_size(group)
        W = jnp.full_like(pooled[0], rows)
    return [W, *pooled]


def _centred(K: jax.Array, unit: jax.Array, W: jax.Array, S1: jax.Array, S2: jax.Array) -> Centred:
    """Moments about K from W = Σw, S1 = Σwu(x − K), S2 = Σw(u(x − K))²; an empty channel has e = 0 and var = 0."""
    n = jnp.where(W == 0, 1, W)
    scaled_rest = S1 / n
    var = jnp.maximum(S2 / n - scaled_rest**2, 0)
    K, unit = _collectives.match(K, S1), _collectives.match(unit, S1)
    return Centred(K, scaled_rest / unit, var, unit, W)


@centred_moments.defjvp
def _centred_moments_jvp(
    reduction: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Centred, Centred]:
    x, weights, K = primals
    s = centred_moments(reduction, x, weights, K)
    return s, moments_tangent(reduction, x, weights, s, tangents[0])


def moments_tangent(
    reduction: Reduction, x: jax.Array, weights: jax.Array | None, s: Centred, t_x: jax.Array
) -> Centred:
    """t_e = Σw·t_x / W and t_var = 2(Σw(x − K)·t_x / W − e·t_e), linear in t_x; K is constant."""
    kernel = partial(_kernels.tangent_sums, t_x=t_x)
    W, T1, T2 = _pooled_sums(reduction, x, weights, kernel, s.pivot, W=s.count)
    n = jnp.where(W > 0, W, 1)
    t_rest = T1 / n
    t_var = 2 * s.unit * (s.unit * (T2 / n - s.rest * t_rest))
    zero = jnp.zeros_like(s.pivot)
    return Centred(zero, t_rest, t_var, zero, jnp.zeros_like(s.count))
