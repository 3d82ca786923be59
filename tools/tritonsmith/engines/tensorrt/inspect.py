"""What the builder made of a model: its layers, what was fused into each, and the precision each runs in.

Read from IEngineInspector's JSON, whose tensors carry their format as a sentence ("Thirty-two wide channel
vectorized row major Int8 format") and whose layers name the ONNX nodes that went into them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tritonsmith.artifact import Json

UNKNOWN = "unknown"
# Longer names first: "BFloat16" holds "Float16", and that holds "Float".
_PRECISIONS = (
    ("bf16", r"bf16|bfloat16"),
    ("fp8", r"fp8|e4m3|e5m2|float8"),
    ("fp4", r"fp4|e2m1|float4"),
    ("int4", r"int4"),
    ("int8", r"int8"),
    ("fp16", r"fp16|half|float16"),
    ("int64", r"int64"),
    ("int32", r"int32"),
    ("bool", r"bool"),
    ("uint8", r"uint8"),
    ("fp32", r"tf32|fp32|float32|float"),
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_HEAVY = re.compile(r"conv|gemm|matmul|matrixmultiply|matrix_multiply|fullyconnected", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLayer:
    """A layer of the plan."""

    name: str
    kind: str  # TensorRT's LayerType: "CaskConvolution", "Reformat", ...
    nodes: tuple[str, ...]  # names of the ONNX nodes that were fused into it
    inputs: tuple[str, ...]  # precision of each input tensor
    outputs: tuple[str, ...]
    weights: str | None  # precision of its weights, where it has any
    tactic: str | None

    @property
    def precision(self) -> str:
        """What it computes in: its first numeric input's (weights alone may be smaller), or "unknown".

        Myelin compiles whole blocks, transformers above all, and does not say what it computes them in.
        """
        if self.kind == "Myelin":
            return UNKNOWN
        known = [p for p in (*self.inputs, *self.outputs, self.weights or UNKNOWN) if p != UNKNOWN]
        numeric = [p for p in known if p not in ("bool", "int32", "int64", "uint8")]
        return next(iter(numeric or known), UNKNOWN)

    @property
    def multiplies(self) -> bool:
        """Whether it is a convolution or a matrix product, as far as its kind, name and nodes say."""
        if self.kind == "Reformat":
            return False
        return any(_HEAVY.search(text) for text in (self.kind, self.name, *self.nodes))


def layers_from_json(text: str) -> tuple[PlanLayer, ...]:
    """The layers in IEngineInspector's JSON (of 8.6 to 11); a plan without details gives names alone.

    Raises:
        ValueError: no such JSON.
    """
    document = json.loads(text, strict=False)  # 8.6 leaves control characters in names
    if not isinstance(document, Mapping) or not isinstance(document.get("Layers"), list):
        raise ValueError("no list of Layers")
    return tuple(_layer_from_json(layer) for layer in document["Layers"])


def summary_of_layers(layers: Sequence[PlanLayer]) -> dict[str, Json]:
    """Counts for a manifest: layers and products by precision, and how many ONNX nodes went into them.

    A product that TensorRT fused into a generated kernel is counted under that kernel's precision.
    """
    heavy = [layer for layer in layers if layer.multiplies]
    return {
        "count": len(layers),
        "by_precision": dict(Counter(layer.precision for layer in layers).most_common()),
        "by_kind": dict(Counter(layer.kind for layer in layers).most_common()),
        "reformats": sum(layer.kind == "Reformat" for layer in layers),
        "products": len(heavy),
        "products_by_precision": dict(Counter(layer.precision for layer in heavy).most_common()),
        "fused_nodes": sum(len(layer.nodes) for layer in layers if len(layer.nodes) > 1),
    }


def layers_from_engine(trt: ModuleType, engine: Any, context: Any | None) -> Json:
    """The report for a loaded engine: the summary, and every layer; `problem` where it cannot be read.

    With a context whose input shapes are set, formats are those of these shapes; without one, layers with
    free axes do not say theirs.
    """
    inspector = engine.create_engine_inspector()
    if context is not None:
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = layers_from_json(text)
    except ValueError as error:  # the plan itself is good
        return {"problem": f"the inspector's report cannot be read: {error}"}
    return {**summary_of_layers(layers), "layers": [json_from_layer(layer) for layer in layers]}


def json_from_layer(layer: PlanLayer) -> dict[str, Json]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "precision": layer.precision,
        "nodes": list(layer.nodes),
        "inputs": list(layer.inputs),
        "outputs": list(layer.outputs),
        "weights": layer.weights,
        "tactic": layer.tactic,
    }


def precision_from_format(text: str) -> str:
    """The precision that a tensor's format or data type names; "unknown" where it names none."""
    for precision, pattern in _PRECISIONS:
        if re.search(rf"(?<![a-z])(?:{pattern})(?![a-z0-9])", text, re.IGNORECASE):
            return precision
    return UNKNOWN


def _layer_from_json(layer: Any) -> PlanLayer:
    if isinstance(layer, str):  # LAYER_NAMES_ONLY
        return PlanLayer(
            name=layer,
            kind=UNKNOWN,
            nodes=_nodes(layer, ""),
            inputs=(),
            outputs=(),
            weights=None,
            tactic=None,
        )
    name, weights = str(layer.get("Name", "")), layer.get("Weights")
    tactic = layer.get("TacticName") or layer.get("TacticValue")
    return PlanLayer(
        name=name,
        kind=str(layer.get("LayerType", UNKNOWN)),
        nodes=_nodes(name, str(layer.get("Metadata", ""))),
        inputs=tuple(_tensor_precision(tensor) for tensor in layer.get("Inputs", ())),
        outputs=tuple(_tensor_precision(tensor) for tensor in layer.get("Outputs", ())),
        weights=precision_from_format(str(weights["Type"]))
        if isinstance(weights, Mapping) and "Type" in weights and weights.get("Count") != 0
        else None,
        tactic=str(tactic) if tactic is not None else None,
    )


def _tensor_precision(tensor: Any) -> str:
    if not isinstance(tensor, Mapping):
        return UNKNOWN
    words = [
        str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype", "Format") if key in tensor
    ]
    known = [precision for word in words if (precision := precision_from_format(word)) != UNKNOWN]
    return known[0] if known else UNKNOWN


def _nodes(name: str, metadata: str) -> tuple[str, ...]:
    """The ONNX nodes of a layer: from its metadata (10 and newer), else from its name's parts ("a + b")."""
    named = _NODE.findall(metadata)
    parts = named or [part.strip() for part in name.split(" + ")]
    return tuple(dict.fromkeys(part for part in parts if part))
