"""recipe.toml -> records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tritonsmith.artifact import Json
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.repository.ensemble import EnsembleRequest
from tritonsmith.repository.warmup import WarmupRequest

PRECISIONS = ("fp32", "fp16", "int8", "auto")
BACKENDS = ("onnxruntime", "openvino")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A trained model to convert, compress, judge and publish into `repository` as `name`."""

    name: str
    source: str
    repository: Path
    precision: str = "fp32"  # one of PRECISIONS
    backend: str = "onnxruntime"  # one of BACKENDS
    calibration: Path | None = None
    evaluation: Path | None = None
    metric: str | None = None
    max_drop: float | None = None
    max_batch_size: int | None = None  # None: chosen by repository.config
    version: int | None = None  # None: the next one
    force: bool = False
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    config: Mapping[str, Json] = field(default_factory=dict)  # fields of model_config.proto
    labels: Mapping[str, Path] = field(default_factory=dict)  # output -> label file
    warmup: WarmupRequest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that one recipe file asks for, in the order in which to build it."""

    path: Path
    builds: tuple[BuildRequest, ...]
    ensembles: tuple[EnsembleRequest, ...]


def load_recipe(path: Path, *, repository: Path, force: bool = False, allow_code: bool = False) -> Recipe:
    """Read a recipe; relative paths in it start from its own folder.

    Raises:
        RecipeError: a mistake in the file, named by its key and place.
    """
    raise NotImplementedError
