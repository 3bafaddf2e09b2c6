"""Tests the parts of the gallery that its claims rest on: who shares statistics, what trains, what stays at home."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import tools
from bnjax.linen import BatchNorm
from experiments.data import molecules, utterances
from experiments.gallery import clients, contrastive, crossq, gan, graphs, layernorm_to_bn, only_bn, padding, speech
from experiments.models.convolutional import StridedNet
from experiments.repro import study

IMAGES = np.random.default_rng(0).random((8, 8, 12, 12, 1), np.float32)  # devices, images of each


def started(setting):
    model = contrastive.Encoder(contrastive.SETTINGS[setting], (4,))
    return model, model.init(jax.random.key(0), IMAGES[0], use_running_average=True)


def second_views(setting, views):
    """Returns the projections of the second views, `[devices, images, 32]`."""
    model, variables = started(setting)
    on_device = partial(contrastive.encode, model, setting == contrastive.SHUFFLED, variables, key=jax.random.key(1))
    return jax.vmap(lambda *each: on_device(each)[1], axis_name=contrastive.DATA)(views, views)


@pytest.mark.parametrize("setting", contrastive.SETTINGS)
def test_who_shares_statistics(setting):
    """Checks that other images of a device change an embedding, and whether those of another device do."""
    changed = IMAGES.copy()
    changed[1:] = changed[1:, :, ::-1] ** 2
    alone = np.allclose(second_views(setting, IMAGES)[0], second_views(setting, changed)[0], atol=1e-6)
    assert alone == (setting == contrastive.LOCAL)


def test_the_pair_is_what_contrast_looks_for():
    z = jnp.eye(4, 8)
    loss, found = contrastive.contrast(z, z)
    others = 1 / contrastive.TEMPERATURE
    np.testing.assert_allclose(loss, np.log(np.exp(others) + 6) - others, rtol=1e-5)
    assert found == 1 and contrastive.contrast(z, jnp.roll(z, 1, 0))[1] == 0


def test_two_parameters_of_each_channel_train():
    model = StridedNet(partial(BatchNorm, momentum=0.9), (4, 8))
    params = model.init(jax.random.key(0), IMAGES[0], train=False)["params"]
    counts = {}
    for setting in only_bn.SETTINGS:
        masks = jax.tree.map(jnp.broadcast_to, only_bn.trained(setting, params), jax.tree.map(jnp.shape, params))
        counts[setting] = int(sum(mask.sum() for mask in jax.tree.leaves(masks)))
    assert counts[only_bn.ONLY_BN] == counts[only_bn.TWO_WEIGHTS] == 2 * (4 + 8)
    assert counts[only_bn.OUTPUT] == sum(leaf.size for leaf in jax.tree.leaves(params["Dense_0"]))
    assert counts[only_bn.ALL] == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("setting", clients.SETTINGS)
def test_what_the_server_averages(setting):
    rng = np.random.default_rng(0)
    own = {
        name: {k: jnp.asarray(rng.random((10, 3))) for k in ("scale", "bias")} for name in ("BatchNorm_0", "Dense_0")
    }
    stats = {"BatchNorm_0": {k: jnp.asarray(rng.random((10, 3))) for k in ("mean", "var")}}
    params, kept = clients.share(setting, own, stats)

    def alike(leaf):
        return bool(np.allclose(leaf, leaf[:1]))

    assert alike(params["Dense_0"]["bias"])
    assert alike(params["BatchNorm_0"]["scale"]) == (setting != clients.FED)
    assert alike(kept["BatchNorm_0"]["mean"]) == (setting in (clients.AVERAGED, clients.MERGED))
    if setting == clients.MERGED:
        means, variances = (np.asarray(stats["BatchNorm_0"][k]) for k in ("mean", "var"))
        np.testing.assert_allclose(kept["BatchNorm_0"]["var"][0], variances.mean(0) + means.var(0), rtol=1e-5)


def disturbed(variables):
    """Returns variables whose BN is not as it starts."""
    keys = iter(jax.random.split(jax.random.key(2), 1_000))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.uniform(next(keys), leaf.shape), variables)


@pytest.mark.parametrize("setting", [name for name, kind in layernorm_to_bn.SETTINGS.items() if kind.batch])
def test_rep_bn_is_bn_and_folds_away(setting):
    images, kind = jnp.asarray(np.random.default_rng(0).random((6, 28, 28, 1), np.float32)), layernorm_to_bn.Kind
    models = [layernorm_to_bn.VisionTransformer(k, 8, 2) for k in (layernorm_to_bn.SETTINGS[setting], kind(batch=True))]
    trained = disturbed(models[0].init(jax.random.key(0), images))
    as_bn = layernorm_to_bn.as_batch_norm(trained)
    np.testing.assert_allclose(models[1].apply(as_bn, images), models[0].apply(trained, images), rtol=1e-3, atol=1e-4)
    folded = tools.fold(models[1].apply, as_bn, images)
    assert len(folded.pairs) == 2 * 2 + 1 and not folded.left and "batch_stats" not in folded.stripped


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_layer_norm(share):
    """Checks λ·LN(x) + (1 − λ)·(BN(x) + ηx) in training, with η = 1 as it starts."""
    x, norm = np.random.default_rng(0).random((6, 5), np.float32), layernorm_to_bn.Norm
    both = norm(layernorm_to_bn.SETTINGS[layernorm_to_bn.BOTH])
    variables = both.init(jax.random.key(0), x, share, False)
    y = both.apply(variables, x, share, True, mutable=["batch_stats"])[0]
    layer = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    batch = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + x
    np.testing.assert_allclose(y, share * layer + (1 - share) * batch, rtol=1e-4, atol=1e-5)


def test_batches_of_the_generator():
    """Checks that statistics of a batch make samples depend on each other and standing ones do not."""
    model, rng = gan.Generator(4), np.random.default_rng(0)
    noise, labels = rng.standard_normal((8, gan.NOISE), np.float32), np.arange(8)
    variables = gan.standing(model, model.init(jax.random.key(0), noise, labels, False), 0, 2)
    pairs, fours = (
        gan.in_batches(model, variables, noise.reshape(-1, n, gan.NOISE), labels.reshape(-1, n)) for n in (2, 4)
    )
    assert pairs.shape[:2] == (4, 2) and not np.allclose(pairs.reshape(fours.shape), fours, atol=1e-4)
    alone, all_of_them = (model.apply(variables, noise[:n], labels[:n], False) for n in (1, 8))
    np.testing.assert_allclose(alone[0], all_of_them[0], rtol=1e-4, atol=1e-6)
    variables["params"]["ConditionalNorm_0"]["scale"] = variables["params"]["ConditionalNorm_0"]["scale"].at[3].set(2.0)
    changed = np.abs(model.apply(variables, noise, labels, False) - all_of_them).max((1, 2, 3)) > 1e-4
    assert changed.tolist() == [label == 3 for label in labels]


def test_frechet_distance_of_gaussians():
    """Checks the distance where it has a simple form: covariances that commute."""
    z = np.random.default_rng(0).standard_normal((1_000, 3))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T
    a, b = z * [1, 2, 3], z * [3, 2, 1] + [1, 0, 2]
    np.testing.assert_allclose(gan.frechet(a, b), 1 + 4 + 2**2 + 2**2, rtol=1e-9)
    np.testing.assert_allclose(gan.frechet(a, a), 0, atol=1e-6)


@pytest.mark.slow
def test_crossq_shares_statistics_and_sac_does_not():
    """Checks that the next actions change Q of the current ones in CrossQ alone."""
    rng = np.random.default_rng(0)
    now, then, other = (jnp.asarray(rng.random((16, 4), np.float32)) for _ in range(3))
    for setting in crossq.SETTINGS:
        agent = crossq.Agent(setting, 10)
        learner = agent.start(0)
        one, two = (agent.joint(learner.variables["critic"], learner.targets, now, x)[0] for x in (then, other))
        assert one.shape == (2, 16)
        assert np.allclose(one, two, atol=1e-6) == (not setting.startswith("CrossQ")), setting


def tasks():
    """Returns the module and a few records of both studies of padding."""
    few = molecules.load(60)[0]
    spoken = utterances.load(Path())[0]
    spoken = utterances.Utterances(*(part[::9] for part in spoken))
    return {"speech": (speech, speech.records(spoken)), "graphs": (graphs, graphs.records(few))}


@pytest.mark.parametrize("name", ["speech", "graphs"])
def test_a_batch_is_padded_as_it_says_and_no_record_is_lost(name):
    module, records = tasks()[name]
    for kind in module.PADDINGS:
        for rng in (None, np.random.default_rng(0)):
            batches = list(records.batches(kind, 7, rng))
            rows = np.concatenate([batch.rows for batch in batches])
            np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(len(records.sizes)))
            widths = [jax.tree.leaves(batch.inputs)[0].shape[name == "speech"] for batch in batches]
            assert not any(width % kind.multiple for width in widths)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["speech", "graphs"])
def test_padding_reaches_the_statistics_without_the_mask_alone(name, masked):
    """Checks the outputs of a batch that is normalised by itself, with the usual padding and with more."""
    module, records = tasks()[name]
    usual, wider, _ = (next(records.batches(kind, 7)) for kind in module.PADDINGS)
    model = module.build(padding.MASKED if masked else padding.UNMASKED, study.Config(smoke=True))
    variables = model.init(jax.random.key(0), *usual.inputs, train=False)

    def outputs(batch):
        run = partial(model.apply, train=True, mutable=["batch_stats"])
        return padding.predict(lambda *inputs: run(variables, *inputs)[0], [batch])[0]

    assert np.allclose(outputs(usual), outputs(wider), rtol=1e-4, atol=1e-5) == masked


def test_outputs_come_in_the_order_of_the_rows():
    def batch(rows):
        return padding.Batch((10.0 * rows,), rows, 100 * rows)

    found = padding.predict(lambda x: x, map(batch, (np.array([2, 0, -1]), np.array([3, -1, 1]))))
    np.testing.assert_array_equal(found, [[0, 10, 20, 30], [0, 100, 200, 300]])
