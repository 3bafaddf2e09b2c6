"""Trains CrossQ of SBX (Stable Baselines in JAX) on Pendulum, with its own batch renormalization and with bnjax's.

Question: Does bnjax train in a program that nobody here wrote: twin critics under vmap, jitted, in a loop of SBX's?
Command:  pip install "bnjax[experiments]" sbx-rl (which brings PyTorch); python -m experiments.bench.clock.crossq
Time:     8 min on one core, most of it compilation; --steps 300 --seeds 0 takes 1 min

SBX has a copy of Flax's layer with r and d. Its name is replaced in SBX's module, and nothing else. Both are batch
normalization in the first 100,000 steps, so that the networks should agree at first, and the returns at the end.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import bnjax
from experiments.bench import report

OWN, OURS = "SBX's BatchRenorm", "bnjax.linen.BatchRenorm"
EARLY = 10  # gradient steps after which the networks are compared
START = 100  # steps of the environment before the first gradient step
HEAD = (
    "layer",
    "seed",
    "return of 10 episodes",
    "gradient steps per second of the processor",
    f"apart after {EARLY} steps",
)


def renorm(warmup_steps: int = 100_000, **fields: Any) -> bnjax.linen.BatchRenorm:
    """Returns bnjax's layer with the schedule and ε of SBX's: from the warm-up on r_max is 3 and d_max 5."""

    def then(before: float, after: float) -> Callable[[jax.Array], jax.Array]:
        return lambda step: jnp.where(step < warmup_steps, before, after)

    return bnjax.linen.BatchRenorm(epsilon=1e-3, r_max=then(1.0, 3.0), d_max=then(0.0, 5.0), **fields)


@contextmanager
def layer(name: str) -> Iterator[None]:
    """Puts bnjax's layer in the place of SBX's, if `name` says so."""
    from sbx.crossq import policies

    own = policies.BatchRenorm
    policies.BatchRenorm = own if name == OWN else renorm
    try:
        yield
    finally:
        policies.BatchRenorm = own


def agent_of(seed: int) -> Any:
    """Returns an agent of SBX with two small hidden layers."""
    import sbx

    options = dict(learning_starts=START, seed=seed, policy_kwargs={"net_arch": [64, 64]})
    return sbx.CrossQ("MlpPolicy", "Pendulum-v1", **options)


def critics(seed: int) -> list[np.ndarray]:
    """Returns the parameters of the two critics after a few gradient steps."""
    agent = agent_of(seed).learn(START + EARLY)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(agent.policy.qf_state.params)]


def measure(name: str, seed: int, steps: int) -> report.Row:
    """Trains one agent and returns its row."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    with layer(name):
        agent = agent_of(seed).learn(START + EARLY)  # compiles
        began = time.process_time()
        agent.learn(steps, reset_num_timesteps=False)
        seconds = time.process_time() - began
        mean, _ = evaluate_policy(agent, make_vec_env("Pendulum-v1", seed=seed), n_eval_episodes=10)
        found = critics(seed)
    with layer(OWN):
        apart = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, critics(seed), strict=True))
    trained = jax.tree.leaves((agent.policy.qf_state.params, agent.policy.qf_state.batch_stats))
    return {
        "layer": name,
        "seed": seed,
        "return": round(float(mean), 1),
        "steps": steps,
        "steps_per_second": round(steps / seconds, 1),
        "apart": float(apart),
        "finite": bool(all(np.isfinite(leaf).all() for leaf in trained)),
    }


def cells(row: report.Row) -> tuple[Any, ...]:
    """Returns the cells of a row of the table."""
    return (row["layer"], row["seed"], row["return"], row["steps_per_second"], f"{row['apart']:.1e}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options: how long, and with which seeds."""

    steps: int = 3000
    """Steps of the environment, one gradient step after each."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One agent with each layer for each."""
    out: Path | None = report.RESULTS
    """Folder of crossq.jsonl and crossq.md; None only prints."""


def main(config: Config) -> None:
    """Prints a row for each layer and seed, and writes all of them."""
    rows = []
    for seed in config.seeds:
        for name in (OWN, OURS):
            rows.append(measure(name, seed, config.steps))
            print(*cells(rows[-1]), sep=" | ", flush=True)
    if config.out:
        means = (
            f"Mean return with {name}: {np.mean([r['return'] for r in rows if r['layer'] == name]):.0f}."
            for name in (OWN, OURS)
        )
        text = f"{config.steps} steps. " + " ".join(means) + "\n\n" + report.table(HEAD, map(cells, rows))
        report.keep(rows, config.out, "clock.crossq", "SBX's CrossQ on Pendulum with either layer", text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
