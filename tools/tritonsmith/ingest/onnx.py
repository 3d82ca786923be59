"""Reading ONNX files: by path whatever their size, with ONNX Runtime on the file itself as reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from tritonsmith.artifact import BATCH_AXIS, TensorSpec, tool_versions
from tritonsmith.engines import open_session
from tritonsmith.errors import EngineError, SourceError
from tritonsmith.ingest.parity import Case, draw_cases, rows_independent
from tritonsmith.ingest.seeds import Range, index_ranges
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.onnx_model import load_model, model_files, signature_of


def export_onnx(source: Path, folder: Path, options: ConvertOptions) -> Exported:
    """Read an ONNX file; it is its own raw export, so `folder` stays empty.

    The model is batched where the first axis of every input and output is free, every output's first
    axis follows the inputs', and each row is computed alone: that is tried, as a name proves nothing.
    A first axis that is fixed, to 1 too, is no batch axis: the model becomes `max_batch_size: 0`.

    Raises:
        SourceError: no ONNX file, weights that are missing or outside of its folder, a graph that ONNX
            Runtime refuses, or tensors that Triton cannot serve.
    """
    model_files(source)
    model = load_model(source, with_weights=False)
    try:
        session = open_session(source)
    except EngineError as error:
        raise SourceError(f"ONNX Runtime cannot load {source}", found=error.found) from error
    rankless = _give_ranks(model)
    inputs, outputs = signature_of(model)
    if not outputs:
        raise SourceError(f"{source} has no outputs", expected="at least one")
    exported = Exported(
        kind="onnx",
        raw=source,
        inputs=inputs,
        outputs=outputs,
        batched=False,
        reference=session.run,
        tools=tool_versions("onnx", "onnxruntime"),
        options={},
    )
    ranges = index_ranges(model, inputs)
    batched, cases = _try_batched(exported, ranges, options.seed)
    if not batched:
        exported = _without_batch_name(exported)
        cases = draw_cases(exported, ranges=ranges, seed=options.seed) if rankless else ()
        return _with_seen_shapes(exported, rankless, cases)
    return _with_seen_shapes(_as_batched(exported), rankless, cases)


def _try_batched(exported: Exported, ranges: Mapping[str, Range], seed: int) -> tuple[bool, tuple[Case, ...]]:
    """Whether the first axes are one batch axis, and the runs that showed it."""
    if not exported.inputs or not all(
        spec.shape and isinstance(spec.shape[0], str) for spec in exported.inputs
    ):
        return False, ()
    symbols = {spec.shape[0] for spec in exported.inputs}
    if any(axis in symbols for spec in exported.inputs for axis in spec.shape[1:]):
        return False, ()
    candidate = _as_batched(exported)
    try:
        cases = draw_cases(candidate, ranges=ranges, seed=seed)
    except SourceError:
        return False, ()  # the first axes are something else; drawn as such, they are tried again
    follows = all(
        array.shape[:1] == (case.axes[BATCH_AXIS],) for case in cases for array in case.expected.values()
    )
    return follows and rows_independent(exported.reference, exported.outputs, cases), cases


def _as_batched(exported: Exported) -> Exported:
    def renamed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=(BATCH_AXIS, *spec.shape[1:]))

    return replace(
        exported,
        inputs=tuple(map(renamed, exported.inputs)),
        outputs=tuple(map(renamed, exported.outputs)),
        batched=True,
    )


def _without_batch_name(exported: Exported) -> Exported:
    """An axis that is no batch axis must not be named so: it becomes `rows`."""

    def renamed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple("rows" if axis == BATCH_AXIS else axis for axis in spec.shape))

    return replace(
        exported,
        inputs=tuple(map(renamed, exported.inputs)),
        outputs=tuple(map(renamed, exported.outputs)),
    )


def _give_ranks(model: onnx.ModelProto) -> frozenset[str]:
    """Give outputs without a rank an empty one, in place, and tell which: runs will show their shape."""
    names = set()
    for value in model.graph.output:
        tensor = value.type.tensor_type
        if value.type.HasField("tensor_type") and not tensor.HasField("shape"):
            tensor.shape.SetInParent()
            names.add(value.name)
    return frozenset(names)


def _with_seen_shapes(exported: Exported, rankless: frozenset[str], cases: tuple[Case, ...]) -> Exported:
    """The shapes of `rankless` outputs as the runs showed them: an axis that changed is free."""
    outputs = []
    for spec in exported.outputs:
        if spec.name in rankless:
            shapes = [case.expected[spec.name].shape for case in cases]
            if len({len(shape) for shape in shapes}) > 1:
                raise SourceError(f"output {spec.name!r} changes its rank", found=shapes)
            axes: list[int | str] = [
                lengths[0] if len(set(lengths)) == 1 else f"{spec.name}_{index}"
                for index, lengths in enumerate(zip(*shapes, strict=True))
            ]
            if exported.batched:
                axes[0] = BATCH_AXIS
            spec = replace(spec, shape=tuple(axes))
        outputs.append(spec)
    return replace(exported, outputs=tuple(outputs))
