"""Tests inspect: every column against its definition, every flag on the fault it reports, and the three displays."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bnjax
from bnjax import tools
from tests.support import zoo

C = 4


def healthy(**changed):
    """Returns the variables of one sound layer, with the given leaves changed."""
    leaves = {
        "mean": jnp.array([0.5, -0.5, 1.0, 0.0]),
        "var": jnp.array([1.0, 2.0, 0.5, 1.0]),
        "scale": jnp.array([1.0, 0.9, 1.2, 0.8]),
        "bias": jnp.zeros(C),
    } | {name: jnp.asarray(value, jnp.float32) for name, value in changed.items()}
    stats = {name: leaves[name] for name in ("mean", "var")}
    return {"params": {"bn": {n: leaves[n] for n in ("scale", "bias")}}, "batch_stats": {"bn": stats}}


def met(variables, rows=1000.0, shift=0.0, factor=1.0):
    """Returns moments of a batch that is `shift` standard deviations away and has `factor` times the variance."""
    mean, var = (variables["batch_stats"]["bn"][k] for k in ("mean", "var"))
    return {"bn": bnjax.Moments(mean + shift * jnp.sqrt(var), var * factor, jnp.full(mean.shape, rows))}


def only_row(variables, moments=None, **options):
    (row,) = tools.inspect(variables, moments, **options).rows
    return row


def test_a_sound_layer_has_no_flags():
    row = only_row(healthy(), met(healthy()))
    assert row["flags"] == []
    assert row["layer"] == "bn"
    assert row["channels"] == C


def test_columns():
    variables = healthy()
    row = only_row(variables, met(variables, rows=50.0, shift=0.1, factor=2.0), epsilon=1e-12)
    wanted = {
        "rows": 50.0,
        "mean_drift": 0.1,
        "var_drift": np.log(2.0),
        "mean_over_std": np.sqrt(2),
        "var_min": 0.5,
        "var_max": 2.0,
        "scale_min": 0.8,
        "scale_median": 0.95,
        "scale_max": 1.2,
        "constant": 0,
        "dead": 0,
        "replica_divergence": None,
    }
    for key, value in wanted.items():
        assert row[key] == (value if value is None else pytest.approx(value, rel=1e-6)), key


FLAGS = {  # a fault, and the text of its flag
    "constant": ((healthy(var=[1, 0, 1, 1]), None), "1 of 4 channels are constant"),
    "dead": ((healthy(scale=[1, 0, 1e-9, 1]), None), "2 of 4 channels have a scale next to zero"),
    "all_dead": ((healthy(scale=[0, 0, 0, 0]), None), "the scale is zero in every channel"),
    "few_rows": ((healthy(), met(healthy(), rows=8.0)), "8 rows per channel: the batch variance is off by 50%"),
    "one_row": ((healthy(), met(healthy(), rows=1.0)), "less than two rows"),
    "mean_drift": ((healthy(), met(healthy(), shift=1.0)), "1 standard deviations"),
    "var_drift": ((healthy(), met(healthy(), factor=4.0)), "1.4 nepers"),
    "nan": ((healthy(mean=[np.nan, 0, 0, 0]), None), "1 of 4 channels have statistics that are not finite"),
    "negative": ((healthy(var=[1, -1, 1, 1]), None), "or a negative variance"),
    "untouched": ((healthy(mean=np.zeros(4), var=np.ones(4)), None), "the statistics were never updated"),
    "spread": ((healthy(scale=[1, 1, 2e-3, 10]), None), "scales range from 0.002 to 10"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name):
    arguments, sentence = FLAGS[name]
    (flag,) = only_row(*arguments)["flags"]
    assert sentence in flag


def test_sampling_noise_is_no_drift():
    """Checks that the distance 1/√n of a batch of n rows is not flagged as drift."""
    mean, var = (np.asarray(leaf) for leaf in healthy()["batch_stats"]["bn"].values())
    moments = bnjax.batch_moments(np.random.default_rng(0).normal(mean, np.sqrt(var), (40, C)))
    assert only_row(healthy(), {"bn": moments})["flags"] == []


def test_replicas_along_an_axis():
    parts = [healthy(), healthy(mean=[0.5, -0.5, 1.0, 2.0])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    row = only_row(stacked, replica_axis=0)
    assert row["channels"] == C
    assert row["replica_divergence"] == pytest.approx(1 / np.sqrt(2), rel=1e-4)  # ±1, of a pooled variance 1 + 1
    assert "replicas hold different statistics" in row["flags"][0]
    assert only_row(jax.tree.map(lambda a: jnp.stack([a, a]), healthy()), replica_axis=0)["flags"] == []


def test_replicas_on_devices():
    """Checks an array typed as replicated whose devices differ, after shard_map(check_vma=False) without axis_name."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x = jax.device_put(jnp.arange(8.0)[:, None] * jnp.ones((1, C)), NamedSharding(mesh, PartitionSpec("data")))
    specs = dict(mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False)
    forgotten = jax.jit(jax.shard_map(lambda x: bnjax.batch_moments(x)[:2], **specs))(x)
    row = only_row({"bn": dict(zip(("mean", "var"), forgotten, strict=True))})
    assert "replicas hold different statistics" in row["flags"][0]
    pooled = jax.jit(jax.shard_map(lambda x: bnjax.batch_moments(x, axis_name="data")[:2], **specs))(x)
    assert only_row({"bn": dict(zip(("mean", "var"), pooled, strict=True))})["flags"] == []


def test_scale_offset():
    variables = healthy(scale=np.zeros(4))
    assert only_row(variables, scale_offset=1.0)["flags"] == []


@pytest.mark.parametrize("net", [zoo.ConvNet, zoo.Nested])
def test_a_network(net, tmp_path):
    """Checks that recalibration leaves no drift, through scan and vmap, with variables from a checkpoint."""
    model, variables = zoo.linen_net(net)
    variables = zoo.through_orbax(variables, tmp_path)
    apply_fn, x = functools.partial(model.apply, mutable=["batch_stats"]), [zoo.images()]
    exact = tools.recalibrate(apply_fn, variables, x, progress=False)
    moments = tools.collect_moments(apply_fn, exact, x, use_running_average=False, progress=False)
    for row in tools.inspect(exact, moments).rows:
        assert max(row["mean_drift"], row["var_drift"]) < 1e-4
        assert row["rows"] == 8 * 6 * 6


def test_the_collection_of_moments():
    """Checks that moments gathered by linen layers are accepted, and not listed as layers."""
    model, variables = zoo.linen_net()
    _, updates = model.apply(variables, zoo.images(), train=True, mutable=["moments", "batch_stats"])
    rows = tools.inspect(variables, updates["moments"]).rows
    collected = tools.collect_moments(
        functools.partial(model.apply, mutable=["batch_stats"]),
        variables,
        [zoo.images()],
        use_running_average=False,
        progress=False,
    )
    for row, wanted in zip(rows, tools.inspect(variables, collected).rows, strict=True):
        assert row["rows"] == wanted["rows"]
        assert row["mean_drift"] == pytest.approx(wanted["mean_drift"], rel=1e-4)
    assert len(tools.inspect({**variables, **updates}).rows) == len(rows)
    with pytest.raises(ValueError, match=r"must map layers to bnjax\.Moments; got int at 'bn'"):
        tools.inspect(healthy(), {"bn": 3})


@pytest.mark.parametrize("norm", zoo.nnx_norms())
def test_nnx(norm):
    model = zoo.nnx_net(norm)
    rows = tools.inspect(model).rows
    assert [row["layer"] for row in rows] == ["norms/0", "norms/1"]
    assert rows == tools.inspect(nnx.state(model)).rows
    assert [row["channels"] for row in rows] == [4, 6]
    assert all(row["scale_min"] is not None for row in rows)
    assert all(row["scale_min"] is None for row in tools.inspect(nnx.state(model, nnx.BatchStat)).rows)


@pytest.fixture
def table():
    variables = healthy(var=[1, 0, 1, 1])
    return tools.inspect(variables, met(variables))


def test_text(table):
    head, row, *flags = str(table).splitlines()
    assert head.split()[:3] == ["layer", "channels", "rows"]
    assert "replicas" not in head
    assert row.split()[:3] == ["bn", "4", "1e+03"]
    assert flags == [f"! bn: {flag}" for flag in table.rows[0]["flags"]]


def test_pandas(table):
    frame = pandas.DataFrame(table.rows)
    assert frame.loc[0, "constant"] == 1


def test_rich(table):
    import rich.console

    console = rich.console.Console(width=200)
    with console.capture() as capture:
        console.print(table.rich())
    assert "mean drift" in capture.get()
    assert "are constant" in capture.get()


def test_png(table, tmp_path):
    for tree in (healthy(), {"bn": healthy()["batch_stats"]["bn"]}):
        tools.inspect(tree).save_png(tmp_path / "table.png")
        assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    table.save_png(str(tmp_path / "other.png"))
    assert (tmp_path / "other.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("package", "module", "show"), [("rich", "rich.table", "rich"), ("matplotlib", "matplotlib.figure", "png")]
)
def test_missing_packages(table, monkeypatch, package, module, show):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "bnjax\[experiments\]"'):
        table.rich() if show == "rich" else table.save_png("nowhere.png")


def test_errors():
    with pytest.raises(ValueError, match="holds no batch normalization"):
        tools.inspect({"dense": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"layers \['nb'\] that the variables do not have"):
        tools.inspect(healthy(), {"nb": met(healthy())["bn"]})
    with pytest.raises(ValueError, match="replica_axis=0 must be"):
        tools.inspect(healthy(), replica_axis=0)
    with pytest.raises(ValueError, match=r"shape \(3,\) do not fit statistics of shape \(4,\)"):
        tools.inspect(healthy(), {"bn": bnjax.Moments(jnp.ones(3), jnp.ones(3), jnp.ones(3))})
