"""Tests that molecules become the graphs that chemists draw, with the boiling points of the handbook."""

import numpy as np
import pytest
from pysmiles import read_smiles

from experiments.data import molecules
from experiments.errors import ConfigError


def test_boiling_points_are_those_of_the_handbook() -> None:
    points = molecules.boiling_points()
    known = {"C1=CC=CC=C1": 353.2, "CCO": 351.4, "CC(=O)O": 391.1, "C1=CC=C2C=CC=CC2=C1": 491.1, "C(Cl)(Cl)Cl": 334.3}
    np.testing.assert_allclose([points[smiles] for smiles in known], list(known.values()), atol=0.3)
    assert len(points) > 4_500 and not any(set(smiles) & set("/\\@.") for smiles in points)


def test_ethanol_as_a_graph() -> None:
    found = molecules.graph(read_smiles("CCO"))
    carbon, oxygen = (np.eye(len(molecules.ELEMENTS))[molecules.ELEMENTS.index(name)] for name in "CO")
    np.testing.assert_array_equal(found.nodes[:, :9], [carbon, carbon, oxygen])
    np.testing.assert_array_equal(found.nodes[:, 9:13], np.eye(4)[[3, 2, 1]])  # CH3, CH2, OH
    assert not found.nodes[:, 13].any()  # charges
    assert sorted(zip(found.senders, found.receivers, strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    np.testing.assert_array_equal(found.edges, np.eye(4)[[0] * 4])


@pytest.mark.parametrize(
    ("smiles", "orders"),
    [("C1=CC=CC=C1", [0, 12, 0, 0]), ("C=O", [0, 0, 2, 0]), ("CC#N", [2, 0, 0, 2]), ("C[N+](=O)[O-]", [4, 0, 2, 0])],
)
def test_orders_of_bonds(smiles: str, orders: list[int]) -> None:
    found = molecules.graph(read_smiles(smiles))
    np.testing.assert_array_equal(found.edges.sum(0), orders)
    assert found.n_edge == len(found.senders) == len(found.edges) == sum(orders)
    assert found.nodes[:, 13].sum() == 0 and np.abs(found.nodes[:, 13]).sum() == 2 * ("+" in smiles)


def test_the_split_holds_every_molecule_once() -> None:
    train, test = molecules.load(200)
    assert len(test.graphs) == (len(train.graphs) + len(test.graphs)) // 5
    for part in (train, test):
        assert part.boiling_points.dtype == np.float32 and len(part.boiling_points) == len(part.graphs)
        assert np.all((part.boiling_points > 80) & (part.boiling_points < 950))


@pytest.mark.slow
def test_every_molecule_is_one_connected_graph_of_known_atoms() -> None:
    train, test = molecules.load()
    assert len(train.graphs) > 3_600 and len(test.graphs) > 900
    for found in (*train.graphs, *test.graphs):
        atoms = int(found.n_node[0])
        assert 2 <= atoms <= 32 and set(found.senders) == set(found.receivers) == set(range(atoms))
        assert np.all(found.nodes[:, :9].sum(1) == 1) and np.all(found.nodes[:, 9:13].sum(1) == 1)
        assert np.all(found.edges.sum(1) == 1) and len(found.edges) <= 5 / 2 * atoms


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(molecules, "PACKAGES", ("chemicals", "no_such_package"))
    molecules.load.cache_clear()
    with pytest.raises(ConfigError, match="pip install no_such_package"):
        molecules.load()
