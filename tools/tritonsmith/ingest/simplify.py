"""Simplifying a graph with onnxslim, which is believed only as far as parity goes."""

from __future__ import annotations

from pathlib import Path

from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest.axes import set_shapes
from tritonsmith.ingest.clean import clean_metadata, fit_ir_version
from tritonsmith.ingest.source import Exported
from tritonsmith.onnx_model import check_file, is_large, load_model, opset_of, save_model


class NotSimplified(Exception):  # noqa: N818 - an outcome that the lineage records, not a failure
    """The reason why the model stays as it is."""


def simplify(source: Path, target: Path, exported: Exported, release: str, *, data_name: str) -> None:
    """Write the simplified model to `target`.

    Raises:
        NotSimplified: the model is too large, or onnxslim failed or changed the signature.
    """
    if is_large(source):
        raise NotSimplified("weights past 2 GB: onnxslim would hold them all in one message")
    try:
        import onnxslim
    except ImportError as error:
        raise MissingExtraError(
            "models are simplified with onnxslim", package="onnxslim", extra="all"
        ) from error
    before = load_model(source)
    try:
        after = onnxslim.slim(load_model(source))
    except Exception as error:
        raise NotSimplified(f"onnxslim failed: {type(error).__name__}: {error}") from error
    for what, old, new in (
        ("inputs", before.graph.input, after.graph.input),
        ("outputs", before.graph.output, after.graph.output),
    ):
        if [value.name for value in old] != [value.name for value in new]:
            raise NotSimplified(f"onnxslim changed the {what}")
    if opset_of(after) != opset_of(before):
        raise NotSimplified(f"onnxslim changed the opset to {opset_of(after)}")
    set_shapes(after, exported)
    clean_metadata(after)
    fit_ir_version(after, release)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(after, target, data_name=data_name)
    try:
        check_file(target)
    except SourceError as error:
        raise NotSimplified(f"onnxslim wrote a broken model: {error.found}") from error
