"""One configuration by itself: Triton core's rules (`src/model_config_utils.cc`), and names that are none."""

from __future__ import annotations

from collections.abc import Iterator

from tritonclient.grpc import model_config_pb2

from tritonsmith.lint.findings import Finding, error_at, finding_from_error
from tritonsmith.lint.scan import PLATFORM_BACKENDS, Model, Variant
from tritonsmith.repository.rules import broken_rules
from tritonsmith.repository.table import nearest

# Of NVIDIA's image, of tritonsmith's own, and those that clients of Triton's tests use.
BACKENDS = (
    *("dali", "ensemble", "fil", "identity", "onnxruntime", "openvino", "python", "pytorch", "repeat"),
    *("square", "tensorflow", "tensorrt", "tensorrtllm", "vllm"),
)


def check_fields(model: Model, variant: Variant) -> Iterator[Finding]:
    """What Triton refuses in this configuration, whatever files there are."""
    for error in broken_rules(variant.config):
        yield finding_from_error(error, model=model.name, place=variant.place)
    yield from _check_backend(model, variant)
    yield from _check_tensors(model, variant)


def _check_backend(model: Model, variant: Variant) -> Iterator[Finding]:
    config = variant.config
    if not variant.backend:
        unknown = config.platform or None
        guess = nearest(config.platform, list(PLATFORM_BACKENDS)) if unknown else None
        yield error_at(
            model.name,
            variant.place,
            "no backend is named",
            found=f"platform {unknown!r}, which Triton does not know" if unknown else None,
            expected=f"backend: one of {', '.join(BACKENDS)}",
            fix=f"did you mean {guess!r}?" if guess else None,
        )
    elif variant.backend not in BACKENDS:
        guess = nearest(variant.backend, BACKENDS)
        yield Finding(
            severity="warning",
            model=model.name,
            place=variant.place,
            what="NVIDIA's container has no backend of this name",
            found=variant.backend,
            expected=f"one of {', '.join(BACKENDS)}",
            fix=f"did you mean {guess!r}?" if guess else "bring the backend along (--backend-directory)",
        )


def _check_tensors(model: Model, variant: Variant) -> Iterator[Finding]:
    config = variant.config
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if not tensors:
            yield Finding(
                severity="warning",
                model=model.name,
                place=variant.place,
                what=f"no {kind} is described",
                fix="describe them: in production auto-completion is off, and nobody else does",
            )
        names = [tensor.name for tensor in tensors]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield error_at(model.name, variant.place, f"{kind} {name!r} is described twice")
        for index, tensor in enumerate(tensors):
            yield from _check_tensor(model, variant, f"{kind}[{index}]", tensor)


def _check_tensor(
    model: Model,
    variant: Variant,
    at: str,
    tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput,
) -> Iterator[Finding]:
    named = f"{at} ({tensor.name})" if tensor.name else at
    if not tensor.name:
        yield error_at(model.name, variant.place, f"{at} has no name")
    if tensor.data_type == model_config_pb2.TYPE_INVALID:
        yield error_at(model.name, variant.place, f"{named} has no data_type")
    if not tensor.dims:
        yield error_at(
            model.name, variant.place, f"{named} has no dims", expected="dims: [1] for one value a sample"
        )
    for dim in tensor.dims:
        if dim == 0 or dim < -1:
            yield error_at(
                model.name,
                variant.place,
                f"{named} has a dimension of {dim}",
                expected="lengths of 1 or more, -1 where free",
            )
    scalar = tensor.HasField("reshape") and not tensor.reshape.shape
    if scalar and variant.config.max_batch_size == 0:
        yield error_at(
            model.name,
            variant.place,
            f"{named} is reshaped to a scalar",
            expected="a shape, where max_batch_size is 0",
        )
