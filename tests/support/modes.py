"""Runs one batch on eight devices in every way that JAX has: y, moments, running statistics and gradients.

Also a program: `python -m tests.support.modes PORT PROCESS OUT` is one of two processes with four devices each.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support.cases import by_name
from tests.support.processes import join

DEVICES = 8
MOMENTUM = 0.9


def train(x, scale, bias, running, **options):
    """Computes y, which is split over the devices, and a dict of statistics that all devices share."""
    y, moments = bnjax.batch_norm(x, scale, bias, **options)
    return y, dict(moments=moments, running=bnjax.update_running(running, moments, momentum=MOMENTUM))


def step(x, scale, bias, dy, mask, running, axis_name=None, train=train):
    """Computes everything that is tested, with the gradients of Σ y·dy over the rows that this program sees."""

    def loss(x, scale, bias):
        y, shared = train(x, scale, bias, running, mask=mask, axis_name=axis_name, dtype=jnp.float32)
        return jnp.sum(y * dy), (y, shared)

    (_, (y, shared)), (dx, dscale, dbias) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return dict(y=y, dx=dx, shared=shared, dscale=dscale, dbias=dbias)


def _summed_step(*args, train):
    """Computes a step and sums the gradients over devices, for mapped programs in which JAX does not."""
    out = step(*args, axis_name="data", train=train)
    return out | {k: jax.lax.psum(out[k], "data") for k in ("dscale", "dbias")}


BATCHED, SHARED = P("data"), P()
OUT_SPECS = dict(y=BATCHED, dx=BATCHED, shared=SHARED, dscale=SHARED, dbias=SHARED)


def _mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def _in_specs(mask):
    return BATCHED, SHARED, SHARED, BATCHED, None if mask is None else BATCHED, SHARED


def one_device(*args, train=train):
    return jax.jit(partial(step, train=train))(*args)


def jit(*args, train=train):
    """Computes a step under plain jit over a sharded batch, where statistics are global."""
    mesh = _mesh()
    spec = _in_specs(args[4])
    placed = jax.tree.map(lambda s, a: jax.device_put(a, NamedSharding(mesh, s)), spec, args)
    return one_device(*placed, train=train)


def shard_map(*args, check_vma=True, train=train):
    inside = partial(step, axis_name="data", train=train) if check_vma else partial(_summed_step, train=train)
    return jax.jit(
        jax.shard_map(inside, mesh=_mesh(), in_specs=_in_specs(args[4]), out_specs=OUT_SPECS, check_vma=check_vma)
    )(*args)


def _mapped(transform, *args, train=train):
    x, scale, bias, dy, mask, running = args
    split = lambda a: a.reshape(DEVICES, -1, *a.shape[1:])  # noqa: E731
    batch = jax.tree.map(split, dict(x=x, dy=dy, mask=mask))
    mapped = lambda b: _summed_step(b["x"], scale, bias, b["dy"], b["mask"], running, train=train)  # noqa: E731
    out = transform(mapped, axis_name="data")(batch)
    whole = {k: out[k].reshape(x.shape) for k in ("y", "dx")}
    return jax.tree.map(lambda a: a[-1], out) | whole  # shared results must be right on the last device too


MODES = dict(
    one_device=one_device,
    jit=jit,
    shard_map_vma=shard_map,
    shard_map_no_vma=partial(shard_map, check_vma=False),
    pmap=partial(_mapped, jax.pmap),
    vmap=partial(_mapped, jax.vmap),
)


def flat(out):
    """Returns the result as one dict of arrays."""
    shared = {f"{k}.{f}": v for k, part in out["shared"].items() for f, v in part._asdict().items() if v is not None}
    return {k: v for k, v in out.items() if k != "shared"} | shared


def _place(spec, array):
    """Creates a global array of which this process fills in its own part."""
    return jax.make_array_from_callback(array.shape, NamedSharding(_mesh(), spec), lambda i: np.asarray(array)[i])


def main(port, process, out):
    """Runs one of two processes on its half of the batch, and writes all results."""
    join(port, process, DEVICES // 2)
    results = {}
    for name in sys.argv[4:]:
        x, scale, bias, dy, mask = by_name(name).arrays()
        args = (x, scale, bias, dy, mask, start(scale.shape))
        placed = [jax.tree.map(partial(_place, spec), a) for spec, a in zip(_in_specs(mask), args, strict=True)]
        whole = multihost_utils.process_allgather(flat(shard_map(*placed)), tiled=True)
        results |= {f"{name}/{k}": np.asarray(v, np.float32) for k, v in whole.items()}  # npz has no bfloat16
    np.savez(out, **results)


def start(shape):
    """Returns running statistics that are neither at their initial values nor near the batch."""
    return bnjax.RunningStats(jnp.full(shape, 0.25), jnp.full(shape, 2.0))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
