"""`python -m experiments`: the experiments, what each of them claims, and where its results are."""

import ast
import re
from pathlib import Path

import tyro

ROOT = Path(__file__).parent
CLAIM = re.compile(r"^Claim:((?:.|\n(?= ))+)", re.MULTILINE)  # the first line, and the indented ones that follow


def claims() -> dict[str, str]:
    """Finds every experiment: maps a module's dotted name to the text after `Claim:` in its docstring, without
    importing it.
    """
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        claim = CLAIM.search(ast.get_docstring(ast.parse(path.read_text())) or "")
        if claim:
            found[".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__main__")] = " ".join(
                claim[1].split()
            )
    return found


def results(name: str) -> str:
    """Returns the path of a module's results, from the nearest folder `results`; an empty string if it has
    no results.
    """
    *folders, stem = name.split(".")
    places = [ROOT.parent.joinpath(*folders[:depth], "results") for depth in range(len(folders), 0, -1)]
    kept = next((found for place in places if (found := sorted(place.glob(f"{stem}.*")))), [])
    return str(next((path for path in kept if path.suffix == ".md"), kept[0]).relative_to(ROOT.parent)) if kept else ""


def main() -> None:
    """Prints the name of each experiment, its claim, and where its results are."""
    for name, claim in claims().items():
        print(f"{name}\n    {claim}\n    {results(name) or 'no results are committed: run it'}")
    print("\nRun one with `python -m NAME`; `--help` lists its options.")


if __name__ == "__main__":
    tyro.cli(main)
