"""`python -m experiments`: the experiments and what each of them claims."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent


def claims() -> dict[str, str]:
    """The `Claim:` line in the docstring of every module that has one, without importing any of them."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines():
            if line.startswith("Claim:"):
                name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
                found[name] = line.removeprefix("Claim:").strip()
    return found


def main() -> None:
    """Prints one line per experiment."""
    table = claims()
    width = max(map(len, table))
    for name, claim in table.items():
        print(f"{name:<{width}}  {claim}")
    print("\nRun one with `python -m NAME`; `--help` lists its options.")


if __name__ == "__main__":
    main()
