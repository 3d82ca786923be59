"""What a graph needs before it is quantized: an opset new enough, BatchNorm folded, types inferred."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from tritonsmith import onnx_model
from tritonsmith.compress.graph import RECURRENT_OPS, WEIGHTED_OPS, nodes_of
from tritonsmith.compress.opset import PER_CHANNEL_OPSET, raise_opset
from tritonsmith.compress.order import sort_nodes
from tritonsmith.errors import CompressionError

FATAL_ONLY = 4  # OrtLoggingLevel; what goes wrong is raised as well
# onnxruntime.quantization looks for this mark and asks for its own pre-processing without it.
PREPARED_MARK = ("onnx.quant.pre_process", "onnxruntime.quant")


def prepare_graph(path: Path, folder: Path, *, opset: int = PER_CHANNEL_OPSET) -> Path:
    """Write the model at `path`, ready to be quantized, into `folder`, and return that file.

    ONNX Runtime's basic optimisations fold constants and BatchNormalization; none of them ties the
    graph to this machine. Weights lie in a file of their own, whatever their size.

    Raises:
        CompressionError: the opset cannot be raised to `opset`, or ONNX Runtime refuses the model.
    """
    raised = _raise_opset(path, folder / "raised.onnx", opset)
    optimized = _optimize(raised, folder / "optimized.onnx")
    inferred = folder / "prepared.onnx"
    try:
        onnx.shape_inference.infer_shapes_path(str(optimized), str(inferred), strict_mode=False)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise CompressionError(f"the types in {path.name} cannot be inferred", found=error) from error
    model = onnx_model.load_model(inferred, with_weights=False)
    _name_nodes(model.graph)
    key, value = PREPARED_MARK
    onnx.helper.set_model_props(
        model, {entry.key: entry.value for entry in model.metadata_props} | {key: value}
    )
    onnx.save(model, str(inferred))
    return inferred


def tidy(model: onnx.ModelProto, like: onnx.ModelProto) -> None:
    """Undo what the tools wrote for themselves: notes, operator sets that no node uses, a newer IR, shapes.

    `like` is the model as it was converted for its server, which reads that IR version and opset. Its
    signature stays, also where a tool could tell more of a free axis; nodes come in the order ONNX asks for.
    """
    for new, old in ((model.graph.input, like.graph.input), (model.graph.output, like.graph.output)):
        known = {value.name: value for value in old}
        for value in new:
            if value.name in known:
                value.CopyFrom(known[value.name])
    notes = {
        entry.key: entry.value
        for entry in model.metadata_props
        if not entry.key.startswith(("onnx.quant.", "onnx.infer"))
    }
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, notes)
    used = {"ai.onnx" if node.domain == "" else node.domain for node in nodes_of(model.graph)}
    for entry in list(model.opset_import):
        if (entry.domain or "ai.onnx") not in used | {"ai.onnx"}:
            model.opset_import.remove(entry)
    oldest = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = max(like.ir_version, oldest)
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    sort_nodes(model.graph)


def refuse_weightless(path: Path) -> None:
    """Raise CompressionError for a model without anything that INT8 would help."""
    graph = onnx_model.load_model(path, with_weights=False).graph
    kinds = {node.op_type for node in graph.node}
    if not kinds & (WEIGHTED_OPS | RECURRENT_OPS):
        raise CompressionError(
            f"{path.name} has nothing that INT8 would help",
            found=f"operators {', '.join(sorted(kinds))}",
            expected=f"at least one of {', '.join(sorted(WEIGHTED_OPS | RECURRENT_OPS))}",
            fix="build it with --precision fp32",
        )


@contextmanager
def named_failures(path: Path) -> Iterator[None]:
    """Whatever the quantizing library raises becomes a CompressionError that names the model."""
    from tritonsmith.engines.onnxruntime import engine_errors, reason_of

    failures: tuple[type[Exception], ...] = (*engine_errors(), AssertionError, AttributeError, KeyError)
    try:
        yield
    except failures as error:
        raise CompressionError(
            f"{path.name} cannot be quantized",
            found=reason_of(error),
            fix="build it with --precision fp32 or fp16",
        ) from error


def _raise_opset(path: Path, out: Path, least: int) -> Path:
    if onnx_model.opset_of(onnx_model.load_model(path, with_weights=False)) >= least:
        return path
    onnx_model.save_model(raise_opset(onnx_model.load_model(path), least, path.name), out)
    return out


def _optimize(path: Path, out: Path) -> Path:
    import onnxruntime

    from tritonsmith.engines.onnxruntime import PROVIDERS, engine_errors, reason_of

    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    data = "session.optimized_model_external_initializers_file_name"
    options.add_session_config_entry(data, out.name + onnx_model.DATA_SUFFIX)
    try:
        onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
    except engine_errors() as error:
        raise CompressionError(f"ONNX Runtime refuses {path}", found=reason_of(error)) from error
    return out


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own; quantization tells them apart by it."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)
