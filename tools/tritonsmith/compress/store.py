"""Results of steps, kept by content: the same step on the same model with the same data is done once.

    <store>/<key>/result/    model.onnx (with its data file), artifact.json
    <store>/<key>/work/      checkpoints of a step that is not done

The key is a hash of the step's options, the model, the data that steps see, the tools and the processor's
INT8 arithmetic. A result appears in one rename, so a kill leaves either all of it or none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tritonsmith import __version__, onnx_model
from tritonsmith.artifact import Artifact, Json, tool_versions
from tritonsmith.compress.int8.arithmetic import detect_arithmetic
from tritonsmith.errors import RepositoryError, SourceError
from tritonsmith.files import existing_parent, locked, write_text_atomically
from tritonsmith.manifest import artifact_from_json, json_from_artifact

MODEL_NAME = "model.onnx"
RECORD_NAME = "artifact.json"
TOOLS = (
    *("keras", "numpy", "onnx", "onnxruntime", "onnxscript", "onnxslim", "openvino", "tensorflow-cpu"),
    *("tf2onnx", "torch", "torch-pruning", "transformers"),
)

Say = Callable[[str], None]


def key_of(parts: Json) -> str:
    """The hash that names a result; `parts` is everything that the result depends on."""
    everything = {
        "tritonsmith": __version__,
        "tools": tool_versions(*TOOLS),
        "arithmetic": detect_arithmetic().options(),
        "parts": parts,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


def keep_artifact(
    store: Path, parts: Json, make: Callable[[Path, Path], Artifact], *, say: Say = lambda _: None
) -> tuple[Artifact, bool]:
    """The kept result for `parts`, or that of `make(out, checkpoint)`, kept from now on.

    Returns the artifact with its lineage, and whether it was there already.

    Raises:
        RepositoryError: the store cannot be written, or holds a damaged result.
    """
    folder = store / key_of(parts)
    existing_parent(folder / MODEL_NAME)
    with locked(folder / "lock", what="the same model", say=say):
        result = folder / "result"
        if result.is_dir():
            return _read(result), True
        checkpoint, staged = folder / "work" / "checkpoint", folder / "work" / "result"
        shutil.rmtree(staged, ignore_errors=True)
        checkpoint.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        made = make(staged / MODEL_NAME, checkpoint)
        record = json.dumps(json_from_artifact(made), indent=1)
        write_text_atomically(staged / RECORD_NAME, record + "\n")
        staged.replace(result)
        shutil.rmtree(folder / "work", ignore_errors=True)
    return replace(made, path=result / MODEL_NAME), False


def _read(result: Path) -> Artifact:
    path = result / MODEL_NAME
    try:
        record = json.loads((result / RECORD_NAME).read_text(encoding="utf-8"))
        artifact = artifact_from_json(record, path)
        found = onnx_model.model_sha256(path)
    except (OSError, ValueError, KeyError, TypeError, SourceError) as error:
        raise _damaged(result, error) from error
    if found != artifact.steps[-1].output_sha256:
        raise _damaged(result, "the model is not what was written")
    return artifact


def _damaged(result: Path, found: object) -> RepositoryError:
    fix = f"remove {result.parent}, and it is made again"
    return RepositoryError(f"{result} is damaged", found=found, fix=fix)
