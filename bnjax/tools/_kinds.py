"""Answers of the protocol in the form in which `fold` asked for them. Deleted once nothing imports it."""

from typing import Any, NamedTuple

from bnjax.functional import Normalization
from bnjax.tools._layers import described, unsaid


class Kind(NamedTuple):
    """What a layer says about itself."""

    about_zero: bool = False  # `var` is the quadratic mean E[x²], and `mean` is zero
    constant: bool = False  # neither the batch nor a tool changes the statistics, and they always normalise
    domains: bool = False  # a row of statistics for each domain


def kind_of(module: Any) -> Kind:
    """Returns the answers of a layer; those of batch normalization for a class that does not say."""
    says = Normalization() if unsaid(module) else described(module)
    return Kind(not says.keeps_mean, says.is_constant, hasattr(module, "num_domains"))


def is_own_class(module: Any) -> bool:
    """Returns whether a normalization is of a class that does not say what it computes."""
    return bool(unsaid(module))
