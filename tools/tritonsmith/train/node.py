"""One node of a graph as the operators see it: its attributes resolved, its constants at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
import torch

from tritonsmith.errors import CompressionError

# Takes the node's inputs in order (None for one that is left out), gives its output or a tuple of them.
Operation: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    name: str
    kind: str
    opset: int
    attributes: Mapping[str, Any]  # strings decoded; tensors as TensorProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]  # what is known before any input: no weights among them

    def integer(self, name: str, default: int) -> int:
        return int(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        return str(self.attributes.get(name, default))

    def integers(self, name: str) -> list[int] | None:
        values = self.attributes.get(name)
        return None if values is None else [int(value) for value in values]

    def constant(self, index: int) -> torch.Tensor | None:
        return self.constants.get(self.inputs[index]) if index < len(self.inputs) else None

    def gives(self, index: int) -> bool:
        """Whether output `index` has a name, that is, whether anything may read it."""
        return index < len(self.outputs) and self.outputs[index] != ""

    def refusal(self, found: str) -> CompressionError:
        return CompressionError(
            f"node {self.name!r} ({self.kind}) cannot be trained",
            found=found,
            fix="leave out the steps that train, or export the model without it",
        )


def read_node(proto: onnx.NodeProto, opset: int, constants: Mapping[str, torch.Tensor]) -> Node:
    return Node(
        name=proto.name or proto.output[0],
        kind=proto.op_type,
        opset=opset,
        attributes={attribute.name: _value(attribute) for attribute in proto.attribute},
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        constants=constants,
    )


def _value(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [text.decode() for text in value]
    return value
