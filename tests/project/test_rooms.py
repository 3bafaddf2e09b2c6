"""Tests the folders: few files in each, no file names with a prefix, and imports only from the folders below."""

import ast
import re

import pytest

from tests.support.programs import ROOT

MOST = 15  # files of a folder
KEPT = {"results", "fixtures"}  # folders of recorded results, of any size
SHARED = {"errors", "jsonl"}
BELOW = {  # what each folder of experiments/ may import of the others
    "data": set(),
    "models": set(),
    "train": {"data", "models"},
    "repro": {"data", "models", "train"},
    "article": {"data", "models", "train", "repro"},
    "gallery": {"data", "models", "train", "repro"},
    "bench": {"models", "train"},
}


def _files(*tops):
    """Returns the files in these folders, without caches and hidden files."""
    found = [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    return [path for path in found if "__pycache__" not in path.parts and not path.name.startswith(".")]


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_folder_has_few_files():
    folders = {}
    for path in _files("bnjax", "experiments", "tests", "docs"):
        folders.setdefault(path.parent, []).extend([path.name] * (path.name != "__init__.py"))
    for folder, names in folders.items():
        assert folder.name in KEPT or len(names) <= MOST, f"{folder.relative_to(ROOT)}: {len(names)} files"


@pytest.mark.parametrize("top", ["experiments", "tests", "docs"])
def test_no_file_repeats_the_name_of_its_folder(top):
    for path in _files(top):
        stem = path.stem.removeprefix("test_")
        assert not any(stem.startswith(f"{folder}_") for folder in path.relative_to(ROOT).parent.parts), path


@pytest.mark.parametrize("folder", BELOW)
def test_experiments_import_what_is_below_them(folder):
    allowed = SHARED | BELOW[folder] | {folder}
    for path in (ROOT / "experiments" / folder).rglob("*.py"):
        for name in _imports(path):
            top, *below = name.split(".")
            assert top != "tests", f"{path.relative_to(ROOT)} imports {name}"
            assert top != "experiments" or below[0] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_no_order_of_imports_matters():
    """Checks that no file turns off the sorting of imports."""
    for path in [path for path in _files("bnjax", "experiments", "tests", "docs", ".ci") if path.suffix == ".py"]:
        assert not re.search(r"#\s*isort:", path.read_text()), path.relative_to(ROOT)
