"""Which node of a model, as its owner knows it, a node of a rewritten graph comes from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx

from tritonsmith import onnx_model
from tritonsmith.compress.graph import nodes_of
from tritonsmith.errors import UsageError

PRODUCTS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "GRU", "Gemm", "LSTM", "MatMul", "MatMulInteger", "MatMulNBits"}
    | {"QLinearConv", "QLinearMatMul", "RNN"}
)
# What ONNX Runtime's optimiser and quantization add to a node's name.
ADDED = re.compile(
    r"(/?(MatMulAddFusion|MatmulTransposeFusion|GemmActivationFusion)/?|/WithoutBiases|_quant|_nchwc|_token_\d+)$"
)
FARTHEST = 8  # nodes between a product and the tensor that an engine fused it up to


class Origins:
    """Finds the product of `graph` that a rewritten node stands for, by its name, else by what it gives."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        nodes = list(nodes_of(graph))
        self._by_name = {node.name: node for node in nodes if node.name}
        self._makers = {name: node for node in nodes for name in node.output}

    def find(self, nodes: Iterable[onnx.NodeProto]) -> onnx.NodeProto | None:
        """The first product found by one of these nodes."""
        for node in nodes:
            name = node.name
            while name:
                found = self._by_name.get(name)
                if found is not None and found.output:
                    product = self._product_behind(found.output[0])
                    if product is not None:
                        return product
                shorter = ADDED.sub("", name)
                if shorter == name:
                    break
                name = shorter
            for output in (name, *node.output):
                found = self._product_behind(output)
                if found is not None:
                    return found
        return None

    def _product_behind(self, tensor: str) -> onnx.NodeProto | None:
        for suffix in ("_QuantizeLinear_Output", "_DequantizeLinear_Output", "_output_quantized"):
            tensor = tensor.removesuffix(suffix)
        for _ in range(FARTHEST):
            maker = self._makers.get(tensor)
            if maker is None:
                return None
            if maker.op_type in PRODUCTS:
                return maker
            behind = [name for name in maker.input if name in self._makers]
            if len(behind) != 1:
                return None
            tensor = behind[0]
        return None


def kept_nodes(keep: Iterable[str], model: Path, rewritten: Path) -> dict[str, str]:
    """Nodes of the rewritten graph that stand for those of `model` named in `keep`: its name to theirs.

    Raises:
        UsageError: no node has such a name; the nearest are named.
    """
    original = onnx_model.load_model(model, with_weights=False).graph
    prepared = onnx_model.load_model(rewritten, with_weights=False).graph
    known = [node.name for node in nodes_of(original) if node.name]
    inside = {node.name for node in prepared.node}
    origins = Origins(original)
    came_from: Mapping[str, str] = {
        node.name: origin.name
        for node in prepared.node
        if node.op_type in PRODUCTS and (origin := origins.find([node])) is not None
    }
    found = {}
    for name in keep:
        here = [name] if name in inside else [new for new, old in came_from.items() if old == name]
        if not here and name not in known:
            nearest = difflib.get_close_matches(name, [*known, *inside], n=3)
            raise UsageError(
                f"no node is named {name!r}, so it cannot stay in floating point",
                expected=", ".join(nearest) or "a name as Netron or onnx.load shows it",
            )
        found.update(dict.fromkeys(here, name))
    return found
