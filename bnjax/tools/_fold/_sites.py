"""The calls of normalizations, convolutions and dense layers in a traced model, marked in the flow of its data."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from bnjax.functional import Normalization, RunningStats
from bnjax.functional._axes import layout_of
from bnjax.tools._fold._flow import Flow, flow_of
from bnjax.tools._fold._linear import Linear, read_linear
from bnjax.tools._layers import Call, Program, described, handling, is_norm, unsaid
from bnjax.tools._trees import Path

# What a call may be given that changes nothing about a·x + c in evaluation.
_HARMLESS = ("use_running_average", "mask", "update_stats", "domain")
_VARIABLES = ("kernel", "mean", "var", "scale", "bias")


class Norm(NamedTuple):
    """What folding has to know of a normalization.

    Attributes:
      problem: why it cannot be folded, or nothing.
      axis: of the features, from the end.
      says: the object that answers for it: `evaluation_affine`.
      epsilon, scale_offset: its fields.
      row: of the statistics, where there is one for each domain.
      shared_affine: whether scale and bias have no rows all the same.
    """

    problem: str = ""
    axis: int = -1
    says: Normalization = Normalization()
    epsilon: float = 1e-5
    scale_offset: float = 0.0
    row: int | None = None
    shared_affine: bool = False


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
    own = dict(_modules(variables)) if isinstance(variables, nnx.Module) else None
    sites: dict[str, Site] = {}

    def mark(call: Call) -> jax.Array:
        label = f"bnjax {len(sites)}"
        sites[label] = Site(call.path, Norm(), None, 0)  # takes the number
        for name, value in _variables(call.module):
            checkpoint_name(value, f"{label} {name}")
        y = call.run(checkpoint_name(call.x, f"{label} input"))
        foreign = "is a linen layer inside of an nnx model" if own is not None and call.path not in own else ""
        if is_norm(call.module):
            module = call.module if own is None else own.get(call.path)
            layer: Norm | Linear = Norm(f"it {foreign}") if foreign else _norm(call, module)
        else:
            layer = Linear(0, -1, after=foreign, before=foreign) if foreign else read_linear(call)
        sites[label] = Site(call.path, layer, y.dtype, y.ndim)
        return checkpoint_name(y, f"{label} output")

    with handling(mark):
        flow = flow_of(jax.make_jaxpr(model.run)(model.state, x))
    return Marked(flow, sites)


def _modules(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    return ((tuple(map(str, path)), module) for path, module in nnx.iter_modules(model))


def _variables(module: Any) -> Iterator[tuple[str, Any]]:
    """Returns the variables that a layer reads, as it sees them here."""
    for name in _VARIABLES:
        if isinstance(module, nnx.Module):
            if isinstance(variable := getattr(module, name, None), nnx.Variable):
                yield name, variable[...]
            continue
        value = module.get_variable("batch_stats" if name in ("mean", "var") else "params", name)
        if value is not None:
            yield name, meta.unbox(value)


def _norm(call: Call, module: Any) -> Norm:
    """Returns what is known of a normalization; `module` is it, outside of this trace where there is such a thing."""
    if problem := unsaid(module) or _problem(call, described(module)):
        return Norm(problem.rstrip("."))
    domain = _domain(call)
    return Norm(
        axis=layout_of(call.x, module.axis).features[0] - call.x.ndim,
        says=described(module.clone(parent=None, name=None) if isinstance(module, nn.Module) else module),
        epsilon=module.epsilon,
        scale_offset=getattr(module, "scale_offset", 0.0),
        row=None if domain is None else int(domain),
        shared_affine=getattr(module, "shared_affine", False),
    )


def _domain(call: Call) -> Any:
    """Returns the domain whose statistics normalise, where there are several."""
    given = call.options.get("domain")
    return getattr(call.module, "domain", None) if given is None else given


def _problem(call: Call, says: Normalization) -> str:
    """Returns why a normalization cannot be folded into any layer, or nothing."""
    module, asked = call.module, call.options.get("use_running_average")
    evaluates = module.use_running_average if asked is None else asked
    if not (evaluates or says.is_constant):
        return "it normalises by the batch here: run the model in evaluation mode"
    if len(layout_of(call.x, module.axis).features) > 1:
        return f"it has several feature axes, {module.axis}"
    if given := [name for name, value in call.options.items() if name not in _HARMLESS and value is not None]:
        return f"its {' and '.join(given)} is given at the call"
    if hasattr(module, "num_domains") and not isinstance(_domain(call), (int, np.integer)):
        return "its domain is not known before the model runs"
    return "it is called with positional arguments that have no name" if call.rest else ""


def affine_of(norm: Norm, stats: RunningStats, scale: Any, bias: Any) -> tuple[jax.Array, jax.Array]:
    """Returns a and c of y = a·x + c; [lead..., C] each, where vmap or scan stacked layers."""
    run = lambda stats, scale, bias: norm.says.evaluation_affine(stats, scale, bias, norm.epsilon)  # noqa: E731
    for _ in range(stats.mean.ndim - 1):
        run = jax.vmap(run)
    return run(stats, scale, bias)
