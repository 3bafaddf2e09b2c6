"""`SplitBatchNorm` for flax.linen."""

from typing import Any

import flax.linen as nn
import jax
from flax.linen.module import merge_param

from bnjax.functional._domains import Domain, Domains
from bnjax.linen.batch_norm import BatchNorm


class SplitBatchNorm(BatchNorm):
    r"""Batch normalization with statistics of their own for each of several domains.

    .. math::
        y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} \cdot \mathrm{scale}_d + \mathrm{bias}_d

    for a batch of domain d, in training by its own moments, in evaluation by the running averages of the domain:
    :func:`bnjax.split_batch_norm`. A call updates those of its domain alone. Names and kinds of the variables are those
    of :class:`bnjax.linen.BatchNorm`, with one more axis in front: a row for each domain.

    Attributes:
      num_domains: D; two by default, as clean and adversarial images.
      domain: which one, 0 to D − 1; here or at the call.
      shared_affine: one scale and bias for all domains, `[C]`.

    The others are those of :class:`bnjax.linen.BatchNorm`.

    Raises:
      ValueError: a domain that is none of the D, or as :class:`bnjax.linen.BatchNorm`.

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
      https://arxiv.org/abs/1906.03950, section 3.2. Both give every domain its own scale and bias.
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
        update_stats: bool = True,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x, a batch of one domain.

        Args:
          x: `[..., C]`.
          domain: which one, 0 to D − 1; a number, or a traced integer.
          use_running_average, mask, update_stats, scale, bias, residual: see :class:`bnjax.linen.BatchNorm`.

        Returns:
          y, of the shape of x; NaN for a traced domain that is none of the D.
        """
        here: Any = merge_param("domain", self.domain, domain)  # typed as an object, for an int and an array
        return self._forward(
            x,
            merge_param("use_running_average", self.use_running_average, use_running_average),
            mask=mask,
            update_stats=update_stats,
            scale=scale,
            bias=bias,
            residual=residual,
            domains=Domains(self.num_domains, here, self.shared_affine),
        )
