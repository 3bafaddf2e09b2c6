"""`python -m experiments`: the experiments, what each of them claims, and what the committed results say of it.

`--write` renews the tables of studies in experiments/README.md, which stand between comments that name their folder.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent
README = ROOT / "README.md"
TABLE = re.compile(r"(<!-- studies in (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Experiment:
    """Holds what an experiment's docstring says of it."""

    name: str  # of the module, with dots
    claim: str
    time: str

    @property
    def results(self) -> Path | None:
        """The file of its results, from the nearest folder `results`, a page of Markdown before others; else None."""
        *folders, stem = self.name.split(".")
        places = [ROOT.parent.joinpath(*folders[:depth], "results") for depth in range(len(folders), 0, -1)]
        kept = next((found for place in places if (found := sorted(place.glob(f"{stem}.*")))), [])
        return next((path for path in kept if path.suffix == ".md"), kept[0] if kept else None)

    @property
    def verdict(self) -> str:
        """What the rule in `experiments.repro.claims` says of the committed lines; empty where no rule applies."""
        if self.results is None or self.results.suffix != ".md":
            return ""
        first, *_ = self.results.read_text().splitlines()
        return first if first.startswith("**") else ""


def experiments() -> list[Experiment]:
    """Finds every experiment by the line `Claim:` in its docstring, without importing it."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        if claim := field(doc, "Claim"):
            name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__main__")
            found.append(Experiment(name, claim, field(doc, "Time")))
    return found


def field(doc: str, name: str) -> str:
    """Returns the text after `name:` in a docstring, with the indented lines that follow; empty if it is not there."""
    found = re.search(rf"^{name}:((?:.|\n(?= ))+)", doc, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def table(folder: str) -> str:
    """Returns a Markdown table of the studies in a folder, with the verdict on the committed lines of each."""
    text = ["| Claim | Command: `python -m experiments....` | Time | Verdict |", "|---" * 4 + "|"]
    for each in experiments():
        _, *below, stem = each.name.split(".")
        if below == [folder]:
            links = [f"{folder}/results/{stem}{suffix}" for suffix in (".md", ".png")]
            named = [f"[{what}]({link})" for what, link in zip(("table", "picture"), links, strict=True)]
            here = f" ({', '.join(named)})" if each.results else ""
            verdict = each.verdict or "not run yet"
            text.append(f"| {each.claim}{here} | `{folder}.{stem}` | {each.time} | {verdict} |")
    return "\n".join(text) + "\n"


def readme() -> str:
    """Returns experiments/README.md with its tables of studies renewed."""
    return TABLE.sub(lambda match: match[1] + table(match[2]), README.read_text())


def main(write: bool = False) -> None:
    """Prints the name of each experiment, its claim, the verdict, and where its results are.

    Args:
        write: renew the tables in experiments/README.md instead.
    """
    if write:
        README.write_text(readme())
        return
    for each in experiments():
        found = each.results.relative_to(ROOT.parent) if each.results else "no results are committed: run it"
        print(f"{each.name}\n    {each.claim}\n" + (f"    {each.verdict}\n" if each.verdict else "") + f"    {found}")
    print("\nRun one with `python -m NAME`; `--help` lists its options.")


if __name__ == "__main__":
    tyro.cli(main)
