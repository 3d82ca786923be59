"""The files that a configuration needs: versions, models, labels, warm-up."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tritonclient.grpc import model_config_pb2

from tritonsmith import dtypes
from tritonsmith.files import path_inside
from tritonsmith.lint.findings import Finding, error_at, leads_out
from tritonsmith.lint.scan import DEFAULT_FILES, Model, Variant
from tritonsmith.repository.entry import WARMUP_FOLDER
from tritonsmith.repository.names import served_versions


def check_files(model: Model, variant: Variant) -> Iterator[Finding]:
    """What is missing beside a configuration."""
    yield from _check_versions(model, variant)
    for version in served_versions(variant.config, model.versions):
        folder = model.folder / str(version)
        for name in _needed_files(variant):
            path = path_inside(folder, name)
            if path is None:
                yield leads_out(model.name, variant.place, name)
            elif not path.exists():
                held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
                yield error_at(
                    model.name,
                    f"{version}/{name}",
                    f"the file that {variant.place} needs is missing",
                    found=f"{', '.join(held) or 'nothing'} in {version}/",
                    fix="build the model, or name the file in default_model_filename",
                )
    yield from _check_labels(model, variant)
    yield from _check_warmup(model, variant)


def model_filename(variant: Variant) -> str | None:
    """The file in a version's folder that the backend opens; None where only the backend knows."""
    return variant.config.default_model_filename or DEFAULT_FILES.get(variant.backend)


def _needed_files(variant: Variant) -> Iterator[str]:
    if variant.backend in ("ensemble", "tensorrt"):
        return
    name = model_filename(variant)
    if name is not None:
        yield name
        if variant.backend == "openvino" and name.endswith(".xml"):
            yield name.removesuffix(".xml") + ".bin"


def _check_versions(model: Model, variant: Variant) -> Iterator[Finding]:
    wanted = set(variant.config.version_policy.specific.versions)
    if absent := sorted(wanted - set(model.versions)):
        yield Finding(
            severity="warning" if wanted & set(model.versions) else "error",
            model=model.name,
            place=variant.place,
            what="version_policy.specific names versions that are not there",
            found=str(absent),
            expected=f"some of {list(model.versions)}",
        )
    elif not model.versions:
        yield error_at(
            model.name,
            "",
            "there is no version folder",
            expected=f"{model.name}/1/ with the model",
            fix="build the model first",
        )


def _check_labels(model: Model, variant: Variant) -> Iterator[Finding]:
    for tensor in variant.config.output:
        if not tensor.label_filename:
            continue
        path = path_inside(model.folder, tensor.label_filename)
        if path is None:
            yield leads_out(model.name, variant.place, tensor.label_filename)
            continue
        if not path.is_file():
            yield error_at(
                model.name,
                tensor.label_filename,
                f"the label file of output {tensor.name!r} is missing",
                fix="add it, or leave label_filename out",
            )
            continue
        lines = len(path.read_bytes().splitlines())
        last = tensor.dims[-1] if tensor.dims else -1
        if last > 0 and lines != last:
            yield Finding(
                severity="warning",
                model=model.name,
                place=tensor.label_filename,
                what=f"the labels do not fit output {tensor.name!r}: classes would be misnamed",
                found=f"{lines} lines",
                expected=f"{last} lines, one for each value",
            )


def _check_warmup(model: Model, variant: Variant) -> Iterator[Finding]:
    for entry in variant.config.model_warmup:
        for name, tensor in entry.inputs.items():
            if tensor.WhichOneof("input_data_type") != "input_data_file":
                continue
            place = f"{WARMUP_FOLDER}/{tensor.input_data_file}"
            path = path_inside(model.folder / WARMUP_FOLDER, tensor.input_data_file)
            expected = _warmup_bytes(tensor)
            if path is None:
                yield leads_out(model.name, variant.place, tensor.input_data_file)
            elif not path.is_file():
                yield error_at(
                    model.name,
                    place,
                    f"the warm-up file of input {name!r} is missing",
                    fix="build the model again, or leave model_warmup out",
                )
            elif expected is not None and path.stat().st_size < expected:
                yield error_at(
                    model.name,
                    place,
                    f"the warm-up file of input {name!r} is too short: the model would not load",
                    found=f"{path.stat().st_size} bytes",
                    expected=f"{expected} bytes",
                )


def _warmup_bytes(tensor: model_config_pb2.ModelWarmup.Input) -> int | None:
    data_type = dtypes.BY_CONFIG.get(model_config_pb2.DataType.Name(tensor.data_type))
    if data_type is None or data_type.name == "string":
        return None
    return math.prod(int(dim) for dim in tensor.dims) * data_type.numpy.itemsize
