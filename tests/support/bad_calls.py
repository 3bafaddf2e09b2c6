"""Lists bad calls of functions, for arguments that layers do not have; bad_inputs.py has those of layers.

Each row: a call that is given x of shape (4, 5, 3); the error that it must raise, and a pattern of the message.
"""

import jax
import numpy as np

import bnjax
from bnjax.functional import split_normalize, update_split_running

V = np.ones(3, np.float32)
BOTH = np.ones((2, 3), np.float32)  # of two domains
STATS, MOMENTS = bnjax.RunningStats(V, V), bnjax.Moments(V, V, V)
SHORT = bnjax.Moments(V[:1], V[:1], V[:1])
RECENT = bnjax.RecentStats(BOTH, BOTH, V)
bn, update = bnjax.batch_norm, bnjax.update_running


def traced(function, value):
    """Calls the function under jit, so that the value is traced."""
    return jax.jit(function)(value)


CALLS = {
    # vectors
    "scale complex": (lambda x: bn(x, V + 1j), TypeError, "scale must be numbers, and real"),
    "scale of text": (lambda x: bn(x, "ones"), TypeError, "scale must be an array of numbers; got str"),
    "scale of bools": (lambda x: bn(x, V > 0), TypeError, "scale must be numbers"),
    "mean left out": (lambda x: bnjax.normalize(x, None, V), ValueError, "mean is needed"),
    "var left out": (lambda x: bnjax.normalize(x, V, None), ValueError, "var is needed"),
    "key for x": (lambda x: bn(jax.random.split(jax.random.key(0))), TypeError, "x must be an array of numbers"),
    "shape for x": (
        lambda x: bn(jax.ShapeDtypeStruct((4, 3), "f4")),
        TypeError,
        "x must be an array of numbers; got Sh",
    ),
    # options that must be known
    "epsilon traced": (
        lambda x: traced(lambda e: bn(x, epsilon=e), 1e-5),
        ValueError,
        "epsilon must be .* traced value",
    ),
    "axis traced": (lambda x: traced(lambda a: bn(x, axis=a), 1), TypeError, "axis must be an integer"),
    "axes traced": (lambda x: traced(lambda a: bn(x, axis=(0, a)), 1), TypeError, "axis must be an integer"),
    "axis name that is not mapped": (lambda x: bn(x, axis_name="data"), ValueError, "axis_name='data' is not an axis"),
    "axis name a number": (lambda x: bn(x, axis_name=0), TypeError, "axis_name must be the name of a mapped axis"),
    "groups without axis name": (lambda x: bn(x, axis_index_groups=[[0]]), ValueError, "give its axis_name too"),
    # running averages
    "momentum traced, per channel": (
        lambda x: traced(lambda m: update(STATS, MOMENTS, momentum=m), V),
        ValueError,
        "one",
    ),
    "momentum None without steps": (lambda x: update(STATS, MOMENTS, momentum=None), ValueError, "steps"),
    "moments of another size": (lambda x: update(STATS, SHORT), ValueError, r"one feature shape .*\(3,\), \(1,\)"),
    "count of one number": (lambda x: update(STATS, bnjax.Moments(V, V, 4.0)), ValueError, "Nothing is broadcast"),
    "integer statistics": (
        lambda x: update(bnjax.RunningStats(np.zeros(3, int), np.ones(3, int)), MOMENTS),
        TypeError,
        "must be floating",
    ),
    "arrays for statistics": (lambda x: update(V, MOMENTS), TypeError, "must be tuples such as"),
    "merge of two sizes": (lambda x: bnjax.merge_moments(MOMENTS, SHORT), ValueError, "one feature shape"),
    "merge with a var of one": (
        lambda x: bnjax.merge_moments(MOMENTS, bnjax.Moments(V, V[:1], V)),
        ValueError,
        "Nothing is broadcast",
    ),
    "merge with None": (lambda x: bnjax.merge_moments(MOMENTS, None), TypeError, "got NoneType"),
    "pooled count of one number": (
        lambda x: bnjax.pool_moments(bnjax.Moments(V, V, 4.0), axis_name=None),
        ValueError,
        "Nothing is broadcast",
    ),
    "moments of complex mask": (lambda x: bnjax.batch_moments(x, mask=x + 1j), TypeError, "mask must be bool"),
    # variants
    "ghost: no size": (lambda x: bnjax.ghost_batch_norm(x), ValueError, "give one of virtual_batch_size and"),
    "ghost: two sizes": (
        lambda x: bnjax.ghost_batch_norm(x, virtual_batch_size=2, num_virtual_batches=2),
        ValueError,
        "give one of",
    ),
    "ghost: size 0": (lambda x: bnjax.ghost_batch_norm(x, virtual_batch_size=0), ValueError, "it must be positive"),
    "ghost: size 2.0": (lambda x: bnjax.ghost_batch_norm(x, virtual_batch_size=2.0), ValueError, "integer of at least"),
    "ghost: number of text": (lambda x: bnjax.ghost_batch_norm(x, num_virtual_batches="2"), TypeError, "integer of"),
    "ghost: nothing to cut": (
        lambda x: bnjax.ghost_batch_norm(x, virtual_batch_size=2, axis=(0, 1, 2)),
        ValueError,
        "an axis to cut",
    ),
    "renorm: r_max 0.5": (lambda x: bnjax.batch_renorm(x, V, V, r_max=0.5), ValueError, "r_max must be at least 1"),
    "renorm: d_max -1": (lambda x: bnjax.batch_renorm(x, V, V, d_max=-1.0), ValueError, "d_max must be at least 0"),
    "renorm: d_max NaN": (lambda x: bnjax.batch_renorm(x, V, V, d_max=np.nan), ValueError, "d_max must be at least 0"),
    "renorm: r_max of text": (lambda x: bnjax.batch_renorm(x, V, V, r_max="3"), TypeError, "r_max must be a number"),
    "renorm: negative var": (lambda x: bnjax.batch_renorm(x, V, -V), ValueError, "var holds variances"),
    "renorm: complex x": (lambda x: bnjax.batch_renorm(x + 1j, V, V), TypeError, "x must be real"),
    "split: domain 2 of 2": (lambda x: bnjax.split_batch_norm(x, 2, BOTH), ValueError, "one of the 2 domains 0 to 1"),
    "split: domain -1": (lambda x: bnjax.split_batch_norm(x, -1, BOTH), ValueError, "one of the 2 domains"),
    "split: domain 1.0": (lambda x: bnjax.split_batch_norm(x, 1.0, BOTH), ValueError, "domain must be one integer"),
    "split: domain None": (
        lambda x: bnjax.split_batch_norm(x, None, BOTH),
        TypeError,
        "domain must be an array of num",
    ),
    "split: a domain per row": (
        lambda x: bnjax.split_batch_norm(x, [0, 1, 0, 1], BOTH),
        ValueError,
        "for the whole batch",
    ),
    "split: scale a number": (
        lambda x: bnjax.split_batch_norm(x, 0, 2.0),
        ValueError,
        r"a row of it per domain; got \(\)",
    ),
    "split: scale of four": (
        lambda x: bnjax.split_batch_norm(x, 0, np.ones((2, 4))),
        ValueError,
        "a row of it per domain",
    ),
    "split: statistics of one domain": (lambda x: split_normalize(x, 0, V, V), ValueError, "mean must have the sh"),
    "split: update of one domain": (lambda x: update_split_running(STATS, MOMENTS, 0), ValueError, "one feature shape"),
    "power: momentum 2": (
        lambda x: bnjax.power_norm(x, V, gradient_momentum=2.0),
        ValueError,
        "gradient_momentum must",
    ),
    "power: momentum traced": (
        lambda x: traced(lambda m: bnjax.power_norm(x, V, gradient_momentum=m), 0.9),
        ValueError,
        "traced value",
    ),
    "power: projection of another size": (lambda x: bnjax.power_norm(x, V, V[:1]), ValueError, "projection must have"),
    "power: negative var": (lambda x: bnjax.power_norm(x, -V), ValueError, "var holds variances"),
    "moving average: r_max 0.5": (
        lambda x: bnjax.moving_average_batch_norm(x, V, RECENT, r_max=0.5),
        ValueError,
        r"r_max must .* \[1, inf\]",
    ),
    "moving average: r_max traced": (
        lambda x: traced(lambda r: bnjax.moving_average_batch_norm(x, V, r_max=r), 2.0),
        ValueError,
        "traced value",
    ),
    "moving average: warmup 1.5": (
        lambda x: bnjax.moving_average_batch_norm(x, V, warmup=1.5),
        ValueError,
        "warmup must be an integer",
    ),
    "moving average: recent of another size": (
        lambda x: bnjax.moving_average_batch_norm(x, V, bnjax.RecentStats(BOTH[:, :1], BOTH, V)),
        ValueError,
        "recent must",
    ),
    "frozen: negative var": (lambda x: bnjax.frozen_batch_norm(x, V, -V), ValueError, "var holds variances"),
    "frozen: mask of another shape": (
        lambda x: bnjax.frozen_batch_norm(x, V, V, mask=np.ones((4, 3))),
        ValueError,
        "mask must be broadcastable",
    ),
    "shuffle: no arrays": (lambda x: bnjax.shuffle({}, jax.random.key(0)), ValueError, "rows must be arrays"),
    "shuffle: lengths that differ": (
        lambda x: bnjax.shuffle((x, x[:2]), jax.random.key(0)),
        ValueError,
        "one number of",
    ),
    "shuffle: a number for rows": (lambda x: bnjax.shuffle(2.0, jax.random.key(0)), ValueError, "their first axis"),
    "shuffle: a number for the key": (lambda x: bnjax.shuffle(x, 3), TypeError, "key must be one key of jax.random"),
}
