"""Reads molecules as graphs, with their measured boiling points, from the tables inside the package chemicals.

The boiling points are those of the CRC Handbook's table of organic compounds; the SMILES of each, its atoms and bonds
as text, is PubChem's. pysmiles reads the SMILES. Nodes are the atoms other than hydrogen, and each bond is an edge in
both directions, as jraph has them. Marks of stereochemistry are left out, and of the compounds that are then alike the
first stays.
"""

import re
from functools import cache
from importlib.util import find_spec
from itertools import islice
from typing import Any, NamedTuple

import jraph
import numpy as np

from experiments.errors import ConfigError

PACKAGES = ("chemicals", "pysmiles")
ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")
ORDERS = (1, 1.5, 2, 3)  # of bonds; 1.5 is an aromatic one
HYDROGENS = (0, 1, 2, 3)  # of an atom
FEWEST, MOST = 2, 32  # atoms
HELD_BACK = 5  # one molecule in this many is for testing
SPLIT_SEED = 0  # not the training seed: the test molecules are the same in every run
STEREO = str.maketrans("", "", "/\\@")


class Molecules(NamedTuple):
    graphs: list[jraph.GraphsTuple]  # nodes [atoms, 14] and edges [2·bonds, 4], float32
    boiling_points: np.ndarray  # [N] float32, in K


@cache
def load(first: int | None = None) -> tuple[Molecules, Molecules]:
    """Loads the molecules for training and those for testing; with `first`, of so many at the top of the table."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"the molecules need packages that are not installed: pip install {' '.join(missing)}")
    from pysmiles import read_smiles  # here, so that what needs no molecules needs no such package

    each = [(read_smiles(smiles), point) for smiles, point in islice(boiling_points().items(), first)]
    molecules = [(graph(atoms), point) for atoms, point in each if FEWEST <= len(atoms) <= MOST]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(molecules))
    cut = len(order) // HELD_BACK
    return part(molecules, order[cut:]), part(molecules, order[:cut])


def part(molecules: list[tuple[jraph.GraphsTuple, float]], rows: np.ndarray) -> Molecules:
    """Returns these rows of the molecules."""
    graphs, points = zip(*(molecules[row] for row in rows), strict=True)
    return Molecules(list(graphs), np.array(points, np.float32))


def boiling_points() -> dict[str, float]:
    """Returns the boiling point in K of each SMILES that holds one molecule of `ELEMENTS` and hydrogen."""
    from chemicals import miscdata, search_chemical

    found: dict[str, float] = {}
    for number, point in miscdata.CRC_organic_data["Tb"].dropna().items():
        try:
            compound = search_chemical(number)
        except ValueError:  # the package has no SMILES for some fifty of the numbers
            continue
        if {*re.findall("[A-Z][a-z]?", compound.formula)} <= {*ELEMENTS, "H"} and "." not in compound.smiles:
            found.setdefault(compound.smiles.translate(STEREO), point)
    return found


def graph(atoms: Any) -> jraph.GraphsTuple:
    """Returns a molecule as one graph of jraph."""
    nodes = [
        [*one_hot(a["element"], ELEMENTS), *one_hot(a["hcount"], HYDROGENS), a["charge"]]
        for _, a in sorted(atoms.nodes(data=True))
    ]
    bonds = np.array(atoms.edges, np.int32)
    edges = np.array([one_hot(order, ORDERS) for _, _, order in atoms.edges(data="order")], np.float32)
    return jraph.GraphsTuple(
        nodes=np.array(nodes, np.float32),
        edges=np.concatenate([edges, edges]),
        senders=np.concatenate([bonds[:, 0], bonds[:, 1]]),
        receivers=np.concatenate([bonds[:, 1], bonds[:, 0]]),
        n_node=np.array([len(nodes)], np.int32),
        n_edge=np.array([2 * len(bonds)], np.int32),
        globals=None,
    )


def one_hot(value: Any, values: tuple[Any, ...]) -> list[bool]:
    """Returns which of the values this one is; all False if it is another."""
    return [value == one for one in values]
