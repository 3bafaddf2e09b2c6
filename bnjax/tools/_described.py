"""What a module is to the tools: a batch normalization or a linear layer, and what a normalization computes."""

from typing import Any

import flax.linen as nn
from flax import nnx

from bnjax.functional import Normalization
from bnjax.functional._protocol import unstated
from bnjax.tools._trees import Path, show

_BRIDGES = (nnx.bridge.ToLinen, nnx.bridge.ToNNX)
_LINEAR = (nn.Conv, nn.ConvTranspose, nn.Dense, nnx.Conv, nnx.ConvTranspose, nnx.Linear)
# What Flax's own classes and their subclasses compute, as long as these leave __call__ alone: batch normalization.
_FLAX_NORMS = (nn.BatchNorm, nnx.BatchNorm)
_BATCH_NORM = Normalization()


def is_norm(module: Any) -> bool:
    """Returns whether a module is a batch normalization: by its class, or because it owns a running mean and variance.

    The latter may compute anything: `unsaid` tells.
    """
    if isinstance(module, (Normalization, *_FLAX_NORMS)):
        return True
    if isinstance(module, nnx.Module):
        return all(isinstance(vars(module).get(name), nnx.BatchStat) for name in ("mean", "var"))
    return module.scope is not None and all(module.has_variable("batch_stats", name) for name in ("mean", "var"))


def is_linear(module: Any) -> bool:
    """Returns whether a module is a convolution or a dense layer, or a subclass that leaves its __call__ alone."""
    cls = own_class(module)
    return any(issubclass(cls, flax) and cls.__call__ is flax.__call__ for flax in _LINEAR)


def is_flax(module: Any) -> bool:
    """Returns whether a module computes what Flax's own BatchNorm does: it is one, or leaves its __call__ alone."""
    cls = own_class(module)
    return any(issubclass(cls, flax) and cls.__call__ is flax.__call__ for flax in _FLAX_NORMS)


def unsaid(module: Any) -> str:
    """Returns why the tools do not know what a layer computes, and what to write; empty where they do."""
    cls = own_class(module)
    if issubclass(cls, Normalization):
        return unstated(object.__new__(cls))  # which asks the class alone
    if is_flax(module):
        return ""
    if issubclass(cls, _BRIDGES):
        return f"{cls.__name__} hides a layer of another API: use the tool on the module that it wraps."
    return (
        f"{cls.__name__} holds a running mean and variance and does not say what it computes with them. Derive it from "
        "bnjax.Normalization (too) and define averaged_moments and evaluation_affine in it, or write "
        "averaged_moments = bnjax.Normalization.averaged_moments there, and likewise the other, if they are as in "
        "batch normalization."
    )


def described(module: Any, path: Path = ()) -> Normalization:
    """Returns the object that answers for a layer: the layer itself, or batch normalization for Flax's own classes.

    Raises:
      ValueError: the class of the layer does not say what it computes.
    """
    if problem := unsaid(module):
        raise ValueError(f"{show(path)}: {problem}" if path else problem)
    return module if isinstance(module, Normalization) else _BATCH_NORM


def own_class(module: Any) -> type:
    """Returns the class that the author of a module gave it, under the spy that the tools may have put on it."""
    return next(c for c in type(module).__mro__ if not vars(c).get("is_spy"))
