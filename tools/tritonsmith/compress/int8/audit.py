"""How many matrix products of a model an engine really runs in INT8, read from what the engine built.

Why one of them does not is read from the quantized file: what its inputs, weights and result look like.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from tritonsmith import onnx_model
from tritonsmith.artifact import Json
from tritonsmith.compress.graph import nodes_of
from tritonsmith.compress.int8.reasons import Explainer
from tritonsmith.compress.names import Origins
from tritonsmith.errors import CompressionError, EngineError, MissingExtraError, UsageError

# Names that ONNX Runtime's optimiser gives to what its CPU kernels run (docs/ContribOperators.md).
ORT_INT8_OPS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearConvTranspose",
        "QLinearMatMul",
    }
)
ORT_FLOAT_OPS = frozenset(
    {"Attention", "Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "GRU", "Gemm"}
    | {"LSTM", "MatMul", "MatMulNBits", "MultiHeadAttention", "NhwcFusedConv", "RNN", "TransposeMatMul"}
)
# The products of two activations in attention are not among them: OpenVINO hides them in a "Subgraph".
OPENVINO_OPS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell"})


MOST_REASONS = 40  # that a manifest lists
MOST_SAID = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Of `ops` convolutions and matrix products, `int8_ops` run in INT8; `by_type` counts each kind.

    `reasons` has a line for each that does not: the node in the model as it was, its operator, and why.
    """

    int8_ops: int
    ops: int
    by_type: Mapping[str, int]
    reasons: tuple[tuple[str, str, str], ...] = ()
    engine: str = "ONNX Runtime CPU"

    def measured(self) -> dict[str, Json]:
        listed = [list(reason) for reason in self.reasons[:MOST_REASONS]]
        return {
            "int8_ops": self.int8_ops,
            "ops": self.ops,
            "ops_by_type": dict(sorted(self.by_type.items())),
            "float_ops": listed,
            "float_ops_left_out": len(self.reasons) - len(listed),
        }

    def __str__(self) -> str:
        return f"{self.int8_ops} of {self.ops} convolutions and matrix products run in INT8 on {self.engine}"

    def lines(self) -> list[str]:
        """Why the others do not, a line for each reason, the most frequent first."""
        nodes: dict[str, list[str]] = {}
        for node, _, reason in self.reasons:
            nodes.setdefault(reason, []).append(node)
        lines = []
        for reason, names in sorted(nodes.items(), key=lambda item: (-len(item[1]), item[0])):
            more = "" if len(names) <= MOST_SAID else f" and {len(names) - MOST_SAID} more"
            lines.append(f"{len(names)} not in INT8, {reason}: {', '.join(names[:MOST_SAID])}{more}")
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Op:
    """A product in the graph that an engine built."""

    kind: str  # the engine's own name for it
    is_int8: bool
    nodes: tuple[onnx.NodeProto, ...]  # with names and results by which it can be traced


def audit_int8(path: Path, *, engine: str, original: Path | None = None, kept: Iterable[str] = ()) -> Audit:
    """Count what runs in INT8 on `engine` on this machine, and say why the rest does not.

    `original` is the model before it was quantized, whose names the reasons use; `kept` are nodes that were
    asked to stay in floating point, by their names in `path`.

    Raises:
        EngineError: the engine refuses the model.
    """
    if engine == "onnxruntime":
        ops, name = _onnxruntime_ops(path), "ONNX Runtime CPU"
    elif engine == "openvino":
        ops, name = _openvino_ops(path), "OpenVINO CPU"
    elif engine == "tensorrt":
        ops, name = _written_ops(path), "TensorRT, as the file asks for (it does not run here)"
    else:
        raise UsageError(f"no engine is named {engine!r}", expected="onnxruntime, openvino or tensorrt")
    by_type: dict[str, int] = {}
    for op in ops:
        by_type[op.kind] = by_type.get(op.kind, 0) + 1
    return Audit(
        int8_ops=sum(op.is_int8 for op in ops),
        ops=len(ops),
        by_type=by_type,
        reasons=_reasons(path, ops, original or path, frozenset(kept), engine),
        engine=name,
    )


def audit_quantized(
    staged: Path,
    original: Path,
    *,
    dialect: str,
    kept: Iterable[str],
    say: Callable[[str], None] = lambda _: None,
) -> Audit:
    """The audit of a model that was just quantized, said aloud.

    Raises:
        CompressionError: nothing would run in INT8.
        EngineError: the engine refuses the model.
    """
    audit = audit_int8(staged, engine=dialect, original=original, kept=kept)
    if audit.int8_ops == 0:
        raise CompressionError(
            f"{original.name} was quantized, but {dialect} would run nothing of it in INT8",
            found="; ".join([str(audit), *audit.lines()]),
            fix="build it with --precision fp32 or fp16",
        )
    say(f"INT8: {audit}")
    for line in audit.lines():
        say(line)
    return audit


def _reasons(
    path: Path, ops: Iterable[_Op], original: Path, kept: frozenset[str], engine: str
) -> tuple[tuple[str, str, str], ...]:
    written = onnx_model.load_model(path, with_weights=False)
    inside = Origins(written.graph)
    before = Origins(onnx_model.load_model(original, with_weights=False).graph)
    explainer = Explainer(written, kept, engine)
    reasons = []
    for op in ops:
        if op.is_int8:
            continue
        node = inside.find(op.nodes)
        source = before.find([*op.nodes, *([node] if node is not None else [])])
        shown = source or node or op.nodes[0]
        reasons.append((shown.name or shown.output[0], shown.op_type, explainer.explain(node, op.kind)))
    return tuple(reasons)


def _onnxruntime_ops(path: Path) -> list[_Op]:
    import onnxruntime

    from tritonsmith.engines.onnxruntime import PROVIDERS, engine_errors, reason_of

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the written graph fits this CPU only: that is the aim
    with tempfile.TemporaryDirectory(prefix="tritonsmith-audit-") as folder:
        written = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        # Keeps the graph itself below 2 GB.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        try:
            onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
        except engine_errors() as error:
            raise EngineError(f"ONNX Runtime refuses {path.name}", found=reason_of(error)) from error
        graph = onnx.load(str(written), load_external_data=False).graph
    return [
        _Op(kind=node.op_type, is_int8=node.op_type in ORT_INT8_OPS, nodes=(node,))
        for node in nodes_of(graph)
        if node.op_type in ORT_INT8_OPS or node.op_type in ORT_FLOAT_OPS
    ]


def _openvino_ops(path: Path) -> list[_Op]:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("OpenVINO cannot be used", package="openvino", extra="openvino") from error
    from tritonsmith.engines.openvino import reason_of

    try:
        compiled = openvino.Core().compile_model(str(path), "CPU")
    except RuntimeError as error:
        raise EngineError(f"OpenVINO refuses {path.name}", found=reason_of(error)) from error
    ops = []
    for op in compiled.get_runtime_model().get_ops():
        kind, precision = (_rt_text(op, key) for key in ("layerType", "runtimePrecision"))
        if kind in OPENVINO_OPS:
            names = [op.get_friendly_name(), *re.split(r",\s*", _rt_text(op, "originalLayersNames"))]
            nodes = tuple(onnx.NodeProto(name=name, op_type=kind, output=[name]) for name in names)
            ops.append(_Op(kind=f"{kind} {precision}", is_int8=precision in ("i8", "u8"), nodes=nodes))
    return ops


def _written_ops(path: Path) -> list[_Op]:
    """What the file itself asks for: a product between DequantizeLinears is INT8 to TensorRT."""
    graph = onnx_model.load_model(path, with_weights=False).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    ops = []
    for node in nodes_of(graph):
        if node.op_type in ORT_FLOAT_OPS:
            is_int8 = all(makers.get(name) == "DequantizeLinear" for name in node.input[:2])
            kind = f"{node.op_type} {'INT8' if is_int8 else 'float'}"
            ops.append(_Op(kind=kind, is_int8=is_int8, nodes=(node,)))
    return ops


def _rt_text(op: Any, key: str) -> str:
    info = op.get_rt_info()
    if key not in info:
        return ""
    value = info[key]
    return value if isinstance(value, str) else str(value.astype(str))
