"""Steps that change how a graph is written, never what it computes: functions, metadata, opset, IR."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import inliner, version_converter

from tritonsmith.errors import SourceError
from tritonsmith.ingest.lower import help_converter
from tritonsmith.ingest.rename import subgraphs
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.targets import OLDEST_OPSET, find_server
from tritonsmith.onnx_model import opset_of

OLDEST_IR_VERSION = 8  # the first that every tool downstream writes and reads: 2021


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace calls of model-local functions by their bodies; few tools look into them."""
    return inliner.inline_local_functions(model) if model.functions else model


def clean_metadata(model: onnx.ModelProto) -> None:
    """Drop, in place, what exporters leave for debugging, and operator sets that no node uses.

    The model's own properties stay, save those of the PyTorch exporter.
    """
    model.doc_string = ""
    kept = [entry for entry in model.metadata_props if not entry.key.startswith("pkg.torch")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    used = {""}
    for graph in _all_graphs(model.graph):
        graph.doc_string = ""
        del graph.metadata_props[:]
        del graph.value_info[:]  # stale after renaming; every reader infers it again
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            used.add(_domain(node.domain))
        for item in (*graph.input, *graph.output, *graph.initializer):
            item.doc_string = ""
            del item.metadata_props[:]
    imports = {_domain(entry.domain): entry.version for entry in reversed(model.opset_import)}
    del model.opset_import[:]
    for domain in sorted(used):
        if domain in imports:
            model.opset_import.append(onnx.helper.make_opsetid(domain, imports[domain]))


def fit_opset(model: onnx.ModelProto, options: ConvertOptions) -> onnx.ModelProto:
    """The model at an opset that the target reads: the one asked for, else its own where that will do.

    A model that is too old stays so where onnx has no converter for it: ONNX Runtime reads it still.

    Raises:
        SourceError: it cannot be brought to the opset asked for, or to one that the server reads.
    """
    server = find_server(options.server)
    found = opset_of(model)
    wanted = options.opset or min(max(found, OLDEST_OPSET), server.opset)
    if wanted == found:
        return model
    help_converter(model, found, wanted)
    try:
        return version_converter.convert_version(model, wanted)
    except (RuntimeError, version_converter.ConvertError) as error:
        if options.opset is None and found < wanted:
            return model
        raise SourceError(
            f"the model cannot be brought from opset {found} to {wanted}",
            found=" ".join(str(error).split())[:300],
            expected=f"an opset that Triton {server.release} reads: at most {server.opset}",
            fix="export it again at that opset, or name a newer server",
        ) from error


def fit_ir_version(model: onnx.ModelProto, release: str) -> None:
    """Set the oldest IR version that the operator sets allow, or the model's own if the target reads it."""
    newest = find_server(release).ir_version
    model.ir_version = min(max(int(model.ir_version), OLDEST_IR_VERSION), newest)


def _all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for inner in subgraphs(graph):
        yield from _all_graphs(inner)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
