"""config.pbtxt: from an artifact and a recipe's [config] table, through Triton's own protobuf.

Here an artifact loses its batch axis, which `dims` leave out; `wiring.py` keeps to that for ensembles.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, Artifact, Json, TensorSpec
from tritonsmith.errors import RecipeError, RepositoryError
from tritonsmith.repository.rules import check_rules
from tritonsmith.repository.table import describe, fill_message, nearest
from tritonsmith.repository.warmup import Warmup

DEFAULT_MAX_BATCH_SIZE = 8
HEADER = "# Written by tritonsmith from the model and its recipe. Change those, not this file.\n"
READING_ORDER = ("name", "platform", "backend", "max_batch_size", "input", "output")

# Fields that a [config] table cannot set, and what to do instead.
DERIVED_FIELDS = {
    "name": "it is [model] name",
    "platform": "it follows from [model] backend",
    "backend": "it is [model] backend",
    "max_batch_size": "it is [model] max_batch_size",
    "ensemble_scheduling": "write an [[ensemble]]",
}
SCHEDULERS = {"dynamic_batching", "sequence_batching"}
INFERENCE_PRECISION = "INFERENCE_PRECISION_HINT"
ENSEMBLE_FIELDS = {
    "name": "it is the ensemble's name",
    "platform": 'it is always "ensemble"',
    "backend": "an ensemble has none",
    "max_batch_size": "it is the smallest of the steps",
    "input": "inputs are derived from the steps",
    "output": "outputs are derived from the steps",
    "dynamic_batching": "set it on the steps; an ensemble forms no batches",
    "sequence_batching": "set it on a step",
    "instance_group": "set it on the steps; an ensemble has no instances",
    "optimization": "set it on the steps",
    "model_warmup": "set it on the steps",
}
_DERIVED_TENSOR_FIELDS = ("data_type", "dims", "reshape", "label_filename")


def config_from_artifact(
    artifact: Artifact,
    *,
    name: str,
    backend: str,
    max_batch_size: int | None = None,
    extra: Mapping[str, Json] | None = None,
    labels: Mapping[str, str] | None = None,
    warmup: Warmup | None = None,
) -> model_config_pb2.ModelConfig:
    """The configuration that serves `artifact`.

    `max_batch_size` None is DEFAULT_MAX_BATCH_SIZE for a model with a batch axis and 0 for one without.
    `extra` is the recipe's [config] table; `labels` maps outputs to file names in the model's folder.

    Raises:
        RecipeError: a key, type or combination of `extra` that Triton would refuse, an output of
            `labels` that the model lacks.
        RepositoryError: a tensor that Triton cannot describe, a batch size that the model cannot take.
    """
    size = _batch_size(artifact, name, max_batch_size)
    config = model_config_pb2.ModelConfig(name=name, backend=backend, max_batch_size=size)
    batched = size > 0
    for spec in artifact.inputs:
        _describe_tensor(config.input.add(), spec, batched=batched)
    for spec in artifact.outputs:
        _describe_tensor(config.output.add(), spec, batched=batched)
    add_labels(config, labels or {})
    add_backend_parameters(config)
    extra = extra or {}
    if size > 1 and not SCHEDULERS & set(extra):
        config.dynamic_batching.SetInParent()  # as Triton itself completes a configuration
    fill_config(config, extra)
    _leave_sequence_tensors_to_triton(config)
    if warmup is not None:
        config.model_warmup.extend(warmup.entries)
    check_rules(config)
    return config


def add_backend_parameters(config: model_config_pb2.ModelConfig) -> None:
    """Set what a backend needs to be told to answer as the model file does."""
    if config.backend == "openvino":
        # Left to itself, OpenVINO computes FP32 in bfloat16 where the CPU has it.
        config.parameters[INFERENCE_PRECISION].string_value = "F32"
        if config.max_batch_size > 1:
            # The native backend refuses a batch smaller than max_batch_size without it.
            config.parameters["ENABLE_BATCH_PADDING"].string_value = "YES"


def inference_precision(parameters: Mapping[str, str]) -> str | None:
    """What OpenVINO computes floats in ("f32", "bf16"), by a configuration's parameters; None: its choice."""
    if parameters.get("HINT_BF16", "").upper() == "YES":
        return "bf16"
    return parameters.get(INFERENCE_PRECISION, "").lower() or None


def served_precision(backend: str, config: model_config_pb2.ModelConfig) -> str | None:
    """What the backend computes floats in: ONNX Runtime what the file says, OpenVINO as it is configured."""
    if backend != "openvino":
        return "f32"
    return inference_precision({key: value.string_value for key, value in config.parameters.items()})


def fill_config(
    config: model_config_pb2.ModelConfig, extra: Mapping[str, Json], *, place: str = "config"
) -> None:
    """Set the fields of a recipe's [config] table; `input` and `output` are found by name."""
    for key in ("input", "output"):
        if key in extra:
            _fill_tensors(config, key, extra[key], f"{place}.{key}")
    rest = {key: value for key, value in extra.items() if key not in ("input", "output")}
    fill_message(config, rest, place=place)


def check_config_table(
    extra: Mapping[str, Json],
    *,
    refused: Mapping[str, str] = DERIVED_FIELDS,
    place: str = "config",
) -> None:
    """Raise RecipeError for what is wrong with a [config] table whatever the model is.

    `refused` are the fields that it cannot set, with the reason.
    """
    for key, reason in refused.items():
        if key in extra:
            raise RecipeError(f"{place}.{key} cannot be set", fix=reason)
    scheduling = extra.get("ensemble_scheduling")
    if isinstance(scheduling, Mapping) and "step" in scheduling:
        raise RecipeError(f"{place}.ensemble_scheduling.step cannot be set", fix="write [[ensemble.step]]")
    rest = {key: value for key, value in extra.items() if key not in ("input", "output")}
    fill_message(model_config_pb2.ModelConfig(), rest, place=place)


def add_labels(config: model_config_pb2.ModelConfig, labels: Mapping[str, str]) -> None:
    """Name each output's label file."""
    outputs = {tensor.name: tensor for tensor in config.output}
    for output, filename in labels.items():
        if output not in outputs:
            guess = nearest(output, list(outputs))
            raise RecipeError(
                f"labels.{output}: model {config.name!r} has no such output",
                expected=f"one of {', '.join(outputs)}",
                fix=f"did you mean {guess!r}?" if guess else None,
            )
        outputs[output].label_filename = filename


def specs_from_config(
    config: model_config_pb2.ModelConfig,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], bool]:
    """The inputs, the outputs and whether there is a batch axis, as a client of the model sees them.

    Raises:
        RepositoryError: a tensor without a data type.
    """
    batched = config.max_batch_size > 0
    inputs = tuple(_spec_from(tensor, batched=batched) for tensor in config.input)
    return inputs, tuple(_spec_from(tensor, batched=batched) for tensor in config.output), batched


def text_from_config(config: model_config_pb2.ModelConfig) -> str:
    """The text of config.pbtxt: always the same for the same configuration."""
    order = {name: position for position, name in enumerate(READING_ORDER)}
    fields = sorted(
        (field for field, _ in config.ListFields()),
        key=lambda field: (order.get(field.name, len(order)), field.number),
    )
    blocks = {field.name: _text_of_field(config, field.name) for field in fields}
    if "max_batch_size" not in blocks:
        before = "backend" if config.backend else "platform"
        blocks = _insert_after(blocks, before, "max_batch_size", "max_batch_size: 0\n")
    return HEADER + "".join(blocks.values())


def config_from_text(text: str, *, place: str = "config.pbtxt") -> model_config_pb2.ModelConfig:
    """Parse the text of a config.pbtxt; `place` names it in errors.

    Raises:
        RepositoryError: with protobuf's own line and column.
    """
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(
            f"{place} cannot be read", found=error, expected="Triton's ModelConfig in protobuf text format"
        ) from error


def _leave_sequence_tensors_to_triton(config: model_config_pb2.ModelConfig) -> None:
    """Triton fills a sequence's controls and carries its states: clients neither send nor get them."""
    batching = config.sequence_batching
    places = [("control_input", control.name, config.input) for control in batching.control_input]
    for state in batching.state:
        places += [("state", state.input_name, config.input), ("state", state.output_name, config.output)]
    for field, name, tensors in places:
        index = next((index for index, tensor in enumerate(tensors) if tensor.name == name), None)
        if index is None:
            raise RecipeError(
                f"config.sequence_batching.{field} names {name!r}, which the model has not",
                found=f"{', '.join(tensor.name for tensor in tensors)} left of the model's own",
            )
        del tensors[index]


def _batch_size(artifact: Artifact, name: str, wanted: int | None) -> int:
    if wanted is None:
        return DEFAULT_MAX_BATCH_SIZE if artifact.batched else 0
    if wanted < 0:
        raise RepositoryError(
            f"model {name!r}: max_batch_size is negative", found=wanted, expected="0 or more"
        )
    if wanted > 0 and not artifact.batched:
        raise RepositoryError(
            f"model {name!r} has no batch axis",
            found=f"max_batch_size {wanted}, and {'; '.join(map(str, artifact.inputs + artifact.outputs))}",
            expected="max_batch_size 0",
            fix="leave max_batch_size out, or export the model with a free first axis shared by all tensors",
        )
    return wanted


def _describe_tensor(
    tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput, spec: TensorSpec, *, batched: bool
) -> None:
    tensor.name = spec.name
    tensor.data_type = model_config_pb2.DataType.Value(dtypes.BY_NAME[spec.dtype].config)
    axes = spec.shape[1:] if batched else spec.shape
    if batched and spec.shape[:1] != (BATCH_AXIS,):
        raise RepositoryError(f"{spec} has no batch axis, but the model is batched")
    dims = [-1 if isinstance(axis, str) else axis for axis in axes]
    if 0 in dims:
        raise RepositoryError(f"{spec} has an axis of length 0, which Triton cannot describe")
    tensor.dims.extend(dims or [1])
    # model_config_utils.cc refuses an empty reshape where max_batch_size is 0: a scalar stays [1] there.
    if not dims and batched:
        tensor.reshape.SetInParent()


def _spec_from(
    tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput, *, batched: bool
) -> TensorSpec:
    axes = tuple(f"{tensor.name}_{index}" if dim < 0 else dim for index, dim in enumerate(tensor.dims))
    kind = model_config_pb2.DataType.Name(tensor.data_type)
    if kind not in dtypes.BY_CONFIG:
        raise RepositoryError(
            f"tensor {tensor.name!r} has no data type in config.pbtxt",
            found=kind,
            expected=f"data_type: one of {', '.join(dtypes.BY_CONFIG)}",
        )
    return TensorSpec(
        name=tensor.name, dtype=dtypes.BY_CONFIG[kind].name, shape=(BATCH_AXIS, *axes) if batched else axes
    )


def _fill_tensors(config: model_config_pb2.ModelConfig, key: str, entries: Json, at: str) -> None:
    """`[[config.input]]`: a tensor's name and what is not derived from the model (format, optional...)."""
    if not isinstance(entries, list | tuple):
        raise RecipeError(f"{at} has the wrong type", found=describe(entries), expected="an array")
    tensors = {tensor.name: tensor for tensor in getattr(config, key)}
    for index, entry in enumerate(entries):
        place = f"{at}[{index}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise RecipeError(f"{place} has no name", expected=f"one of {', '.join(tensors)}")
        name = str(entry["name"])
        if name not in tensors:
            guess = nearest(name, list(tensors))
            raise RecipeError(
                f"{place}: the model has no {key} {name!r}",
                expected=f"one of {', '.join(tensors)}",
                fix=f"did you mean {guess!r}?" if guess else None,
            )
        for derived in _DERIVED_TENSOR_FIELDS:
            if derived in entry:
                raise RecipeError(f"{place}.{derived} cannot be set", fix="it is derived from the model")
        fill_message(tensors[name], entry, place=place)


def _text_of_field(config: model_config_pb2.ModelConfig, field: str) -> str:
    part = model_config_pb2.ModelConfig()
    others = [other.name for other, _ in config.ListFields() if other.name != field]
    part.CopyFrom(config)
    for other in others:
        part.ClearField(other)
    return str(text_format.MessageToString(part, as_utf8=True, use_short_repeated_primitives=True))


def _insert_after(blocks: dict[str, str], before: str, name: str, text: str) -> dict[str, str]:
    """`max_batch_size: 0` is protobuf's default, which it does not print; a reader should see it."""
    result: dict[str, str] = {}
    for key, block in blocks.items():
        result[key] = block
        if key == before:
            result[name] = text
    return result
