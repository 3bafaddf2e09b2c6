"""Runs the examples of docs/guides/controls.md as written, and tests the statistics that they leave."""

import pathlib
import re
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import bnjax
from tests.support import oracle
from tests.support.cases import assert_close, unit

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "guides" / "controls.md").read_text(encoding="utf-8")
N, D, H = 16, 5, 8  # rows, inputs, channels of the normalised layer
MOMENTUM = 0.9
TOL = 60 * unit("float32")  # a matrix product over 5 terms, sums over 16 rows, and an average


def blocks():
    """Returns the code of the page by heading."""
    parts = re.split(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
    code = ("\n".join(re.findall(r"```python\n(.*?)```", body, re.DOTALL)) for body in parts[2::2])
    return dict(zip(parts[1::2], code, strict=True))


@pytest.fixture(scope="module")
def page():
    """Runs the page, and returns the names that it defines."""
    names = {}
    for heading, code in blocks().items():
        exec(compile(code, f"docs/guides/controls.md, {heading}", "exec"), names)
    return types.SimpleNamespace(**names)


@pytest.fixture
def network(page):
    variables = page.Net().init(jax.random.key(0), batch(), use_running_average=False)
    return variables["params"], variables["batch_stats"]


def batch(seed=0, rows=N):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, D)), jnp.float32)


def labels(seed=0, rows=N):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 3, rows))


def after(params, *xs, momentum=MOMENTUM):
    """Returns running mean and var after one step for each of xs, from their initial values."""
    running = np.zeros(H), np.ones(H)
    for x in xs:
        hidden = np.asarray(x, np.float64) @ np.asarray(params["Dense_0"]["kernel"], np.float64)
        running = oracle.update_running(running, oracle.statistics(hidden, (1,)), momentum)
    return running


def check(stats, params, *xs):
    for name, want in zip(("mean", "var"), after(params, *xs), strict=True):
        assert_close(stats["BatchNorm_0"][name], want, TOL, what=name)


def check_equal(a, b):
    chex.assert_trees_all_equal(a, b)


def check_close(a, b, tol):
    for got, want in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_close(got, want, tol, 1)


def test_the_headings_are_those_of_the_table():
    table = re.findall(r"\]\(#(.*?)\)", TEXT)
    anchors = [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in blocks()]
    assert set(table) == set(anchors[1:])


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_no_combination_is_impossible(page, network, running, update, train):
    """Checks that each control has its own effect and no other, in all combinations."""
    params, stats = network
    stats = jax.tree.map(lambda a: a + 0.5, stats)
    x, y = batch(), labels()
    flags = dict(use_running_average=running, update_stats=update)
    optimizer = optax.sgd(0.1) if train else page.frozen_optimizer(0.1)
    g, new = jax.grad(page.loss_fn, has_aux=True)(params, stats, x, y, **flags)
    moved = optax.apply_updates(params, optimizer.update(g, optimizer.init(params))[0])

    assert (new["BatchNorm_0"]["mean"] != stats["BatchNorm_0"]["mean"]).all() == (update and not running)
    assert (moved["BatchNorm_0"]["bias"] != params["BatchNorm_0"]["bias"]).any() == train
    quiet = page.loss_fn(params, stats, x, y, use_running_average=running, update_stats=False)[0]
    np.testing.assert_array_equal(page.loss_fn(params, stats, x, y, **flags)[0], quiet)


def test_adversarial_attack(page, network):
    """Checks that the statistics take one step, on the attacked images, and the attack itself takes none."""
    params, stats = network
    _, new = page.adversarial_step(params, stats, batch(), labels())

    def attacked(x):  # in training mode, with batch statistics
        return page.loss_fn(params, stats, x, labels(), use_running_average=False)[0]

    x = batch() + 0.1 * jnp.sign(jax.grad(attacked)(batch()))
    check(new, params, x)


def test_sharpness_aware_minimization(page, network):
    """Checks that the statistics take one step, in the first pass, and that the gradient is that of the second."""
    params, stats = network
    g, new = page.sam_step(params, stats, batch(), labels())
    check(new, params, batch())
    plain, _ = jax.grad(page.loss_fn, has_aux=True)(params, stats, batch(), labels(), use_running_average=False)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, g, plain)) > 1e-3


def test_siamese_double_call(page):
    """Checks that each view is normalized by its own batch, and the statistics step on the first only."""
    module, a, b = page.Siamese(), batch(1), batch(2) + 3
    variables = module.init(jax.random.key(0), a, b)
    (out_a, out_b), updates = module.apply(variables, a, b, mutable=["batch_stats"])
    params = variables["params"]["Net_0"]
    check(updates["batch_stats"]["Net_0"], params, a)
    alone = {"params": params, "batch_stats": variables["batch_stats"]["Net_0"]}
    for out, x in ((out_a, a), (out_b, b)):
        np.testing.assert_array_equal(out, page.Net().apply(alone, x, use_running_average=False, update_stats=False))


def test_gan_discriminator(page, network):
    """Checks that the statistics of the discriminator step on the real images, and the generator leaves them alone."""
    params, stats = network
    real, noise = batch(1), batch(2)
    generator = jnp.eye(D)
    fake = jnp.tanh(noise @ generator)
    _, new = jax.grad(page.discriminator_loss, has_aux=True)(params, stats, real, fake)
    check(new, params, real)
    g = jax.grad(page.generator_loss)(generator, noise, params, new)
    assert np.abs(g).max() > 1e-4
    unseen = jax.grad(page.generator_loss)(generator, noise, params, stats)
    check_close(g, unseen, TOL)  # batch statistics, so the running averages do not matter


def test_frozen_fine_tuning(page, network):
    """Checks that statistics, scale and bias stay fixed, other layers move, and y of a row depends on no other row."""
    params, stats = network
    _, stats = page.loss_fn(params, stats, batch(1), labels(), use_running_average=False)
    optimizer = page.frozen_optimizer(0.1)
    moved, new, _ = page.fine_tuning_step(params, stats, optimizer.init(params), batch(), labels(), optimizer)
    check_equal(new, stats)
    check_equal(moved["BatchNorm_0"], params["BatchNorm_0"])
    assert all((moved[k]["kernel"] != params[k]["kernel"]).any() for k in ("Dense_0", "Dense_1"))


def test_local_statistics(page, network):
    """Checks that each device normalizes by its own rows, without a collective, and the running averages stay fixed."""
    params, stats = network
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x = batch() * jnp.arange(1.0, N + 1)[:, None]
    step = jax.jit(lambda x: page.keys(params, stats, x, mesh))
    variables = {"params": params, "batch_stats": stats}
    local = [page.Net().apply(variables, s, use_running_average=False, update_stats=False) for s in jnp.split(x, 4)]
    assert_close(step(x), jnp.concatenate(local), TOL)
    assert "all-reduce" not in step.lower(x).compile().as_text()


def test_shuffled_keys(page, network):
    """Checks that each key is at its image's place, and was normalized with the rows shuffled to its device."""
    params, stats = network
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x, key = batch() * jnp.arange(1.0, N + 1)[:, None], jax.random.key(3)
    shuffled = jax.jit(lambda x: page.shuffled_keys(params, stats, x, key, mesh))(x)
    order = bnjax.shuffle(jnp.arange(N), key)
    variables = {"params": params, "batch_stats": stats}
    local = [
        page.Net().apply(variables, s, use_running_average=False, update_stats=False) for s in jnp.split(x[order], 4)
    ]
    assert_close(shuffled[order], jnp.concatenate(local), TOL)


def test_two_sets_of_statistics(page):
    """Checks that the statistics of each domain take one step, on the images of that domain."""
    clean, adversarial = batch(1), batch(2) + 1
    variables = page.SplitNet().init(jax.random.key(0), clean, use_running_average=False, domain=page.CLEAN)
    params, stats = variables["params"], variables["batch_stats"]
    _, new = page.advprop_loss(params, stats, clean, adversarial, labels())
    for domain, x in ((page.CLEAN, clean), (page.ADVERSARIAL, adversarial)):
        for name, want in zip(("mean", "var"), after(params, x), strict=True):
            assert_close(new["SplitBatchNorm_0"][name][domain], want, TOL, what=name)


def test_gradient_accumulation(page, network):
    """Checks that the statistics step once per micro-batch, in order, and the gradient is the mean over them."""
    params, stats = network
    xs = jnp.stack([batch(i) for i in range(4)])
    ys = jnp.stack([labels(i) for i in range(4)])
    g, new = jax.jit(page.accumulate)(params, stats, xs, ys)
    check(new, params, *xs)
    each = [
        jax.grad(page.loss_fn, has_aux=True)(params, stats, x, y, use_running_average=False)[0]
        for x, y in zip(xs, ys, strict=True)
    ]
    check_close(g, jax.tree.map(lambda *g: sum(g) / 4, *each), TOL)


def test_the_momentum_of_a_whole_step():
    """Checks that k updates by the same moments at momentum m^(1/k) equal one update at m."""
    moments = bnjax.batch_moments(batch())
    start = bnjax.RunningStats(jnp.zeros(D), jnp.ones(D))
    running = start
    for _ in range(4):
        running = bnjax.update_running(running, moments, momentum=MOMENTUM ** (1 / 4))
    check_close(running, bnjax.update_running(start, moments, momentum=MOMENTUM), TOL)


def test_in_nnx(page):
    """Checks that a view shares the variables and leaves them unchanged, also if jax.grad captures it."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = bnjax.nnx.BatchNorm(D, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    model, x = Block(nnx.Rngs(0)), batch()
    attacked = page.attack(model, x, lambda y: jnp.sum(y**3))
    assert (attacked != x).any()
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(D))
    model(attacked)
    want = oracle.statistics(np.asarray(attacked), (1,))
    assert_close(model.norm.mean[...], 0.01 * want.mean, TOL, 1)


def test_nn_modules_pass_the_flags_on():
    """Checks that Flax's own layer has no `update_stats`, so that a network passing it on needs bnjax's."""
    with pytest.raises(TypeError, match="update_stats"):
        nn.BatchNorm().init(jax.random.key(0), batch(), use_running_average=False, update_stats=False)
