"""Names of modules: checks of those that callers give, their order, and lists of them that stay readable."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


def check_modules(option: str, given: Iterable[str], modules: Sequence[str], what: str) -> None:
    """Raises ValueError for names that are not of modules of that kind; the error says which are possible."""
    if isinstance(given, str):
        raise ValueError(f"{option} holds paths of modules; got the string {given!r}: write [{given!r}].")
    unknown = [name for name in given if name not in modules]
    if unknown:
        close = [match for name in unknown for match in get_close_matches(str(name), modules, 1)]
        meant = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"{option}: {unknown} are no modules of the variables with {what}.{meant} Write paths joined by '/'; "
            f"these have {what}: {shortened(modules)}."
        )


def check_mapping(option: str, given: Any, example: str) -> Mapping[str, Any]:
    """Returns the mapping, empty for None; raises ValueError for anything else."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{option} maps paths of modules, as in {option}={example}; got {given!r}.")
    return given


def shortened(names: Iterable[Any], most: int = 8) -> str:
    """Returns a list of names as text: the first few, and how many follow."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}"


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a key by which 10 comes after 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]
