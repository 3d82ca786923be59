"""Quantization-aware fine-tuning: a model learns to be quantized before it is.

What is trained is the graph of the quantized file itself: each pair of QuantizeLinear and DequantizeLinear
is a point where `train/fake_quantize.py` computes what the pair computes, and the weights are floats again.
So training sees the rounding exactly where the file has it, whatever the dialect. The weights then go back
into the FP32 graph and the learned ranges to the quantizer, which writes the file as it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from tritonsmith import onnx_model
from tritonsmith.compress import steps
from tritonsmith.compress.chain import Material
from tritonsmith.compress.graph import drop_unused
from tritonsmith.errors import CompressionError

if TYPE_CHECKING:
    from tritonsmith.train.fake_quantize import FakeActivation, FakeBias, FakeWeight
    from tritonsmith.train.loop import TrainReport

Ranges = Mapping[str, tuple[float, float]]

INTEGERS: Mapping[int, tuple[int, int]] = {
    onnx.TensorProto.INT8: (-128, 127),
    onnx.TensorProto.UINT8: (0, 255),
    onnx.TensorProto.INT16: (-32768, 32767),
    onnx.TensorProto.UINT16: (0, 65535),
}
WEIGHT_LIMIT = 127  # steps of a symmetric INT8 weight


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedModel:
    """The FP32 graph with the weights of the fine-tuning, and the ranges for its activations."""

    model: onnx.ModelProto
    ranges: Ranges
    report: TrainReport


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeQuantized:
    """A quantized graph made trainable."""

    model: onnx.ModelProto
    activations: Mapping[
        str, FakeActivation
    ]  # by the tensor that a pair gives; a shared scale is one of them
    weights: Mapping[str, FakeBias | FakeWeight]
    sources: Mapping[str, str]  # that name -> the tensor that the pair rounds

    @property
    def wraps(self) -> dict[str, Callable[[Any], Any]]:
        return {**self.activations, **self.weights}


def finetune_quantized(
    spec: steps.Quantize,
    material: Material,
    prepared: Path,
    quantized: Path,
    ranges: Ranges,
    *,
    checkpoint: Path,
    say: Callable[[str], None] = lambda _: None,
) -> TunedModel:
    """Train the weights of `prepared` (FP32) so that they do well where `quantized` rounds.

    `quantized` is the QDQ file made of `prepared` with `ranges`, those of each tensor by name; they come
    back as they were learned. The teacher is the model that the chain began with.

    Raises:
        CompressionError: an operator without gradients, or a quantized graph that does not match.
        SamplesError: no data to train on.
    """
    from tritonsmith.train.loop import train
    from tritonsmith.train.module import OnnxModule

    original = onnx_model.load_model(prepared)
    fake = fake_quantize(original, onnx_model.load_model(quantized))
    say(f"fine-tuning with {len(fake.activations)} activations and {len(fake.weights)} constants rounded")
    module = OnnxModule(fake.model, wraps=fake.wraps)
    report = train(module, material, spec, teacher=material.teacher, checkpoint=checkpoint, say=say)
    module.write_weights(fake.model)
    trained = {tensor.name: tensor for tensor in fake.model.graph.initializer}
    for tensor in original.graph.initializer:
        if tensor.name in trained:
            tensor.CopyFrom(trained[tensor.name])
    learned = {fake.sources[name]: point.value_range() for name, point in fake.activations.items()}
    return TunedModel(model=original, ranges={**ranges, **learned}, report=report)


def fake_quantize(
    prepared: onnx.ModelProto, quantized: onnx.ModelProto, *, learned: bool = True
) -> FakeQuantized:
    """The graph of `quantized` with Identity in place of its pairs, and what each Identity must compute.

    Weights are those of `prepared`, under their names there, found through the nodes that read them.

    Raises:
        CompressionError: a weight that cannot be found in `prepared`, or is quantized in another way than
            symmetrically by channel.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    graph = model.graph
    _name_float_weights(graph, prepared.graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    floats = _float_weights(prepared, quantized)
    activations: dict[str, FakeActivation] = {}
    weights: dict[str, FakeBias | FakeWeight] = {}
    sources: dict[str, str] = {}
    scales: dict[str, FakeActivation] = {}
    used: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        maker = makers.get(node.input[0])
        if node.input[0] in tensors:
            source = floats.get(node.output[0])
            if source is None:
                raise CompressionError(
                    f"the FP32 weight of {node.input[0]!r} cannot be found, so it cannot be fine-tuned",
                    fix="put the layer's name into keep, or quantize without epochs",
                )
            used.add(source.name)
            bias = tensors[node.input[0]].data_type == onnx.TensorProto.INT32
            make = _fake_bias if bias else _fake_weight
            weights[node.output[0]] = make(node, tensors, source)
            name = source.name
        elif maker is not None and maker.op_type == "QuantizeLinear":
            name = maker.input[0]
            if node.input[1] not in scales:
                scales[node.input[1]] = _fake_activation(node, tensors, learned=learned)
            activations[node.output[0]] = scales[node.input[1]]
            sources[node.output[0]] = name
        else:
            raise CompressionError(f"{node.name or node.output[0]!r} dequantizes what nothing quantized")
        node.CopyFrom(onnx.helper.make_node("Identity", [name], [node.output[0]], name=node.name))
    replaced = [n for n in graph.node if n.op_type == "QuantizeLinear" or list(n.input) == list(n.output)]
    for node in replaced:  # a bias keeps its name, and is the weight itself now
        graph.node.remove(node)
    present = set(tensors)
    graph.initializer.extend(tensor for tensor in prepared.graph.initializer if tensor.name in used - present)
    drop_unused(graph)
    return FakeQuantized(model=model, activations=activations, weights=weights, sources=sources)


def _name_float_weights(graph: onnx.GraphProto, prepared: onnx.GraphProto) -> None:
    """Let nodes read their own float weights again, which the file shares where they are equal so far."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    own = {tensor.name: tensor for tensor in prepared.initializer}
    before = {node.name: node for node in prepared.node}
    for node in graph.node:
        same = before.get(node.name)
        for index, source in enumerate(() if same is None else same.input[: len(node.input)]):
            if source in own and node.input[index] in tensors and node.input[index] != source:
                node.input[index] = source
                if source not in tensors:
                    tensors[source] = own[source]
                    graph.initializer.append(own[source])


def _float_weights(prepared: onnx.ModelProto, quantized: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """FP32 weights by the name that their readers know them by in the quantized graph."""
    tensors = {tensor.name: tensor for tensor in prepared.graph.initializer}
    before = {node.name: node for node in prepared.graph.node}
    found = {}
    for node in quantized.graph.node:
        same = before.get(node.name)
        if same is None or same.op_type != node.op_type:
            continue
        for name, source in zip(node.input, same.input, strict=False):
            if source in tensors:
                found[name] = tensors[source]
    return found


def _fake_weight(
    node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], source: onnx.TensorProto
) -> FakeWeight:
    """Rounding as this DequantizeLinear undoes it; how many steps reach the largest weight is read from it.

    Weights of seven bits (no VNNI) have fewer than 127.
    """
    from tritonsmith.train.fake_quantize import FakeWeight

    values = numpy_helper.to_array(source)
    scale, zero_point = _scale_of(node, tensors)
    blocked = any(attribute.name == "block_size" and attribute.i for attribute in node.attribute)
    if blocked or zero_point.any() or list(source.dims) != list(tensors[node.input[0]].dims):
        raise CompressionError(
            f"weight {source.name!r} is quantized in a way that fine-tuning does not know",
            expected="symmetric, by tensor or by channel, in the shape of the FP32 weight",
        )
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    axis = axis % values.ndim if scale.size > 1 else None
    others = tuple(other for other in range(values.ndim) if other != axis)
    largest = np.abs(values).max(axis=others) if others else np.abs(values)
    limit = int(min(np.rint((largest / scale).max()), WEIGHT_LIMIT))
    return FakeWeight(axis, max(limit, 1))


def _fake_bias(
    node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], source: onnx.TensorProto
) -> FakeBias:
    import torch

    from tritonsmith.train.fake_quantize import FakeBias

    scale, _ = _scale_of(node, tensors)
    if scale.size not in (1, numpy_helper.to_array(source).size):
        raise CompressionError(f"bias {source.name!r} is quantized in a way that fine-tuning does not know")
    return FakeBias(torch.from_numpy(scale.reshape(-1).copy()))


def _fake_activation(
    node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], *, learned: bool
) -> FakeActivation:
    from tritonsmith.train.fake_quantize import FakeActivation

    scale, zero_point = _scale_of(node, tensors)
    kind = tensors[node.input[2]].data_type if len(node.input) > 2 else onnx.TensorProto.UINT8
    if scale.size != 1 or kind not in INTEGERS:
        raise CompressionError(
            f"activation {node.output[0]!r} is quantized in a way that fine-tuning does not know",
            expected="one scale, and integers of 8 or 16 bits",
        )
    lowest, highest = INTEGERS[kind]
    if lowest < 0 and not zero_point:
        lowest = -highest  # a symmetric range, as the dialects define it
    return FakeActivation(float(scale), int(zero_point), lowest, highest, learned=learned)


def _scale_of(
    node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]
) -> tuple[NDArray[Any], NDArray[Any]]:
    scale = numpy_helper.to_array(tensors[node.input[1]])
    if len(node.input) > 2:
        return scale, numpy_helper.to_array(tensors[node.input[2]])
    return scale, np.zeros((), np.int64)
