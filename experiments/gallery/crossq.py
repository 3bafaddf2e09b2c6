"""CrossQ on Gymnasium's Pendulum: reinforcement learning without target networks, with BN over the joint batch.

Claim:    Without target networks BN or Batch Renorm in the critic learns a pendulum in fewer steps than no
          normalization does, and than SAC with target networks.
Command:  python -m experiments.gallery.crossq                  # --smoke: seconds; --full: 30,000 steps
Hardware: 2 CPU cores
Time:     3 min of one core

Bhatt, Palenicek et al. 2024, https://arxiv.org/abs/1902.05605. A critic that predicts its own targets meets
two distributions: actions of the replay buffer in (s, a), and those of the policy of today in (s', a'). Normalising
each by itself would give the target another network than the prediction; normalised together, in one forward pass over
both, they share statistics, and the target network goes. The policy is trained and acts by running averages.

The authors' code (https://github.com/adityab/CrossQ, sbx/sac) has momentum 0.99, ε 0.001, and a Batch Renorm that is BN
for 100,000 steps and then has r_max 3 and d_max 5 at once. Here that is after a tenth of the steps.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from bnjax.linen import BatchNorm, BatchRenorm
from experiments.gallery import RESULTS
from experiments.models.convolutional import Norm, Unnormalised
from experiments.repro import study
from experiments.repro.claims import Claim, Measure, of

GAMMA, TAU, RATE, WIDTH, BATCH, CHUNK, RANDOM = 0.99, 0.005, 1e-3, 64, 64, 10, 200
TARGETS = "SAC with target networks"
USED = dict(momentum=0.99, epsilon=1e-3)


def after(steps: int, before: float, then: float) -> Any:
    """Returns a limit of Batch Renorm that changes at once, as a function of the step."""
    return lambda step: jnp.where(step < steps, before, then)


def norms(steps: int) -> dict[str, Norm]:
    """Returns the normalization of each setting; Batch Renorm begins to correct after a tenth of the steps."""
    limits = dict(r_max=after(steps // 10, 1.0, 3.0), d_max=after(steps // 10, 0.0, 5.0))
    return {
        "CrossQ, BN": partial(BatchNorm, **USED),
        "CrossQ, Batch Renorm": partial(BatchRenorm, **USED, **limits),
        "no targets, no BN": Unnormalised,
        TARGETS: Unnormalised,
    }


SETTINGS = tuple(norms(1))


class Net(nn.Module):
    """Norm, and two times Dense → ReLU → norm, as in the authors' code; a Dense layer gives the outputs."""

    norm: Norm
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes `[N, outputs]` from x `[N, C]`."""
        norm = partial(self.norm, use_running_average=not train)
        x = norm()(x)
        for _ in range(2):
            x = norm()(nn.relu(nn.Dense(WIDTH)(x)))
        return nn.Dense(self.outputs)(x)


class Batch(NamedTuple):
    """Holds transitions, each `[N, ...]`. The pendulum never terminates; time limits are no ends of the task."""

    state: Any
    action: Any
    reward: Any
    following: Any


class Learner(NamedTuple):
    """Holds the variables of actor and two critics, the logarithm of the temperature, and the optimizer's state."""

    variables: Any  # {"actor": ..., "critic": ...}: each with params and batch_stats
    targets: Any  # variables of the target critics; of SAC alone
    opt_state: Any
    key: jax.Array


class Agent:
    """Builds the networks of a setting, acts, and updates them."""

    def __init__(self, setting: str, steps: int):
        norm = norms(steps)[setting]
        self.with_targets, self.actor = setting == TARGETS, Net(norm, 2)
        axes = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        twice = nn.vmap(Net, in_axes=None, out_axes=0, axis_size=2, **axes)
        self.critic, self.optimizer = twice(norm, 1), optax.adam(RATE, b1=0.5)

    def start(self, seed: int) -> Learner:
        """Returns the learner before its first step."""
        keys = jax.random.split(jax.random.key(seed), 3)
        actor = self.actor.init(keys[0], jnp.zeros((1, 3)), False)
        critic = self.critic.init(keys[1], jnp.zeros((1, 4)), False)
        variables = {"actor": actor, "critic": critic, "temperature": {"params": jnp.zeros(())}}
        opt_state = self.optimizer.init(params_of(variables))
        return Learner(variables, critic, opt_state, keys[2])

    def sample(self, variables: Any, state: jax.Array, key: jax.Array, train: bool = False) -> tuple[Any, Any, Any]:
        """Draws actions between −1 and 1; returns them, their log-probabilities and the actor's new statistics."""
        out, updates = self.actor.apply(variables, state, train, mutable=["batch_stats"])
        mean, log_std = jnp.split(out, 2, axis=-1)
        log_std = jnp.clip(log_std, -20, 2)
        raw = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        log_prob = -0.5 * ((raw - mean) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
        log_prob -= 2 * (jnp.log(2) - raw - nn.softplus(-2 * raw))  # the derivative of tanh, without its cancellation
        return jnp.tanh(raw), log_prob.sum(-1), updates

    @partial(jax.jit, static_argnums=0)
    def act(self, variables: Any, state: jax.Array, key: jax.Array) -> jax.Array:
        """Returns sampled actions for states `[N, 3]`."""
        return self.sample(variables, state, key)[0]

    @partial(jax.jit, static_argnums=0)
    def best(self, variables: Any, state: jax.Array) -> jax.Array:
        """Returns the actions of evaluation, without noise."""
        return jnp.tanh(self.actor.apply(variables, state, False)[..., :1])

    @partial(jax.jit, static_argnums=0)
    def update(self, learner: Learner, batches: Batch) -> Learner:
        """Takes a step for each of the batches, `[steps, N, ...]`."""
        return jax.lax.scan(self.step, learner, batches)[0]

    def step(self, learner: Learner, batch: Batch) -> tuple[Learner, None]:
        """Takes one step of critics, actor and temperature."""
        key, *keys = jax.random.split(learner.key, 3)
        variables = learner.variables
        temperature = jnp.exp(variables["temperature"]["params"])
        action, log_prob, _ = self.sample(variables["actor"], batch.following, keys[0])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            live = {name: {**variables[name], "params": params[name]} for name in variables}
            now, then = jnp.concatenate([batch.state, batch.action], -1), jnp.concatenate([batch.following, action], -1)
            q, following, critic = self.joint(live["critic"], learner.targets, now, then)
            target = batch.reward + GAMMA * (following.min(0) - temperature * log_prob)
            of_critic = 0.5 * ((q - jax.lax.stop_gradient(target)) ** 2).mean(1).sum()
            own, own_log_prob, actor = self.sample(live["actor"], batch.state, keys[1], train=True)
            frozen = jax.lax.stop_gradient(live["critic"])
            value = self.critic.apply(frozen, jnp.concatenate([batch.state, own], -1), False)[..., 0].min(0)
            of_actor = (temperature * own_log_prob - value).mean()
            surplus = jax.lax.stop_gradient(own_log_prob.mean() - 1)  # the target entropy is −1, of one action
            of_temperature = -params["temperature"] * surplus
            return of_critic + of_actor + of_temperature, {"critic": critic, "actor": actor}

        params = params_of(variables)
        grads, stats = jax.grad(loss, has_aux=True)(params)
        changes, opt_state = self.optimizer.update(grads, learner.opt_state, params)
        params = optax.apply_updates(params, changes)
        variables = {name: {**variables[name], **stats.get(name, {}), "params": params[name]} for name in variables}
        targets = optax.incremental_update(variables["critic"], learner.targets, TAU)
        return Learner(variables, targets, opt_state, key), None

    def joint(self, critic: Any, targets: Any, now: jax.Array, then: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """Returns Q of (s, a) and of (s', a'), each `[2, N]`, and the critics' new statistics."""
        if self.with_targets:
            return (
                self.critic.apply(critic, now, True)[..., 0],
                self.critic.apply(targets, then, False)[..., 0],
                {},
            )
        q, updates = self.critic.apply(critic, jnp.concatenate([now, then]), True, mutable=["batch_stats"])
        return *jnp.split(q[..., 0], 2, axis=1), updates


def params_of(variables: Any) -> Any:
    """Returns what is trained of actor, critic and temperature."""
    return {name: each["params"] for name, each in variables.items()}


def returns(agent: Agent, learner: Learner, episodes: int = 5) -> float:
    """Returns the mean return of whole episodes without noise, always from the same states."""
    import gymnasium

    envs = gymnasium.make_vec("Pendulum-v1", num_envs=episodes)
    state, _ = envs.reset(seed=1_000)
    total = np.zeros(episodes)
    for _ in range(200):
        state, reward, *_ = envs.step(2 * np.asarray(agent.best(learner.variables["actor"], state)))
        total += reward
    envs.close()
    return float(total.mean())


def trial(setting: str, seed: int, config: study.Config) -> Iterator[study.Line]:
    """Trains one agent; yields the return on the way, and the gradient steps per second of CPU time."""
    import gymnasium

    steps, every = config.pick(4_000, 300, full=30_000), config.pick(500, 100, full=1_000)
    env, rng = gymnasium.make("Pendulum-v1"), np.random.default_rng(seed)
    agent, key = Agent(setting, steps), jax.random.key(seed)
    learner, used, taken = agent.start(seed), 0.0, 0
    memory = Batch(*(np.zeros((steps, *shape), np.float32) for shape in ((3,), (1,), (), (3,))))
    state, _ = env.reset(seed=seed)
    for step in range(steps):
        if step < RANDOM:
            action = rng.uniform(-1, 1, 1)
        else:
            action = np.asarray(agent.act(learner.variables["actor"], state[None], jax.random.fold_in(key, step)))[0]
        following, reward, _, truncated, _ = env.step(np.float32(2 * action))
        for row, value in zip(memory, (state, action, reward, following), strict=True):
            row[step] = value
        state = env.reset()[0] if truncated else following
        if step + 1 >= RANDOM and (step + 1) % CHUNK == 0:
            rows = rng.integers(0, step + 1, (CHUNK, BATCH))
            before = time.process_time()
            learner = jax.block_until_ready(agent.update(learner, Batch(*(row[rows] for row in memory))))
            if taken:  # the first call compiles
                used += time.process_time() - before
            taken += CHUNK
        if (step + 1) % every == 0:
            rate = (taken - CHUNK) / used if used else 0.0
            yield {"kind": "step", "step": step + 1, "return": returns(agent, learner), "steps per second": rate}


def mean_return(setting: str) -> Measure:
    """Returns a measure: the mean of the returns over the training, which is higher where learning is faster."""
    return of(setting, "return", np.mean)


CLAIMS = (
    Claim(
        "CrossQ with BN has a higher return over the training than without",
        mean_return("CrossQ, BN"),
        ">",
        mean_return("no targets, no BN"),
    ),
    Claim(
        "CrossQ with Batch Renorm has a higher return than without",
        mean_return("CrossQ, Batch Renorm"),
        ">",
        mean_return("no targets, no BN"),
    ),
    Claim(
        "CrossQ with BN has a higher return than SAC with target networks",
        mean_return("CrossQ, BN"),
        ">",
        mean_return(TARGETS),
    ),
    Claim(
        "CrossQ with Batch Renorm has a higher return than SAC",
        mean_return("CrossQ, Batch Renorm"),
        ">",
        mean_return(TARGETS),
    ),
)
DISTANCE = (
    "Pendulum for 4,000 steps instead of MuJoCo, critics 64 wide instead of 2,048, an actor updated in each step "
    "instead of each third, and Adam with b1 0.5 for SAC too."
)


def table(lines: list[study.Line]) -> str:
    """Makes a table of the mean return over the training, the last return, and the gradient steps per second."""
    text = [
        "| | return, mean of the training | at the end | gradient steps per second of CPU time |",
        "|---|---|---|---|",
    ]
    for setting in SETTINGS:
        found = study.curves(lines, setting, "step", "return")[1]
        rate = study.curves(lines, setting, "step", "steps per second")[1][:, -1]
        cells = [study.spread(found.mean(1), 0), study.spread(found[:, -1], 0), study.spread(rate, 0)]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(lines: list[study.Line], figure: Figure) -> None:
    """Draws the return by step, mean and range over the seeds."""
    axes = figure.subplots()
    for setting in SETTINGS:
        study.band(axes, *study.curves(lines, setting, "step", "return"), label=setting)
    axes.set(xlabel="steps of the environment", ylabel="return of an episode, without noise")
    study.below(axes)


STUDY = study.Study("crossq", SETTINGS, trial, table, draw, size=(7, 5), claims=CLAIMS, distance=DISTANCE)

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
