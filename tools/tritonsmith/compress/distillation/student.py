"""A student from any source, brought to the teacher's signature and made ready to be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tritonsmith import dtypes, onnx_model
from tritonsmith.artifact import BATCH_AXIS, Artifact, Json, TensorSpec
from tritonsmith.compress.chain import Material
from tritonsmith.compress.distillation.depth import find_runs, spread
from tritonsmith.compress.steps import Distill
from tritonsmith.errors import CompressionError
from tritonsmith.ingest import convert, source_sha256

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    model: onnx.ModelProto
    hidden: tuple[tuple[str, str], ...] | None  # pairs of states; None: those of equal name
    measured: dict[str, Json]


def read_student(
    spec: Distill, artifact: Artifact, material: Material, checkpoint: Path, say: Say
) -> Student:
    """Convert `spec.student`, once: an untrained one would have other weights each time.

    Raises:
        CompressionError: its inputs and outputs are not those of `artifact`.
        SourceError: it cannot be converted.
    """
    source = spec.student or ""
    folder = checkpoint / f"student-{source_sha256(source)[:16]}"
    path = folder / "model.onnx"
    if not path.exists():
        convert(source, path, material.convert, say=say)
    model = onnx_model.load_model(path)
    inputs, outputs = onnx_model.signature_of(model)
    _check_signature(source, inputs + outputs, artifact)
    _adopt_signature(model.graph, artifact)
    _untie_constants(model.graph)
    if added := _restore_biases(model.graph):
        say(f"the student has no bias at all, so {added} layers get one of zeros")
    hidden = _match_blocks(model, material.teacher) if spec.hidden else None
    return Student(model=model, hidden=hidden, measured={"student_sha256": onnx_model.model_sha256(path)})


def _check_signature(source: str, found: tuple[TensorSpec, ...], artifact: Artifact) -> None:
    """Raise one CompressionError that lists all differences; free axes may have other names."""
    wanted = {spec.name: spec for spec in artifact.inputs + artifact.outputs}
    given = {spec.name: spec for spec in found}
    differences = [f"the student lacks {wanted[name]}" for name in wanted if name not in given]
    differences += [f"the teacher has no {given[name]}" for name in given if name not in wanted]
    differences += [
        f"{given[name]} is not {wanted[name]}"
        for name in wanted
        if name in given and not _is_alike(given[name], wanted[name])
    ]
    sides = {spec.name for spec in artifact.inputs} ^ {spec.name for spec in found[: len(artifact.inputs)]}
    if not differences and sides:
        differences.append(f"inputs and outputs are exchanged: {', '.join(sorted(sides))}")
    if differences:
        raise CompressionError(
            f"the student {source} does not fit the teacher",
            found="; ".join(differences),
            expected="; ".join(map(str, wanted.values())),
            fix="give the student inputs and outputs of the teacher's names, data types and shapes",
        )


def _is_alike(student: TensorSpec, teacher: TensorSpec) -> bool:
    return (
        student.dtype == teacher.dtype
        and len(student.shape) == len(teacher.shape)
        and all(
            ours == theirs
            or (isinstance(ours, str) and isinstance(theirs, str) and BATCH_AXIS not in (ours, theirs))
            for ours, theirs in zip(student.shape, teacher.shape, strict=True)
        )
    )


def _adopt_signature(graph: onnx.GraphProto, artifact: Artifact) -> None:
    """The teacher's order of inputs and outputs, and its names of free axes."""
    for values, specs in ((graph.input, artifact.inputs), (graph.output, artifact.outputs)):
        infos = [
            onnx.helper.make_tensor_value_info(spec.name, dtypes.BY_NAME[spec.dtype].onnx, spec.shape)
            for spec in specs
        ]
        del values[:]
        values.extend(infos)
    del graph.value_info[:]


def _untie_constants(graph: onnx.GraphProto) -> None:
    """Give each reader its own copy of weights that are one number throughout.

    Exporters share equal tensors, and all biases of an untrained layer size are equal zeros.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    seen: set[str] = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            tensor = tensors.get(name)
            if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or not tensor.dims:
                continue
            if name not in seen:
                seen.add(name)
                continue
            values = onnx.numpy_helper.to_array(tensor)
            if values.size > 1 and (values == values.flat[0]).all():
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = f"{name}_of_{node.output[0]}_{index}"
                graph.initializer.append(copy)
                node.input[index] = copy.name


def _restore_biases(graph: onnx.GraphProto) -> int:
    """Give layers a bias of zeros where no layer has one; how many got it.

    What is simplified loses additions of zero, and those are all the biases of an untrained Keras model.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    biased = [
        node
        for node in graph.node
        if (node.op_type in ("Conv", "Gemm") and len(node.input) > 2)
        or (node.op_type in ("Add", "Sub") and weights.keys() & set(node.input))
    ]
    if biased:
        return 0
    nodes, added = [], 0
    for node in graph.node:
        nodes.append(node)
        shape = weights.get(node.input[1], ()) if len(node.input) > 1 else ()
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(shape) < 2:
            continue
        options = {attribute.name: attribute.i for attribute in node.attribute}
        size = shape[0] if node.op_type == "Conv" or options.get("transB") else shape[-1]
        bias = f"{node.output[0]}_bias"
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(size, np.float32), bias))
        added += 1
        if node.op_type == "MatMul":
            product = f"{node.output[0]}_product"
            nodes.append(onnx.helper.make_node("Add", [product, bias], [node.output[0]], name=bias))
            node.output[0] = product
        else:
            node.input.append(bias)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    return added


def _match_blocks(student: onnx.ModelProto, teacher: Artifact) -> tuple[tuple[str, str], ...] | None:
    """What the student's repeated blocks give beside what as deep a block of the teacher's gives."""
    graphs = (student.graph, onnx_model.load_model(teacher.path, with_weights=False).graph)
    ours, theirs = (max(find_runs(graph), key=lambda run: run.blocks, default=None) for graph in graphs)
    if ours is None or theirs is None or ours.blocks > theirs.blocks:
        return None
    places = spread(theirs.blocks + 1, ours.blocks + 1)
    return tuple(zip(ours.borders, (theirs.borders[place] for place in places), strict=True))
