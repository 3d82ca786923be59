"""An ONNX graph as a PyTorch module: the same operators, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import nn

from tritonsmith import onnx_model
from tritonsmith.errors import CompressionError
from tritonsmith.train.node import Operation, read_node
from tritonsmith.train.operators import OPERATORS
from tritonsmith.train.tensors import tensor_from_onnx, write_tensor
from tritonsmith.train.trainable import trainable_weights

Wrap = Callable[[torch.Tensor], torch.Tensor]

OLDEST_OPSET = 13  # `convert` raises every model to it; axes became inputs there


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A node that is ready to run; `last` names what nothing reads after it."""

    name: str
    kind: str
    run: Operation
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...]


class OnnxModule(nn.Module):
    """Computes what the graph computes, in PyTorch.

    Float initializers become parameters, in `weights` by their names. Those that are no weights in truth
    (an epsilon, an exponent, the statistics of a BatchNormalization, a mask) do not require gradients.
    BatchNormalization is that of inference: its statistics stay.

    `wraps[name]` is applied to tensor `name`, a weight or an activation, once in each pass and before
    anything reads it, so also where it is an output. A wrap that is a module is part of this one.

    Raises:
        CompressionError: an operator, an option of one or a data type that has no counterpart here; the
            message names the node.
    """

    def __init__(self, model: onnx.ModelProto, *, wraps: Mapping[str, Wrap] | None = None) -> None:
        super().__init__()
        graph = model.graph
        self._wraps = dict(wraps or {})
        self.weights: dict[str, nn.Parameter] = {}
        self._constants: dict[str, str] = {}  # tensor name -> name of its buffer
        initialized = {tensor.name for tensor in graph.initializer}
        self._inputs = tuple(value.name for value in graph.input if value.name not in initialized)
        self._outputs = tuple(value.name for value in graph.output)
        for index, wrap in enumerate(self._wraps.values()):
            if isinstance(wrap, nn.Module):
                self.add_module(f"wrap_{index}", wrap)
        trained = trainable_weights(graph)
        constants: dict[str, torch.Tensor] = {}
        for tensor in graph.initializer:
            value = tensor_from_onnx(tensor)
            if not value.is_floating_point():
                constants[tensor.name] = value
                continue
            parameter = nn.Parameter(value, requires_grad=tensor.name in trained)
            self.register_parameter(f"weight_{len(self.weights)}", parameter)
            self.weights[tensor.name] = parameter
        calls = self._compile(model, constants)
        self._calls = _with_last_uses(calls, self._outputs)
        self.tensors = frozenset(
            {*self._inputs, *self.weights, *constants, *(name for call in calls for name in call.outputs)}
        )
        self._check_names(self._wraps, "wrapped")
        read = {name for call in calls for name in call.inputs} | set(self._outputs)
        for name in sorted(read & set(constants)):
            self.register_buffer(f"constant_{len(self._constants)}", constants[name], persistent=False)
            self._constants[name] = f"constant_{len(self._constants)}"

    def forward(
        self, inputs: Mapping[str, torch.Tensor], taps: Sequence[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Outputs by name, for tensors by input name, and the tensors that `taps` names.

        Raises:
            CompressionError: an input is missing, a tap is no tensor of the graph, or a node fails.
        """
        self._check_names(taps, "tapped")
        wanted = {*self._outputs, *taps}
        values: dict[str, torch.Tensor] = {}
        for name in self._inputs:
            if name not in inputs:
                raise CompressionError(f"input {name!r} is missing", found=sorted(inputs))
            values[name] = self._wrapped(name, inputs[name])
        for name, parameter in self.weights.items():
            values[name] = self._wrapped(name, parameter)
        for name, buffer in self._constants.items():
            values[name] = self._wrapped(name, getattr(self, buffer))
        for call in self._calls:
            results = _run(call, [values[name] if name else None for name in call.inputs])
            for name, result in zip(call.outputs, results, strict=False):
                if name:
                    values[name] = self._wrapped(name, result)
            for name in call.last:
                if name not in wanted:
                    del values[name]
        return {name: values[name] for name in (*self._outputs, *taps)}

    def write_weights(self, model: onnx.ModelProto) -> None:
        """Put the values of the weights into the initializers of the model that this was made of.

        Raises:
            CompressionError: an initializer is gone or has another shape.
        """
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, parameter in self.weights.items():
            tensor = tensors.get(name)
            if tensor is None or list(tensor.dims) != list(parameter.shape):
                found = "none of this name" if tensor is None else f"shape {list(tensor.dims)}"
                raise CompressionError(
                    f"weight {name!r} cannot be written back", found=found, expected=list(parameter.shape)
                )
            write_tensor(parameter, tensor)

    def _compile(self, model: onnx.ModelProto, constants: dict[str, torch.Tensor]) -> list[Call]:
        """The nodes in order; what hangs on `constants` alone is computed here and joins them."""
        opset = onnx_model.opset_of(model)
        if opset < OLDEST_OPSET:
            raise CompressionError(
                "the model is of an opset too old to be trained",
                found=f"opset {opset}",
                expected=f"opset {OLDEST_OPSET} or newer",
                fix="convert it with tritonsmith, which raises it",
            )
        calls = []
        for proto in model.graph.node:
            node = read_node(proto, opset, constants)
            build = OPERATORS.get(node.kind) if proto.domain in ("", "ai.onnx") else None
            if build is None:
                raise node.refusal(f"operator {proto.domain + '.' if proto.domain else ''}{node.kind}")
            call = Call(
                name=node.name,
                kind=node.kind,
                run=build(node),
                inputs=node.inputs,
                outputs=node.outputs,
                last=(),
            )
            fixed = all(name in constants for name in node.inputs if name)
            if fixed and not self._wraps.keys() & {*node.inputs, *node.outputs}:
                with torch.no_grad():
                    results = _run(call, [constants[name] if name else None for name in node.inputs])
                constants.update(zip(node.outputs, results, strict=False))
            else:
                calls.append(call)
        return calls

    def _wrapped(self, name: str, value: torch.Tensor) -> torch.Tensor:
        wrap = self._wraps.get(name)
        return value if wrap is None else wrap(value)

    def _check_names(self, names: Mapping[str, object] | Sequence[str], verb: str) -> None:
        if unknown := [name for name in names if name not in self.tensors]:
            raise CompressionError(f"no tensor of the graph can be {verb} under this name", found=unknown)


def _run(call: Call, arguments: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    try:
        result = call.run(*arguments)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        shapes = ", ".join("none" if a is None else f"{a.dtype}{list(a.shape)}" for a in arguments)
        raise CompressionError(
            f"node {call.name!r} ({call.kind}) fails in PyTorch",
            found=f"{str(error).strip().splitlines()[0]}; inputs {shapes}",
        ) from error
    return result if isinstance(result, tuple) else (result,)


def _with_last_uses(calls: list[Call], outputs: tuple[str, ...]) -> tuple[Call, ...]:
    """The same calls, each with the names that no later one reads."""
    seen = set(outputs)
    finished = []
    for call in reversed(calls):
        names = dict.fromkeys(name for name in (*call.inputs, *call.outputs) if name)
        last = tuple(name for name in names if name not in seen)
        seen |= set(last)
        finished.append(
            Call(
                name=call.name,
                kind=call.kind,
                run=call.run,
                inputs=call.inputs,
                outputs=call.outputs,
                last=last,
            )
        )
    return tuple(reversed(finished))
