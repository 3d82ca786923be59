"""Ensembles: their steps exist, their tensors connect, and their batches fit the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from tritonsmith.errors import RecipeError, RepositoryError
from tritonsmith.lint.findings import Finding, error_at, finding_from_error
from tritonsmith.lint.scan import Model, Variant
from tritonsmith.repository.ensemble import EnsembleRequest, EnsembleStep, config_from_steps
from tritonsmith.repository.wiring import dims_agree


def check_ensemble(
    repository: Path, models: Mapping[str, Model], model: Model, variant: Variant
) -> Iterator[Finding]:
    """What is wrong with an ensemble; nothing for another model."""
    config = variant.config
    if not (config.platform == "ensemble" or config.HasField("ensemble_scheduling")):
        return
    if not config.ensemble_scheduling.step:
        yield error_at(model.name, variant.place, "the ensemble has no steps")
        return
    request = EnsembleRequest(
        name=model.name,
        repository=repository,
        steps=_in_order(config.ensemble_scheduling.step),
        inputs=tuple(tensor.name for tensor in config.input),
        outputs=tuple(tensor.name for tensor in config.output),
    )
    try:
        derived = config_from_steps(request)
    except (RepositoryError, RecipeError) as error:
        yield finding_from_error(error, model=model.name, place=variant.place)
        return
    yield from _check_batches(models, model, variant)
    for kind, own, theirs in (
        ("input", config.input, derived.input),
        ("output", config.output, derived.output),
    ):
        for tensor, wanted in zip(own, theirs, strict=True):
            yield from _check_tensor(model, variant, derived.max_batch_size, kind, tensor, wanted)


def _in_order(steps: Sequence[model_config_pb2.ModelEnsembling.Step]) -> tuple[EnsembleStep, ...]:
    """The steps, each after those that write what it reads: Triton takes them in any order."""
    waiting = [
        EnsembleStep(
            model=step.model_name,
            inputs=dict(step.input_map),
            outputs=dict(step.output_map),
            version=step.model_version if step.model_version > 0 else None,
        )
        for step in steps
    ]
    ordered: list[EnsembleStep] = []
    while waiting:
        unwritten = {tensor for step in waiting for tensor in step.outputs.values()}
        free = [step for step in waiting if not unwritten & set(step.inputs.values())]
        if not free:  # a cycle, which the wiring names
            return (*ordered, *waiting)
        ordered += free
        waiting = [step for step in waiting if step not in free]
    return tuple(ordered)


def _check_batches(models: Mapping[str, Model], model: Model, variant: Variant) -> Iterator[Finding]:
    size = variant.config.max_batch_size
    own = {other.target for other in model.targets}
    for step in variant.config.ensemble_scheduling.step:
        used = models[step.model_name].served(variant.target) if step.model_name in models else ()
        for other in used:
            most = other.config.max_batch_size
            # Where the ensemble has the target too, it is held against that one.
            elsewhere = variant.target is None and other.target in own
            if not elsewhere and 0 < most < size:
                yield error_at(
                    model.name,
                    variant.place,
                    f"the ensemble takes larger batches than its step {step.model_name!r}",
                    found=f"max_batch_size {size}, and {most} in {step.model_name}/{other.place}",
                    expected=f"at most {most}",
                )


def _check_tensor(
    model: Model,
    variant: Variant,
    derived_size: int,
    kind: str,
    own: model_config_pb2.ModelInput | model_config_pb2.ModelOutput,
    wanted: model_config_pb2.ModelInput | model_config_pb2.ModelOutput,
) -> Iterator[Finding]:
    names = [model_config_pb2.DataType.Name(tensor.data_type) for tensor in (own, wanted)]
    if own.data_type != wanted.data_type:
        yield error_at(
            model.name,
            variant.place,
            f"{kind} {own.name!r} has another data type than its steps",
            found=names[0],
            expected=names[1],
        )
    shapes = [
        [-1, *tensor.dims] if size > 0 else [*tensor.dims]
        for tensor, size in ((own, variant.config.max_batch_size), (wanted, derived_size))
    ]
    if not dims_agree(*shapes):
        yield error_at(
            model.name,
            variant.place,
            f"{kind} {own.name!r} has another shape than its steps",
            found=f"{shapes[0]}, the batch axis included",
            expected=str(shapes[1]),
        )
