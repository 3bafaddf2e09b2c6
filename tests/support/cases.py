"""Lists the cases that property tests run over, and the tolerances that follow from dtype and number of rows."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from tests.support import oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of batch; `arrays` draws it, and the other properties follow from its fields."""

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: str = "float32"
    mask: str | None = None  # a key of MASKS
    offset: float = 0.5  # mean/std of x

    def __str__(self):
        return self.name

    @property
    def features(self):
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(sorted(a % len(self.shape) for a in axes))

    @property
    def feature_shape(self):
        return tuple(self.shape[a] for a in self.features)

    @property
    def rows(self):
        return math.prod(n for a, n in enumerate(self.shape) if a not in self.features)

    def arrays(self, seed=0):
        """Draws x, scale, bias, dy and mask as NumPy arrays (x in the case's dtype)."""
        rng = np.random.default_rng(seed)
        x = (rng.normal(size=self.shape) + self.offset).astype(jnp.dtype(self.dtype))
        scale, bias = rng.uniform(0.5, 1.5, self.feature_shape), rng.normal(size=self.feature_shape)
        dy = rng.normal(size=self.shape)
        mask = None if self.mask is None else MASKS[self.mask](rng, self)
        if self.mask in SPOILS:
            x = np.where(np.broadcast_to(mask == 0, self.shape), np.asarray(np.nan, x.dtype), x)
        return x, scale.astype(np.float32), bias.astype(np.float32), dy.astype(np.float32), mask


def _per_row(case):
    """Returns the shape of a mask with one weight per position of the first axis."""
    return (case.shape[0],) + (1,) * (len(case.shape) - 1)


def _uneven(rng, case):
    """Masks each eighth of the batch differently: all rows valid, half, one, ..., as at the end of an epoch."""
    n = case.shape[0]
    share = np.arange(n) // max(1, n // 8)
    place = np.arange(n) % max(1, n // 8)
    return (place < np.array([n, n, n // 16 + 1, 1, 1, 2, 1, n])[share % 8]).reshape(_per_row(case))


def _empty_shard(rng, case):
    """Masks the whole first and last eighth of the batch."""
    n = case.shape[0]
    return ((np.arange(n) >= n // 8) & (np.arange(n) < n - n // 8)).reshape(_per_row(case))


MASKS = {
    "per_row": lambda rng, case: rng.random(_per_row(case)) < 0.7,
    "per_position": lambda rng, case: rng.random(case.shape) < 0.7,
    "per_channel": lambda rng, case: (rng.random(case.shape) < 0.7).astype(np.int32),
    "integers": lambda rng, case: rng.integers(0, 4, _per_row(case)),
    "floats": lambda rng, case: (rng.random(_per_row(case)) * (rng.random(_per_row(case)) < 0.8)).astype(np.float32),
    "uneven": _uneven,
    "empty_shard": _empty_shard,
    "nobody": lambda rng, case: np.zeros(_per_row(case), bool),
    "nan_padding": lambda rng, case: _uneven(rng, case),
}
SPOILS = {"nan_padding"}  # masks whose zeros hide NaN

CASES = [
    Case("image", (8, 6, 5, 3)),
    Case("rows", (64, 7)),
    Case("vector", (5,)),
    Case("one_channel", (33, 1)),
    Case("sequence", (8, 9, 4), offset=3.0),
    Case("channels_first", (8, 3, 6, 5), axis=1),
    Case("two_features", (8, 3, 5), axis=(1, 2)),
    Case("split_features", (4, 8, 3), axis=(0, -1)),
    Case("negative_axes", (2, 3, 8, 4), axis=(-3, -1)),
    Case("many_rows", (40_000, 2)),
    Case("offset", (64, 4, 4, 3), offset=100.0),
    Case("bfloat16", (16, 5, 5, 4), dtype="bfloat16"),
    Case("float16", (16, 5, 5, 4), dtype="float16"),
    Case("masked_rows", (16, 3, 3, 4), mask="per_row"),
    Case("masked_positions", (16, 5, 4), mask="per_position"),
    Case("masked_channels", (16, 5, 4), mask="per_channel"),
    Case("integer_weights", (24, 5), mask="integers"),
    Case("float_weights", (24, 5), mask="floats"),
    Case("uneven", (32, 3, 4), mask="uneven"),
    Case("empty_shard", (16, 3, 4), mask="empty_shard"),
    Case("nobody", (16, 3, 4), mask="nobody"),
    Case("nan_padding", (32, 3, 4), mask="nan_padding"),
    Case("masked_channels_first", (16, 4, 5), axis=1, mask="per_position"),
    Case("masked_bfloat16", (32, 6), dtype="bfloat16", mask="nan_padding"),
]


def unit(dtype):
    """Returns the rounding error of one operation."""
    return float(jnp.finfo(dtype).eps) / 2


def tolerance(case, statistics="float32"):
    """Returns the rounding error of a sum over the rows: a tree of additions, and some twenty operations.

    It is relative to Σ|terms|, which callers pass to `assert_close` as the magnitude.
    """
    return (math.log2(case.rows + 1) + 20) * unit(statistics)


def expected(case, arrays, epsilon=1e-5):
    x, scale, bias, dy, mask = arrays
    return oracle.batch_norm(x.astype(np.float64), scale, bias, dy, case.features, epsilon, mask)


def assert_close(actual, wanted, tol, magnitude=None, what=""):
    """Asserts |actual − wanted| ≤ tol·magnitude everywhere; magnitude defaults to the largest |wanted|."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, f"{what}: shape {actual.shape}, wanted {wanted.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    magnitude = np.max(np.abs(wanted), initial=0) if magnitude is None else magnitude
    error = np.max(np.abs(actual - wanted) / np.maximum(magnitude, 1e-30), initial=0)
    assert error <= tol, f"{what}: error {error:.2e} of the magnitude, allowed {tol:.2e}"


def by_name(name):
    return next(c for c in CASES + SHARDED if c.name == name)


# Batches that divide by eight devices, the rows of each eighth on one of them.
SHARDED = [
    Case("plain_shards", (32, 3, 4), offset=2.0),
    Case("uneven_shards", (32, 3, 4), offset=2.0, mask="uneven"),
    Case("an_empty_shard", (16, 3, 4), offset=2.0, mask="empty_shard"),
    Case("nan_in_padding", (32, 3, 4), offset=2.0, mask="nan_padding"),
    Case("float_weight_shards", (32, 3, 4), offset=2.0, mask="floats"),
    Case("offset_shards", (32, 3, 4), offset=1000.0, mask="uneven"),
    Case("bfloat16_shards", (32, 3, 4), dtype="bfloat16", mask="uneven"),
]
