"""From a raw export to a clean, proven ONNX file: the half of a conversion that all sources share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tritonsmith.artifact import Artifact, Step, tool_versions
from tritonsmith.errors import EngineError, ParityError, SourceError, UsageError
from tritonsmith.files import refuse_overwrite, staging_folder
from tritonsmith.ingest.axes import match_output_axes, name_axes, rename_axes, set_shapes, tied_axes
from tritonsmith.ingest.clean import clean_metadata, fit_ir_version, fit_opset, inline_functions
from tritonsmith.ingest.parity import Case, Parity, compare_cases, draw_cases
from tritonsmith.ingest.rename import set_names
from tritonsmith.ingest.seeds import index_ranges
from tritonsmith.ingest.simplify import NotSimplified, simplify
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.targets import check_target, newest_opset
from tritonsmith.onnx_model import (
    DATA_SUFFIX,
    check_file,
    load_editable,
    load_model,
    model_bytes,
    model_files,
    model_sha256,
    opset_of,
    precision_of,
    save_model,
    signature_of,
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What the lineage says of the source itself."""

    sha256: str
    size_bytes: int
    export_s: float  # time spent in the reader


def finish(
    exported: Exported,
    out: Path,
    options: ConvertOptions | None = None,
    *,
    origin: Origin | None = None,
    force: bool = False,
    say: Say = lambda _: None,
) -> Artifact:
    """Clean a raw export, prove that it computes what the source computes, and put it at `out`.

    Without an `origin`, the raw file counts as the source. Weights past 2 GB lie beside `out`.

    Raises:
        SourceError: the export is broken, or the target server cannot read it.
        ParityError: it does not compute what the source computes; nothing is written.
        UsageError: `out` exists and `force` is not given, or an option is wrong.
    """
    options = options or ConvertOptions()
    check_request(out, options, force=force)
    started = time.perf_counter()
    if origin is None:
        origin = Origin(sha256=model_sha256(exported.raw), size_bytes=model_bytes(exported.raw), export_s=0.0)
    with staging_folder(out) as folder:
        plain, slim = folder / "plain" / out.name, folder / "slim" / out.name
        say("cleaning the exported graph and asking the source for its answers")
        data_name = _free_data_name(out)
        exported, cases = _write_plain(exported, plain, options, data_name)
        written = time.perf_counter()
        say("simplifying the graph and comparing it with the source")
        chosen, parity, refused = _choose(exported, plain, slim, cases, options.server, data_name)
        model = load_model(chosen, with_weights=False)
        check_target(model, options.server)
        inputs, outputs = signature_of(model)
        convert = _convert_step(exported, options, origin, plain, parity, written - started)
        simplified = _simplify_step(plain, chosen, convert, refused, time.perf_counter() - written)
        _publish(chosen, out)
    return Artifact(
        path=out,
        format="onnx",
        inputs=inputs,
        outputs=outputs,
        # Where one row's answer depends on another's, requests must not be joined.
        batched=exported.batched and parity.rows_independent is not False,
        precision=precision_of(model),
        steps=(convert, simplified),
    )


def check_request(out: Path, options: ConvertOptions, *, force: bool) -> None:
    """Raise UsageError for a target that may not be written, an unknown server or an unsuitable opset."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder", expected="the name of an .onnx file")
    refuse_overwrite(out, force=force)
    newest_opset(options.server, options.opset)


def separate_names(exported: Exported) -> Exported:
    """The same source with `_output` after each output name that an input has too: ONNX needs both apart."""
    inputs = {spec.name for spec in exported.inputs}
    renamed = {spec.name: f"{spec.name}_output" for spec in exported.outputs if spec.name in inputs}
    if not renamed:
        return exported
    reference = exported.reference

    def answer(arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return {renamed.get(name, name): array for name, array in reference(arrays).items()}

    outputs = tuple(replace(spec, name=renamed.get(spec.name, spec.name)) for spec in exported.outputs)
    return replace(exported, outputs=outputs, reference=answer)


def _write_plain(
    exported: Exported, path: Path, options: ConvertOptions, data_name: str
) -> tuple[Exported, tuple[Case, ...]]:
    """Write the clean graph; the export with its axes named, and the source's answers, come back."""
    model = inline_functions(load_editable(exported.raw))
    before = separate_names(exported)
    exported = name_axes(before)
    set_names(model, [spec.name for spec in exported.inputs], [spec.name for spec in exported.outputs])
    ranges = index_ranges(model, exported.inputs)
    cases = draw_cases(exported, ranges=ranges, seed=options.seed)
    tied = tied_axes(before, exported, [case.axes for case in cases])
    exported = rename_axes(exported, tied)
    cases = tuple(
        replace(case, axes={tied.get(n, n): length for n, length in case.axes.items()}) for case in cases
    )
    exported = match_output_axes(exported, [(case.axes, case.expected) for case in cases])
    clean_metadata(model)
    fit_ir_version(model, options.server)  # first: the converter wants weights of IR 3 among the inputs
    model = fit_opset(model, options)
    fit_ir_version(model, options.server)
    set_shapes(model, exported)
    path.parent.mkdir(parents=True)
    save_model(model, path, weights_from=exported.raw.parent, data_name=data_name)
    check_file(path)
    return exported, cases


def _choose(
    exported: Exported, plain: Path, slim: Path, cases: tuple[Case, ...], release: str, data_name: str
) -> tuple[Path, Parity, str | None]:
    """The simplified model where it is proved, else the plain one and the reason."""
    try:
        simplify(plain, slim, exported, release, data_name=data_name)
        return slim, compare_cases(slim, exported, cases), None
    except NotSimplified as error:
        refused = str(error)
    except (ParityError, EngineError) as error:
        refused = f"the simplified model is not right: {' '.join(str(error).split())}"
    try:
        return plain, compare_cases(plain, exported, cases), refused
    except EngineError as error:
        raise SourceError("ONNX Runtime cannot load the converted model", found=error.found) from error


def _convert_step(
    exported: Exported, options: ConvertOptions, origin: Origin, plain: Path, parity: Parity, seconds: float
) -> Step:
    model = load_model(plain, with_weights=False)
    return Step(
        name="convert",
        options={"kind": exported.kind, **asdict(options), **exported.options},
        input_sha256=origin.sha256,
        output_sha256=model_sha256(plain),
        tools={**exported.tools, **tool_versions("onnx", "onnxruntime", "numpy")},
        duration_s=origin.export_s + seconds,
        bytes_before=origin.size_bytes,
        bytes_after=model_bytes(plain),
        measured={
            "opset": opset_of(model),
            "ir_version": int(model.ir_version),
            "parity": parity.to_json(),
        },
    )


def _simplify_step(plain: Path, chosen: Path, convert: Step, refused: str | None, seconds: float) -> Step:
    before, after = (len(load_model(path, with_weights=False).graph.node) for path in (plain, chosen))
    return Step(
        name="simplify",
        options={},
        input_sha256=convert.output_sha256,
        output_sha256=model_sha256(chosen),
        tools=tool_versions("onnxslim"),
        duration_s=seconds,
        bytes_before=convert.bytes_after,
        bytes_after=model_bytes(chosen),
        measured={
            "used": refused is None,
            "refused": refused,
            "nodes_before": before,
            "nodes_after": after,
        },
    )


def _free_data_name(out: Path) -> str:
    """A name for the weights that no file has: an old model keeps its own until it is replaced."""
    count, name = 0, out.name + DATA_SUFFIX
    while (out.parent / name).exists():
        count += 1
        name = f"{out.name}.{count}{DATA_SUFFIX}"
    return name


def _publish(chosen: Path, out: Path) -> None:
    """Move the model to `out`, its weights first, and drop the weights of the model that was there."""
    stale: set[str] = set()
    if out.exists():
        try:
            stale = {file.name for file in model_files(out) if file != out}
        except SourceError:
            stale = set()  # what is replaced is no model, so it has no weights elsewhere
    for file in model_files(chosen)[1:]:
        file.replace(out.parent / file.name)
    chosen.replace(out)
    for name in sorted(stale):
        (out.parent / name).unlink(missing_ok=True)
