"""How many matrix products of a model an engine really runs in INT8, read from what the engine built."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from tritonsmith.artifact import Json
from tritonsmith.compress.graph import nodes_of
from tritonsmith.errors import EngineError, MissingExtraError, UsageError

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
    | {"LSTM", "MatMul", "MultiHeadAttention", "NhwcFusedConv", "TransposeMatMul"}
)
# The products of two activations in attention are not among them: OpenVINO hides them in a "Subgraph".
OPENVINO_OPS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Of `ops` convolutions and matrix products, `int8_ops` run in INT8; `by_type` counts each kind."""

    int8_ops: int
    ops: int
    by_type: dict[str, int]

    def measured(self) -> dict[str, Json]:
        return {"int8_ops": self.int8_ops, "ops": self.ops, "ops_by_type": dict(sorted(self.by_type.items()))}

    def __str__(self) -> str:
        return f"{self.int8_ops} of {self.ops} convolutions and matrix products run in INT8"


def audit_int8(path: Path, *, engine: str) -> Audit:
    """Count what runs in INT8 on `engine` on this machine.

    Raises:
        EngineError: the engine refuses the model.
    """
    if engine == "onnxruntime":
        return _count(_onnxruntime_ops(path))
    if engine == "openvino":
        return _count(_openvino_ops(path))
    raise UsageError(f"no engine is named {engine!r}", expected="onnxruntime or openvino")


def _count(ops: Iterator[tuple[str, bool]]) -> Audit:
    by_type: dict[str, int] = {}
    int8_ops = 0
    for name, is_int8 in ops:
        by_type[name] = by_type.get(name, 0) + 1
        int8_ops += is_int8
    return Audit(int8_ops=int8_ops, ops=sum(by_type.values()), by_type=by_type)


def _onnxruntime_ops(path: Path) -> Iterator[tuple[str, bool]]:
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
    for node in nodes_of(graph):
        if node.op_type in ORT_INT8_OPS or node.op_type in ORT_FLOAT_OPS:
            yield node.op_type, node.op_type in ORT_INT8_OPS


def _openvino_ops(path: Path) -> Iterator[tuple[str, bool]]:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("OpenVINO cannot be used", package="openvino", extra="openvino") from error
    from tritonsmith.engines.openvino import reason_of

    try:
        compiled = openvino.Core().compile_model(str(path), "CPU")
    except RuntimeError as error:
        raise EngineError(f"OpenVINO refuses {path.name}", found=reason_of(error)) from error
    for op in compiled.get_runtime_model().get_ops():
        kind, precision = (_rt_text(op, key) for key in ("layerType", "runtimePrecision"))
        if kind in OPENVINO_OPS:
            yield f"{kind} {precision}", precision in ("i8", "u8")


def _rt_text(op: Any, key: str) -> str:
    value = op.get_rt_info()[key]
    return value if isinstance(value, str) else str(value.astype(str))
