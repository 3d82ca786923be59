"""What a container has, and what it has not: fields, backends, GPUs, security fixes."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message

from tritonsmith.containers import NO_TENSORFLOW_SINCE, SAFE_SINCE, SECURITY_FIXES, Container
from tritonsmith.engines.tensorrt.fit import capability_from_text
from tritonsmith.lint.findings import Finding, error_at
from tritonsmith.lint.scan import Deployment, Model, Variant

# Fields of model_config.proto that came after 24.10: the branches r24.10 to r26.07 of the repository
# triton-inference-server/common, compared field by field.
FIELDS_SINCE = (
    (("model_metrics",), "24.11"),
    (("ensemble_scheduling", "max_inflight_requests"), "25.11"),
)
YES = "YES"


def check_deployment(deployment: Deployment) -> Iterator[Finding]:
    """What is wrong with the container itself, and between it and the GPU."""
    container = deployment.container
    if container is None:
        return
    if container.release < SAFE_SINCE:
        missing = [release for release in SECURITY_FIXES if release > container.release]
        yield Finding(
            severity="warning",
            model="",
            place="",
            what=f"container {container.release} has known vulnerabilities",
            found=f"without the security fixes of {', '.join(missing)}",
            expected=f"{SAFE_SINCE} or later",
            fix="take a newer container",
        )
    if deployment.gpu is None:
        return
    if capability_from_text(deployment.gpu) < capability_from_text(container.oldest_gpu):
        yield Finding(
            severity="error",
            model="",
            place="",
            what=f"container {container.release} does not support the GPU",
            found=f"compute capability {deployment.gpu}",
            expected=f"{container.oldest_gpu} or newer",
            fix="take an older container or a newer GPU",
        )


def check_release(model: Model, variant: Variant, deployment: Deployment) -> Iterator[Finding]:
    """What the container lacks of what a configuration asks for."""
    container = deployment.container
    if variant.backend == "tensorflow":
        yield from _check_tensorflow(model, variant, container)
    if container is None:
        return
    for path, since in FIELDS_SINCE:
        if container.release < since and _is_set(variant.config, path):
            yield error_at(
                model.name,
                variant.place,
                f"{'.'.join(path)} is no field of container {container.release}, which refuses the file",
                expected=f"{since} or later",
                fix="leave the field out, or take a newer container",
            )
    if variant.backend == "openvino":
        yield from _check_openvino(model, variant)


def _check_tensorflow(model: Model, variant: Variant, container: Container | None) -> Iterator[Finding]:
    if container is not None and container.release < NO_TENSORFLOW_SINCE:
        return
    yield Finding(
        severity="error" if container is not None else "warning",
        model=model.name,
        place=variant.place,
        what=f"Triton has no TensorFlow backend since {NO_TENSORFLOW_SINCE}",
        found=variant.config.platform or variant.config.backend,
        fix="convert the SavedModel or Keras file: `tritonsmith build SOURCE --name "
        f"{model.name} --repository DIR`",
    )


def _check_openvino(model: Model, variant: Variant) -> Iterator[Finding]:
    """The native backend's ways, which the embedded one has not; bfloat16 is its own choice on such CPUs."""
    parameters = {key: value.string_value.upper() for key, value in variant.config.parameters.items()}
    if parameters.get("INFERENCE_PRECISION_HINT") == "F32":
        yield Finding(
            severity="warning",
            model=model.name,
            place=variant.place,
            what="the native OpenVINO backend does not read INFERENCE_PRECISION_HINT: "
            "on CPUs that have bfloat16 it may compute FP32 in it",
            fix="validate on such a machine: `tritonsmith validate ... --url grpc://host:8001`",
        )
    padded = YES in (parameters.get("ENABLE_BATCH_PADDING"), parameters.get("SKIP_OV_DYNAMIC_BATCHSIZE"))
    if variant.config.max_batch_size > 1 and not padded:
        yield error_at(
            model.name,
            variant.place,
            "the native OpenVINO backend refuses batches smaller than max_batch_size",
            expected='parameters { key: "ENABLE_BATCH_PADDING" value { string_value: "YES" } }',
        )


def _is_set(message: Message, path: tuple[str, ...]) -> bool:
    *above, last = path
    for name in above:
        message = getattr(message, name)
    return any(field.name == last for field, _ in message.ListFields())
