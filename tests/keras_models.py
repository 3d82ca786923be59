"""Tiny Keras models of every kind that convert reads, for Keras 3 (`keras`) and Keras 2 (`tf_keras`).

Each factory takes the framework's module. Weights are drawn anew from a seed, so that biases and
normalisation statistics are not zeros and ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Factory = Callable[[Any], Any]


def conv2d(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 2), name="image"),
            layers.Rescaling(1 / 4),
            layers.Conv2D(4, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, strides=2, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax", name="label"),
        ]
    )


def conv1d(keras: Any) -> Any:
    layers = keras.layers
    signal = keras.Input((None, 3), name="signal")
    hidden = layers.Conv1D(4, 3, padding="causal", activation="gelu")(signal)
    hidden = layers.LayerNormalization()(hidden)
    return keras.Model(signal, layers.Conv1DTranspose(2, 3, padding="same", name="denoised")(hidden))


def conv3d(keras: Any) -> Any:
    layers = keras.layers
    volume = keras.Input((4, 6, 6, 1), name="volume")
    hidden = layers.Conv3D(2, 3, padding="same")(volume)
    hidden = layers.MaxPooling3D((1, 2, 2))(hidden)
    hidden = layers.GroupNormalization(groups=2)(hidden)
    return keras.Model(volume, layers.Flatten(name="features")(hidden))


def image_to_image(keras: Any) -> Any:
    """Height and width are free."""
    image = keras.Input((None, None, 3), name="photo")
    hidden = keras.layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(image)
    return keras.Model(
        image, keras.layers.Conv2DTranspose(3, 3, strides=2, padding="same", name="restored")(hidden)
    )


def recurrent(keras: Any) -> Any:
    layers = keras.layers
    series = keras.Input((None, 3), name="series")
    hidden = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(series)
    hidden = layers.GRU(3, return_sequences=True)(hidden)
    hidden = layers.Bidirectional(layers.GRU(2, return_sequences=True))(hidden)
    output, state, carry = layers.LSTM(5, return_state=True, name="encoder")(hidden)
    return keras.Model(series, [output, state, carry])


def masked_recurrent(keras: Any) -> Any:
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="words"),
            keras.layers.Embedding(11, 4, mask_zero=True),
            keras.layers.LSTM(3, name="meaning"),
        ]
    )


def attention(keras: Any) -> Any:
    """Token ids and a boolean mask, whose free axes must agree."""
    layers = keras.layers
    tokens = keras.Input((None,), dtype="int64", name="tokens")
    mask = keras.Input((None,), dtype="bool", name="mask")
    hidden = layers.Embedding(13, 8)(tokens)
    seen = layers.Reshape((1, -1))(mask)
    attended = layers.MultiHeadAttention(2, 4)(hidden, hidden, attention_mask=seen)
    hidden = layers.LayerNormalization()(layers.Add()([hidden, attended]))
    return keras.Model([tokens, mask], layers.Dense(4, name="encoded")(hidden))


def several(keras: Any) -> Any:
    """A dictionary of inputs and a dictionary of outputs."""
    layers = keras.layers
    inputs = {
        "price": keras.Input((2,), name="price"),
        "count": keras.Input((2,), dtype="int32", name="count"),
    }
    both = layers.Concatenate()([inputs["price"], layers.Rescaling(0.5)(inputs["count"])])
    outputs = {"value": layers.Dense(1)(both), "risk": layers.Dense(2, activation="sigmoid")(both)}
    return keras.Model(inputs, outputs)


def nested(keras: Any) -> Any:
    """A list inside a dictionary, on both sides."""
    layers = keras.layers
    left, right, scale = (keras.Input((2,), name=name) for name in ("left", "right", "scale"))
    total = layers.Add()([left, right])
    outputs = {
        "pair": [layers.Dense(2)(total), layers.Dense(3)(total)],
        "scaled": layers.Multiply()([total, scale]),
    }
    return keras.Model({"sides": [left, right], "scale": scale}, outputs)


def fixed_batch(keras: Any) -> Any:
    batch = keras.Input(batch_size=4, shape=(3,), name="rows")
    return keras.Model(batch, keras.layers.Dense(2, name="scores")(batch))


def float64(keras: Any) -> Any:
    wide = keras.Input((3,), dtype="float64", name="wide")
    return keras.Model(wide, keras.layers.Dense(2, dtype="float64", name="sums")(wide))


def unnamed(keras: Any) -> Any:
    return keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(1)])


def mixed_float16(keras: Any) -> Any:
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        image = keras.Input((6, 6, 1), name="image")
        hidden = keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(image))
        return keras.Model(image, keras.layers.Dense(2, name="label")(hidden))
    finally:
        keras.mixed_precision.set_global_policy("float32")


def with_lambda(keras: Any, path: str) -> Any:
    """A Lambda layer one model down, which makes a file when its code runs, and doubles its input."""
    numbers = keras.Input((2,))
    trick = keras.layers.Lambda(
        lambda tensor, where: (open(where, "w").close(), tensor * 2)[1],  # noqa: PTH123 - has no globals
        arguments={"where": path},
        name="trick",
        output_shape=(2,),
    )
    inner = keras.Model(numbers, trick(numbers))
    outer = keras.Input((2,), name="numbers")
    return keras.Model(outer, keras.layers.Dense(1, name="sum")(inner(outer)))


BOTH: dict[str, Factory] = {
    "conv2d": conv2d,
    "conv1d": conv1d,
    "conv3d": conv3d,
    "image_to_image": image_to_image,
    "recurrent": recurrent,
    "masked_recurrent": masked_recurrent,
    "attention": attention,
    "several": several,
    "nested": nested,
    "fixed_batch": fixed_batch,
    "float64": float64,
    "mixed_float16": mixed_float16,
}


def randomised(model: Any, seed: int = 0) -> Any:
    """The same model with every weight drawn from a seed; variances stay positive."""
    random = np.random.default_rng(seed)
    weights = []
    for array, variable in zip(model.get_weights(), model.weights, strict=True):
        drawn = random.normal(0, 0.4, array.shape)
        weights.append((np.abs(drawn) + 0.5 if "variance" in variable.name else drawn).astype(array.dtype))
    model.set_weights(weights)
    return model
