"""Defines the two networks of a conditional GAN for small digits: a generator with conditional BN, a discriminator."""

import jax
from flax import linen as nn

from bnjax.linen import BatchNorm

CLASSES = 10


class ConditionalNorm(nn.Module):
    """BN whose scale and bias are those of the class of each image."""

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
        """Normalises x `[N, H, W, C]` and applies scale and bias of the classes, labels `[N]`."""
        start, shape = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}, (CLASSES, 1, 1, x.shape[-1])
        of_image = {name: self.param(name, init, shape)[labels] for name, init in start.items()}
        return BatchNorm(not train, use_scale=False, use_bias=False)(x, **of_image)


class Generator(nn.Module):
    """Makes a digit of noise and a class: Dense → norm → ConvTranspose → norm → Conv; the norms alone see the class."""

    width: int = 32

    @nn.compact
    def __call__(self, noise: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
        """Computes images `[N, 14, 14, 1]` in 0 to 1 from noise `[N, D]` and labels `[N]`."""
        x = nn.Dense(7 * 7 * self.width, use_bias=False)(noise).reshape(-1, 7, 7, self.width)
        x = nn.relu(ConditionalNorm()(x, labels, train))
        x = nn.ConvTranspose(self.width // 2, (4, 4), (2, 2), use_bias=False)(x)
        x = nn.relu(ConditionalNorm()(x, labels, train))
        return nn.sigmoid(nn.Conv(1, (3, 3))(x))


class Discriminator(nn.Module):
    """Tells real digits from generated ones by convolutions and the projection of Miyato & Koyama 2018."""

    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes logits `[N]`, high for real images `[N, 14, 14, 1]` of their classes."""
        x = images
        for width in (self.width, 2 * self.width):
            x = nn.leaky_relu(nn.Conv(width, (4, 4), 2)(x), 0.2)
        x = x.reshape(len(x), -1)
        return nn.Dense(1)(x)[:, 0] + (nn.Embed(CLASSES, x.shape[1])(labels) * x).sum(1)
