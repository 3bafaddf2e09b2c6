"""Whether a layer reads the variables that are stored at its path, and nothing else does."""

from bnjax.tools._fold._flow import ARGUMENT, Flow, Op
from bnjax.tools._fold._names import name_of
from bnjax.tools._fold._sites import Marked, Norm, Site
from bnjax.tools._trees import Path, show

# What may happen to a variable on its way into a layer: it is the same one behind these.
_SAME = ("name", "copy", "copy_p", "sharding_constraint", "reshard", "pvary", "pcast", "convert_element_type", ARGUMENT)


class Stored:
    """Answers for one traced model."""

    def __init__(self, marked: Marked, names: list[Path]):
        self.flow = marked.flow
        self._leaves = {name: i for i, name in enumerate(names)}

    def problem(self, label: str, site: Site) -> str:
        """Returns why the variables of a site are not its own alone, or nothing."""
        who = "its" if isinstance(site.layer, Norm) else "whose"
        inside = [
            range(first.at, last.at)
            for first, last in zip(*(self.flow.marks[f"{label} {what}"] for what in ("input", "output")), strict=True)
        ]
        for name in ("kernel", "mean", "var", "scale", "bias"):
            for mark in self.flow.marks.get(f"{label} {name}", []):
                leaf = self._leaves.get((*site.path, name), -1)
                if _origin(self.flow, mark.inputs[0]) != leaf:
                    return f"{who} {name} is not the one that is stored at {show((*site.path, name))}, or not as it is"
                for reader in _readers(self.flow, leaf):
                    if not any(reader.at in call for call in inside):
                        return f"{who} {name} is read by {name_of(reader)} as well"
        return ""


def _origin(flow: Flow, value: int) -> int:
    while (op := flow.maker.get(value)) is not None and op.name in _SAME:
        value = op.inputs[0]
    return value


def _readers(flow: Flow, value: int) -> list[Op]:
    """Returns the operations that use a variable for something."""
    found: list[Op] = []
    for op in flow.users.get(value, []):
        found += _readers(flow, op.outputs[0]) if op.name in _SAME else [op]
    return found
