"""`BatchNorm` for flax.nnx: holds the variables, calls the functional core, stores the result."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from jax.nn import initializers

from bnjax.functional import Moments, RunningStats, batch_norm, normalize, update_running
from bnjax.functional._affine import Affine, affine_of, offset_init, own_or_given
from bnjax.functional._axes import Layout, as_array, check_stored, layout_of, output_dtype
from bnjax.functional._domains import ONE, Domains
from bnjax.functional._finish import Activation, Ending
from bnjax.functional._merge import moments_for_running
from bnjax.functional._running import Momentum, needs_steps
from bnjax.nnx._variables import read, static, write


class BatchNorm(nnx.Module):
    r"""Batch normalization; a drop-in for `flax.nnx.BatchNorm`.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    After `.train()` mean and var are those of the batch (:func:`bnjax.batch_norm`) and the running averages take a step
    (:func:`bnjax.update_running`); after `.eval()` they are the running averages (:func:`bnjax.normalize`). Variables,
    names, shapes and defaults are Flax's: `nnx.Param` scale and bias, `nnx.BatchStat` mean and var; states of either
    load in the other.

    Three controls, each by itself: `use_running_average` says which statistics normalise, `update_stats` whether a call
    updates the running ones, and the filter of the optimizer whether scale and bias train.

    Args:
      num_features: size of the feature axis. With several feature axes their sizes in a tuple, in the order of the
        axes of x; or, as in Flax, their product: then the variables are flat.
      use_running_average: normalise with the running averages; here, by `.train()` and `.eval()`, or at the call.
      axis: the feature axis or axes.
      momentum: the weight of the OLD running value, in [0, 1]; or a function from the step 0, 1, ... to it (an Optax
        schedule); or None for the plain average over all batches. The last two, and `debias`, count batches in one more
        `nnx.BatchStat`, steps; a state without it loads by `nnx.update`, and the count goes on from where it was.
      epsilon: added to the variance; positive.
      dtype: of the output; by default the promotion of x, the statistics, scale and bias.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that share statistics. None under
        plain `jit`, where a sharded batch is normalised by its global statistics anyway.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      use_fast_variance: accepted for Flax's sake; both settings are fast and exact here.
      promote_dtype: asked for the dtype of the output only; the statistics are never cast down.
      rngs: the key of scale and bias is taken from its stream `params`.
      bias_metadata: metadata of the variable bias.
      scale_metadata: metadata of the variable scale.
      update_stats: whether calls that normalise by the batch update the running averages; here, by `set_attributes`,
        `nnx.view`, or at the call.
      scale_offset: added to the scale, own or given: with 1.0 the layer multiplies by 1 + scale, and weight decay pulls
        towards 1. `scale_init` still says what it multiplies by at first: the variable starts at that less the offset.
      debias: leave the starting values 0 and 1 out of the running averages; see :func:`bnjax.update_running`.
      unbiased_var: average var·n/(n − 1), as PyTorch does.
      stats_axis_name: name, or names, of the mapped axes over which the running averages are those of everybody, where
        fewer share the statistics that normalise: `axis_name` None, one axis of several, or `axis_index_groups`. Two
        small all-reduces more. Without it, running averages follow the statistics that normalise.
      activation: a function that the output goes through, such as `jax.nn.relu`, after a residual was added.
      count_skipped: count in one more `nnx.BatchStat`, skipped, the batches that a channel's running averages refused
        because its moments were NaN or Inf; `bnjax.tools.inspect` shows it.

    Raises:
      ValueError: see :func:`bnjax.batch_norm` and :func:`bnjax.update_running`; or a `num_features` that is not that of
        x; or `scale` or `bias` at the call of a layer that has its own.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> norm = bnjax.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> print(norm.mean[...])
      [0.2 2. ]
      >>> y = norm(x, update_stats=False)
      >>> norm.eval()
      >>> y = norm(x)
      >>> print(norm.mean[...])
      [0.2 2. ]

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.

    Differences: Flax casts the running statistics to `dtype` before it normalises, pools per-device masked means
    unweighted, keeps NaN for ever, and raises TraceContextError for a module merged from outer variables in `jax.grad`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: initializers.Initializer = initializers.zeros,
        scale_init: initializers.Initializer = initializers.ones,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        update_stats: bool = True,
        scale_offset: float = 0.0,
        debias: bool = False,
        unbiased_var: bool = False,
        stats_axis_name: str | Sequence[str] | None = None,
        activation: Activation = None,
        count_skipped: bool = False,
    ):
        self.num_features = static(num_features)
        self.use_running_average = use_running_average
        self.axis = static(axis)
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = static(axis_name)
        self.axis_index_groups = static(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.update_stats = update_stats
        self.scale_offset = scale_offset
        self.debias = debias
        self.unbiased_var = unbiased_var
        self.stats_axis_name = static(stats_axis_name)
        self.activation = activation
        shape = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
        stats_shape, shape = self._domains.shape(shape), self._domains.of_affine.shape(shape)
        self.mean = nnx.BatchStat(jnp.zeros(stats_shape, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(stats_shape, jnp.float32))
        if self._counts_steps():
            self.steps = nnx.BatchStat(jnp.zeros(stats_shape, jnp.float32))
        if count_skipped:
            self.skipped = nnx.BatchStat(jnp.zeros(stats_shape, jnp.float32))
        self.scale = self.bias = nnx.data(None)
        if use_scale:
            scale = offset_init(scale_init, scale_offset)(rngs.params(), shape, param_dtype)
            self.scale = nnx.Param(scale, **scale_metadata)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype), **bias_metadata)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: bool | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x.

        Args:
          x: `[..., C]`; where it is complex, the running mean becomes complex with the first update.
          use_running_average: normalise with the running averages rather than with those of the batch; before what the
            constructor said.
          mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
          update_stats: whether a call that normalises by the batch updates the running averages; before what the
            constructor said. With False the module is only read: it may be captured by `jax.grad`, `jax.jit` ...
          scale: in place of the parameter (`use_scale=False`): `[C]`, or of the rank of x and broadcastable to it,
            such as `[N, 1, 1, C]` for one per example (conditional batch normalization).
          bias: the same.
          residual: of the shape of x, added before the activation.

        Returns:
          y, of the shape of x.
        """
        options: dict[str, Any] = dict(mask=mask, update_stats=update_stats, scale=scale, bias=bias, residual=residual)
        return self._forward(x, use_running_average, **options)

    def set_view(self, use_running_average: bool | None = None, update_stats: bool | None = None) -> None:
        """What `nnx.view` sets.

        Args:
          use_running_average: normalise with the running averages rather than with those of the batch.
          update_stats: whether calls that normalise by the batch update the running averages.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.update_stats = update_stats

    # What a variant overrides -----------------------------------------------------------------------------------------

    def _batch_norm(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        """y by the statistics of the batch, and the moments for the running averages."""
        return batch_norm(x, pivot=running.pivot, **options)

    def _normalize(self, x: jax.Array, running: RunningStats, **options: Any) -> jax.Array:
        """y by the running averages."""
        return normalize(x, running.mean, running.var, **options)

    def _counts_steps(self) -> bool:
        """Whether the variable steps is needed."""
        return needs_steps(self.momentum, self.debias)

    @property
    def _domains(self) -> Domains:
        """Whether the variables have a row for each of several domains."""
        return ONE

    # What it keeps ----------------------------------------------------------------------------------------------------

    def _forward(
        self,
        x: jax.Array,
        use_running_average: bool | None,
        *,
        mask: jax.Array | None,
        update_stats: bool | None,
        scale: jax.Array | None,
        bias: jax.Array | None,
        residual: jax.Array | None,
        domains: Domains = ONE,
    ) -> jax.Array:
        """The call; of the variables, the part that `domains` selects."""
        use_running_average = first_from(use_running_average, self.use_running_average, error_msg=_WHICH_STATISTICS)
        x = as_array("x", x)
        layout = layout_of(x, self.axis)
        running = self._running(x, layout, domains)
        ending = Ending(self._affine(x, layout, running, scale, bias, domains.of_affine), self.activation, residual)
        options = dict(axis=self.axis, epsilon=self.epsilon, **ending.core)
        if use_running_average:
            return ending.finish(self._normalize(x, running, mask=mask, **options))
        options |= dict(axis_name=self.axis_name, axis_index_groups=self.axis_index_groups)
        y, moments = self._batch_norm(x, running, mask=mask, **options)
        if self.update_stats if update_stats is None else update_stats:
            moments = moments_for_running(
                moments,
                running.mean,
                shape=x.shape,
                axis_name=self.axis_name,
                stats_axis_name=self.stats_axis_name,
                axis_index_groups=self.axis_index_groups,
            )
            new = update_running(
                running, moments, momentum=self.momentum, debias=self.debias, unbiased_var=self.unbiased_var
            )
            write(self, {name: v for name, v in new._asdict().items() if v is not None}, domains)
        return ending.finish(y)

    def _running(self, x: jax.Array, layout: Layout, domains: Domains) -> RunningStats:
        mean = read(self.mean, layout, domains)
        if mean.shape != layout.shape:
            raise ValueError(
                f"num_features must be the size of the feature axes {layout.features} of x, {layout.shape}; "
                f"got num_features={self.num_features}. Check the channel count, or the axis argument."
            )
        counters = (getattr(self, name, None) for name in ("steps", "skipped"))
        read_counters = (None if counter is None else read(counter, layout, domains) for counter in counters)
        running = RunningStats(mean, read(self.var, layout, domains), *read_counters)
        check_stored(layout.shape, x, **running._asdict())
        return running

    def _affine(
        self,
        x: jax.Array,
        layout: Layout,
        running: RunningStats,
        scale: jax.Array | None,
        bias: jax.Array | None,
        domains: Domains,
    ) -> Affine:
        """The parameters, or what the call gave in their place."""
        own_scale = None if self.scale is None else read(self.scale, layout, domains)
        own_bias = None if self.bias is None else read(self.bias, layout, domains)
        check_stored(layout.shape, x, scale=own_scale, bias=own_bias)
        scale, bias = own_or_given("scale", own_scale, scale), own_or_given("bias", own_bias, bias)
        dtype = None if self.dtype is None else output_dtype(self.dtype, x)
        promote = partial(self.promote_dtype, dtype=dtype)
        promoted = jax.eval_shape(promote, (x, running.mean, running.var, scale, bias))
        return affine_of(x, scale, bias, axis=self.axis, offset=self.scale_offset, dtype=promoted[0].dtype)


_WHICH_STATISTICS = (
    "use_running_average must be given to the constructor or at the call, or set by .train() and .eval(): it says "
    "whether the running averages normalise or the statistics of the batch."
)
