"""Tests that the site lists every page and public name, and that each docstring has the parts a reader needs."""

import importlib.util
import inspect
import json
import re
import types
from functools import cache
from pathlib import Path

import flax.linen
import pytest
from flax import nnx

import bnjax

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"), *DOCS.glob("reference/*.rst")]
MODULES = bnjax, bnjax.linen, bnjax.nnx, bnjax.tools


def public(module):
    names = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in names.items() if not isinstance(value, types.ModuleType)}


NAMES = {f"{m.__name__}.{name}": value for m in MODULES for name, value in public(m).items()}
ALIAS = "bnjax.BatchNorm"  # of bnjax.linen.BatchNorm


def sections(value):
    """Splits a docstring into parts by heading; the text before the first is under ''."""
    found, heading = {"": ""}, ""
    for line in (inspect.getdoc(value) or "").splitlines():
        if match := re.fullmatch(r"([A-Z][a-z]+):", line):
            heading = match[1]
        found[heading] = found.get(heading, "") + line + "\n"
    return found


def explained(value):
    """Returns the arguments and fields that a docstring explains, several in one row or each in its own."""
    rows = "".join(sections(value).get(heading, "") for heading in ("Args", "Attributes"))
    return {name for row in re.findall(r"^  (\w+(?:, \w+)*):", rows, re.M) for name in row.split(", ")}


def arguments(value):
    """Returns the arguments of a function, or those a class adds to its base class."""
    if not inspect.isclass(value):
        return {name for name in inspect.signature(value).parameters if name != "self"}
    if issubclass(value, flax.linen.Module):
        return set(inspect.get_annotations(value)) - {"name", "parent"}
    if issubclass(value, tuple):
        return set(value._fields)
    own = value.__init__ if "__init__" in vars(value) else None
    return set(inspect.signature(own).parameters) - {"self"} if own else set()


@cache
def own_members():
    """Returns the function that decides which methods the reference shows."""
    spec = importlib.util.spec_from_file_location("classes", DOCS / "_sphinx" / "classes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.own_members


def listed():
    """Returns the names that the pages of the reference list, in their order."""
    pages = "\n".join(page.read_text() for page in sorted(DOCS.glob("reference/*.rst")))
    lists = re.findall(r"^\.\. reference:: (\S+)\n\n((?:   \w+\n)+)", pages, re.M)
    return [f"{module}.{name}" for module, names in lists for name in names.split()]


def test_the_reference_lists_every_public_name_once():
    assert sorted(listed()) == sorted(NAMES.keys() - {ALIAS})
    assert NAMES[ALIAS] is bnjax.linen.BatchNorm
    assert NAMES.keys() - {ALIAS} >= {f"bnjax.{name}" for name in public(bnjax.functional)}


def test_the_navigation_lists_every_page_once():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.M | re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    shown = [re.sub(r"^.*<(.*)>$", r"\1", line) for line in lines]
    pages = {str(source.relative_to(DOCS).with_suffix("")) for source in SOURCES}
    assert sorted(shown) == sorted(pages - {"index"})


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {ALIAS}))
def test_docstring(name):
    value, said = NAMES[name], sections(NAMES[name])
    first = said[""].splitlines()[0]
    assert first.endswith((".", ":")) and len(first) <= 120, first
    assert arguments(value) <= explained(value), f"not explained: {arguments(value) - explained(value)}"
    assert ">>> " in said.get("Examples", ""), "no example"
    assert inspect.isclass(value) or "Returns" in said, "what does it return?"
    for member in own_members()(value) if inspect.isclass(value) else ():
        method = getattr(value, member)
        assert inspect.getdoc(method), member
        assert isinstance(method, property) or arguments(method) <= explained(method), member


# The sets below are exact: a new name must be added, and one that has the part now must be removed.
def lacking(is_there):
    return {name.removeprefix("bnjax.") for name in NAMES if name != ALIAS and not is_there(name)}


def test_every_name_has_its_equation_but_for_those_that_compute_nothing():
    assert lacking(lambda name: re.search(r":math:|\.\. math::", inspect.getdoc(NAMES[name]))) == {
        "OneRowWarning",
        "Step",
        "nnx.OverwriteWithGradient",
        "tools.affine_labels",
        "tools.Inspection",
        "tools.Loaded",
        "tools.Pair",
    }


def test_every_name_says_what_errors_it_raises_but_for_those_that_raise_none():
    values = {
        "Moments",
        "RunningStats",
        "RecentStats",
        "Step",
        "Normalization",
        "tools.Folded",
        "tools.Inspection",
        "tools.Loaded",
        "tools.Pair",
    }
    anything_goes = {"renorm_r_max", "renorm_d_max", "tools.entropy"}
    assert lacking(lambda name: "Raises" in sections(NAMES[name])) == (
        values | anything_goes | {"OneRowWarning", "nnx.OverwriteWithGradient"}
    )


def test_every_layer_and_function_of_the_mathematics_names_its_paper():
    def is_mathematics(value):
        return inspect.isfunction(value) or issubclass(value, flax.linen.Module | nnx.Module)

    here = {name: value for name, value in NAMES.items() if not name.startswith("bnjax.tools.")}
    computed = [name for name, value in here.items() if is_mathematics(value)]
    assert [name for name in computed if "References" not in sections(NAMES[name])] == []
    assert len(computed) > 30


def test_the_notebook_is_run_and_small():
    file = DOCS / "guides" / "quickstart.ipynb"
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert file.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
