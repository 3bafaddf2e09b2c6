"""Makes the network that is used after training: averaged weights, statistics taken again, BN folded, exported."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bnjax import tools
from experiments.train.devices import replicated
from experiments.train.loop import TrainState, as_float, place
from experiments.train.session import Session, build_model

EXPORTED = "model.jax"
PLATFORMS = ("cpu", "cuda", "tpu")
ROWS = 4  # images on which the exported network is compared with the trained one


def final_state(session: Session, state: TrainState) -> TrainState:
    """Returns the state with the average of the parameters, if there is one, and statistics taken again if asked for.

    The running averages fit the parameters of the last steps and not their average, so --recalibrate belongs to --ema.
    """
    training = session.config.training
    if state.average is not None:
        state = state._replace(params=state.average)
    if training.recalibrate and state.batch_stats:
        model = build_model(training, "jit", session.data.classes)
        batches = session.data.training(training.batch_size, training.epochs, training.seed, session.shard)
        count = min(training.recalibrate, session.total)
        placed = (place(batch, session.mesh) for batch in islice(batches, count))
        variables = {"params": state.params, "batch_stats": state.batch_stats}

        def apply(variables: Any, batch: Any) -> Any:
            return model.apply(variables, as_float(batch), train=True, mutable=["batch_stats"])

        stats = tools.recalibrate(apply, variables, placed, progress=False)["batch_stats"]
        batches.close()
        state = state._replace(batch_stats=jax.device_put(stats, replicated(session.mesh)))
    return state


def write_exported(session: Session, state: TrainState, file: Path) -> float:
    """Folds BN into the convolutions, exports the network, reads the file again and compares.

    The exported function takes images `[rows, height, width, channels]` uint8 and returns float32 logits; any number of
    rows, on CPU, GPU and TPU, without this code: `jax.export.deserialize(bytearray(path.read_bytes())).call(images)`.

    Args:
        session: says what the network is.
        state: from `final_state`.
        file: to write.

    Returns:
        The largest difference of its logits from those of the network that was not folded, in units of the largest
        logit.
    """
    training, shape = session.config.training, session.data.shape
    model = build_model(training, "jit", session.data.classes)
    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (ROWS, *shape), np.uint8)
    network = partial(model.apply, train=False)
    folded = tools.fold(network, variables, as_float({"image": images}))

    def predict(images: jax.Array) -> jax.Array:
        return folded.apply_fn(folded.stripped, as_float({"image": images})).astype(jnp.float32)

    (rows,) = export.symbolic_shape("rows")
    blob = export.export(jax.jit(predict), platforms=PLATFORMS)(jax.ShapeDtypeStruct((rows, *shape), jnp.uint8))
    file.write_bytes(blob.serialize())
    found = export.deserialize(bytearray(file.read_bytes())).call(images)
    wanted = jnp.asarray(network(variables, as_float({"image": images})), jnp.float32)
    return float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())
