"""Keras 3's GRU in the form that tf2onnx turns into an ONNX GRU.

tf2onnx knows the step of Keras 2's GRU (`keras_gru_pattern` in its `rnn_utils.py`): one BiasAdd of each
product, biases that come from outside of the loop, and two splits. Keras 3 computes the same with
slices and additions inside, which tf2onnx can only turn into a Loop. While a model is traced, its GRU
layers take the old step; parity is proved against the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def traceable_gru(layers: Sequence[Any], keras: Any, tf: Any) -> Iterator[None]:
    """Let the GRU layers among `layers` compute with a step that tf2onnx recognises."""
    changed = [
        layer for layer in layers if type(layer) is keras.layers.GRU and layer.reset_after and layer.use_bias
    ]
    for layer in changed:
        layer.inner_loop = _inner_loop(layer, keras, tf)
    try:
        yield
    finally:
        for layer in changed:
            del layer.inner_loop


def _inner_loop(layer: Any, keras: Any, tf: Any) -> Callable[..., Any]:
    cell = layer.cell

    def inner_loop(sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        kernel, recurrent_kernel, bias = (
            tf.convert_to_tensor(weight) for weight in (cell.kernel, cell.recurrent_kernel, cell.bias)
        )
        input_bias, recurrent_bias = tf.unstack(bias)

        def step(inputs: Any, states: Any, training: bool = False) -> Any:
            del training
            (state,) = states
            inner_z, inner_r, inner_h = tf.split(
                tf.nn.bias_add(tf.matmul(inputs, kernel), input_bias), 3, axis=1
            )
            outer_z, outer_r, outer_h = tf.split(
                tf.nn.bias_add(tf.matmul(state, recurrent_kernel), recurrent_bias), 3, axis=1
            )
            update = cell.recurrent_activation(inner_z + outer_z)
            reset = cell.recurrent_activation(inner_r + outer_r)
            candidate = cell.activation(inner_h + reset * outer_h)
            output = update * state + (1 - update) * candidate
            return output, [output]

        cell.call = step
        try:
            return keras.layers.RNN.inner_loop(layer, sequences, initial_state, mask, training)
        finally:
            del cell.call

    return inner_loop
