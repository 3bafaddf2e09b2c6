"""The calls of normalizations, convolutions and dense layers in a traced model, marked in the flow of its data."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from bnjax.functional import Normalization, RunningStats
from bnjax.functional._axes import layout_of
from bnjax.functional._protocol import unstated
from bnjax.tools._fold._flow import Flow, flow_of
from bnjax.tools._fold._linear import Linear, read_linear
from bnjax.tools._layers import Call, Program, handling, is_norm
from bnjax.tools._trees import Path

Affine = Callable[..., tuple[jax.Array, jax.Array]]  # Normalization.evaluation_affine of a layer

# What a call may be given that changes nothing about a·x + c in evaluation.
_HARMLESS = ("use_running_average", "mask", "update_stats", "domain")
_VARIABLES = ("kernel", "mean", "var", "scale", "bias")


class Norm(NamedTuple):
    """What folding has to know of a normalization.

    Attributes:
      axis: of the features, from the end.
      affine: a and c of y = a·x + c from its statistics, scale, bias and epsilon.
      epsilon, scale_offset: its fields.
      row: of the statistics, where there is one for each domain.
      shared_affine: whether scale and bias have no rows all the same.
      problem: why it cannot be folded, or nothing.
    """

    axis: int
    affine: Affine
    epsilon: float
    scale_offset: float = 0.0
    row: int | None = None
    shared_affine: bool = False
    problem: str = ""


class Site(NamedTuple):
    """One call of a layer.

    Attributes:
      path: of the layer.
      layer: what it is.
      dtype: of the output.
      rank: of input and output, without axes that vmap put there.
    """

    path: Path
    layer: Norm | Linear
    dtype: Any
    rank: int


class Marked(NamedTuple):
    """A traced model: the flow of its data, in which `checkpoint_name` labels inputs, outputs and variables of sites.

    Attributes:
      flow: of the model, whose first arguments are the leaves of its variables.
      sites: by label. `"<label> input"` and so on are in `flow.marks`, once for each place where the call was traced.
    """

    flow: Flow
    sites: dict[str, Site]


def find_sites(model: Program, variables: Any, x: Any) -> Marked:
    """Traces a model with every call of a layer marked."""
    own = dict(_modules(variables)) if isinstance(variables, nnx.Module) else {}
    sites: dict[str, Site] = {}
    reading = False

    def mark(call: Call) -> jax.Array:
        nonlocal reading
        if reading:  # a layer is traced alone
            return call.run(call.x)
        label = f"bnjax {len(sites)}"
        sites[label] = Site(call.path, Linear(0, -1), None, 0)  # takes the number
        for name, value in _variables(call.module):
            checkpoint_name(value, f"{label} {name}")
        y = call.run(checkpoint_name(call.x, f"{label} input"))
        if is_norm(call.module):
            layer: Norm | Linear = _norm(call, own.get(call.path, call.module))
        else:
            reading = True
            layer = read_linear(call)
            reading = False
        sites[label] = Site(call.path, layer, y.dtype, y.ndim)
        return checkpoint_name(y, f"{label} output")

    with handling(mark):
        flow = flow_of(jax.make_jaxpr(model.run)(model.state, x))
    return Marked(flow, sites)


def _modules(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    return ((tuple(map(str, path)), module) for path, module in nnx.iter_modules(model))


def _variables(module: Any) -> Iterator[tuple[str, Any]]:
    """The variables that a layer reads, as it sees them here."""
    for name in _VARIABLES:
        if isinstance(module, nnx.Module):
            if isinstance(variable := getattr(module, name, None), nnx.Variable):
                yield name, variable[...]
            continue
        value = module.get_variable("batch_stats" if name in ("mean", "var") else "params", name)
        if value is not None:
            yield name, meta.unbox(value)


def _norm(call: Call, module: Any) -> Norm:
    """What is known of a normalization; `module` is it, outside of this trace where that is possible."""
    layout = layout_of(call.x, module.axis)
    domain, problem = _domain(call), _problem(call, module)
    if hasattr(module, "num_domains") and not problem and not isinstance(domain, (int, np.integer)):
        problem = "its domain is not known before the model runs"
    if not isinstance(module, Normalization):
        affine: Affine = Normalization().evaluation_affine
    elif isinstance(module, nn.Module):
        affine = module.clone(parent=None, name=None).evaluation_affine
    else:
        affine = module.evaluation_affine
    return Norm(
        layout.features[0] - call.x.ndim,
        affine,
        module.epsilon,
        getattr(module, "scale_offset", 0.0),
        row=None if problem or domain is None else int(domain),
        shared_affine=getattr(module, "shared_affine", False),
        problem=problem,
    )


def _domain(call: Call) -> Any:
    """Whose statistics normalise, where there are several."""
    given = call.options.get("domain")
    return getattr(call.module, "domain", None) if given is None else given


def _problem(call: Call, module: Any) -> str:
    """Why a normalization cannot be folded into any layer, or nothing."""
    if type(module) not in (nn.BatchNorm, nnx.BatchNorm) and (unknown := unstated(module)):
        return unknown.rstrip(".")
    asked = call.options.get("use_running_average")
    evaluates = call.module.use_running_average if asked is None else asked
    if not (evaluates or getattr(module, "is_constant", False)):
        return "it normalises by the batch here: run the model in evaluation mode"
    if len(layout_of(call.x, module.axis).features) > 1:
        return f"it has several feature axes, {module.axis}"
    if given := [name for name, value in call.options.items() if name not in _HARMLESS and value is not None]:
        return f"its {' and '.join(given)} is given at the call"
    return ""


def affine_of(norm: Norm, stats: RunningStats, scale: Any, bias: Any) -> tuple[jax.Array, jax.Array]:
    """a and c of y = a·x + c; [lead..., C] each, where vmap or scan stacked layers."""
    run = lambda stats, scale, bias: norm.affine(stats, scale, bias, norm.epsilon)  # noqa: E731
    for _ in range(stats.mean.ndim - 1):
        run = jax.vmap(run)
    return run(stats, scale, bias)
