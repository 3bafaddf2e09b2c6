"""Teachers that follow a student, in their weights and in their statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bnjax.tools import _trees
from bnjax.tools._trees import show

if TYPE_CHECKING:
    import chex


def follow(teacher: chex.ArrayTree, student: chex.ArrayTree, *, momentum: jax.Array | float = 0.999) -> Any:
    r"""Moves an EMA teacher one step towards its student, in its weights and in its statistics (EMAN).

    .. math:: \theta_\text{teacher} \leftarrow m\,\theta_\text{teacher} + (1 - m)\,\theta_\text{student},
              \qquad \theta = (\mathrm{params}, \mathrm{mean}, \mathrm{var})

    The teacher then runs with `use_running_average=True`, and never on the statistics of its own batch: what those say
    about the other images of the batch leaks into self-supervised training, and statistics that the averaged weights
    have never met make it unstable.

    Args:
      teacher: all the variables of the teacher, leaves of any shapes; or an nnx state.
      student: those of the student, of the same structure.
      momentum: the weight of the OLD value, in [0, 1]; may be traced.

    Returns:
      The new variables of the teacher, in their dtypes. Integers, and the counters `steps` and `skipped` of the layers,
      are the student's.

    Raises:
      ValueError: no statistics in the tree, another structure or other shapes, or a momentum outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from bnjax import tools
      >>> teacher = {"params": {"scale": jnp.array([1.0])}, "batch_stats": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}
      >>> student = {"params": {"scale": jnp.array([2.0])}, "batch_stats": {"mean": jnp.ones(1), "var": jnp.ones(1)}}
      >>> teacher = tools.follow(teacher, student, momentum=0.75)
      >>> print(teacher["params"]["scale"], teacher["batch_stats"]["mean"])
      [1.25] [0.25]

    References:
      Cai et al. 2021, "Exponential Moving Average Normalization for Self-supervised and Semi-supervised Learning",
      https://arxiv.org/abs/2101.08482, section 3.2.

    Differences: the averages are those of the paper. As in the authors' program, counters of batches are copied from
    the student. Here a counter may matter: with `debias`, `momentum=None` or a schedule it says how many batches the
    averages of the student have taken, and those of the teacher lag behind. So do not train a teacher that follows.
    """
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= float(momentum) <= 1:
        raise ValueError(f"momentum is the weight of the OLD value and must be in [0, 1]; got {momentum!r}.")
    old, new = _trees.flatten_with_layers(teacher), _trees.flatten_with_layers(student)
    shapes = [dict(zip(t.names, map(jnp.shape, t.leaves), strict=True)) for t in (old, new)]
    if shapes[0] != shapes[1]:
        differing = sorted(show(n) for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
        raise ValueError(f"teacher and student must have the same leaves; they differ in {differing}.")

    counters = {at for roles in old.layers.values() for role, at in roles.items() if role in ("steps", "skipped")}

    def step(i: int, a: jax.Array, b: jax.Array) -> jax.Array:
        if i in counters or not jnp.issubdtype(jnp.result_type(a), jnp.inexact):
            return b
        wide = jnp.promote_types(jnp.result_type(a), jnp.float32)  # in bfloat16 a step of 1 − m is lost
        return (momentum * jnp.asarray(a, wide) + (1 - momentum) * jnp.asarray(b, wide)).astype(jnp.result_type(a))

    return old.build([step(i, *pair) for i, pair in enumerate(zip(old.leaves, new.leaves, strict=True))])
