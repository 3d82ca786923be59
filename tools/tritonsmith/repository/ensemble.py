"""Ensembles: steps in order, tensors connected by name, everything else derived and checked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Json, Manifest, Step, sha256_of
from tritonsmith.errors import EnsembleError, RepositoryError
from tritonsmith.repository.config import (
    ENSEMBLE_FIELDS,
    add_labels,
    check_config_table,
    specs_from_config,
    text_from_config,
)
from tritonsmith.repository.entry import CONFIG_NAME, Entry, find_entry, publish, read_config
from tritonsmith.repository.labels import labels_from_files
from tritonsmith.repository.names import check_name, versions_of
from tritonsmith.repository.rules import check_rules
from tritonsmith.repository.table import fill_message, nearest
from tritonsmith.repository.wiring import EnsembleStep, Port, Wiring, dims_agree, wire_steps

__all__ = ["EnsembleRequest", "EnsembleStep", "config_from_steps", "publish_ensemble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleRequest:
    """An ensemble to publish into `repository`, where the models of its steps already are.

    `inputs` and `outputs` name the ensemble's own tensors, in order. None: the tensors that no step
    writes, and those that no step reads.
    """

    name: str
    repository: Path
    steps: tuple[EnsembleStep, ...]
    inputs: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    version: int | None = None
    force: bool = False
    config: Mapping[str, Json] = field(default_factory=dict)
    labels: Mapping[str, Path] = field(default_factory=dict)  # output -> label file


def publish_ensemble(request: EnsembleRequest, *, say: Callable[[str], None] = lambda _: None) -> Entry:
    """Derive the ensemble's configuration and publish it; unchanged, the version that is there.

    Raises:
        EnsembleError: a step or tensor that does not fit.
        RepositoryError: as `publish`.
    """
    started = time.perf_counter()
    config = config_from_steps(request)
    for step in request.steps:
        if not versions_of(request.repository / step.model):
            raise EnsembleError(
                f"ensemble {request.name!r}: model {step.model!r} has no published version",
                fix="build that model first",
            )
    inputs, outputs, batched = specs_from_config(config)
    labels = labels_from_files(request.labels, outputs).files
    fingerprint = _fingerprint(config, labels)
    found = find_entry(request.repository, request.name, fingerprint, request.version)
    if found is not None and not request.force:
        say(f"{request.name}: version {found.version} is up to date")
        return found
    manifest = Manifest(
        name=request.name,
        version=0,
        fingerprint=fingerprint,
        source="ensemble",
        source_sha256=fingerprint,
        inputs=inputs,
        outputs=outputs,
        batched=batched,
        precision="",
        backend="ensemble",
        files={},
        steps=(_lineage(request, fingerprint, time.perf_counter() - started),),
        gate=None,
        candidates=(),
    )
    say(f"{request.name}: publishing an ensemble of {len(request.steps)} steps")
    return publish(
        None,
        config,
        request.repository,
        manifest=manifest,
        version=request.version,
        force=request.force,
        labels=labels,
    )


def _fingerprint(config: model_config_pb2.ModelConfig, labels: Mapping[str, Path]) -> str:
    """Of all that an ensemble is: its configuration, and what its label files hold."""
    digest = hashlib.sha256(text_from_config(config).encode())
    for name, path in sorted(labels.items()):
        digest.update(f"\0{name}\0{sha256_of(path)}".encode())
    return digest.hexdigest()


def config_from_steps(request: EnsembleRequest) -> model_config_pb2.ModelConfig:
    """The ensemble's configuration, from the config.pbtxt of each step's model in the repository.

    Raises:
        EnsembleError: names the step and the tensor that does not fit, and says why.
        RecipeError: a field of the request's `config` that an ensemble cannot have.
    """
    check_name(request.name)
    check_config_table(request.config, refused=ENSEMBLE_FIELDS)
    configs = [_step_config(request, index, step) for index, step in enumerate(request.steps)]
    wiring = wire_steps(request.name, request.steps, configs, request.inputs, request.outputs)
    size, one_by_one = _batching(wiring, configs)
    config = model_config_pb2.ModelConfig(name=request.name, platform="ensemble", max_batch_size=size)
    for tensor in wiring.inputs:
        _describe(config.input.add(), tensor, wiring.readers[tensor], size=size, one_by_one=one_by_one)
    for tensor in wiring.outputs:
        _describe(config.output.add(), tensor, (wiring.writers[tensor],), size=size, one_by_one=one_by_one)
    for step in request.steps:
        config.ensemble_scheduling.step.add(
            model_name=step.model,
            model_version=step.version or -1,
            input_map=dict(step.inputs),
            output_map=dict(step.outputs),
        )
    fill_message(config, request.config)
    add_labels(config, {output: path.name for output, path in request.labels.items()})
    _check_cache(config, configs)
    check_rules(config)
    return config


def _step_config(request: EnsembleRequest, index: int, step: EnsembleStep) -> model_config_pb2.ModelConfig:
    place = f"ensemble {request.name!r}: step {index + 1}"
    if step.model == request.name:
        raise EnsembleError(f"{place} is the ensemble itself", fix="name another model")
    check_name(step.model)
    folder = request.repository / step.model
    if not (folder / CONFIG_NAME).is_file():
        models = [path.parent.name for path in sorted(request.repository.glob(f"*/{CONFIG_NAME}"))]
        guess = nearest(step.model, models)
        raise EnsembleError(
            f"{place}: the repository has no model {step.model!r}",
            found=f"models in {request.repository}: {', '.join(models) or 'none'}",
            fix=f"did you mean {guess!r}?" if guess else "build that model first",
        )
    versions = versions_of(folder)
    if step.version is not None and versions and step.version not in versions:
        raise EnsembleError(
            f"{place}: model {step.model!r} has no version {step.version}",
            found=f"versions {', '.join(map(str, versions))}",
        )
    try:
        return read_config(request.repository, step.model)
    except RepositoryError as error:
        raise EnsembleError(f"{place}: {error.what}", found=error.found, expected=error.expected) from error


def _batching(wiring: Wiring, configs: Sequence[model_config_pb2.ModelConfig]) -> tuple[int, bool]:
    """The ensemble's max_batch_size, and whether a batch must pass through it one sample at a time.

    The smallest of the steps that batch. Where a step does not, the ensemble batches only if that
    step's tensors have a free first axis in the place of the batch axis.
    """
    sizes = [config.max_batch_size for config in configs if config.max_batch_size > 0]
    if not sizes or len(sizes) == len(configs):
        return (min(sizes) if sizes else 0), False
    for tensor, readers in wiring.readers.items():
        writer = wiring.writers.get(tensor)
        first, *others = [*([writer] if writer else []), *readers]
        if not all(dims_agree(first.full_dims, other.full_dims) for other in others):
            return 0, True
    visible = [port for tensor in wiring.inputs for port in wiring.readers[tensor]]
    visible += [wiring.writers[tensor] for tensor in wiring.outputs]
    if all(port.full_dims[:1] == (-1,) and len(port.full_dims) > 1 for port in visible):
        return min(sizes), False
    return 0, False


def _describe(
    tensor: model_config_pb2.ModelInput | model_config_pb2.ModelOutput,
    name: str,
    ports: Sequence[Port],
    *,
    size: int,
    one_by_one: bool,
) -> None:
    """The type and shape that all `ports` agree on; a fixed axis wins over a free one."""
    shapes = [port.dims if one_by_one else port.full_dims for port in ports]
    if len({len(shape) for shape in shapes}) > 1:
        raise EnsembleError(
            f"tensor {name!r} has a batch axis for one step and none for another, and so cannot be described",
            found=", and ".join(map(str, ports)),
            expected="steps that all batch, or that none do",
            fix="give every step a max_batch_size",
        )
    merged = [max(axis) for axis in zip(*shapes, strict=True)]
    tensor.name = name
    tensor.data_type = ports[0].data_type
    tensor.dims.extend(merged[1:] if size > 0 else merged)


def _check_cache(config: model_config_pb2.ModelConfig, steps: Sequence[model_config_pb2.ModelConfig]) -> None:
    decoupled = [step.name for step in steps if step.model_transaction_policy.decoupled]
    if config.response_cache.enable and decoupled:
        raise EnsembleError(
            f"ensemble {config.name!r}: a response cache cannot hold the answers of a decoupled model",
            found=", ".join(decoupled),
            fix="leave response_cache out",
        )


def _lineage(request: EnsembleRequest, fingerprint: str, duration_s: float) -> Step:
    models: list[Json] = [
        {
            "model": step.model,
            "version": step.version or versions_of(request.repository / step.model)[-1],
            "config_sha256": sha256_of(request.repository / step.model / CONFIG_NAME),
        }
        for step in request.steps
    ]
    return Step(
        name="ensemble",
        options={"steps": models},
        input_sha256=fingerprint,
        output_sha256=fingerprint,
        tools={},
        duration_s=duration_s,
        bytes_before=0,
        bytes_after=0,
    )
