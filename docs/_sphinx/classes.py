"""Chooses what the reference shows of a class: its constructor, and its own methods."""

import inspect
from types import MappingProxyType
from typing import Any

from flax import linen, nnx

import bnjax


def own_members(cls: type) -> list[str]:
    """Returns the methods and properties that a class defines itself, without the fields of a NamedTuple."""

    def is_own(member: Any) -> bool:
        qualified = getattr(member, "__qualname__", "")  # a default that is a function belongs to another
        return isinstance(member, property | classmethod) or qualified.startswith(f"{cls.__qualname__}.")

    shown = (name for name in vars(cls) if not name.startswith("_") or name in ("__call__", "__str__"))
    return [name for name in shown if is_own(vars(cls)[name])]


def constructor(cls: type) -> str:
    """Returns the signature of a Flax class, without the arguments that every module, or BatchNorm, has too."""
    if not issubclass(cls, linen.Module | nnx.Module | nnx.Variable):
        return ""  # the signature that Sphinx finds is right
    parameters = dict(inspect.signature(cls.__init__).parameters)
    if cls.__base__ is bnjax.linen.BatchNorm:
        names = inspect.get_annotations(cls)
        own = {n: p.replace(kind=p.KEYWORD_ONLY) for n, p in parameters.items() if n in names}
        fields = inspect.Parameter("fields", inspect.Parameter.VAR_KEYWORD)
        parameters = own | {"fields": fields}
    shown = [p for name, p in parameters.items() if name not in ("self", "parent", "name")]
    return str(inspect.Signature([plain(p) for p in shown]))


def plain(parameter: inspect.Parameter) -> inspect.Parameter:
    """Returns a parameter without its type, and with the name of a class or function as its default."""
    default = parameter.default
    if callable(default) and default is not inspect.Parameter.empty:
        default = Name(default.__name__)
    if isinstance(default, MappingProxyType):
        default = dict(default)
    return parameter.replace(annotation=inspect.Parameter.empty, default=default)


class Name(str):
    """A string whose repr has no quotes."""

    def __repr__(self) -> str:
        return str(self)
