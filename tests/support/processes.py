"""Runs two real processes, connected by `jax.distributed` and gloo on localhost; both exit by themselves."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


def run_two(program, folder, *arguments):
    """Runs `python -m program PORT PROCESS OUT arguments...` in two processes; returns the arrays each
    wrote as .npz.
    """
    port = free_port()
    # Each process sets its own number of devices, not the eight of this one.
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-m", program, str(port)]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(folder / f"{i}.npz"), *arguments],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [w.communicate(timeout=180)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    assert [w.returncode for w in workers] == [0, 0], "\n".join(outputs)
    return [dict(np.load(folder / f"{i}.npz")) for i in range(2)]


def free_port():
    """Returns a port on which no process listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(port, process, devices):
    """Connects one of the two processes to the other, with this many CPU devices."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, 2, process, initialization_timeout=60, coordinator_bind_address=address)
