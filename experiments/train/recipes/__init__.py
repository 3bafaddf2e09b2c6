"""Reads recipes: defaults for `python -m experiments.train`, one small TOML file each."""

import tomllib
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from experiments.errors import ConfigError
from experiments.train.config import Config

FOLDER = Path(__file__).parent
SECTIONS = ("training", "hardware", "files")


def defaults(argv: Sequence[str]) -> Config:
    """Returns the default options for a command line: those of its --recipe, smaller ones with --smoke.

    Raises:
        ConfigError: there is no such recipe, or it has an option that is not known.
    """
    config, name = Config(), named(argv)
    if name is not None:
        config = read(config, path_of(name))
    if "--smoke" in argv:
        config = replace(config, training=replace(config.training, epochs=1, width=8))
    return config


def named(argv: Sequence[str]) -> str | None:
    """Returns the value of --recipe."""
    for option, value in pairwise([*argv, ""]):
        if option == "--recipe":
            return value
        if option.startswith("--recipe="):
            return option.partition("=")[2]
    return None


def path_of(name: str) -> Path:
    """Returns the file of a recipe."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise ConfigError(f"--recipe {name}: expected one of {known}, or a file .toml")
    return path


def read(config: Config, path: Path) -> Config:
    """Returns the options with those in the file put in their place."""
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    if unknown := sorted(content.keys() - set(SECTIONS)):
        raise ConfigError(f"{path} has the section [{unknown[0]}]: expected {', '.join(SECTIONS)}")
    for section, options in content.items():
        config = replace(config, **{section: changed(getattr(config, section), options, f"{path}, [{section}]")})
    return config


def changed(part: Any, options: dict[str, Any], where: str) -> Any:
    """Returns one part of the options with others in their place; `where` begins an error."""
    known = {field.name.replace("_", "-"): field for field in fields(part)}
    values = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{where} has {name!r}: expected names of options, without the two dashes")
        field = known[name]
        kinds = [kind for kind in (get_args(field.type) or (field.type,)) if isinstance(kind, type)] or [str]
        if float in kinds:
            kinds.append(int)
        value = Path(value) if Path in kinds and isinstance(value, str) else value
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(
                f"{where} has {name} = {value!r}: expected {' or '.join(kind.__name__ for kind in kinds)}"
            )
        values[field.name] = value
    return replace(part, **values)
