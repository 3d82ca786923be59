"""What every reader of a source hands over: a raw ONNX file and the source itself as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tritonsmith.artifact import Json, TensorSpec

Reference = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How a source is read and which server must read the result."""

    server: str = "24.10"  # Triton release that must load it; a key of ingest.targets.SERVERS
    opset: int | None = None  # None: the exporter's own, raised to 13 or lowered to what `server` reads
    allow_code: bool = False  # run code that the source carries: pickles, Lambda layers
    custom_objects: str | None = None  # "package.module" that defines a Keras model's own classes
    seed: int = 0  # of the inputs on which parity is proved


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A source, exported to ONNX but not yet cleaned, and its reference to compare with.

    `inputs` and `outputs` carry the names that the source uses, in the order of the raw graph's inputs
    and outputs, with shapes that include the batch axis as BATCH_AXIS where `batched`. `reference`
    computes the outputs by those names in the source's own framework.

    `ranges` bounds the seeded values of an input, both ends included; where it is silent, embedding
    tables in the graph and the data type decide. `lengths` names lengths at which a free axis is tried.
    """

    kind: str  # "keras", "saved-model", "torch", "huggingface", "onnx"
    raw: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    reference: Reference
    tools: Mapping[str, str]
    options: Mapping[str, Json]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
