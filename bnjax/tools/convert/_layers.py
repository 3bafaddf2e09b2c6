"""What the modules say of their own kernels: which are transposed convolutions, and in what order the layers run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from bnjax.functional import Normalization

# A jitted model that ran before is traced again: what jit keeps of it was made without looking at its modules.
_tracing = jax.make_user_context(None)


class Layer(NamedTuple):
    """What a module says of its kernel."""

    transposed: bool = False  # a transposed convolution
    transpose_kernel: bool = False  # that option of it: the kernel is stored as [..., out, in], and not mirrored
    rank: int | None = None  # of one kernel; more where layers are stacked by vmap or scan
    keeps_mean: bool = True  # False for a normalization whose running mean is always 0


def layers_of(variables: Any, apply_fn: Callable[..., Any] | None, x: Any) -> dict[str, Layer]:
    """Returns the modules by path: those of an nnx module as they are defined, those of linen as they run.

    Empty for linen variables without `apply_fn`, and for the state of an nnx module: neither says anything of modules.
    """
    if isinstance(variables, nnx.Module):
        return {"/".join(path): _layer(module) for path, module in _defined(variables, (), set())}
    if (apply_fn is None) != (x is None):
        raise ValueError(
            "apply_fn and x go together: apply_fn(variables, x) is traced to see which layers there are; x may be "
            "jax.ShapeDtypeStruct(shape, dtype)."
        )
    return {} if apply_fn is None else _traced(apply_fn, variables, x)


def order_of(variables: Any, layers: Mapping[str, Layer]) -> Iterable[str]:
    """Returns the names of the modules in the order in which they run or are defined; empty where it is not known.

    `nnx.split`, `nnx.merge`, `nnx.clone` and `nnx.eval_shape` sort the attributes of a module by name. So attributes in
    alphabetical order say nothing about the order of their definition.
    """
    if isinstance(variables, nnx.Module):
        for _, module in nnx.iter_modules(variables):
            names = [name for name, held in vars(module).items() if isinstance(held, nnx.Module)]
            if len(names) > 1 and names == sorted(names):
                return ()
    return layers


def _layer(module: Any) -> Layer:
    if isinstance(module, (nn.Dense, nn.DenseGeneral, nnx.Linear, nnx.LinearGeneral)):
        return Layer(rank=2)
    if isinstance(module, Normalization):
        return Layer(keeps_mean=module.keeps_mean)
    if not isinstance(module, (nn.Conv, nn.ConvTranspose, nnx.Conv, nnx.ConvTranspose)):
        return Layer()
    size = module.kernel_size
    rank = 2 + (1 if isinstance(size, int) else len(size))
    if isinstance(module, (nn.ConvTranspose, nnx.ConvTranspose)):
        return Layer(transposed=True, transpose_kernel=module.transpose_kernel, rank=rank)
    return Layer(rank=rank)


def _defined(module: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Returns the modules of an nnx module, each once, in the order of the attributes that hold them."""
    if isinstance(module, nnx.Module) and id(module) not in seen:
        seen.add(id(module))
        yield path, module
        for name, held in vars(module).items():
            yield from _defined(held, (*path, name), seen)


def _traced(apply_fn: Callable[..., Any], variables: Any, x: Any) -> dict[str, Layer]:
    found: dict[str, Layer] = {}

    def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            found.setdefault("/".join(context.module.path), _layer(context.module))
        return method(*args, **kwargs)

    with nn.intercept_methods(intercept), _tracing(object()):
        jax.eval_shape(lambda variables, x: apply_fn(variables, x), variables, x)
    if not found:
        raise ValueError("apply_fn(variables, x) ran no linen module: give model.apply, or a function that calls it.")
    return found
