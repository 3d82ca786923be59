"""Sharing rows of an embedding table: ids that calibration and training data hardly use share others' rows.

The table keeps the rows that are used most, then those of the lowest ids (vocabularies list frequent tokens
first). Every other id is sent to the kept row that points most nearly the same way. A small map from id to
row comes before the look-up; ids that are kept give exactly what they gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step, steps
from tritonsmith.compress.calibration import token_mask
from tritonsmith.compress.chain import Material
from tritonsmith.compress.graph import readers_of
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.files import staging_folder
from tritonsmith.samples import Samples

Array = NDArray[Any]
Say = Callable[[str], None]

PASSES_IDS_ON = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
CHUNK_ROWS = 2048  # bounds the memory of similarities
NARROW_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """An embedding table `[rows, width]`, the nodes that look it up, and the inputs that hold its ids."""

    weight: onnx.TensorProto
    rows: int
    nodes: tuple[str, ...]  # first outputs of the Gathers
    inputs: tuple[str, ...]


def apply_share_rows(
    spec: steps.ShareRows,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    say: Say = lambda _: None,
) -> Artifact:
    """Let the largest embedding table keep `spec.rows` rows.

    Raises:
        CompressionError: no float32 table that an integer input indexes, or one that is that small already.
        SamplesError: neither calibration nor training data, or ids that the table does not have.
    """
    samples = [part for part in (material.calibration, material.training) if part is not None]
    if not samples:
        raise SamplesError(
            "sharing rows needs calibration or training data: they say which rows are used",
            expected="samples like those that the model will see",
            fix="take them from the training data, apart from the evaluation data",
        )
    options: dict[str, Json] = {"rows": spec.rows, "samples_sha256": [part.sha256 for part in samples]}
    work = step.begin("share-rows", options)
    model = onnx_model.load_model(artifact.path)
    table = find_table(model.graph, artifact.path.name)
    if not 0 < spec.rows < table.rows:
        raise CompressionError(
            f"embedding table {table.weight.name!r} of {artifact.path.name} cannot keep {spec.rows} rows",
            found=f"a table of {table.rows} rows",
            expected=f"1 to {table.rows - 1} rows",
        )
    uses = np.sum([count_uses(table, part) for part in samples], axis=0)
    weight = numpy_helper.to_array(table.weight)
    kept = kept_rows(uses, spec.rows)
    row_of, cosine = share(weight, kept)
    replace_table(model.graph, table, weight[kept], row_of)
    measured: dict[str, Json] = {
        "table": table.weight.name,
        "rows_before": table.rows,
        "rows_after": len(kept),
        "ids_used": int((uses > 0).sum()),
        "coverage": float(uses[kept].sum() / uses.sum()),
        "mean_cosine_of_shared": cosine,
    }
    say(
        f"{table.weight.name}: {table.rows} rows become {len(kept)}; {measured['coverage']:.2%} of the "
        f"tokens in the data keep their own row"
    )
    with staging_folder(out) as folder:
        staged = folder / out.name
        onnx_model.save_model(model, staged)
        return step.finish(
            work, artifact, staged, out, precision=artifact.precision, measured=measured, tools=("onnx",)
        )


def find_table(graph: onnx.GraphProto, name: str) -> Table:
    """The largest float32 table that Gathers along axis 0 read, with ids that come from integer inputs.

    Raises:
        CompressionError: there is none.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    integers = {
        value.name
        for value in graph.input
        if value.type.tensor_type.elem_type in (TensorProto.INT32, TensorProto.INT64)
    } - set(weights)
    makers = {output: node for node in graph.node for output in node.output}
    readers = readers_of(graph)
    top = {id(node) for node in graph.node}
    tables, refused = [], []
    for tensor in graph.initializer:
        nodes = readers.get(tensor.name, [])
        if not any(node.op_type == "Gather" and node.input[0] == tensor.name for node in nodes):
            continue
        if len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT:
            refused.append(f"{tensor.name} is not float32 of two axes")
            continue
        sources = [_source_of(node, makers, integers) for node in nodes if _is_lookup(node, tensor.name)]
        if len(sources) < len(nodes) or any(id(node) not in top for node in nodes):
            refused.append(f"{tensor.name} is read by more than look-ups of rows")
        elif None in sources:
            refused.append(f"{tensor.name} is looked up by ids that are computed")
        else:
            inputs = tuple(dict.fromkeys(source for source in sources if source is not None))
            outputs = tuple(node.output[0] for node in nodes)
            rows = int(tensor.dims[0])
            tables.append(Table(weight=tensor, rows=rows, nodes=outputs, inputs=inputs))
    if not tables:
        raise CompressionError(
            f"{name} has no embedding table whose rows could be shared",
            found="; ".join(refused) or "no Gather from a weight",
            expected="a float32 weight [rows, width], looked up by an integer input",
            fix="leave this step out, or put it before those that quantize",
        )
    return max(tables, key=lambda table: table.rows * int(table.weight.dims[1]))


def count_uses(table: Table, samples: Samples) -> Array:
    """How often each id occurs in the samples; padding counts nothing.

    Raises:
        SamplesError: an id that the table does not have.
    """
    uses = np.zeros(table.rows, dtype=np.int64)
    for name in table.inputs:
        ids = samples.arrays[name]
        if ids.min() < -table.rows or ids.max() >= table.rows:
            raise SamplesError(
                f"{samples.path}: input {name!r} holds ids that the table {table.weight.name!r} lacks",
                found=f"{ids.min()} to {ids.max()}",
                expected=f"0 to {table.rows - 1}",
            )
        mask = token_mask(samples)
        counted = ids[mask] if mask is not None and mask.shape == ids.shape else ids.ravel()
        uses += np.bincount(counted % table.rows, minlength=table.rows)
    return uses


def kept_rows(uses: Array, rows: int) -> Array:
    """Ids `[rows]`, ascending: those used most, ties and the rest by the lowest id."""
    order = np.argsort(-uses, kind="stable")
    return np.sort(order[:rows])


def share(weight: Array, kept: Array) -> tuple[Array, float]:
    """For each id the position of its row in `kept`, and the mean cosine of the others to theirs."""
    directions = _directions(weight)
    anchors = directions[kept]
    row_of = np.empty(len(weight), dtype=np.int64)
    row_of[kept] = np.arange(len(kept))
    others = np.setdiff1d(np.arange(len(weight)), kept)
    cosines = []
    for start in range(0, len(others), CHUNK_ROWS):
        some = others[start : start + CHUNK_ROWS]
        similarity = directions[some] @ anchors.T
        row_of[some] = similarity.argmax(axis=1)
        cosines.append(similarity.max(axis=1))
    return row_of, float(np.concatenate(cosines).mean())


def replace_table(graph: onnx.GraphProto, table: Table, rows: Array, row_of: Array) -> None:
    """Put the smaller table in place, and the map from id to row before each of its look-ups."""
    name = table.weight.name
    width = np.uint16 if len(rows) <= NARROW_ROWS else np.int32
    map_name = f"{name}_row_of_id"
    table.weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows), name))
    graph.initializer.append(numpy_helper.from_array(row_of.astype(width), map_name))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output and node.output[0] in table.nodes and node.input[0] == name:
            stem = f"{node.output[0]}_row"
            nodes.append(helper.make_node("Gather", [map_name, node.input[1]], [f"{stem}_narrow"], stem))
            cast = helper.make_node("Cast", [f"{stem}_narrow"], [stem], f"{stem}_cast", to=TensorProto.INT64)
            nodes.append(cast)
            node.input[1] = stem
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _is_lookup(node: onnx.NodeProto, weight: str) -> bool:
    return (
        node.op_type == "Gather"
        and node.input[0] == weight
        and node.input[1] != weight
        and all(attribute.i == 0 for attribute in node.attribute)
    )


def _source_of(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], integers: set[str]) -> str | None:
    """The integer input that a look-up's ids are, or None where they are computed."""
    name: str = node.input[1]
    while name not in integers:
        maker = makers.get(name)
        if maker is None or maker.op_type not in PASSES_IDS_ON:
            return None
        name = maker.input[0]
    return name


def _directions(weight: Array) -> Array:
    norms = np.linalg.norm(weight, axis=1, keepdims=True)
    directions: Array = np.divide(weight, norms, out=np.zeros_like(weight), where=norms > 0)
    return directions
