"""Defines `BatchNorm` for flax.nnx, which holds the variables, calls the functional step and stores the result."""

import math
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

from bnjax.functional import Normalization, RunningStats, Step, _module, batch_norm_step
from bnjax.nnx._variables import minus, static, write


class BatchNorm(Normalization, nnx.Module):
    r"""Batch normalization as a drop-in for `flax.nnx.BatchNorm`.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    After `.train()`, mean and var are those of the batch (:func:`bnjax.batch_norm`), and the running averages take a
    step (:func:`bnjax.update_running`). After `.eval()`, mean and var are the running averages
    (:func:`bnjax.normalize`). Variables, names, shapes and defaults are those of Flax: `nnx.Param` scale and bias, and
    `nnx.BatchStat` mean and var, so that states of bnjax load in Flax and those of Flax in bnjax.

    Three independent controls: `use_running_average` says which statistics normalise, `update_stats` whether a call
    updates the running averages, and the filter of the optimizer whether scale and bias train.

    Args:
      num_features: size of the feature axis. With several feature axes, a tuple of their sizes in the order of the axes
        of x; or their product, as in Flax, and then the variables are flat.
      use_running_average: normalise by the running averages; set here, by `.train()` and `.eval()`, or at the call.
      axis: the feature axis or axes.
      momentum: the weight of the OLD running value, in [0, 1]; or a function from the step 0, 1, ... to it (an Optax
        schedule); or None for the plain average over all batches. A function, None and `debias` count batches in one
        more `nnx.BatchStat`, `steps`. A state without it loads by `nnx.update`, and the count goes on from its present
        value.
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
      use_fast_variance: accepted because Flax has it, and ignored: the variance is always fast and accurate.
      promote_dtype: called only to find the dtype of the output; the statistics are never cast down.
      rngs: source of the keys of scale and bias, its stream `params`.
      bias_metadata: metadata of the variable bias.
      scale_metadata: metadata of the variable scale.
      update_stats: whether calls that normalise by the batch update the running averages; set here, by `set_attributes`
        or `nnx.view`, or at the call.
      scale_offset: added to the scale, to the parameter as to an argument of the call: with 1.0 the layer multiplies by
        1 + scale, and weight decay pulls the factor towards 1. `scale_init` still gives the factor at the start, so the
        parameter starts at that minus the offset.
      debias: leave the starting values 0 and 1 out of the running averages; see :func:`bnjax.update_running`.
      unbiased_var: average var·n/(n − 1), as PyTorch does.
      stats_axis_name: name, or names, of the mapped axes whose devices the running averages follow, where fewer devices
        share the statistics that normalise: with `axis_name` None, one axis of several, or `axis_index_groups`. It
        costs two more small all-reduces. With None, the running averages follow the statistics that normalise.
      count_skipped: count in one more `nnx.BatchStat`, `skipped`, the batches that the running averages of a channel
        skipped because its moments were NaN or Inf, or of which they averaged only the mean because there was one row;
        `bnjax.tools.inspect` shows the count.
      stats_dtype: dtype in which the running mean starts, at least float32: pass complex64 if x will be complex, and
        float64 if x will be float64. If a later x has a wider dtype the averages take it too, except in `lax.scan`,
        whose carry may not change its dtype.

    Raises:
      ValueError: see :func:`bnjax.batch_norm` and :func:`bnjax.update_running`; or `num_features` does not fit x; or
        `scale` or `bias` is given at the call of a layer that has that parameter.

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

    Differences: Flax casts the running statistics to `dtype` before it normalises, averages the masked means of devices
    without their counts, and keeps a NaN in the running averages for ever.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: Any = 0.99,
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
        count_skipped: bool = False,
        stats_dtype: Any = jnp.float32,
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
        self.stats_dtype = stats_dtype
        shape = tuple(num_features) if isinstance(num_features, Sequence) else (num_features,)
        self._make_variables(
            shape, shape, count_skipped, (scale_init, scale_metadata), (bias_init, bias_metadata), rngs
        )

    def _make_variables(
        self,
        stats_shape: tuple[int, ...],
        shape: tuple[int, ...],
        count_skipped: bool,
        scale: tuple[initializers.Initializer, Mapping[str, Any]],
        bias: tuple[initializers.Initializer, Mapping[str, Any]],
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the variables.

        Args:
          stats_shape: of the running statistics.
          shape: of scale and bias.
          count_skipped: whether there is a counter `skipped`.
          scale, bias: the initializer and the metadata of each.
          rngs: source of the keys.
        """
        wide = jnp.promote_types(self.stats_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros(stats_shape, wide))
        self.var = nnx.BatchStat(jnp.ones(stats_shape, jnp.finfo(wide).dtype))
        if self.counts_steps():
            self.steps = nnx.BatchStat(jnp.zeros(stats_shape, jnp.float32))
        if count_skipped:
            self.skipped = nnx.BatchStat(jnp.zeros(stats_shape, jnp.float32))
        self.scale = self.bias = nnx.data(None)
        if self.use_scale:
            start = minus(scale[0](rngs.params(), shape, self.param_dtype), self.scale_offset)
            self.scale = nnx.Param(start, **scale[1])
        if self.use_bias:
            self.bias = nnx.Param(bias[0](rngs.params(), shape, self.param_dtype), **bias[1])

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: jax.Array | bool | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x.

        Args:
          x: `[..., C]`; where it is complex, the running mean becomes complex with the first update.
          use_running_average: normalise by the running averages rather than by the statistics of the batch. It takes
            precedence over the field of the module.
          mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
          update_stats: whether a call that normalises by the batch updates the running averages; may be traced. It
            takes precedence over the field of the module. With False the module is only read, so that functions under
            `jax.grad` or `jax.jit` may capture it.
          scale: used instead of the parameter, with `use_scale=False`: `[C]`, or of the rank of x and broadcastable to
            it, such as `[N, 1, 1, C]` for one per example (conditional batch normalization).
          bias: used instead of the parameter, with `use_bias=False`; of the same shapes as scale.

        Returns:
          y, of the shape of x.
        """
        x, shape = _module.prepare(x, self.axis)
        running = self._running(shape, x)
        scale = _module.choose("scale", self._read("scale", shape, x), scale, shape, x)
        bias = _module.choose("bias", self._read("bias", shape, x), bias, shape, x)
        step = self._step(x, running, scale, bias, use_running_average, _module.mask_around(x, mask), update_stats)
        if step.running is not running:
            write(self, step.running._asdict())
        return step.y

    def set_view(self, use_running_average: bool | None = None, update_stats: bool | None = None) -> None:
        """Sets the fields that `nnx.view` passes, where they are not None.

        Args:
          use_running_average: normalise by the running averages rather than by the statistics of the batch.
          update_stats: whether calls that normalise by the batch update the running averages.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.update_stats = update_stats

    # The steps of a call. SplitBatchNorm calls the same steps and selects the row of its domain in between.

    def _running(self, shape: tuple[int, ...], x: jax.Array) -> RunningStats:
        """Returns the running averages, and the counters that the module has."""
        values: Any = (self._read(name, shape, x) for name in RunningStats._fields)
        return RunningStats(*values)

    def _read(self, name: str, shape: tuple[int, ...], x: jax.Array) -> jax.Array | None:
        """Returns the value of a variable, reshaped to the given shape if it is flat; None if it does not exist."""
        variable = getattr(self, name, None)
        if variable is None:
            return None
        value: jax.Array = variable[...]
        value = value.reshape(shape) if value.shape == (math.prod(shape),) else value
        if value.shape != shape and name == "mean":
            raise ValueError(
                f"num_features must be the size of the feature axes {self.axis} of x {x.shape}, {shape}; "
                f"got num_features={self.num_features}. Check the channel count, or the axis argument."
            )
        _module.check_stored(shape, x, **{name: value})
        return value

    def _step(
        self,
        x: jax.Array,
        running: RunningStats,
        scale: jax.Array | None,
        bias: jax.Array | None,
        use_running_average: bool | None,
        mask: jax.Array | None,
        update_stats: jax.Array | bool | None,
    ) -> Step:
        """Calls the functional step with the fields of the module."""
        evaluates = True
        if not self.is_constant:
            evaluates = first_from(use_running_average, self.use_running_average, error_msg=_WHICH_STATISTICS)
        output = None if self.dtype is None else _module.output_dtype(self.dtype, x)
        promote = partial(self.promote_dtype, dtype=output)
        promoted = jax.eval_shape(promote, (x, running.mean, running.var, scale, bias))
        return batch_norm_step(
            x,
            running,
            scale,
            bias,
            variant=self,
            use_running_average=evaluates,
            update_stats=self.update_stats if update_stats is None else update_stats,
            mask=mask,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            stats_axis_name=self.stats_axis_name,
            dtype=promoted[0].dtype,
            scale_offset=self.scale_offset,
            debias=self.debias,
            unbiased_var=self.unbiased_var,
        )

    # These state that __call__ computes what the inherited methods describe; see `Normalization`.
    averaged_moments = Normalization.averaged_moments
    evaluation_affine = Normalization.evaluation_affine


_WHICH_STATISTICS = (
    "use_running_average must be given to the constructor or at the call, or set by .train() and .eval(): it says "
    "whether the running averages normalise or the statistics of the batch."
)
