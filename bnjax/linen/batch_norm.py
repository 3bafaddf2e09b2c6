"""`BatchNorm` for flax.linen: creates the variables, calls the functional step, stores the result."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.core.scope import DenyList, in_filter
from flax.linen.module import merge_param

from bnjax.functional import Moments, Normalization, RunningStats, Step, _module, batch_norm_step, merge_moments


class BatchNorm(Normalization, nn.Module):
    r"""Batch normalization; a drop-in for `flax.linen.BatchNorm`.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    In training mean and var are those of the batch (:func:`bnjax.batch_norm`) and the running averages in the
    collection `batch_stats` take a step (:func:`bnjax.update_running`); with `use_running_average` they are the running
    averages (:func:`bnjax.normalize`). Variables, names, shapes and defaults are Flax's: `params/{scale, bias}`,
    `batch_stats/{mean, var}`, each of the feature shape; checkpoints of either load in the other.

    Three controls, each by itself: `use_running_average` says which statistics normalise, `update_stats` whether this
    call updates the running ones, and an Optax mask whether scale and bias train.

    With `mutable=["moments"]` the moments of the batch are merged into the collection of that name, `{mean, var,
    count}` per layer: over several calls, if it is passed back in, exactly those of all the rows.
    :func:`bnjax.tools.apply_moments` makes one update of the running averages of them.

    Attributes:
      use_running_average: normalise with the running averages; here or at the call.
      axis: the feature axis or axes.
      momentum: the weight of the OLD running value, in [0, 1]; or a function from the step 0, 1, ... to it (an Optax
        schedule); or None for the plain average over all batches. The last two, and `debias`, count batches in one more
        variable, `batch_stats/steps`; a checkpoint without it loads, and counts from 0.
      epsilon: added to the variance; positive.
      dtype: of the output; by default the promotion of x, scale and bias.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name, or names, of the mapped axes (`shard_map`, `pmap`, `vmap`) that share statistics. None under
        plain `jit`, where a sharded batch is normalised by its global statistics anyway.
      axis_index_groups: groups of indices along `axis_name`, of one size, that share statistics.
      use_fast_variance: accepted for Flax's sake; both settings are fast and exact here.
      force_float32_reductions: statistics are always computed in float32 at least; False only makes the running
        averages start in `param_dtype`, so that such a checkpoint of Flax loads.
      scale_offset: added to the scale, own or given: with 1.0 the layer multiplies by 1 + scale, and weight decay pulls
        towards 1. `scale_init` still says what it multiplies by at first: the variable starts at that less the offset.
      debias: leave the starting values 0 and 1 out of the running averages; see :func:`bnjax.update_running`.
      unbiased_var: average var·n/(n − 1), as PyTorch does.
      stats_axis_name: name, or names, of the mapped axes over which the running averages are those of everybody, where
        fewer share the statistics that normalise: `axis_name` None, one axis of several, or `axis_index_groups`. Two
        small all-reduces more. Without it, running averages follow the statistics that normalise.
      count_skipped: count in one more variable, `batch_stats/skipped`, the batches that a channel's running averages
        refused because its moments were NaN or Inf, or of which they took the mean alone because there was one row;
        `bnjax.tools.inspect` shows it.
      stats_dtype: of the running mean as it starts, at least float32; by default that of the x of `init`: float64 for
        float64, complex where x is. The averages follow a wider x later on too, except in `lax.scan`, whose carry may
        not change its dtype.

    Raises:
      ValueError: see :func:`bnjax.batch_norm` and :func:`bnjax.update_running`; or `scale` or `bias` at the call of a
        layer that has its own.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> norm = bnjax.linen.BatchNorm(momentum=0.9)
      >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(updates["batch_stats"]["mean"])
      [0.2 2. ]
      >>> y = norm.apply({**variables, **updates}, x, use_running_average=True)

    References:
      Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: Any = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    scale_offset: float = 0.0
    debias: bool = False
    unbiased_var: bool = False
    stats_axis_name: str | Sequence[str] | None = None
    count_skipped: bool = False
    stats_dtype: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Keeps Flax from recording the methods of the protocol, in variants too, as calls of the module."""
        for name in set(vars(cls)) & set(vars(Normalization)):
            if callable(vars(cls)[name]):
                nn.nowrap(vars(cls)[name])
        super().__init_subclass__(**options)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: jax.Array | bool = True,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x.

        During `init` the running averages stay as they start and no axis needs to be bound.

        Args:
          x: `[..., C]`; where it is complex so is the running mean, as in Flax.
          use_running_average: normalise with the running averages rather than with those of the batch.
          mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
          update_stats: whether a call in training mode updates the running averages; may be traced. False needs no
            mutable collection.
          scale: in place of the parameter (`use_scale=False`): `[C]`, or of the rank of x and broadcastable to it,
            such as `[N, 1, 1, C]` for one per example (conditional batch normalization).
          bias: likewise.

        Returns:
          y, of the shape of x.
        """
        x, shape = _module.prepare(x, self.axis)
        evaluates = self._evaluates(use_running_average)
        variables = self._statistics(x, shape, evaluates)
        running = RunningStats._make(None if v is None else v.value for v in variables)
        scale, bias = self._scale_and_bias(x, shape, scale, bias)
        step = self._step(x, running, scale, bias, evaluates, mask, update_stats)
        if step.moments is not None and self._gathers_moments():
            held = self._gathered(step.moments, shape)
            merged = merge_moments(Moments._make(v.value for v in held), step.moments)
            self._store(held, merged)
        if step.running is not running:
            self._store(variables, step.running)
        return step.y

    # The parts of a call, in its order. SplitBatchNorm puts them together with a row of each variable in between.

    @nn.nowrap
    def _evaluates(self, use_running_average: bool | None) -> bool:
        """Returns whether this call normalises by the running averages, from the field or the argument of the call."""
        if self.is_constant:
            return True
        name = "use_running_average"
        return _module.as_flag(name, merge_param(name, self.use_running_average, use_running_average))

    @nn.nowrap
    def _statistics(self, x: jax.Array, shape: tuple[int, ...], evaluates: bool) -> tuple[Any, ...]:
        """Returns the variables of `RunningStats`, made in `init`; None for a counter that is not needed."""
        starting = self.is_initializing() or self.is_mutable_collection("batch_stats")
        if not (starting or self.has_variable("batch_stats", "mean")):
            raise ValueError(
                f"{self._described()} found no batch_stats. Pass the collection that init returned along with params: "
                'model.apply({"params": params, "batch_stats": batch_stats}, x, ...).'
            )
        dtype = jnp.promote_types(x.dtype if self.stats_dtype is None else self.stats_dtype, jnp.float32)
        if not self.force_float32_reductions:
            dtype = jnp.promote_types(self.param_dtype, jnp.complex64) if jnp.iscomplexobj(x) else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.finfo(dtype).dtype)

        def counter(name: str, needed: bool) -> Any:
            there = self.has_variable("batch_stats", name) or (starting and not evaluates) or self.is_initializing()
            return self.variable("batch_stats", name, jnp.zeros, shape, jnp.float32) if needed and there else None

        variables = mean, var, counter("steps", self.counts_steps()), counter("skipped", self.count_skipped)
        _module.check_stored(
            shape, x, **{k: v and v.value for k, v in zip(RunningStats._fields, variables, strict=True)}
        )
        return variables

    @nn.nowrap
    def _scale_and_bias(
        self, x: jax.Array, shape: tuple[int, ...], scale: jax.Array | None, bias: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns the parameters, made in `init`, or what the call gave in their place."""

        def scale_init(*args: Any) -> Any:  # inside of a box such as nn.Partitioned, if there is one
            return jax.tree.map(lambda v: v - self.scale_offset, self.scale_init(*args))

        given = {"scale": scale, "bias": bias}
        for name, init, use in (("scale", scale_init, self.use_scale), ("bias", self.bias_init, self.use_bias)):
            there = meta.unbox(self.get_variable("params", name))
            _module.check_stored(shape, x, **{name: there})  # Flax's own error is neither of value nor of type
            own = self.param(name, init, shape, self.param_dtype) if use else None
            given[name] = _module.choose(name, own, given[name], shape, x)
        return given["scale"], given["bias"]

    @nn.nowrap
    def _step(
        self,
        x: jax.Array,
        running: RunningStats,
        scale: jax.Array | None,
        bias: jax.Array | None,
        evaluates: bool,
        mask: jax.Array | None,
        update_stats: jax.Array | bool,
    ) -> Step:
        """Calls the functional step with the fields of the module."""
        starting = self.is_initializing()
        groups: dict[str, Any] = {}
        if not starting:  # axes are bound in training alone
            groups = {k: getattr(self, k) for k in ("axis_name", "axis_index_groups", "stats_axis_name")}
        if not isinstance(update_stats, jax.Array):
            update_stats = _module.as_flag("update_stats", update_stats)
        updates = not (starting or evaluates or update_stats is False)
        if updates and not self.is_mutable_collection("batch_stats"):
            raise ValueError(
                f"{self._described()} is to update its running averages, and batch_stats may not change here. Call "
                'model.apply(..., mutable=["batch_stats"]), which returns (y, updates), to keep the updates; '
                "or pass use_running_average=True to evaluate, or update_stats=False."
            )
        with _module.silent_if(starting):
            return batch_norm_step(
                x,
                running,
                scale,
                bias,
                variant=self,
                use_running_average=evaluates,
                update_stats=updates and update_stats,
                mask=mask,
                axis=self.axis,
                momentum=self.momentum,
                epsilon=self.epsilon,
                dtype=self.dtype,
                scale_offset=self.scale_offset,
                debias=self.debias,
                unbiased_var=self.unbiased_var,
                **groups,
            )

    @nn.nowrap
    def _gathers_moments(self) -> bool:
        """Returns whether `mutable` names the collection moments; True, or all but a few, as in `init`, does not."""
        mutable = self.scope.mutable if self.scope is not None else False
        return not isinstance(mutable, (bool, DenyList)) and in_filter(mutable, "moments")

    @nn.nowrap
    def _gathered(self, moments: Moments, shape: tuple[int, ...]) -> list[Any]:
        """Returns the variables of the collection moments: those of all calls since it was empty."""
        return [self.variable("moments", k, jnp.zeros, shape, v.dtype) for k, v in moments._asdict().items()]

    @nn.nowrap
    def _store(self, variables: Any, values: Any) -> None:
        """Puts the values into the variables."""
        for variable, value in zip(variables, values, strict=True):
            if variable is not None:
                variable.value = value

    @nn.nowrap
    def _described(self) -> str:
        """Returns the class and path of the layer, for an error."""
        return f"{type(self).__name__} at {'/'.join(self.path) or 'the top level'}"

    # __call__ above computes what the protocol says of batch normalization.
    averaged_moments = nn.nowrap(Normalization.averaged_moments)
    evaluation_affine = nn.nowrap(Normalization.evaluation_affine)
