"""ONNX files against the configuration that serves them and the ONNX Runtime that opens them.

What the native backend accepts is in the onnxruntime backend's `src/onnxruntime_utils.cc`
(CompareDimsSupported): a batching model's first axis must be free, an input's fixed axes must be the
configuration's, and an output's shape must be exactly it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from tritonclient.grpc import model_config_pb2

from tritonsmith import dtypes, onnx_model
from tritonsmith.artifact import TensorSpec
from tritonsmith.containers import Container
from tritonsmith.errors import SourceError
from tritonsmith.files import path_inside
from tritonsmith.lint.files import model_filename
from tritonsmith.lint.findings import Finding, error_at, finding_from_error
from tritonsmith.lint.scan import Deployment, Model, Variant
from tritonsmith.repository.names import served_versions

QUANTIZE = "QuantizeLinear"


def check_onnx_files(
    model: Model, variants: tuple[Variant, ...], deployment: Deployment
) -> Iterator[Finding]:
    """Every ONNX file that one of the configurations serves, each read once and without its weights."""
    for place, users in _users(model, variants).items():
        path = model.folder / place
        try:
            onnx_model.model_files(path)
            graph = onnx_model.load_model(path, with_weights=False)
            inputs, outputs = onnx_model.signature_of(graph)
        except SourceError as error:
            yield finding_from_error(error, model=model.name, place=place)
            continue
        if deployment.container is not None:
            yield from _check_reader(model, place, graph, deployment.container)
        for variant in users:
            for kind, tensors, specs in (
                ("input", variant.config.input, inputs),
                ("output", variant.config.output, outputs),
            ):
                yield from _check_tensors(model, variant, kind, tuple(tensors), specs)
            if runs_on_tensorrt(variant.config) and has_unsigned_activations(graph):
                yield _wrong_dialect(model, place, variant)


def has_unsigned_activations(graph: onnx.ModelProto) -> bool:
    """Whether a QuantizeLinear makes uint8: ONNX Runtime's dialect, which TensorRT refuses."""
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type != QUANTIZE:
            continue
        chosen = [attribute.i for attribute in node.attribute if attribute.name == "output_dtype"]
        zero_point = node.input[2] if len(node.input) > 2 else ""
        kind = types.get(zero_point) if zero_point else next(iter(chosen), onnx.TensorProto.UINT8)
        if kind in (onnx.TensorProto.UINT8, onnx.TensorProto.UNDEFINED):
            return True
    return False


def runs_on_tensorrt(config: model_config_pb2.ModelConfig) -> bool:
    """Whether ONNX Runtime hands the graph to TensorRT on a GPU."""
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    return any(accelerator.name == "tensorrt" for accelerator in accelerators)


def _users(model: Model, variants: tuple[Variant, ...]) -> dict[str, list[Variant]]:
    """The ONNX files that are there -> the configurations that serve them."""
    users: dict[str, list[Variant]] = {}
    for variant in variants:
        name = model_filename(variant)
        if variant.backend not in ("onnxruntime", "openvino") or not name or not name.endswith(".onnx"):
            continue
        for version in served_versions(variant.config, model.versions):
            path = path_inside(model.folder / str(version), name)
            if path is None:
                continue  # check_files says so
            file = path / name if path.is_dir() else path  # a folder keeps the weights beside the graph
            if file.is_file():
                users.setdefault(file.relative_to(model.folder).as_posix(), []).append(variant)
    return users


def _check_reader(
    model: Model, place: str, graph: onnx.ModelProto, container: Container
) -> Iterator[Finding]:
    if container.opset is None or container.ir_version is None:
        yield Finding(
            severity="warning",
            model=model.name,
            place=place,
            what=f"which opset the ONNX Runtime of {container.release} reads is not known here",
            found=f"opset {onnx_model.opset_of(graph)}, IR version {graph.ir_version}",
        )
        return
    for what, found, newest in (
        ("opset", onnx_model.opset_of(graph), container.opset),
        ("IR version", int(graph.ir_version), container.ir_version),
    ):
        if found > newest:
            yield error_at(
                model.name,
                place,
                f"the {what} is newer than container {container.release} reads",
                found=f"{what} {found}",
                expected=f"at most {newest} (ONNX Runtime {container.onnxruntime})",
                fix=f"build it with --server {container.release}, or take a newer container",
            )


def _check_tensors(
    model: Model,
    variant: Variant,
    kind: str,
    tensors: tuple[model_config_pb2.ModelInput | model_config_pb2.ModelOutput, ...],
    specs: tuple[TensorSpec, ...],
) -> Iterator[Finding]:
    own = {spec.name: spec for spec in specs}
    for tensor in tensors:
        if tensor.name not in own:
            yield error_at(
                model.name,
                variant.place,
                f"the ONNX file has no {kind} {tensor.name!r}",
                expected=f"one of {', '.join(own)}",
            )
            continue
        spec = own[tensor.name]
        named = f"{kind} {tensor.name!r}"
        data_type = model_config_pb2.DataType.Name(tensor.data_type)
        wanted = dtypes.BY_NAME[spec.dtype].config
        if data_type != wanted:
            yield error_at(
                model.name,
                variant.place,
                f"{named} has another data type in the ONNX file",
                found=data_type,
                expected=wanted,
            )
        yield from _check_shape(model, variant, kind, tensor, spec)
    if kind == "input" and tensors:
        given = {tensor.name for tensor in tensors} | _fed_by_triton(variant.config)
        for name in own.keys() - given:
            yield error_at(
                model.name,
                variant.place,
                f"input {name!r} of the ONNX file is not given",
                expected=f"an input {own[name]}",
            )


def _check_shape(
    model: Model,
    variant: Variant,
    kind: str,
    tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput,
    spec: TensorSpec,
) -> Iterator[Finding]:
    dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    axes = [-1 if isinstance(axis, str) else axis for axis in spec.shape]
    size = variant.config.max_batch_size
    named = f"{kind} {tensor.name!r}"
    if not axes and size == 0:
        return
    if size > 0 and axes[:1] != [-1]:
        yield error_at(
            model.name,
            variant.place,
            f"max_batch_size is {size}, but the ONNX file has no batch axis at {named}",
            found=f"{axes} in the file",
            expected="a free first axis, or max_batch_size: 0 with the whole shape in dims",
            fix="export the model with a free first axis, or set max_batch_size to 0",
        )
        return
    full = [-1, *dims] if size > 0 else dims
    if _agree(kind, full, axes):
        return
    fix = None
    if size > 0 and len(dims) == len(axes):
        fix = f"leave the batch axis out of dims: {axes[1:]}; max_batch_size adds it"
    elif size == 0 and len(dims) + 1 == len(axes):
        fix = f"write the whole shape, {axes}, or give the model a max_batch_size"
    yield error_at(
        model.name,
        variant.place,
        f"the dims of {named} do not fit the ONNX file",
        found=f"{full}, with the batch axis that max_batch_size adds" if size > 0 else str(full),
        expected=str(axes),
        fix=fix,
    )


def _agree(kind: str, dims: list[int], axes: list[int]) -> bool:
    if kind == "output":
        return dims == axes
    return len(dims) == len(axes) and all(axis in (-1, dim) for dim, axis in zip(dims, axes, strict=True))


def _fed_by_triton(config: model_config_pb2.ModelConfig) -> set[str]:
    batching = config.sequence_batching
    fed = {control.name for control in batching.control_input}
    fed |= {state.input_name for state in batching.state}
    return fed | {name for entry in config.batch_input for name in entry.target_name}


def _wrong_dialect(model: Model, place: str, variant: Variant) -> Finding:
    return error_at(
        model.name,
        place,
        f"activations are quantized to uint8, and {variant.place} hands the graph to TensorRT",
        expected="INT8 in TensorRT's dialect: symmetric int8 activations",
        fix="quantize with dialect=tensorrt, or leave the accelerator out",
    )
