"""The Keras program of the article's section 4.1, layer for layer. Needs Keras 3, on any of its backends.

The article writes `tf.keras`, which is this same package since TensorFlow 2.16. Its `x_train` and `y_train` are not
defined; here they are images between 0 and 1 and integer labels.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

EPOCHS, BATCH = 5, 32  # `fit(epochs=5)`; 32 is what `fit` takes where no batch size is given


def program() -> keras.Model:
    """Builds and compiles the model. The names are those that Keras gives by itself in a new process."""
    model = keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, (3, 3), activation="relu", name="conv2d"),
            layers.BatchNormalization(name="batch_normalization"),
            layers.MaxPooling2D((2, 2), name="max_pooling2d"),
            layers.Flatten(name="flatten"),
            layers.Dense(10, activation="softmax", name="dense"),
        ],
        name="sequential",
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Original:
    """The compiled model, started with given weights and trained one batch at a time."""

    def __init__(self, weights: Mapping[str, Any]):
        """weights: arrays by the path of each weight, `{"sequential/conv2d/kernel": ...}`."""
        self.model = program()
        for weight in self.model.weights:
            weight.assign(weights[weight.path])

    def step(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Trains on images `[N, 28, 28, 1]` float and labels `[N]`. Returns the loss before the step."""
        self.model.reset_metrics()  # train_on_batch returns the mean loss since the last reset
        return float(self.model.train_on_batch(images, labels)[0])

    def logits(self, images: np.ndarray, train: bool = False) -> np.ndarray:
        """Returns the probabilities `[N, 10]`: their largest is where that of the logits is."""
        return np.asarray(self.model(images, training=train))
