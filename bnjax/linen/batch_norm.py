"""`BatchNorm` for flax.linen: creates the variables, calls the functional core, stores the result."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.core.scope import DenyList, in_filter
from flax.linen.module import merge_param

from bnjax.functional import Moments, RunningStats, batch_norm, merge_moments, normalize, update_running
from bnjax.functional._affine import Affine, affine_of, offset_init, own_or_given
from bnjax.functional._axes import as_array, check_stored, layout_of
from bnjax.functional._domains import ONE, Domains
from bnjax.functional._finish import Activation, Ending
from bnjax.functional._merge import moments_for_running
from bnjax.functional._one_row import silent_if
from bnjax.functional._running import Momentum, needs_steps


class BatchNorm(nn.Module):
    r"""Batch normalization; a drop-in for `flax.linen.BatchNorm`.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale} + \mathrm{bias}

    In training mean and var are those of the batch (:func:`bnjax.batch_norm`) and the running averages in the
    collection `batch_stats` take a step (:func:`bnjax.update_running`); with `use_running_average` they are the running
    averages (:func:`bnjax.normalize`). Variables, names, shapes and defaults are Flax's: `params/{scale, bias}`,
    `batch_stats/{mean, var}`, each of the feature shape; checkpoints of either load in the other.

    The running mean is the pivot of the sums (where all devices share it for certain: plain jit and
    shard_map(check_vma=True)), so that in a steady state training reads x once for its statistics and makes one
    all-reduce forward and one backward, whatever the data. A batch more than 4 standard deviations from the pivot costs
    one more of each. At mean/std = r that ends after about ln(r/4) / ln(1/momentum) steps: 9 at r = 10 and momentum
    0.9, 92 at momentum 0.99, 550 at r = 1000. It never begins where r < 4, as behind most convolutions.

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
      force_float32_reductions: statistics are always computed in float32 at least; False only gives the running
        averages `param_dtype`, so that such a checkpoint of Flax loads.
      scale_offset: added to the scale, own or given: with 1.0 the layer multiplies by 1 + scale, and weight decay pulls
        towards 1. `scale_init` still says what it multiplies by at first: the variable starts at that less the offset.
      debias: leave the starting values 0 and 1 out of the running averages; see :func:`bnjax.update_running`.
      unbiased_var: average var·n/(n − 1), as PyTorch does.
      stats_axis_name: name, or names, of the mapped axes over which the running averages are those of everybody, where
        fewer share the statistics that normalise: `axis_name` None, one axis of several, or `axis_index_groups`. Two
        small all-reduces more. Without it, running averages follow the statistics that normalise.
      activation: a function that the output goes through, such as `jax.nn.relu`, after a residual was added.
      count_skipped: count in one more variable, `batch_stats/skipped`, the batches that a channel's running averages
        refused because its moments were NaN or Inf; `bnjax.tools.inspect` shows it.

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
    momentum: Momentum = 0.99
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
    activation: Activation = None
    count_skipped: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: bool = True,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x.

        During `init` the running averages stay as they start and no axis needs to be bound.

        Args:
          x: `[..., C]`; where it is complex so is the running mean, as in Flax.
          use_running_average: normalise with the running averages rather than with those of the batch.
          mask: non-negative weights (bool, integer or float), broadcastable to x; see :func:`bnjax.batch_norm`.
          update_stats: whether a call in training mode updates the running averages. False needs no mutable collection.
          scale: in place of the parameter (`use_scale=False`): `[C]`, or of the rank of x and broadcastable to it,
            such as `[N, 1, 1, C]` for one per example (conditional batch normalization).
          bias: the same.
          residual: of the shape of x, added before the activation.

        Returns:
          y, of the shape of x.
        """
        use_running_average = merge_param("use_running_average", self.use_running_average, use_running_average)
        options: dict[str, Any] = dict(mask=mask, update_stats=update_stats, scale=scale, bias=bias, residual=residual)
        return self._forward(x, use_running_average, **options)

    # What a variant overrides -----------------------------------------------------------------------------------------

    def _batch_norm(self, x: jax.Array, running: RunningStats, **options: Any) -> tuple[jax.Array, Moments]:
        """y by the statistics of the batch, and the moments for the running averages. No axis name during `init`."""
        return batch_norm(x, pivot=running.pivot, **options)

    def _normalize(self, x: jax.Array, running: RunningStats, **options: Any) -> jax.Array:
        """y by the running averages."""
        return normalize(x, running.mean, running.var, **options)

    def _counts_steps(self) -> bool:
        """Whether `batch_stats/steps` is needed."""
        return needs_steps(self.momentum, self.debias)

    # What it keeps ----------------------------------------------------------------------------------------------------

    def _forward(
        self,
        x: jax.Array,
        use_running_average: bool,
        *,
        mask: jax.Array | None,
        update_stats: bool,
        scale: jax.Array | None,
        bias: jax.Array | None,
        residual: jax.Array | None,
        domains: Domains = ONE,
    ) -> jax.Array:
        """The call; of the variables, the part that `domains` selects."""
        x = as_array("x", x)
        shape = layout_of(x, self.axis).shape
        update_stats = update_stats and not use_running_average and not self.is_initializing()
        variables = self._statistics(domains.shape(shape), jnp.iscomplexobj(x), update_stats)
        stored = RunningStats._make(None if v is None else v.value for v in variables)
        check_stored(domains.shape(shape), x, **stored._asdict())
        running = domains.take(stored)
        ending = Ending(self._affine(x, shape, scale, bias, domains.of_affine), self.activation, residual)
        options = dict(axis=self.axis, epsilon=self.epsilon, **ending.core)
        if use_running_average:
            return ending.finish(self._normalize(x, running, mask=mask, **options))
        if not self.is_initializing():
            options |= dict(axis_name=self.axis_name, axis_index_groups=self.axis_index_groups)
        with silent_if(self.is_initializing()):
            y, moments = self._batch_norm(x, running, mask=mask, **options)
        if self._is_asked_for("moments"):
            self._accumulate(moments, domains)
        if update_stats:
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
            for variable, value in zip(variables, domains.put(stored, new), strict=True):
                if variable is not None:
                    variable.value = value
        return ending.finish(y)

    def _statistics(self, shape: tuple[int, ...], is_complex: bool, update_stats: bool) -> tuple[Any, ...]:
        """The variables of `RunningStats`; None for a counter that is not needed, or not there and only read."""
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean_dtype = jnp.promote_types(stats_dtype, jnp.complex64) if is_complex else stats_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, mean_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)

        def counter(name: str, is_needed: bool) -> Any:
            exists = update_stats or self.is_initializing() or self.has_variable("batch_stats", name)
            return self.variable("batch_stats", name, jnp.zeros, shape, jnp.float32) if is_needed and exists else None

        return mean, var, counter("steps", self._counts_steps()), counter("skipped", self.count_skipped)

    def _is_asked_for(self, collection: str) -> bool:
        """Whether `mutable` names the collection. True, or all but a few (as in `init`), gives what Flax gives."""
        mutable = self.scope.mutable if self.scope is not None else False
        return not isinstance(mutable, (bool, DenyList)) and in_filter(mutable, collection)

    def _accumulate(self, moments: Moments, domains: Domains) -> None:
        """Merges the moments into the collection `moments`: those of all calls since it was empty."""
        held = [
            self.variable("moments", name, jnp.zeros_like, value, shape=domains.shape(value.shape))
            for name, value in moments._asdict().items()
        ]
        stored = Moments._make(variable.value for variable in held)
        merged = merge_moments(domains.take(stored), moments)
        for variable, value in zip(held, domains.put(stored, merged), strict=True):
            variable.value = value

    def _affine(
        self,
        x: jax.Array,
        shape: tuple[int, ...],
        scale: jax.Array | None,
        bias: jax.Array | None,
        domains: Domains,
    ) -> Affine:
        """The parameters, or what the call gave in their place."""
        shape = domains.shape(shape)
        loaded = {name: meta.unbox(self.get_variable("params", name)) for name in ("scale", "bias")}
        check_stored(shape, x, **loaded)  # Flax's own error is neither of value nor of type
        scale_init = offset_init(self.scale_init, self.scale_offset)
        own_scale = self.param("scale", scale_init, shape, self.param_dtype) if self.use_scale else None
        own_bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        own_scale, own_bias = domains.take((own_scale, own_bias))
        scale, bias = own_or_given("scale", own_scale, scale), own_or_given("bias", own_bias, bias)
        return affine_of(x, scale, bias, axis=self.axis, offset=self.scale_offset, dtype=self.dtype)
