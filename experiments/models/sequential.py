"""Defines two small networks that predict the next token and take their normalization as an argument.

Padding follows a sequence and both networks are causal, so padding can change a prediction only through a normalization
whose statistics include it. In training mode, statistics over time also let position t depend on later positions of the
batch, so the training loss is not exactly that of a causal model.
"""

import jax
import numpy as np
from flax import linen as nn

from experiments.models.convolutional import Norm


class Transformer(nn.Module):
    """Causal blocks of norm → attention and norm → two Dense layers, each added to its input.

    `norm(use_running_average=...)` builds a normalisation that is called with x and `mask`.
    """

    norm: Norm
    vocabulary: int
    masked: bool = True  # whether the norms get the mask of the padding
    width: int = 64
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array, weight: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, T, vocabulary]` from tokens `[N, T]` int and weights `[N, T]`, zero at padding."""
        mask, norm = mask_of(weight, self.masked), lambda: self.norm(use_running_average=not train)
        x = nn.Embed(self.vocabulary, self.width)(tokens) + places(tokens.shape[1], self.width)[None]
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads)
            x += attention(norm()(x, mask=mask), mask=nn.make_causal_mask(tokens))
            hidden = nn.gelu(nn.Dense(4 * self.width)(norm()(x, mask=mask)))
            x += nn.Dense(self.width)(hidden)
        return nn.Dense(self.vocabulary)(norm()(x, mask=mask))


class LSTM(nn.Module):
    """Layers of norm → LSTM and one Dense layer; the norm acts on the whole sequence, outside of the recurrence.

    This is the placement of Laurent et al. 2016, https://arxiv.org/abs/1510.01378. `norm` and `masked` are as in
    `Transformer`.
    """

    norm: Norm
    vocabulary: int
    masked: bool = True
    width: int = 96
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array, weight: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits `[N, T, vocabulary]` from tokens `[N, T]` int and weights `[N, T]`, zero at padding."""
        mask, norm = mask_of(weight, self.masked), lambda: self.norm(use_running_average=not train)
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        for _ in range(self.layers):
            x = nn.RNN(nn.OptimizedLSTMCell(self.width))(norm()(x, mask=mask))
        return nn.Dense(self.vocabulary)(norm()(x, mask=mask))


def layer_norm(use_running_average: bool) -> nn.Module:
    """Builds a LayerNorm with the interface of a batch normalization; it normalizes each position alone and needs no
    mask.
    """
    return nn.LayerNorm()


def mask_of(weight: jax.Array, masked: bool) -> jax.Array | None:
    """Returns a mask `[N, T, 1]` bool that is False at padding, or None if the norms are not to be masked."""
    return weight[..., None] > 0 if masked else None


def places(length: int, width: int) -> np.ndarray:
    """Returns sinusoidal position encodings `[length, width]` float32, of Vaswani et al. 2017, section 3.5."""
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
