"""From a trained model of any framework to one clean, proven ONNX file: `convert` is the door."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tritonsmith.artifact import Artifact, bytes_of, sha256_of
from tritonsmith.errors import SourceError
from tritonsmith.ingest.detect import detect_kind
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.user_code import files_of_module


def convert(
    source: str,
    out: Path,
    options: ConvertOptions | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Convert a trained model to ONNX at `out` and prove that it computes the same.

    Args:
        source: a path, or `package.module:factory` for PyTorch.
        say: told each long step as it begins.

    Raises:
        SourceError: the source cannot be read or converted.
        MissingExtraError: the framework that reads it is not installed.
        ParityError: the converted model computes something else; nothing is written.
        UsageError: `out` exists and `force` is not given, or an option is wrong.
    """
    from tritonsmith.ingest.finish import Origin, check_request, finish

    options = options or ConvertOptions()
    check_request(out, options, force=force)
    kind = detect_kind(source)
    with tempfile.TemporaryDirectory(prefix="tritonsmith-convert-") as folder:
        say(f"reading {source} ({kind})")
        started = time.perf_counter()
        exported = _export(kind, source, Path(folder), options)
        origin = Origin(
            sha256=source_sha256(source),
            size_bytes=source_bytes(source),
            export_s=time.perf_counter() - started,
        )
        return finish(exported, out, options, origin=origin, force=force, say=say)


def export_source(source: str, folder: Path, options: ConvertOptions) -> Exported:
    """The source as a function and as a raw ONNX file in `folder`, as `convert` reads it."""
    return _export(detect_kind(source), source, folder, options)


def source_sha256(source: str) -> str:
    """A hash of all that a source is made of: a file, a folder, ONNX with its weights, a factory's code.

    Of a factory, that is the Python files of its module or of its whole package. Files that it reads
    while it runs are not known and not covered.
    """
    kind = detect_kind(source)
    if kind == "onnx":
        from tritonsmith.onnx_model import model_sha256

        return model_sha256(Path(source))
    if kind == "torch-factory":
        lines = [source, *(f"{file.name} {sha256_of(file)}" for file in _code_of(source))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return sha256_of(Path(source))


def source_bytes(source: str) -> int:
    """Bytes on disk of a source."""
    kind = detect_kind(source)
    if kind == "onnx":
        from tritonsmith.onnx_model import model_bytes

        return model_bytes(Path(source))
    paths = _code_of(source) if kind == "torch-factory" else (Path(source),)
    return sum(bytes_of(path) for path in paths)


def _export(kind: str, source: str, folder: Path, options: ConvertOptions) -> Exported:
    path = Path(source)
    if kind == "keras":
        from tritonsmith.ingest.keras import export_keras

        return export_keras(path, folder, options)
    if kind == "saved-model":
        from tritonsmith.ingest.saved_model import export_saved_model

        return export_saved_model(path, folder, options)
    if kind in ("torch", "torch-factory"):
        from tritonsmith.ingest.torch import export_torch

        return export_torch(source, folder, options)
    if kind == "huggingface":
        from tritonsmith.ingest.huggingface import export_huggingface

        return export_huggingface(path, folder, options)
    from tritonsmith.ingest.onnx import export_onnx

    return export_onnx(path, folder, options)


def _code_of(source: str) -> tuple[Path, ...]:
    """The Python files that a factory's answer depends on, as far as names tell: its module or package."""
    return files_of_module(source.partition(":")[0], f"source {source}", SourceError)
