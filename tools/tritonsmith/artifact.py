"""The records that flow from a source to a repository, and their form in manifest.json."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MANIFEST_SCHEMA = 3
BATCH_AXIS = "batch"
FAITHFUL_STEPS = ("convert", "simplify", "save-openvino")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor's name, data type (a name of `dtypes`) and shape.

    The shape includes the batch axis, as the name `BATCH_AXIS`; a free axis is a name, a fixed one
    a number. `()` is a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(axis) for axis in self.shape)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step did to an artifact: a line of its lineage."""

    name: str  # "convert", "quantize-static", ...
    options: Mapping[str, Json]
    input_sha256: str
    output_sha256: str
    tools: Mapping[str, str]  # distribution name -> version
    duration_s: float
    bytes_before: int
    bytes_after: int
    measured: Mapping[str, Json] = field(default_factory=dict)  # parity errors, counts of INT8 nodes, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A model file that can be run, with what it takes, what it gives, and where it came from."""

    path: Path  # model.onnx; external data lies beside it, model.xml with model.bin for openvino
    format: str  # "onnx" or "openvino"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool  # axis 0 of every input and output is BATCH_AXIS, and each row is answered by itself
    precision: str  # "fp32", "fp16", "bf16", "int8", "int4"
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a version holds for a further target, which `configs/<name>.pbtxt` serves."""

    name: str
    backend: str  # "tensorrt", "onnxruntime" or "openvino"
    precision: str | None  # of what is served; None: no plan was built yet, and building chooses it
    files: tuple[str, ...]  # of the version's files, those that are this target's alone, plans among them
    order: str | None = None  # one of `files`, the plan order; None for a target that needs no plan
    candidates: tuple[Mapping[str, Json], ...] = ()  # judged, each with its `file` where it was written
    plans: tuple[Mapping[str, Json], ...] = ()  # PlanFacts (targets/order_file.py), one for each kind of GPU

    @property
    def deferred(self) -> bool:
        """Whether plans are still to be built on the GPU machine."""
        return self.order is not None and not self.plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The lineage of one published version: `<model>/<version>/manifest.json`."""

    name: str
    version: int
    fingerprint: str  # of everything that the build depends on; equal means nothing to do
    source: str
    source_sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    precision: str
    backend: str
    files: Mapping[str, str]  # file name in the version folder -> sha256
    steps: tuple[Step, ...]
    gate: Mapping[str, Json] | None
    candidates: tuple[Mapping[str, Json], ...]
    # config.pbtxt, configs/*.pbtxt, labels and warm-up files in the model's folder, as this publish wrote
    # them -> sha256
    model_files: Mapping[str, str] = field(default_factory=dict)
    ledger: Mapping[str, Json] | None = None  # of a chain of compression steps
    search: Mapping[str, Json] | None = None  # that found the chain
    targets: tuple[Target, ...] = ()

    @property
    def compressed(self) -> bool:
        """Whether a step changed what the model computes: it is not equal to its source, only judged."""
        return any(step.name not in FAITHFUL_STEPS for step in self.steps)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, or of a folder's sorted relative names and contents."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def bytes_of(path: Path) -> int:
    """Bytes on disk of a file or of all files below a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def tool_versions(*distributions: str) -> dict[str, str]:
    """The installed versions of these distributions; those that are absent are left out."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
