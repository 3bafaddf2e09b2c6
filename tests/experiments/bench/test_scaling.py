"""Tests the scaling benchmark: fits recover known costs, programs have the expected collectives, pages are current."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from jax.sharding import Mesh

from experiments import jsonl
from experiments.bench import readme, report
from experiments.bench.clock.scaling import __main__ as scaling
from experiments.bench.clock.scaling import fits, paper, processes
from experiments.bench.compiled import hlo, networks

ABOUT = {"sizes": "quick", "jax": "1", "flax": "2", "cores": "3"}


def _lines():
    """Returns lines of a machine with known times: 2 ns per element, all-reduces of 50 µs plus 3 ns per byte."""
    rows = []
    for sweep, (_, curves) in fits.SWEEPS.items():
        for size in (10, 10**7, 10**8):
            for curve in curves:
                grows = size if sweep in ("64 channels", "8 channels") else 8 * size // 10
                milliseconds = 50e-3 + 3e-6 * grows if curve == "all-reduce" else 2e-6 * grows
                row = dict(sweep=sweep, grows=grows, curve=curve, bytes=4 * size, milliseconds=milliseconds)
                rows.append(row)
    rows[0]["milliseconds"] = 1e3  # a small array, which the exponents must ignore
    return [ABOUT, *rows]


def test_exponents_are_those_of_large_arrays():
    found = fits.points(_lines()[1:], "64 channels", "floor", least=fits.LARGE)
    assert len(found) == 2
    np.testing.assert_allclose(fits.power(found), (1, 2e-6), rtol=1e-9)


def test_latency_and_bandwidth():
    found = fits.points(_lines()[1:], "2 processes", "all-reduce")
    np.testing.assert_allclose(fits.line(found), (50e-3, 3e-6), rtol=1e-6)


def test_tables_and_picture(tmp_path):
    text = fits.tables(_lines())
    assert "| rows, 64 channels | 1.00 | 1.00 | 1.00 |" in text
    assert "| one all-reduce: latency, µs | 50 | 50 |" in text
    assert "small sizes" in text
    fits.draw(_lines(), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size < 300_000


@pytest.mark.parametrize(("curve", "count"), [("local", 0), ("pooled", 2), ("all-reduce", 1)])
def test_all_reduces(curve, count):
    """Checks for one all-reduce forward, one backward, and one in the loop that times them."""
    mesh, rows, channels = Mesh(np.array(jax.devices()[:4]), ("data",)), 64, 8
    x = jax.ShapeDtypeStruct((rows, channels), jnp.float32)
    v = jax.ShapeDtypeStruct((4, 2 * channels), jnp.float32)
    arguments = [v] if curve == "all-reduce" else [x] * 4
    compiled = processes.program(curve, mesh).lower(*arguments).compile()
    payloads, _ = hlo.all_reduces(compiled)
    assert [hlo.elements(payload) for payload in payloads] == [2 * channels] * count


def test_a_row_for_each_device_count_and_curve():
    rows = list(processes.measure([(16, 4)], [1, 2], rounds=1))
    assert {(row["curve"], row["devices"]) for row in rows} == {(c, d) for c in processes.CURVES for d in (1, 2)}
    assert all(row["milliseconds"] > 0 and row["bytes"] == 256 for row in rows)


@pytest.mark.slow
def test_two_processes():
    """Checks that two processes connect and run the same collectives, and that the first returns the times."""
    sizes = scaling.Sizes((), (), (), 0, (0, 0), payloads=(8, 16), rounds=1, seconds=0.0)
    rows = list(scaling._processes(sizes, 2))
    assert [(row["sweep"], row["grows"]) for row in rows] == [("2 processes", 64)] * 3 + [("2 processes", 128)] * 3
    assert {row["devices"] for row in rows} == {2}


def test_a_process_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="a process failed"):
        list(scaling._started([{"nothing": "to do"}]))


@pytest.mark.slow
def test_one_device_beside_flax():
    with jax.numpy_rank_promotion("allow"):  # the floor broadcasts over ranks
        rows = list(scaling._compare("64 channels", 32, 8, 32, seconds=0.0))
    assert [row["curve"] for row in rows] == ["floor", "bnjax", "flax.linen"]
    assert all(row["grows"] == 32 and row["bytes"] == 1024 and row["milliseconds"] > 0 for row in rows)


def test_sizes_are_those_that_were_asked_for():
    sizes = scaling.FULL
    assert (sizes.wide[0], sizes.wide[-1], sizes.narrow[-1]) == (10**3, 10**6, 10**7)
    assert (sizes.channels[0], sizes.channels[-1], sizes.payloads[0], sizes.payloads[-1]) == (8, 4096, 8, 4096)
    assert max(r * c for r, c in ((sizes.wide[-1], 64), (sizes.narrow[-1], 8))) * 4 * 8 < 4e9  # eight arrays at a time
    assert sizes.batch[0] % 8 == scaling.QUICK.batch[0] % 8 == 0


@pytest.mark.slow
def test_the_network_on_paper_is_resnet_50():
    model = networks.ResNet50(lambda: networks.nn.BatchNorm(use_running_average=False))
    images = jnp.zeros((1, 64, 64, 3))
    stats = jax.eval_shape(lambda: model.init(jax.random.key(0), images))["batch_stats"]
    means = [leaf for path, leaf in jax.tree.leaves_with_path(stats) if "mean" in jax.tree_util.keystr(path)]
    assert (len(means), sum(leaf.size for leaf in means)) == (paper.LAYERS, paper.CHANNELS)


def test_the_model_of_pods():
    """Compares with a calculation by hand: 32 hops of 1 µs per all-reduce, 2 · 2 · 26,560 numbers at 50 GB/s."""
    pod = paper.PODS[0]
    assert math.isclose(paper.all_reduces(pod), 106 * 32e-6 + 2 * 2 * 2 * 26_560 * 4 / 50e9)
    shares = [paper.share(pod, images) for images in (8, 32, 256)]
    assert shares == sorted(shares, reverse=True)
    assert math.isclose(paper.tree(1), 15.2e-6)


def test_the_page_is_up_to_date():
    page = report.ROOT / "experiments" / "bench" / "README.md"
    assert readme.updated(page.read_text(), readme.PAGES[page]) == page.read_text(), "run experiments.bench.readme"


def test_the_option_that_prints_the_model(capsys):
    scaling.main(tyro.cli(scaling.Config, args=["--paper"]))
    assert capsys.readouterr().out == paper.table() + "\n"


def test_lines_of_the_results_have_what_the_tables_need():
    about, *rows = jsonl.read(report.RESULTS / "scaling.jsonl")
    assert about["sizes"] in ("full", "quick")
    assert {row["sweep"] for row in rows} == set(fits.SWEEPS)
