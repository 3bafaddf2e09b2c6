"""The article's Keras program: the original of `experiments.article.keras_port`. Needs Keras 3, on any backend.

The article's text is not at hand: this is the program of its description, a CNN for MNIST with batch normalization
between convolution and activation, as such articles print it.
"""

from collections.abc import Sequence

import keras
from keras import layers


def program(widths: Sequence[int] = (32, 64), units: int = 128) -> keras.Model:
    """The model, compiled. It takes images between 0 and 1 and one-hot labels."""
    model = keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(widths[0], (3, 3), name="conv1"),
            layers.BatchNormalization(name="bn1"),
            layers.Activation("relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(widths[1], (3, 3), name="conv2"),
            layers.BatchNormalization(name="bn2"),
            layers.Activation("relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Flatten(),
            layers.Dense(units, name="fc1"),
            layers.BatchNormalization(name="bn3"),
            layers.Activation("relu"),
            layers.Dense(10, activation="softmax", name="fc2"),
        ],
        name="cnn",
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    return model
