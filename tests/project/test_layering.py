"""Tests that imports point down: functional imports nothing above it, and linen and nnx do not import each other."""

import ast
import inspect
import pathlib

import pytest

import bnjax

ROOT = pathlib.Path(__file__).parents[2] / "bnjax"
BELOW = {  # what each layer may import of the project
    "functional": {"functional"},
    "linen": {"functional", "linen"},
    "nnx": {"functional", "nnx"},
    "tools": {"functional", "linen", "nnx", "tools"},
}
# The four packages and their dependencies NumPy and ml_dtypes. Packages of extras are imported inside functions.
LIBRARY = {"jax", "flax", "optax", "chex", "numpy", "ml_dtypes"}
OPTIONAL = {"tools": {"matplotlib", "rich", "tqdm", "safetensors", "h5py"}}


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield node.module, node.col_offset
            yield from ((f"{node.module}.{alias.name}", node.col_offset) for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0]
    for name, column in _imports(ast.parse(path.read_text())):
        top = name.split(".")[0]
        assert top not in ("experiments", "tests"), f"{path.name} imports {name}"
        if top == "bnjax" and layer in BELOW and "." in name:
            assert name.split(".")[1] in BELOW[layer], f"{layer} imports {name}"
        if top in OPTIONAL.get(layer, ()):
            assert column > 0, f"{path.name}: {name} is optional, so import it where it is used"


def test_the_library_needs_four_packages():
    import sys

    for path in sorted(ROOT.rglob("*.py")):
        layer = path.relative_to(ROOT).parts[0]
        for name, _ in _imports(ast.parse(path.read_text())):
            top = name.split(".")[0]
            known = top in LIBRARY | {"bnjax"} | OPTIONAL.get(layer, set()) or top in sys.stdlib_module_names
            assert known, f"{path.name} imports {name}"


def test_every_file_is_short():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, f"{path} is over 300 lines: split it by concept"


def test_nothing_is_pickled():
    """Checks that nothing is pickled or unpickled, so that loading a file never runs code from it."""
    pickles = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for path in [*ROOT.rglob("*.py"), *ROOT.parent.glob("experiments/**/*.py")]:
        assert not {name.split(".")[0] for name, _ in _imports(ast.parse(path.read_text()))} & pickles, path
        assert "allow_pickle" not in path.read_text(), path


def test_options_are_keyword_only():
    """Checks that options are keyword-only; arrays may be given by position, and what is a function's one argument."""
    options = {"axis", "mask", "axis_name", "axis_index_groups", "dtype", "momentum"}
    for name, function in {**vars(bnjax), **vars(bnjax.functional), **vars(bnjax.tools)}.items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        for p in parameters if len(parameters) > 1 else ():
            is_option = p.name in options or isinstance(p.default, (bool, int, float))
            assert p.kind is p.KEYWORD_ONLY or not is_option or name.startswith(("fields_from", "renorm_")), (name, p)
