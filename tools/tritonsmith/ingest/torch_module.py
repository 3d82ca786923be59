"""A PyTorch source as the module itself: what a reader exports, and what can be pruned and trained before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tritonsmith.artifact import Json
from tritonsmith.errors import SourceError
from tritonsmith.ingest.detect import detect_kind
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.torch_example import ExampleInputs
from tritonsmith.ingest.torch_export import export_module, require_torch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchModule:
    """A module in eval mode, how it is called, and which of its axes may vary."""

    source: str
    kind: str  # "torch", "huggingface"
    module: torch.nn.Module
    example: ExampleInputs
    free: Mapping[str, Mapping[int, str]]  # input name -> axis -> the axis's name
    must_stay_free: bool
    options: Mapping[str, Json]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def load_module(source: str, options: ConvertOptions) -> TorchModule:
    """The module of a factory or a Hugging Face folder, as `convert` would export it.

    Raises:
        SourceError: another kind of source, or one that cannot be loaded.
        MissingExtraError: its framework is not installed.
    """
    kind = detect_kind(source)
    if kind == "torch-factory":
        from tritonsmith.ingest.torch_factory import load_factory

        require_torch(source, extra="torch")
        return load_factory(source)
    if kind == "huggingface":
        from tritonsmith.ingest.huggingface import load_huggingface

        return load_huggingface(Path(source), options)
    raise SourceError(
        f"{source} holds no PyTorch module",
        found=kind,
        expected="package.module:factory, or a Hugging Face folder",
    )


def export_loaded(loaded: TorchModule, folder: Path) -> Exported:
    """Write a module as `folder/raw.onnx`; `export_module` says what it raises."""
    return export_module(
        loaded.source,
        loaded.module,
        loaded.example,
        loaded.free,
        folder,
        kind=loaded.kind,
        must_stay_free=loaded.must_stay_free,
        options=loaded.options,
        ranges=loaded.ranges,
        lengths=loaded.lengths,
    )
