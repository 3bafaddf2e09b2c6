"""Which batch normalization can be folded into which layer: decided by the flow of data through the traced model."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from bnjax.tools._fold._channels import Channels, behind, channels_at
from bnjax.tools._fold._flow import Op
from bnjax.tools._fold._moves import Index
from bnjax.tools._fold._names import modules_around, name_of
from bnjax.tools._fold._sites import Marked, Norm, Site
from bnjax.tools._fold._stored import Stored
from bnjax.tools._fold._sweep import End, sweep, unmoved
from bnjax.tools._trees import Path, show


class Pair(NamedTuple):
    """A normalization that was folded, and the layer that took it.

    Attributes:
      norm: the path of the normalization, such as `"block1/BatchNorm_0"`.
      layer: the path of the layer.
      side: `"previous"`: the layer makes the input of the normalization; `"next"`: it uses its output.

    Examples:
      >>> from bnjax import tools
      >>> tools.Pair(norm="BatchNorm_0", layer="Conv_0", side="previous").layer
      'Conv_0'
    """

    norm: str
    layer: str
    side: str


class Match(NamedTuple):
    """A pair, with what is needed to fold it.

    Attributes:
      norm, layer: the two sites.
      side: as in `Pair`.
      channels: the channel of the normalization for each output (previous) or input (next) of the layer, −1 for none;
        None where they are the same.
      factor: a constant c per channel arrives at the other of the two as factor·c.
      ordered: whether it is right for a ≥ 0 alone, because of a max-pool in between.
    """

    norm: Site
    layer: Site
    side: str
    channels: Index | None
    factor: float
    ordered: bool


def find_pairs(marked: Marked, names: list[Path]) -> tuple[list[Match], dict[Path, str]]:
    """Returns the pairs of a model, in the order of its layers, and the reason for each normalization that is left.

    Args:
      marked: the traced model.
      names: of the leaves of its variables.
    """
    search = _Search(marked, names)
    matches: list[Match] = []
    norms = {label: site for label, site in marked.sites.items() if isinstance(site.layer, Norm)}
    left = {site.path: "its output is not used" for site in norms.values()}
    for label, site in norms.items():
        if label not in search.sites:  # a loop may be traced several times, and one of these is used
            continue
        found = search.partners(label, site, site.layer)
        if isinstance(found, str):
            left[site.path] = found
        else:
            matches += found
            del left[site.path]
    return matches, left


class _Search:
    """The search for the layers that take a normalization."""

    def __init__(self, marked: Marked, names: list[Path]):
        self.flow, sites = marked.flow, marked.sites
        outputs = {label: self.flow.marks.get(f"{label} output", []) for label in sites}
        live = {label: [op for op in ops if op.at in self.flow.live] for label, ops in outputs.items()}
        self.sites = {label: site for label, site in sites.items() if live[label]}
        self.calls = Counter(site.path for label, site in self.sites.items() for _ in live[label])
        self.stored = Stored(marked, names)
        self.ends = {label: self._from(label, site) for label, site in self.sites.items()}

    def partners(self, label: str, site: Site, norm: Any) -> list[Match] | str:
        """Returns the layer before a normalization, else all layers after it, else the reasons against both."""
        problem = norm.problem or self._alone(label, site)
        if problem:
            return problem
        before = self._before(label, site, norm)
        if isinstance(before, Match):
            return [before]
        after: list[Match] = []
        for end in self.ends[label]:
            found = self._after(label, site, norm, end)
            if isinstance(found, str):
                return f"its input {before}; its output {found}"
            after.append(found)
        return after

    def _before(self, label: str, site: Site, norm: Norm) -> Match | str:
        maker = self._maker(self._mark(label, "input").inputs[0])
        if maker is None:
            return "is an argument of the model, or of the loop or branch around it"
        source = self._label(maker, "output")
        if source is None:
            return f"is made by {name_of(maker, self._around(label))}"
        layer = self.sites[source]
        made = f"is made by {show(layer.path)}, "
        if isinstance(layer.layer, Norm):
            return made + "a normalization"
        problem = self._alone(source, layer) or (layer.layer.after and f"which {layer.layer.after}")
        if problem:
            return made + problem
        (end, *others) = self.ends[source]
        if others or self._label(end.op, "input") != label:
            return made + f"whose output goes into {self._list(self.ends[source], source)}"
        if self._stacked(source, layer):
            return Match(site, layer, "previous", None, 1.0, False) if norm.axis == -1 else made + "inside of vmap"
        index = _outputs(end.channels, self._shape(source, "output")[-1], norm.axis, self._shape(label, "input"))
        return self._match(Match(site, layer, "previous", index, *end.channels[1:3]), end, made.rstrip(", "))

    def _after(self, label: str, site: Site, norm: Norm, end: End) -> Match | str:
        target = self._label(end.op, "input")
        if target is None or isinstance(self.sites[target].layer, Norm):
            return f"goes into {self._list(self.ends[label], label)}"
        layer: Any = self.sites[target]
        goes = f"goes into {show(layer.path)}"
        problem = self._alone(target, layer) or (layer.layer.before and f"which {layer.layer.before}")
        if problem:
            return f"{goes}, {problem}"
        if self._stacked(label, site):
            return Match(site, layer, "next", None, 1.0, False) if norm.axis == -1 else f"{goes}, inside of vmap"
        return self._match(Match(site, layer, "next", end.channels.along(-1), *end.channels[1:3]), end, goes)

    def _match(self, match: Match, end: End, so_far: str) -> Match | str:
        """Returns the pair, unless an operation in between mixes channels or does not keep constants."""
        if match.channels is None or not match.factor or end.channels.uneven:
            return f"{so_far}, with {end.channels.uneven or 'a reshape that mixes channels'} in between"
        return match

    def _from(self, label: str, site: Site) -> list[End]:
        """Returns where the output of a site goes."""
        shape = self._shape(label, "output")
        axis = site.layer.axis if isinstance(site.layer, Norm) else -1
        channels = channels_at(axis, shape[axis], len(shape))
        wanted = lambda op: self._label(op, "input") is not None  # noqa: E731
        start = self._mark(label, "output").outputs[0]
        return sweep(self.flow, {start: channels}, wanted, unmoved if self._stacked(label, site) else behind)

    def _stacked(self, label: str, site: Site) -> bool:
        """Returns whether vmap put an axis somewhere into the output of a site."""
        return len(self._shape(label, "output")) != site.rank

    def _shape(self, label: str, what: str) -> tuple[int, ...]:
        return self.flow.shapes[self._mark(label, what).outputs[0]]

    def _mark(self, label: str, what: str) -> Op:
        return next(op for op in self.flow.marks[f"{label} {what}"] if op.at in self.flow.live)

    def _alone(self, label: str, site: Site) -> str:
        """Returns why a site cannot take part, whatever is beside it, or nothing."""
        if self.calls[site.path] > 1:
            return "it is called more than once" if isinstance(site.layer, Norm) else "which is called more than once"
        return self.stored.problem(label, site)

    def _maker(self, value: int) -> Op | None:
        """Returns what makes a value, through operations that channels pass."""
        while (op := self.flow.maker.get(value)) is not None:
            inputs = [value for value in op.inputs if value not in self.flow.constants]
            if self._label(op, "output") is not None or len(inputs) != 1:
                return op
            (value,) = inputs
            anywhere = Channels(np.zeros([1] * len(self.flow.shapes[value]), int))
            if behind(op, {value: anywhere}, self.flow) is None:
                return op
        return None

    def _label(self, op: Op, what: str) -> str | None:
        """Returns the label of a site whose input or output an operation marks."""
        label = op.label.removesuffix(f" {what}")
        return label if label != op.label and label in self.sites else None

    def _around(self, label: str) -> frozenset[str]:
        return modules_around(self._mark(label, "input"))

    def _list(self, ends: list[End], label: str) -> str:
        """Returns what people call the ends of the ways from a site."""
        sites = [self._label(end.op, "input") for end in ends]
        around = self._around(label)
        names = [show(self.sites[s].path) if s else name_of(e.op, around) for s, e in zip(sites, ends, strict=True)]
        if len(ends) > 1:  # one operation, such as gelu, may hand its input on beside what it makes of it
            names = [end.channels.uneven or name for name, end in zip(names, ends, strict=True)]
        return " and ".join(dict.fromkeys(names))


def _outputs(channels: Channels, count: int, axis: int, shape: tuple[int, ...]) -> Index | None:
    """Returns the channel of a normalization for each output of the layer before it; None where one is in several.

    Args:
      channels: where the outputs of the layer are in the input of the normalization.
      count: how many outputs the layer has.
      axis: the feature axis of the normalization.
      shape: of its input.
    """
    mine = channels_at(axis, shape[axis], len(shape)).at
    outputs, mine = (a.reshape(-1) for a in np.broadcast_arrays(channels.at, mine))
    index = np.full(count, -1)
    index[outputs] = mine
    return index if np.array_equal(index[outputs], mine) else None
