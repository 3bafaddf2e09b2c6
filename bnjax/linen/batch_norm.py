"""Defines `BatchNorm` for flax.linen, which creates the variables, calls the functional step and stores the result."""

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
    r"""Batch normalization as a drop-in for `flax.linen.BatchNorm`.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    In training, mean and var are those of the batch (:func:`bnjax.batch_norm`), and the running averages in the
    collection `batch_stats` take a step (:func:`bnjax.update_running`). With `use_running_average`, mean and var are
    the running averages (:func:`bnjax.normalize`). Variables, names, shapes and defaults are those of Flax:
    `params/{scale, bias}` and `batch_stats/{mean, var}`, each of the feature shape, so that checkpoints of bnjax load
    in Flax and those of Flax in bnjax.

    Three independent controls: `use_running_average` says which statistics normalise, `update_stats` whether this
    call updates the running averages, and an Optax mask whether scale and bias train.

    With `mutable=["moments"]` the moments of the batch are merged into the collection `moments`, which has `{mean, var,
    count}` per layer. If the collection is passed to the next call, it then holds exactly the moments of the rows of
    both calls. :func:`bnjax.tools.apply_moments` makes one update of the running averages from it.

    Attributes:
      use_running_average: normalise with the running averages; here or at the call.
      axis: the feature axis or axes.
      momentum: the weight of the OLD running value, in [0, 1]; or a function from the step 0, 1, ... to it (an Optax
        schedule); or None for the plain average over all batches. A function, None and `debias` count batches in one
        more variable, `batch_stats/steps`; a checkpoint without it loads, and counts from 0.
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
      use_fast_variance: accepted because Flax has it, and ignored: the variance is always fast and accurate.
      force_float32_reductions: statistics are always computed in float32 at least. False only makes the running
        averages start in `param_dtype`, so that a Flax checkpoint that was made with False loads.
      scale_offset: added to the scale, to the parameter as to an argument of the call: with 1.0 the layer multiplies by
        1 + scale, and weight decay pulls the factor towards 1. `scale_init` still gives the factor at the start, so the
        parameter starts at that minus the offset.
      debias: leave the starting values 0 and 1 out of the running averages; see :func:`bnjax.update_running`.
      unbiased_var: average var·n/(n − 1), as PyTorch does.
      stats_axis_name: name, or names, of the mapped axes whose devices the running averages follow, where fewer devices
        share the statistics that normalise: with `axis_name` None, one axis of several, or `axis_index_groups`. It
        costs two more small all-reduces. With None, the running averages follow the statistics that normalise.
      count_skipped: count in one more variable, `batch_stats/skipped`, the batches that the running averages of a
        channel skipped because its moments were NaN or Inf, or of which they averaged only the mean because there was
        one row; `bnjax.tools.inspect` shows the count.
      stats_dtype: dtype in which the running mean starts, at least float32; by default that of x in `init`: float64 for
        float64, complex for complex x. If a later x has a wider dtype the averages take it too, except in `lax.scan`,
        whose carry may not change its dtype.

    Raises:
      ValueError: see :func:`bnjax.batch_norm` and :func:`bnjax.update_running`; or `scale` or `bias` is given at the
        call of a layer that has that parameter.

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
        """Wraps protocol methods of a subclass by `nn.nowrap`, so that Flax does not record them as module calls."""
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
          x: `[..., C]`; where it is complex, so is the running mean, as in Flax.
          use_running_average: normalise by the running averages rather than by the statistics of the batch.
          mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
          update_stats: whether a call in training mode updates the running averages; may be traced. With False no
            collection needs to be mutable.
          scale: used instead of the parameter, with `use_scale=False`: `[C]`, or of the rank of x and broadcastable to
            it, such as `[N, 1, 1, C]` for one per example (conditional batch normalization).
          bias: used instead of the parameter, with `use_bias=False`; of the same shapes as scale.

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

    # The steps of a call, in order. SplitBatchNorm calls the same steps and selects the row of its domain in between.

    @nn.nowrap
    def _evaluates(self, use_running_average: bool | None) -> bool:
        """Returns whether this call normalises by the running averages, from the field or the argument of the call."""
        if self.is_constant:
            return True
        name = "use_running_average"
        return _module.as_flag(name, merge_param(name, self.use_running_average, use_running_average))

    @nn.nowrap
    def _statistics(self, x: jax.Array, shape: tuple[int, ...], evaluates: bool) -> tuple[Any, ...]:
        """Returns the variables of `RunningStats`, which `init` creates; None for a counter that is not needed."""
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
        """Returns scale and bias: the parameters, which `init` creates, or the arguments of the call, or None."""

        def scale_init(*args: Any) -> Any:  # tree.map reaches into a box such as nn.Partitioned
            return jax.tree.map(lambda v: v - self.scale_offset, self.scale_init(*args))

        given = {"scale": scale, "bias": bias}
        for name, init, use in (("scale", scale_init, self.use_scale), ("bias", self.bias_init, self.use_bias)):
            there = meta.unbox(self.get_variable("params", name))
            _module.check_stored(shape, x, **{name: there})  # Flax would raise an error that is no ValueError
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
        if not starting:  # `init` may run where the axes are not bound
            groups = {k: getattr(self, k) for k in ("axis_name", "axis_index_groups", "stats_axis_name")}
        if not isinstance(update_stats, jax.Array):
            update_stats = _module.as_flag("update_stats", update_stats)
        updates = not (starting or evaluates or update_stats is False)
        if updates and not self.is_mutable_collection("batch_stats"):
            raise ValueError(
                f"{self._described()} is to update its running averages, but batch_stats is not mutable here. Call "
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
        """Returns whether the caller named the collection moments in `mutable`; `mutable=True` does not count."""
        mutable = self.scope.mutable if self.scope is not None else False
        return not isinstance(mutable, (bool, DenyList)) and in_filter(mutable, "moments")

    @nn.nowrap
    def _gathered(self, moments: Moments, shape: tuple[int, ...]) -> list[Any]:
        """Returns the variables of the collection moments, which hold the merged moments of the calls so far."""
        return [self.variable("moments", k, jnp.zeros, shape, v.dtype) for k, v in moments._asdict().items()]

    @nn.nowrap
    def _store(self, variables: Any, values: Any) -> None:
        """Writes values to variables; a variable that is None is left out."""
        for variable, value in zip(variables, values, strict=True):
            if variable is not None:
                variable.value = value

    @nn.nowrap
    def _described(self) -> str:
        """Returns the class and path of the layer, for errors."""
        return f"{type(self).__name__} at {'/'.join(self.path) or 'the top level'}"

    # These state that __call__ computes what the inherited methods describe; see `Normalization`.
    averaged_moments = nn.nowrap(Normalization.averaged_moments)
    evaluation_affine = nn.nowrap(Normalization.evaluation_affine)
