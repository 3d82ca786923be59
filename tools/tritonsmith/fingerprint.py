"""One hash of everything that a build depends on; equal means that there is nothing to do.

It reads files and the versions of installed packages, and imports no framework. What it cannot see: data
that a `package.module:factory` or a metric's function loads by itself. `--force` builds anyway.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tritonsmith import __version__
from tritonsmith.artifact import Json, sha256_of, tool_versions
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.ingest import source_sha256
from tritonsmith.recipe import BuildRequest

TOOLS = (
    *("h5py", "keras", "ml-dtypes", "numpy", "onnx", "onnxruntime", "onnxscript", "onnxslim", "openvino"),
    *("safetensors", "tensorflow", "tensorflow-cpu", "tf-keras", "tf2onnx", "torch", "transformers"),
)
# Where things lie does not change what is built, and what lies there is hashed.
LEFT_OUT = ("repository", "version", "force", "source", "calibration", "evaluation", "labels")


def fingerprint_of(request: BuildRequest, *, arithmetic: dict[str, Json]) -> str:
    """A SHA-256 of the source, the options, the data, the tools and the processor's INT8 arithmetic."""
    options = {name: value for name, value in asdict(request).items() if name not in LEFT_OUT}
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
        "modules": {name: _module_sha256(name) for name in _modules(request)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _files(request: BuildRequest) -> dict[str, Path]:
    roles: dict[str, Path | None] = {"calibration": request.calibration, "evaluation": request.evaluation}
    if request.warmup is not None:
        roles["warmup"] = request.warmup.samples
    roles |= {f"labels {output} {path.name}": path for output, path in request.labels.items()}
    files = {role: path for role, path in roles.items() if path is not None}
    for role, path in files.items():
        if not path.is_file():
            raise SamplesError(
                f"{path} is no file", expected=f"the {role.split()[0]} data of {request.name!r}"
            )
    return files


def _modules(request: BuildRequest) -> list[str]:
    names = []
    if request.metric is not None and ":" in request.metric:
        names.append(request.metric.partition(":")[0])
    if request.convert.custom_objects is not None:
        names.append(request.convert.custom_objects)
    return names


def _module_sha256(name: str) -> str:
    """The hash of a module's file, found without importing it or its packages."""
    top, *rest = name.split(".")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise UsageError(f"no Python module is named {top!r}", fix="run from its folder, or set PYTHONPATH")
    path = Path(spec.origin)
    if rest:
        base = path.parent.joinpath(*rest)
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.is_file():
        raise UsageError(f"no Python module is named {name!r}", found=f"no file {path}")
    return sha256_of(path)
