"""Shape nodes as every version of TensorRT reads them.

Since opset 15, Shape has `start` and `end`. The ONNX parser of TensorRT 8.6 does not read them, and says
nothing (onnx-tensorrt 8.6, builtin_op_importers.cpp: `addShape(input)` alone): a plan would take all axes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tritonsmith.onnx_model import copy_renamed, load_model, save_model

_LAST = np.iinfo(np.int64).max


def copy_with_whole_shapes(path: Path, target: Path) -> Path:
    """Copy a model, with a whole Shape and a Slice for each Shape with a range of axes; as it is without any.

    External data lies in `<target>.data`, so that several models can lie in one folder.
    """
    model = load_model(path, with_weights=False)
    if not _split(model.graph):
        return copy_renamed(path, target)
    save_model(model, target, weights_from=path.parent)
    return target


def _split(graph: onnx.GraphProto) -> int:
    count = 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        count += sum(_split(attribute.g) for attribute in node.attribute if attribute.HasField("g"))
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "Shape" or node.domain or not ends:
            nodes.append(node)
            continue
        count += 1
        out = node.output[0]
        for name, default in (("start", 0), ("end", _LAST)):
            value = np.array([ends.get(name, default)], np.int64)
            graph.initializer.append(numpy_helper.from_array(value, f"{out}_{name}"))
        nodes += [
            helper.make_node("Shape", [node.input[0]], [f"{out}_whole"], name=node.name),
            helper.make_node("Slice", [f"{out}_whole", f"{out}_start", f"{out}_end"], [out]),
        ]
    if count:
        del graph.node[:]
        graph.node.extend(nodes)
    return count
