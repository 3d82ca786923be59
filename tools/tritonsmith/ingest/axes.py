"""Names for free axes: the source's own where it gave one, else what such an axis usually is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, TensorSpec
from tritonsmith.errors import SourceError
from tritonsmith.ingest.source import Exported

# What exporters call an axis that its author did not name.
MACHINE_NAME = re.compile(r"(unk__\d+|[su]\d+|dim_?\d+|axis_?\d+|dynamic_axes_\d+|None|unknown|-1)$")
PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*$")
SPACES = {2: ("height", "width"), 3: ("depth", "height", "width")}


def name_axes(exported: Exported) -> Exported:
    """Give each free axis of the inputs a name that says something; equal symbols stay equal.

    An output's axis of the same symbol follows; other unnamed axes of an output carry the output's name.
    """
    taken = {axis for spec in (*exported.inputs, *exported.outputs) for axis in _named(spec)} | {BATCH_AXIS}
    renamed: dict[str, str] = {}
    for spec in exported.inputs:
        for index, axis in enumerate(spec.shape):
            if isinstance(axis, str) and _is_unnamed(spec, index) and axis not in renamed:
                renamed[axis] = _free_name(_usual_name(spec, index), taken)
    outputs = []
    for spec in exported.outputs:
        shape = [
            _output_name(spec, index) if _is_unnamed(spec, index) and axis not in renamed else axis
            for index, axis in enumerate(spec.shape)
        ]
        outputs.append(replace(spec, shape=tuple(shape)))
    return rename_axes(replace(exported, outputs=tuple(outputs)), renamed)


def tied_axes(before: Exported, after: Exported, runs: Sequence[Mapping[str, int]]) -> dict[str, str]:
    """Names that `name_axes` made up for axes that had one length in every run, by the one name to keep.

    Axes of different names are drawn with different lengths as long as the source takes that.
    """
    given = {axis for spec in before.inputs for axis in spec.shape}
    named = [axis for spec in after.inputs for axis in spec.shape if isinstance(axis, str)]
    ours = [axis for axis in dict.fromkeys(named) if axis not in given]
    if len(ours) < 2 or any(len({axes[name] for name in ours}) > 1 for axes in runs):
        return {}
    return dict.fromkeys(ours[1:], ours[0])


def rename_axes(exported: Exported, names: Mapping[str, str]) -> Exported:
    """The same signature with its free axes renamed."""
    return replace(
        exported,
        inputs=tuple(_renamed(spec, names) for spec in exported.inputs),
        outputs=tuple(_renamed(spec, names) for spec in exported.outputs),
        lengths={names.get(axis, axis): lengths for axis, lengths in exported.lengths.items()},
    )


def match_output_axes(
    exported: Exported, runs: Sequence[tuple[Mapping[str, int], Mapping[str, NDArray[Any]]]]
) -> Exported:
    """Give an output's unnamed axis the name of the one input axis whose length it had in every run.

    `runs` holds the lengths of the inputs' axes and the outputs of each run.
    """
    known = {axis for axes, _ in runs for axis in axes}
    outputs = []
    for spec in exported.outputs:
        shape = list(spec.shape)
        for index, axis in enumerate(shape):
            if isinstance(axis, int) or axis in known or not axis.startswith(f"{spec.name}_"):
                continue
            matches = [
                name
                for name in sorted(known - {BATCH_AXIS})
                if all(
                    arrays[spec.name].ndim > index and arrays[spec.name].shape[index] == axes[name]
                    for axes, arrays in runs
                )
            ]
            if len(matches) == 1:
                shape[index] = matches[0]
        outputs.append(replace(spec, shape=tuple(shape)))
    return replace(exported, outputs=tuple(outputs))


def set_shapes(model: onnx.ModelProto, exported: Exported) -> None:
    """Write the signature's shapes into the graph's inputs and outputs, in place.

    Raises:
        SourceError: the graph has another data type than the signature.
    """
    graph = model.graph
    pairs = zip((*graph.input, *graph.output), (*exported.inputs, *exported.outputs), strict=True)
    for value, spec in pairs:
        wanted = dtypes.BY_NAME[spec.dtype].onnx
        found = value.type.tensor_type.elem_type
        if found != wanted:
            raise SourceError(
                f"tensor {spec.name!r} has another data type in the exported graph",
                found=onnx.TensorProto.DataType.Name(found),
                expected=spec.dtype,
            )
        value.CopyFrom(onnx.helper.make_tensor_value_info(spec.name, wanted, spec.shape))


def _named(spec: TensorSpec) -> list[str]:
    shape = enumerate(spec.shape)
    return [axis for index, axis in shape if isinstance(axis, str) and not _is_unnamed(spec, index)]


def _is_unnamed(spec: TensorSpec, index: int) -> bool:
    axis = spec.shape[index]
    if isinstance(axis, int):
        return False
    if axis == f"{spec.name}_{index}" or MACHINE_NAME.match(axis):
        return True
    return PLAIN_NAME.match(axis) is None


def _usual_name(spec: TensorSpec, index: int) -> str:
    free = [place for place, axis in enumerate(spec.shape) if isinstance(axis, str) and axis != BATCH_AXIS]
    inner = len(spec.shape) - spec.shape.count(BATCH_AXIS)
    if inner in (3, 4) and len(free) == inner - 1:
        return SPACES[len(free)][free.index(index)]
    if inner in (1, 2) and free[0] == index:
        return "sequence"
    return f"{spec.name}_{index}"


def _output_name(spec: TensorSpec, index: int) -> str:
    usual = _usual_name(spec, index)
    return usual if usual.startswith(f"{spec.name}_") else f"{spec.name}_{usual}"


def _free_name(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _renamed(spec: TensorSpec, names: Mapping[str, str]) -> TensorSpec:
    shape = tuple(names.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape)
    return replace(spec, shape=shape)
