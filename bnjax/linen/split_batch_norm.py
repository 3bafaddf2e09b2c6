"""Defines `SplitBatchNorm` for flax.linen."""

from typing import Any

import flax.linen as nn
import jax
from flax.linen.module import merge_param

from bnjax.functional import Moments, Normalization, RunningStats, _module, merge_moments
from bnjax.functional.variants._split_batch_norm import Domain, at_domain, set_domain, take_row
from bnjax.linen.batch_norm import BatchNorm


class SplitBatchNorm(BatchNorm):
    r"""Batch normalization with separate statistics, scale and bias for each of several domains.

    .. math::
        y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale}_d + \mathrm{bias}_d

    for a batch of domain d. mean and var are those of the batch in training and the running averages of the domain in
    evaluation; see :func:`bnjax.split_batch_norm`. A call in training updates the running averages of its domain only.
    The variables have the names and kinds of those of :class:`bnjax.linen.BatchNorm` and one more axis in front, with a
    row for each domain.

    Attributes:
      num_domains: D; 2 by default, such as clean and adversarial images.
      domain: the domain of the rows, 0 to D − 1; here or at the call.
      shared_affine: whether all domains share one scale and one bias, `[C]`.

    The other attributes are those of :class:`bnjax.linen.BatchNorm`.

    Raises:
      ValueError: a known domain is outside 0 to D − 1; also as :class:`bnjax.linen.BatchNorm`.

    Examples:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm = bnjax.linen.SplitBatchNorm(use_running_average=False, momentum=0.5)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = norm.init(jax.random.key(0), x, domain=0)
      >>> y, updates = norm.apply(variables, x, domain=1, mutable=["batch_stats"])
      >>> print(updates["batch_stats"]["mean"].ravel())
      [0. 1.]

    References:
      Xie et al. 2020 (AdvProp), https://arxiv.org/abs/1911.09665, section 4; Chang et al. 2019 (DSBN),
      https://arxiv.org/abs/1906.03950, section 3.2. Both papers give every domain its own scale and bias.
    """

    num_domains: int = 2
    domain: int | None = None
    shared_affine: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        domain: Domain | None = None,
        mask: jax.Array | None = None,
        update_stats: jax.Array | bool = True,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x, a batch of one domain.

        Args:
          x: `[..., C]`.
          domain: the domain of the rows, 0 to D − 1: a number, or a traced integer.
          use_running_average, mask, update_stats, scale, bias: see :class:`bnjax.linen.BatchNorm`.

        Returns:
          y, of the shape of x; NaN for a traced domain outside 0 to D − 1.
        """
        here: Any = merge_param("domain", self.domain, domain)  # Any, because it is an int or an array
        x, row = _module.prepare(x, self.axis)
        shape = (self.num_domains, *row)
        evaluates = self._evaluates(use_running_average)
        variables = self._statistics(x, shape, evaluates)
        stored = RunningStats._make(None if v is None else v.value for v in variables)
        running = at_domain(stored, here)
        scale, bias = self._scale_and_bias(x, row if self.shared_affine else shape, scale, bias)
        scale, bias = (take_row(v, here, shape) for v in (scale, bias))
        step = self._step(x, running, scale, bias, evaluates, mask, update_stats)
        if step.moments is not None and self._gathers_moments():
            held = self._gathered(step.moments, shape)
            gathered = Moments._make(v.value for v in held)
            merged = merge_moments(at_domain(gathered, here), step.moments)
            self._store(held, set_domain(gathered, here, merged))
        if step.running is not running:
            self._store(variables, set_domain(stored, here, step.running))
        return step.y

    averaged_moments = Normalization.averaged_moments
    evaluation_affine = Normalization.evaluation_affine
