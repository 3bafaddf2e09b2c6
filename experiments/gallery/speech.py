"""Utterances of several lengths, padded: BN with and without a mask, and LayerNorm, in a convolutional network.

Claim:    With a mask BN gives the same outputs however utterances are padded and batched; without, statistics taken
          with other padding err. Masked BN is more accurate than BN without the mask and than LayerNorm.
Command:  python -m experiments.gallery.speech                  # --smoke: seconds
Hardware: 1 CPU core
Time:     1.5 min of one core

Nine speakers say a and e (JapaneseVowels, `experiments.data.utterances`): 270 utterances of 7 to 26 frames for
training, 370 of other sessions for testing, in batches of 30. Convolutions see zeros beside an utterance, and the mean
over time takes its frames alone, in all settings: only the normalization may see the padding. Half of a batch of 32
frames is padding, seven eighths of one of 128.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.data import utterances
from experiments.gallery import RESULTS, padding
from experiments.gallery.padding import NORMS, Batch, Padding, Records, Task
from experiments.models.convolutional import Norm
from experiments.repro import study

SETTINGS, WIDTH, LAYERS, SIZE = tuple(NORMS), 32, 3, 3  # SIZE: frames of a kernel
PADDINGS = (
    Padding("to 32 frames", 32),
    Padding("to 128 frames", 128),
    Padding("by length, to multiples of 8", 8, by_size=True),
)


class SpeechNet(nn.Module):
    """Convolutions over time, each with a norm, the mean over the frames, and one Dense layer."""

    norm: Norm
    masked: bool  # whether the norms get the mask
    width: int = WIDTH
    layers: int = LAYERS

    @nn.compact
    def __call__(self, frames: jax.Array, lengths: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, 9]` from frames `[N, T, 12]`."""
        there = (jnp.arange(frames.shape[1])[None] < lengths[:, None])[..., None]
        mask = {"mask": there} if self.masked else {}
        x = jnp.where(there, frames, 0)
        for _ in range(self.layers):
            x = nn.Conv(self.width, (SIZE,), use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x, **mask))
            x = jnp.where(there, x, 0)
        return nn.Dense(utterances.SPEAKERS)(x.sum(1) / jnp.maximum(lengths, 1)[:, None])


def records(data: utterances.Utterances) -> Records:
    """Gives access to utterances in padded batches."""

    def batch(rows: np.ndarray, multiple: int) -> Batch:
        lengths = np.where(rows < 0, 0, data.lengths[rows])
        width = -(-lengths.max() // multiple) * multiple
        frames = np.pad(data.frames[rows], [(0, 0), (0, width), (0, 0)])[:, :width]
        return Batch((frames, lengths), rows, data.speakers[rows])

    return Records(data.lengths, batch)


def load(config: study.Config) -> tuple[Records, Records, Records]:
    """Loads the utterances for training, those for statistics, which are the same, and those for testing."""
    train, test = map(records, utterances.load(config.data_dir))
    return train, train, test


def build(setting: str, config: study.Config) -> SpeechNet:
    """Builds the network of a setting."""
    return SpeechNet(*NORMS[setting], width=config.pick(WIDTH, 4), layers=config.pick(LAYERS, 1))


def error(logits: np.ndarray, speakers: np.ndarray) -> float:
    """Computes the share of utterances whose speaker is not found, in %."""
    return 100 * float(np.mean(logits.argmax(-1) != speakers))


TASK = Task(
    build, load, optax.softmax_cross_entropy_with_integer_labels, error, PADDINGS, size=30, steps=270, rate=3e-3
)
CLAIMS = padding.claims(TASK, SETTINGS, padding.rounding(LAYERS + 1, SIZE * WIDTH), margin=1)
STUDY = padding.study_of("speech", TASK, SETTINGS, CLAIMS, "%", "test error, %, of each seed")

if __name__ == "__main__":
    study.run(STUDY, __doc__, RESULTS)
