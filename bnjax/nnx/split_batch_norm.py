"""Defines `SplitBatchNorm` for flax.nnx."""

from collections.abc import Sequence
from typing import Any

import jax
from flax.nnx.module import first_from

from bnjax.functional import Normalization, _module
from bnjax.functional.variants._split_batch_norm import Domain, at_domain, set_domain, take_row
from bnjax.nnx._variables import write
from bnjax.nnx.batch_norm import BatchNorm


class SplitBatchNorm(BatchNorm):
    r"""Batch normalization with separate statistics, scale and bias for each of several domains.

    .. math::
        y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale}_d + \mathrm{bias}_d

    for a batch of domain d. mean and var are those of the batch in training and the running averages of the domain in
    evaluation; see :func:`bnjax.split_batch_norm`. A call in training updates the running averages of its domain only.
    The variables have the names and kinds of those of :class:`bnjax.nnx.BatchNorm` and one more axis in front, with a
    row for each domain.

    Args:
      num_features: size of the feature axis, or sizes of several; see :class:`bnjax.nnx.BatchNorm`.
      num_domains: D; 2 by default, such as clean and adversarial images.
      domain: the domain of the rows, 0 to D − 1; here, by `set_attributes`, or at the call.
      shared_affine: whether all domains share one scale and one bias, `[C]`.
      fields: those of :class:`bnjax.nnx.BatchNorm`.

    Raises:
      ValueError: a known domain is outside 0 to D − 1; also as :class:`bnjax.nnx.BatchNorm`.

    Examples:
      >>> import jax.numpy as jnp, bnjax
      >>> from flax import nnx
      >>> norm = bnjax.nnx.SplitBatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = norm(jnp.array([[1.0], [3.0]]), domain=1)
      >>> print(norm.mean[...].ravel())
      [0. 1.]

    References:
      Xie et al. 2020 (AdvProp), https://arxiv.org/abs/1911.09665, section 4; Chang et al. 2019 (DSBN),
      https://arxiv.org/abs/1906.03950, section 3.2. Both papers give every domain its own scale and bias.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        num_domains: int = 2,
        domain: int | None = None,
        shared_affine: bool = False,
        **fields: Any,
    ):
        self.num_domains, self.domain, self.shared_affine = num_domains, domain, shared_affine
        super().__init__(num_features, **fields)

    def _make_variables(self, stats_shape: tuple[int, ...], shape: tuple[int, ...], *others: Any) -> None:
        """Creates the variables with a row for each domain; scale and bias without it if the domains share them."""
        rows = (self.num_domains, *shape)
        super()._make_variables(rows, shape if self.shared_affine else rows, *others)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        domain: Domain | None = None,
        mask: jax.Array | None = None,
        update_stats: jax.Array | bool | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x, a batch of one domain.

        Args:
          x: `[..., C]`.
          domain: the domain of the rows, 0 to D − 1: a number, or a traced integer. It takes precedence over the field.
          use_running_average, mask, update_stats, scale, bias: see :class:`bnjax.nnx.BatchNorm`.

        Returns:
          y, of the shape of x; NaN for a traced domain outside 0 to D − 1.
        """
        here: Any = first_from(domain, self.domain, error_msg=_WHICH_DOMAIN)  # Any, because it is an int or an array
        x, row = _module.prepare(x, self.axis)
        shape = (self.num_domains, *row)
        stored = self._running(shape, x)
        running, own = at_domain(stored, here), row if self.shared_affine else shape
        scale = _module.choose("scale", self._read("scale", own, x), scale, own, x)
        bias = _module.choose("bias", self._read("bias", own, x), bias, own, x)
        scale, bias = (take_row(v, here, shape) for v in (scale, bias))
        step = self._step(x, running, scale, bias, use_running_average, _module.mask_around(x, mask), update_stats)
        if step.running is not running:
            write(self, set_domain(stored, here, step.running)._asdict())
        return step.y

    averaged_moments = Normalization.averaged_moments
    evaluation_affine = Normalization.evaluation_affine


_WHICH_DOMAIN = (
    "domain must be given to the constructor or at the call, or set by set_attributes: it says to which domain the "
    "rows of x belong."
)
