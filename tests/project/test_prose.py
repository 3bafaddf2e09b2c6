"""Tests docstrings, comments and pages: functions open with a verb, and no unclear phrases are used.

`python -m tests.project.test_prose` prints the share of each folder, and the functions that do not open with a verb.
"""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("bnjax", "experiments", "tests")
PAGES = (*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")))
LEAST = 0.9  # share of the functions with a docstring, private ones and methods included
VERBS = set(
    re.findall(
        r"\w+",
        """
    Accepts Adapts Adds Allocates Appends Applies Assembles Asserts Averages Blurs Broadcasts Builds Calls Casts
    Changes Checks Chooses Clips Closes Collects Combines Compares Compiles Completes Computes Connects Constructs
    Converts Copies Corrects Counts Creates Decides Declares Decodes Defines Derives Describes Detects Determines
    Differentiates Divides Draws Drops Encodes Enters Estimates Evaluates Exits Expands Explains Exports Extracts
    Fails Fills Finds Fits Flattens Flushes Folds Follows Formats Freezes Gathers Generates Gets Gives Handles
    Hashes Holds Ignores Imports Initializes Inserts Inspects Interpolates Inverts Iterates Joins Keeps Limits Lists
    Loads Locates Makes Maps Marks Masks Matches Measures Merges Mirrors Moves Multiplies Normalizes Obtains Opens
    Overwrites Pads Parses Performs Permutes Picks Pools Predicts Prepares Prints Produces Promotes Provides Puts
    Raises Reads Rebuilds Recalibrates Receives Recomputes Recovers Reduces Refuses Registers Removes Renames
    Replaces Reports Requires Resets Reshapes Resolves Restores Returns Rotates Rounds Runs Saves Scales Scans
    Searches Selects Sends Sets Shares Shifts Shows Shuffles Simulates Skips Sorts Splits Stacks Standardizes Starts
    Stops Stores Strips Subtracts Sums Swaps Takes Tells Times Traces Trains Transforms Transposes Tries Truncates
    Turns Undoes Updates Uses Validates Visits Waits Walks Warns Widens Wraps Writes Yields
    Initialises Names Normalises Standardises Suppresses
    """,
    )
)
UNCLEAR = {
    "the same, for": "say what is computed, and for what",
    "is none": "say what the value is instead",
    "lest": "write `so that ... not`, or `because`",
}
PATTERN = re.compile(rf"\b(?:{'|'.join(UNCLEAR)})\b")  # lower case: `is None` is code
PARAGRAPH = re.compile(r"(?:.+\n?)+")


def modules(folder: str) -> list[Path]:
    """Returns the Python files below a folder of the repository."""
    return sorted((ROOT / folder).rglob("*.py"))


def opens_with_a_verb(docstring: str) -> bool:
    """Returns True if the first word of a docstring is one of `VERBS`, and not a noun as in "Sums of the rows"."""
    first, *following = re.findall(r"\w+|\W", docstring)
    return first in VERBS and following[1:2] != ["of"]


def docstrings_of_functions(folder: str) -> dict[str, str]:
    """Returns the docstring of each function and method that has one, by `file:line name`."""
    found = {}
    for path in modules(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                found[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = text
    return found


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the docstrings (those of fields too) and comments of a Python file, or the paragraphs of a page.

    Each comes with its line.
    """
    text = path.read_text()
    if path.suffix == ".md":
        yield from ((text.count("\n", 0, match.start()) + 1, match[0]) for match in PARAGRAPH.finditer(text))
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def found_in(path: Path) -> list[str]:
    """Returns each unclear phrase in a file, with its line and what to write instead."""
    matches = ((line, match[0]) for line, text in prose(path) for match in PATTERN.finditer(" ".join(text.split())))
    return [f"{path.relative_to(ROOT)}:{line}: {phrase!r}: {UNCLEAR[phrase]}" for line, phrase in matches]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_of_functions_open_with_a_verb(folder):
    texts = docstrings_of_functions(folder)
    others = [name for name, text in texts.items() if not opens_with_a_verb(text)]
    share = 1 - len(others) / len(texts)
    assert share >= LEAST, f"{share:.0%} open with a verb ('Returns ...'); these do not:\n" + "\n".join(others)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_unclear_phrases(folder):
    assert [line for path in modules(folder) for line in found_in(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_unclear_phrases_in_pages(page):
    assert found_in(page) == []


def test_the_checks_see_what_they_look_for(tmp_path, monkeypatch):
    assert opens_with_a_verb("Returns x.") and opens_with_a_verb("Splits: two parts.")
    assert not opens_with_a_verb("The rows.") and not opens_with_a_verb("Sums of x.")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    phrase = "the same, " + "for"
    (tmp_path / "some.py").write_text(f'"""Rows, or\n{phrase} all: x is None."""\n')
    assert found_in(tmp_path / "some.py") == [f"some.py:1: {phrase!r}: {UNCLEAR[phrase]}"]
    (tmp_path / "some.md").write_text(f"# Title\n\nRows, or\n{phrase} all.\n")
    assert found_in(tmp_path / "some.md") == [f"some.md:3: {phrase!r}: {UNCLEAR[phrase]}"]


if __name__ == "__main__":
    for top in FOLDERS:
        texts = docstrings_of_functions(top)
        others = [name for name, text in texts.items() if not opens_with_a_verb(text)]
        print(f"{top}: {1 - len(others) / len(texts):.1%} of {len(texts)} docstrings open with a verb")
        print("".join(f"    {name}\n" for name in others), end="")
