"""Which batch normalization can be folded into which layer: decided by the flow of data through the traced model."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bnjax.functional._axes import layout_of
from bnjax.tools._flow import Flow, flow_of
from bnjax.tools._kinds import is_own_class, kind_of
from bnjax.tools._layers import Call, Program, handling, is_norm
from bnjax.tools._trees import Path, show

# What a call of BatchNorm may be given that changes nothing about a·x + c in evaluation, or comes after it.
_HARMLESS = ("use_running_average", "mask", "update_stats", "residual", "domain")


class Site(NamedTuple):
    """What folding has to know of one layer."""

    path: Path
    norm: bool
    dtype: Any  # of the output
    epsilon: float = 0.0
    scale_offset: float = 0.0
    groups: int = 1
    rank: int = 0  # of the kernel, without axes that vmap or scan put before
    out_axis: int = -1  # of the kernel
    ends: bool = False  # whether a residual or an activation follows inside the normalization
    row: int | None = None  # of the statistics, where there is one for each domain
    shared_affine: bool = False  # whether scale and bias have no rows all the same
    problem: str = ""  # why a normalization cannot be folded, or why none can be folded into a layer from before it


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
    """The same, with what is needed to do it."""

    norm: Site
    layer: Site
    side: str


def find_pairs(model: Program, x: Any) -> tuple[list[Match], dict[Path, str]]:
    """The pairs of a model, in the order of its layers, and the reason for each normalization that is left."""
    sites: list[Site] = []

    def mark(call: Call) -> jax.Array:
        at = len(sites)
        label = _label(at, call.path)
        sites.append(Site(call.path, is_norm(call.module), None))
        y = call.run(checkpoint_name(call.x, f"input of {label}"))
        sites[at] = (_norm_site if is_norm(call.module) else _linear_site)(call, y.dtype)
        return checkpoint_name(y, f"output of {label}")

    with handling(mark):
        flow = flow_of(jax.make_jaxpr(model.run)(model.state, x))
    return _match(flow, {_label(i, site.path): site for i, site in enumerate(sites)})


def _label(call: int, path: Path) -> str:
    return f"{show(path)} (call {call})"


def _norm_site(call: Call, dtype: Any) -> Site:
    module = call.module
    ends = getattr(module, "activation", None) is not None or call.options.get("residual") is not None
    domain, problem = _domain(call), _problem(call)
    if kind_of(module).domains and not problem and not isinstance(domain, (int, np.integer)):
        problem = "its domain is not known before the model runs"
    return Site(
        call.path,
        True,
        dtype,
        epsilon=module.epsilon,
        scale_offset=getattr(module, "scale_offset", 0.0),
        ends=ends,
        row=None if problem or domain is None else int(domain),
        shared_affine=getattr(module, "shared_affine", False),
        problem=problem,
    )


def _domain(call: Call) -> Any:
    """Whose statistics normalise, where there are several."""
    given = call.options.get("domain")
    return getattr(call.module, "domain", None) if given is None else given


def _problem(call: Call) -> str:
    """Why a normalization cannot be folded into any layer, or nothing."""
    module, asked = call.module, call.options.get("use_running_average")
    evaluates = module.use_running_average if asked is None else asked
    if not (evaluates or kind_of(module).constant):
        return "it normalises by the batch here: run the model in evaluation mode"
    if layout_of(call.x, module.axis).features != (call.x.ndim - 1,):
        return f"its feature axis {module.axis} is not the last one"
    if is_own_class(module):
        return f"it is a {type(module).__name__}, which may do more than BatchNorm"
    if given := [name for name, value in call.options.items() if name not in _HARMLESS and value is not None]:
        return f"its {' and '.join(given)} is given at the call"
    return ""


def _linear_site(call: Call, dtype: Any) -> Site:
    module, problem = call.module, ""
    convolution = not isinstance(module, (nn.Dense, nnx.Linear))
    transposed = isinstance(module, (nn.ConvTranspose, nnx.ConvTranspose))
    size = tuple(np.atleast_1d(module.kernel_size)) if convolution else ()
    if transposed:
        problem = "a transposed convolution sees zeros between the positions"
    elif convolution and not _pads_nothing(module.padding, size):
        problem = "the convolution pads with zeros, which are not shifted"
    elif convolution and module.mask is not None:
        problem = "the convolution masks its kernel"
    swapped = transposed and module.transpose_kernel
    groups = getattr(module, "feature_group_count", 1)
    rank = len(size) + 2
    return Site(call.path, False, dtype, groups=groups, rank=rank, out_axis=-2 if swapped else -1, problem=problem)


def _pads_nothing(padding: Any, size: tuple[int, ...]) -> bool:
    """Whether no zeros are put around the input: shifted channels then stay shifted everywhere."""
    if isinstance(padding, str):
        return padding in ("VALID", "CIRCULAR", "REFLECT") or (padding == "SAME" and set(size) == {1})
    return not np.any(np.asarray(padding))


def _match(flow: Flow, sites: dict[str, Site]) -> tuple[list[Match], dict[Path, str]]:
    live = {label: site for label, site in sites.items() if f"output of {label}" in flow.marks}
    calls = [site.path for site in live.values()]
    outputs = tuple(f"output of {label}" for label in live)
    matches: list[Match] = []
    left = {site.path: "its output is not used" for site in sites.values() if site.norm and site.path not in calls}
    for label, norm in live.items():
        if not norm.norm:
            continue
        problem = norm.problem or ("it is called more than once" if calls.count(norm.path) > 1 else "")
        matched, reason = (None, problem) if problem else _partner(flow, live, outputs, label, calls)
        if matched is None:
            left[norm.path] = reason
        else:
            matches.append(matched)
    return matches, left


def _partner(
    flow: Flow, live: dict[str, Site], outputs: tuple[str, ...], label: str, calls: list[Path]
) -> tuple[Match | None, str]:
    """The layer before the normalization, else the layer after it, else the reasons against both."""
    norm = live[label]
    found, before = flow.origin(flow.marks[f"input of {label}"].inputs[0], outputs)
    if found:
        layer = live[found.removeprefix("output of ")]
        if not layer.norm and calls.count(layer.path) == 1:
            return Match(norm, layer, "previous"), ""
        before = "made by a normalization" if layer.norm else f"made by {show(layer.path)}, which is called repeatedly"
    after = "goes into no convolution or dense layer alone"
    for name, layer in live.items():
        if layer.norm or flow.origin(flow.marks[f"input of {name}"].inputs[0], (f"output of {label}",))[0] == "":
            continue
        ended = "a residual or an activation stands in between" if norm.ends else ""
        after = ended or layer.problem or ("that layer is called repeatedly" if calls.count(layer.path) > 1 else "")
        if not after:
            return Match(norm, layer, "next"), ""
        after = f"goes into {show(layer.path)}, but {after}"
    return None, f"its input is {before}; its output {after}"
