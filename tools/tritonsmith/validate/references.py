"""What a served model is compared with: its source, its published file, or an ensemble's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import Manifest, TensorSpec
from tritonsmith.client import Client, Signature
from tritonsmith.engines import ENGINES, open_session
from tritonsmith.errors import RepositoryError, UsageError, ValidationError
from tritonsmith.ingest.parity import TOLERANCES
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.manifest import MANIFEST_NAME, read_manifest
from tritonsmith.repository.config import inference_precision
from tritonsmith.repository.names import versions_of

Arrays = Mapping[str, NDArray[Any]]
Say = Callable[[str], None]

# Of an output's scale: reduced precision rounds differently on other processors, kernels and batches.
REDUCED_TOLERANCES = {"fp16": 5e-3, "bf16": 5e-3, "int8": 5e-2, "int4": 5e-2}
DEFAULT_FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}
WIRE_NAMES = {data_type.wire: data_type.name for data_type in dtypes.DATA_TYPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Something to compare with: outputs by name for one request's inputs.

    `tolerances` by output: 0 for what must be equal, None for what is recorded and not judged.
    """

    name: str
    run: Callable[[Arrays], dict[str, NDArray[Any]]]
    tolerances: Mapping[str, float | None]


def is_ensemble(signature: Signature) -> bool:
    return "ensemble_scheduling" in signature.config


def published_version(repository: Path, name: str) -> int | None:
    """The newest version in the repository, or None where none has files (an ensemble made by hand).

    Raises:
        RepositoryError: no such model in the repository.
    """
    folder = repository / name
    if not (folder / "config.pbtxt").is_file():
        known = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
        raise RepositoryError(
            f"{repository} has no model {name!r}", found=", ".join(known) or "no models at all"
        )
    return max(versions_of(folder), default=None)


def published_manifest(repository: Path, name: str) -> Manifest | None:
    """The manifest of the newest version; None for a model that tritonsmith did not build."""
    version = published_version(repository, name)
    path = repository / name / str(version) / MANIFEST_NAME
    return read_manifest(path) if path.is_file() else None


@contextmanager
def open_references(
    repository: Path,
    signature: Signature,
    client: Client,
    against: str | None,
    options: ConvertOptions,
    say: Say,
) -> Iterator[tuple[Reference, ...]]:
    """Everything that the model can be compared with, the source first.

    Raises:
        UsageError: a source for an ensemble.
        ValidationError: nothing at all, or a source that is another model.
    """
    if is_ensemble(signature):
        if against is not None:
            raise UsageError(
                f"{signature.model!r} is an ensemble, which has no source of its own",
                fix="leave --against out: an ensemble is compared with its steps; validate its models each",
            )
        yield (_steps_reference(repository, signature, client),)
        return
    manifest = published_manifest(repository, signature.model)
    with TemporaryDirectory(prefix="tritonsmith-validate-") as folder:
        references = []
        if against is not None:
            say(f"reading {against}")
            references.append(_source_reference(signature, manifest, against, Path(folder), options))
        known = signature.config.get("backend") in (*ENGINES, "tensorrt")
        if known and (file := _file_of(signature, manifest)) is not None:
            references.append(_file_reference(repository, signature, manifest, *file))
        if not references:
            raise ValidationError(
                f"there is nothing to compare {signature.model!r} with",
                found=f"backend {signature.config.get('backend')!r}, whose models do not run in this process",
                fix="name its source with --against",
            )
        yield tuple(references)


def _source_reference(
    signature: Signature, manifest: Manifest | None, against: str, folder: Path, options: ConvertOptions
) -> Reference:
    from tritonsmith.ingest import export_source

    exported = export_source(against, folder, options)
    served = {"inputs": signature.inputs, "outputs": signature.outputs}
    trained = {"inputs": exported.inputs, "outputs": exported.outputs}
    for side, tensors in served.items():
        names = {spec.name for spec in trained[side]}
        if unknown := [tensor.name for tensor in tensors if tensor.name not in names]:
            raise ValidationError(
                f"{against} is not the source of {signature.model!r}: it has no {side[:-1]} {unknown[0]!r}",
                found=f"{side} {sorted(names)}",
                expected=f"{side} {sorted(tensor.name for tensor in tensors)}",
            )
    wanted = {spec.name: dtypes.BY_NAME[spec.dtype].numpy for spec in exported.inputs}

    def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
        arrays = {name: array.astype(wanted[name], copy=False) for name, array in inputs.items()}
        outputs = exported.reference(_reshaped_inputs(signature, arrays, exported.inputs))
        return _reshaped_outputs(signature, {name: np.asarray(array) for name, array in outputs.items()})

    reduced = manifest is not None and (manifest.precision in REDUCED_TOLERANCES or manifest.compressed)
    tolerances = dict.fromkeys(_exact(signature), None) if reduced else _exact(signature)
    return Reference(name="source", run=run, tolerances=tolerances)


def _file_reference(
    repository: Path, signature: Signature, manifest: Manifest | None, file: str, precision: str
) -> Reference:
    backend = str(signature.config["backend"])
    parameters = {key: entry["string_value"] for key, entry in signature.config.get("parameters", {}).items()}
    session = open_session(
        repository / signature.model / signature.version / file,
        engine="onnxruntime" if backend == "tensorrt" else backend,
        precision=inference_precision(parameters),
    )

    specs = () if manifest is None else manifest.inputs

    def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
        return _reshaped_outputs(signature, session.run(_reshaped_inputs(signature, inputs, specs)))

    return Reference(name="file", run=run, tolerances=_tolerances(signature, [precision]))


def _file_of(signature: Signature, manifest: Manifest | None) -> tuple[str, str] | None:
    """The published file that the server's answers come from, and its precision; of a plan, its ONNX file.

    None for a plan that tritonsmith did not order.
    """
    backend = str(signature.config["backend"])
    served = signature.config.get("default_model_filename") or DEFAULT_FILES.get(backend, "model.plan")
    targets = () if manifest is None else manifest.targets
    plans = {plan["file"]: plan for target in targets for plan in target.plans}
    if served in plans:
        return str(plans[served]["source"]), str(plans[served]["precision"])
    for target in targets:
        kept = [item for item in target.candidates if item["file"] and item["chosen"]]
        files = {str(item["file"]): str(item["precision"]) for item in kept}
        if served in files:
            return served, files[served]
        if files and backend == "tensorrt" == target.backend and served.startswith(f"{target.name}."):
            # A view's plan: which candidate it was built from stands in the cache of the GPU machine.
            return next(iter(files)), max(files.values(), key=_looseness)
    if backend == "tensorrt":
        return None
    return served, "fp32" if manifest is None else manifest.precision


def _looseness(precision: str) -> float:
    return REDUCED_TOLERANCES.get(precision, 0.0)


def _steps_reference(repository: Path, signature: Signature, client: Client) -> Reference:
    steps = signature.config["ensemble_scheduling"]["step"]
    models = [client.model(step["model_name"], _step_version(step)) for step in steps]
    manifests = [published_manifest(repository, step["model_name"]) for step in steps]

    def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
        tensors = dict(inputs)
        waiting = list(zip(steps, models, strict=True))
        while waiting:
            ready = [pair for pair in waiting if all(name in tensors for name in _reads(pair[0]))]
            if not ready:
                raise ValidationError(
                    f"the steps of {signature.model!r} cannot be run one by one",
                    found=f"no tensor {sorted(_reads(waiting[0][0]) - set(tensors))}",
                )
            for step, model in ready:
                arrays = {name: tensors[tensor] for name, tensor in step["input_map"].items()}
                outputs = model(arrays, outputs=list(step["output_map"]))
                tensors.update({step["output_map"][name]: array for name, array in outputs.items()})
            waiting = [pair for pair in waiting if pair not in ready]
        return {tensor.name: tensors[tensor.name] for tensor in signature.outputs}

    precisions = ["fp32", *(manifest.precision for manifest in manifests if manifest is not None)]
    return Reference(name="steps", run=run, tolerances=_tolerances(signature, precisions))


def step_models(signature: Signature) -> list[str]:
    """The models of an ensemble's steps, each once."""
    steps = signature.config["ensemble_scheduling"]["step"]
    return list(dict.fromkeys(str(step["model_name"]) for step in steps))


def _reads(step: Mapping[str, Any]) -> set[str]:
    return set(step["input_map"].values())


def _step_version(step: Mapping[str, Any]) -> int | None:
    version = int(step.get("model_version", -1))
    return None if version < 0 else version


def _exact(signature: Signature) -> dict[str, float | None]:
    """The tolerance of each output by its data type, as conversion holds it."""
    return {t.name: TOLERANCES.get(WIRE_NAMES[t.datatype], 0.0) for t in signature.outputs}


def _tolerances(signature: Signature, precisions: list[str]) -> dict[str, float | None]:
    widest = max(REDUCED_TOLERANCES.get(precision, 0.0) for precision in precisions)
    return {name: max(exact, widest) if exact else 0.0 for name, exact in _exact(signature).items()}


def _reshaped_inputs(
    signature: Signature, inputs: Arrays, specs: tuple[TensorSpec, ...]
) -> dict[str, NDArray[Any]]:
    """Inputs as the model file takes them: Triton's `reshape` says how, without the batch axis.

    Where there is no batch axis, Triton refuses an empty `reshape`: `specs` say what is of rank 0.
    """
    shapes = _reshapes(signature, "input")
    if not signature.max_batch_size:
        shapes.update({spec.name: () for spec in specs if not spec.shape})
    lead = 1 if signature.max_batch_size else 0
    return {
        name: array.reshape(array.shape[:lead] + shapes[name]) if name in shapes else array
        for name, array in inputs.items()
    }


def _reshaped_outputs(signature: Signature, outputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The model file's outputs as Triton answers them."""
    shapes = _reshapes(signature, "output")
    lead = 1 if signature.max_batch_size else 0
    answered = {}
    for tensor in signature.outputs:
        array = outputs[tensor.name]
        if tensor.name in shapes:
            array = array.reshape(array.shape[:lead] + tensor.shape[lead:])
        elif not array.ndim:
            array = array.reshape(1)
        answered[tensor.name] = array
    return answered


def _reshapes(signature: Signature, key: str) -> dict[str, tuple[int, ...]]:
    return {
        entry["name"]: tuple(int(axis) for axis in entry["reshape"].get("shape", ()))
        for entry in signature.config.get(key, ())
        if "reshape" in entry
    }
