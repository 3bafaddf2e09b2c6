"""Tests that weights before batch normalization are scale-invariant, and what follows for gradient and training.

All in float64. ε breaks the invariance slightly: it is either too small to matter, or its effect is in the equation.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bnjax.linen import BatchNorm, GhostBatchNorm
from experiments.models.convolutional import ConvNet
from tests.support.cases import assert_close

ROWS, WIDTH = 12, 6
NO_EPSILON, EPSILON, FACTOR = 1e-30, 0.1, 3.0
TOLERANCE = 1e-12  # float64: 2⁻⁵³ times the ROWS·8·8 rows that a sum runs over, and some steps of training
IMAGES, VECTORS = (ROWS, 8, 8, 4), (ROWS, 5)
LAYERS = {
    "dense": (nn.Dense(WIDTH, use_bias=False, param_dtype=float), VECTORS),
    "dense with bias": (nn.Dense(WIDTH, param_dtype=float), VECTORS),
    "conv": (nn.Conv(WIDTH, (3, 3), use_bias=False, param_dtype=float), IMAGES),
    "conv with bias": (nn.Conv(WIDTH, (3, 3), param_dtype=float), IMAGES),
    "strided grouped conv": (nn.Conv(8, (3, 3), 2, feature_group_count=4, param_dtype=float), IMAGES),
    "transposed conv": (nn.ConvTranspose(WIDTH, (3, 3), param_dtype=float), IMAGES),
}
NORMS = {"BatchNorm": BatchNorm, "GhostBatchNorm": lambda **fields: GhostBatchNorm(virtual_batch_size=4, **fields)}
each_layer = pytest.mark.parametrize("name", LAYERS)
one_of_each = pytest.mark.parametrize("name", ["dense", "conv with bias"])
each_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _layer(name):
    """Returns a layer and an input for it."""
    layer, shape = LAYERS[name]
    return layer, jnp.asarray(np.random.default_rng(1).normal(size=shape))


@cache
def _objective(name, epsilon, norm="BatchNorm"):
    """Returns a compiled `params -> (loss, gradient)` of a layer followed by the norm, with a generic loss."""
    layer, x = _layer(name)
    model = nn.Sequential([layer, NORMS[norm](use_running_average=False, epsilon=epsilon, param_dtype=float)])

    def loss(params):
        y, _ = model.apply({"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) / y.size**0.5

    return jax.jit(jax.value_and_grad(loss))


def _params(name, factor=1.0):
    """Draws parameters; only the layer's kernel is multiplied by `factor`."""
    (layer, x), rng = _layer(name), np.random.default_rng(7)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    norm = {name: np.zeros(shapes["kernel"].shape[-1]) for name in ("scale", "bias")}
    params = {"layers_0": shapes, "layers_1": norm}
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    params["layers_0"]["kernel"] *= factor
    return params


def _kernel(params):
    return params["layers_0"]["kernel"]


def _along(gradient, kernel):
    """Returns ⟨∂L/∂w, w⟩ of each output channel, and the sum of |terms| for the tolerance."""
    product = np.asarray(gradient * kernel).reshape(-1, kernel.shape[-1])
    size = np.abs(product).sum()
    assert size > 1e-3  # there is a gradient
    return product.sum(0), size


@each_norm
@each_layer
def test_the_gradient_is_orthogonal_to_the_weights(name, norm):
    """Checks ⟨∂L/∂w, w⟩ = 0 per output channel, and that a bias before the norm has no gradient."""
    params = _params(name)
    _, gradient = _objective(name, NO_EPSILON, norm)(params)
    inner, size = _along(_kernel(gradient), _kernel(params))
    assert_close(inner, np.zeros_like(inner), TOLERANCE, size)
    if "bias" in params["layers_0"]:
        assert_close(gradient["layers_0"]["bias"], np.zeros_like(inner), TOLERANCE, size)


@one_of_each
def test_what_epsilon_leaves_along_the_weights(name):
    """Checks ⟨∂L/∂w, w⟩ = scale · ∂L/∂scale · ε/(var + ε), from ∂xhat/∂α = xhat·ε/(var + ε) at weights αw."""
    (layer, x), params = _layer(name), _params(name)
    _, gradient = _objective(name, EPSILON)(params)
    inner, size = _along(_kernel(gradient), _kernel(params))
    x = layer.apply({"params": params["layers_0"]}, x)
    var = jnp.var(x, range(x.ndim - 1))
    scale, d_scale = params["layers_1"]["scale"], gradient["layers_1"]["scale"]
    assert_close(inner, scale * d_scale * EPSILON / (var + EPSILON), TOLERANCE, size)


@each_norm
@one_of_each
def test_the_loss_forgets_the_scale_and_divides_the_gradient_by_it(name, norm):
    """Checks L(αw) = L(w) and ∇L(αw) = ∇L(w)/α, with ε replaced by α²ε."""
    loss, gradient = _objective(name, EPSILON, norm)(_params(name))
    again, smaller = _objective(name, FACTOR**2 * EPSILON, norm)(_params(name, FACTOR))
    assert_close(again, loss, TOLERANCE, 1)
    assert_close(FACTOR * _kernel(smaller), _kernel(gradient), TOLERANCE, 1)
    jax.tree.map(lambda g, w: assert_close(g, w, TOLERANCE, 1), smaller["layers_1"], gradient["layers_1"])


def _train(objective, params, optimizer, steps=5):
    """Trains the layer before the norm only; returns the loss of each step and the final kernel."""
    labels = {"layers_0": "trained", "layers_1": "kept"}
    optimizer = optax.multi_transform({"trained": optimizer, "kept": optax.set_to_zero()}, labels)
    state, losses = optimizer.init(params), []
    for _ in range(steps):
        loss, gradient = objective(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    assert steps == 1 or np.ptp(losses) > 1e-2  # it learns
    return np.array(losses), _kernel(params)


@one_of_each
def test_a_step_lengthens_the_weights_as_in_pythagoras(name):
    """Checks ‖w − η∇L‖² = ‖w‖² + η²‖∇L‖²: plain SGD never shortens the weights."""
    params, objective = _params(name), _objective(name, NO_EPSILON)
    step = 3 * _kernel(objective(params)[1])
    _, kernel = _train(objective, params, optax.sgd(3.0), steps=1)
    assert jnp.sum(step**2) > 1e-3
    assert_close(jnp.sum(kernel**2), jnp.sum(_kernel(params) ** 2) + jnp.sum(step**2), TOLERANCE)


@pytest.mark.parametrize("momentum", [None, 0.9])
@one_of_each
def test_the_learning_rate_counts_by_the_squared_norm(name, momentum):
    """Checks that (αw, α²η) trains as (w, η): η/‖w‖² is the effective rate (van Laarhoven 2017, section 2)."""
    losses, kernel = _train(_objective(name, EPSILON), _params(name), optax.sgd(0.5, momentum))
    objective, larger = _objective(name, FACTOR**2 * EPSILON), _params(name, FACTOR)
    again, kernel_of_larger = _train(objective, larger, optax.sgd(FACTOR**2 * 0.5, momentum))
    assert_close(again, losses, TOLERANCE, 1)
    assert_close(kernel_of_larger, FACTOR * kernel, TOLERANCE)


@one_of_each
def test_weight_decay_is_a_learning_rate_that_grows(name):
    """Checks, with c = 1 − ηλ, that the rate η·c^(−2t−1) gives w_t/cᵗ and the same losses (Li & Arora 2020)."""
    objective, params = _objective(name, NO_EPSILON), _params(name)
    rate, decay, steps = 0.5, 0.1, 5
    c = 1 - rate * decay
    decayed = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    losses, kernel = _train(objective, params, decayed, steps)
    again, longer = _train(objective, params, optax.sgd(lambda t: rate * c ** (-2.0 * t - 1)), steps)
    assert_close(again, losses, TOLERANCE, 1)
    assert_close(longer, kernel / c**steps, TOLERANCE)


@pytest.mark.slow
def test_every_convolution_of_a_network():
    """Checks all layers before a norm in a network, and that the head, which has none after it, is not orthogonal."""
    rng, model = np.random.default_rng(0), ConvNet(lambda **call: BatchNorm(epsilon=NO_EPSILON, **call), widths=(4, 6))
    images, labels = jnp.asarray(rng.normal(size=(10, 8, 8, 1))), jnp.arange(10)
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)
    params = jax.tree.map(lambda p: p.astype(float), variables["params"])

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    along = {name: _along(gradient[name]["kernel"], params[name]["kernel"]) for name in ("Conv_0", "Conv_1", "Dense_0")}
    for name in ("Conv_0", "Conv_1"):
        inner, size = along[name]
        assert_close(inner, np.zeros_like(inner), TOLERANCE, size)
    inner, size = along["Dense_0"]
    assert np.abs(inner).max() > 0.01 * size
