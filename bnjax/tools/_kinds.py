"""The kinds of batch normalization: what the statistics of each mean, and which of them evaluate as BatchNorm does."""

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What the tools have to know of a class."""

    about_zero: bool = False  # `var` is the quadratic mean E[x²], and `mean` is zero
    constant: bool = False  # neither the batch nor a tool changes the statistics, and they always normalise
    domains: bool = False  # a row of statistics for each domain


# All of these evaluate as y = (x − mean)/√(var + ε)·scale + bias, by the statistics that they hold.
_KINDS = {
    "BatchNorm": Kind(),
    "GhostBatchNorm": Kind(),
    "BatchRenorm": Kind(),
    "FrozenBatchNorm": Kind(constant=True),
    "SplitBatchNorm": Kind(domains=True),
    "PowerNorm": Kind(about_zero=True),
    "MovingAverageBatchNorm": Kind(about_zero=True),
}
_LIBRARIES = ("flax", "bnjax")


def kind_of(module: Any) -> Kind:
    """The kind of a normalization; of a user's own class, that of the class it was made from."""
    return next((_KINDS[c.__name__] for c in type(module).__mro__ if _is_known(c)), Kind())


def is_own_class(module: Any) -> bool:
    """Whether a normalization is of a user's own class, which may do more than the one it was made from."""
    return not _is_known(type(module))


def _is_known(cls: type) -> bool:
    return cls.__name__ in _KINDS and cls.__module__.partition(".")[0] in _LIBRARIES
