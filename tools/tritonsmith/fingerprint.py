"""One hash of everything that a build depends on; equal means that there is nothing to do.

It reads files and the versions of installed packages, and imports no framework. Of code that the
user names (a factory, a metric, custom objects) it sees the module, or all of its package. What it cannot
see: other modules that this imports, and data that it loads by itself. `--force` builds anyway.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tritonsmith import __version__
from tritonsmith.artifact import Json, sha256_of, tool_versions
from tritonsmith.compress.step_text import json_from_spec
from tritonsmith.compress.steps import Distill
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.ingest import source_sha256
from tritonsmith.metrics import metric_module
from tritonsmith.recipe import BuildRequest
from tritonsmith.user_code import files_of_module

TOOLS = (
    *("h5py", "keras", "ml-dtypes", "numpy", "onnx", "onnxruntime", "onnxscript", "onnxslim", "openvino"),
    *("safetensors", "tensorflow", "tensorflow-cpu", "tf-keras", "tf2onnx", "torch", "torch-pruning"),
    "transformers",
)
# Where things lie does not change what is built, and what lies there is hashed.
LEFT_OUT = (
    *("repository", "version", "force", "source", "labels"),
    *("calibration", "training", "tuning", "evaluation"),
    *("targets", "defer"),  # see _targets
)


def fingerprint_of(request: BuildRequest, *, arithmetic: dict[str, Json]) -> str:
    """A SHA-256 of the source, the options, the data, the tools and the processor's INT8 arithmetic."""
    options = {name: value for name, value in asdict(request).items() if name not in LEFT_OUT}
    options["steps"] = [json_from_spec(spec) for spec in request.steps]
    if request.warmup is not None:
        options["warmup"] = {**options["warmup"], "samples": None}
    parts = {
        "tritonsmith": __version__,
        "python": list(sys.version_info[:3]),
        "tools": tool_versions(*TOOLS),
        "arithmetic": arithmetic,
        "options": options,
        "source": source_sha256(request.source),
        "files": {role: sha256_of(path) for role, path in _files(request).items()},
        "students": [
            source_sha256(spec.student)
            for spec in request.steps
            if isinstance(spec, Distill) and spec.student is not None
        ],
        "modules": _modules(request),
        **_targets(request),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _targets(request: BuildRequest) -> dict[str, Json]:
    """What further targets add: nothing where there are none; TensorRT's version where it builds here."""
    if not request.targets:
        return {}
    targets = [{**asdict(target), "traffic": None} for target in request.targets]
    return {
        "targets": targets,
        "defer": request.defer,
        "tensorrt": {} if request.defer else tool_versions("tensorrt", "tensorrt-bindings"),
    }


def _files(request: BuildRequest) -> dict[str, Path]:
    roles: dict[str, Path | None] = {
        "calibration": request.calibration,
        "training": request.training,
        "tuning": request.tuning,
        "evaluation": request.evaluation,
    }
    if request.warmup is not None:
        roles["warmup"] = request.warmup.samples
    roles |= {f"traffic of {target.name}": target.traffic for target in request.targets}
    roles |= {f"labels {output} {path.name}": path for output, path in request.labels.items()}
    files = {role: path for role, path in roles.items() if path is not None}
    for role, path in files.items():
        if not path.is_file():
            raise SamplesError(
                f"{path} is no file", expected=f"the {role.split()[0]} data of {request.name!r}"
            )
    return files


def _modules(request: BuildRequest) -> dict[str, list[str]]:
    """The hashes of the files of each module that is imported, or of its whole package, by purpose."""
    names = {"custom objects": request.convert.custom_objects}
    if request.metric is not None:
        names["metric"] = metric_module(request.metric)
    return {
        purpose: [
            f"{file.name} {sha256_of(file)}"
            for file in files_of_module(name, f"{purpose} of {request.name!r}", UsageError)
        ]
        for purpose, name in names.items()
        if name is not None
    }
