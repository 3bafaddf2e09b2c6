"""Compares layers on the device with float64 arithmetic: largest errors of y and dx, over dtypes, means and devices."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax

NORMS: dict[str, Callable[..., nn.Module]] = {
    "bnjax": bnjax.BatchNorm,
    "flax.linen": nn.BatchNorm,
    "flax.linen, accurate": partial(nn.BatchNorm, use_fast_variance=False),
}
RATIOS = (0.0, 1e2, 1e4)  # mean over standard deviation
EPSILON = 1e-5


def reference(x: np.ndarray, dy: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns y and dx of batch normalization over all axes but the last, in float64.

    dx = (dy − m·(mean(dy) + xhat·mean(dy·xhat)))/√(var + ε), with means over the rows of the mask m and sums of all dy.
    """
    x, dy, rows = x.astype(np.float64), dy.astype(np.float64), tuple(range(x.ndim - 1))
    count = mask.sum() * x[..., 0].size / mask.size
    mean = (mask * x).sum(rows) / count
    var = (mask * (x - mean) ** 2).sum(rows) / count
    rstd = 1 / np.sqrt(var + EPSILON)
    y = (x - mean) * rstd
    return y, rstd * (dy - mask * (dy.sum(rows) + y * (dy * y).sum(rows)) / count)


def rows(shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yields a row for each dtype, mean, mask and norm: the largest errors of y and dx, relative to the largest values.

    The batch is spread over all devices under plain `jit`, so its first size must be a multiple of their number.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        for ratio in RATIOS:
            x = np.asarray(jnp.asarray(rng.normal(size=shape) + ratio, dtype))
            dy = rng.normal(size=shape).astype(np.float32)
            for masked in (False, True):
                mask = np.ones((shape[0], *[1] * (len(shape) - 1)), bool)
                mask[len(mask) // 2 + 1 :] = not masked
                wanted = reference(x, dy, mask)
                arrays = [jax.device_put(a, split) for a in (x, dy, mask)]
                for name, norm in NORMS.items():
                    errors = map(_error, _layer(norm, masked)(*arrays), wanted)
                    yield {
                        "part": "conformance",
                        "dtype": dtype,
                        "mean_over_std": ratio,
                        "masked": masked,
                        "norm": name,
                        **dict(zip(("y", "dx"), errors, strict=True)),
                    }


def _layer(norm: Callable[..., nn.Module], masked: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a program that computes y and dx, in float32."""
    module = norm(use_running_average=False, epsilon=EPSILON, dtype=jnp.float32)

    @jax.jit
    def run(x: jax.Array, dy: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = module.init(jax.random.key(0), x)
        given = {"mask": mask} if masked else {}
        y, pull = jax.vjp(lambda x: module.apply(variables, x, mutable=["batch_stats"], **given)[0], x)
        return y, pull(dy)[0]

    return run


def _error(found: jax.Array, wanted: np.ndarray) -> float:
    """Returns the largest error over the largest value, or over 1 if that is less; NaN if anything found is NaN."""
    return float(np.max(np.abs(np.asarray(found, np.float64) - wanted)) / max(1, np.max(np.abs(wanted))))
