"""Defines `.. reference:: module` with names below it: a table of their first sentences, then each whole docstring."""

import importlib
import inspect
from typing import Any

from classes import constructor, own_members
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList


class Reference(Directive):
    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        (module,) = self.arguments
        names = "\n".join(self.content).split()
        lines = [
            f".. currentmodule:: {module}",
            "",
            ".. autosummary::",
            "   :nosignatures:",
            "",
            *(f"   {name}" for name in names),
            "",
        ]
        for name in names:
            lines += entry(name, getattr(importlib.import_module(module), name))
        section = nodes.section(document=self.state.document)
        self.state.nested_parse(StringList(lines, source="reference"), self.content_offset, section)
        return section.children


def entry(name: str, value: Any) -> list[str]:
    """Returns the lines of the Sphinx directive for one public name."""
    if not inspect.isclass(value):
        return [f".. autofunction:: {name}", ""]
    members = own_members(value)
    options = [f"   :members: {', '.join(members)}"] if members else []
    return [f".. autoclass:: {name}{constructor(value)}", *options, ""]


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("reference", Reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
