"""Results of steps, kept by content: the same step on the same model with the same data is done once.

    <store>/<key>/result/    model.onnx (with its data file), step.json
    <store>/<key>/work/      checkpoints of a step that is not done

The key is a hash of the step's options, the model, the data that steps see, the tools and the processor's
INT8 arithmetic. A result appears in one rename, so a kill leaves either all of it or none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from tritonsmith import __version__, onnx_model
from tritonsmith.artifact import Artifact, Json, Step, tool_versions
from tritonsmith.compress.arithmetic import detect_arithmetic
from tritonsmith.errors import RepositoryError
from tritonsmith.files import existing_parent, write_text_atomically

MODEL_NAME = "model.onnx"
STEP_NAME = "step.json"
TOOLS = ("numpy", "onnx", "onnxruntime", "openvino", "torch", "torch-pruning", "transformers")

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


def keep_step(
    store: Path,
    parts: Json,
    artifact: Artifact,
    make: Callable[[Path, Path], Artifact],
    *,
    say: Say = lambda _: None,
) -> tuple[Artifact, bool]:
    """The kept result for `parts`, or that of `make(out, checkpoint)`, kept from now on.

    Returns the artifact, with the lineage of `artifact` and one step more, and whether it was there.

    Raises:
        RepositoryError: the store cannot be written, or holds a damaged result.
    """
    folder = store / key_of(parts)
    with _locked(folder, say):
        result = folder / "result"
        if result.is_dir():
            return _read(result, artifact), True
        checkpoint, staged = folder / "work" / "checkpoint", folder / "work" / "result"
        shutil.rmtree(staged, ignore_errors=True)
        checkpoint.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        made = make(staged / MODEL_NAME, checkpoint)
        record = {"precision": made.precision, "step": asdict(made.steps[-1])}
        write_text_atomically(staged / STEP_NAME, json.dumps(record, indent=1) + "\n")
        staged.replace(result)
        shutil.rmtree(folder / "work", ignore_errors=True)
    return replace(made, path=result / MODEL_NAME), False


def _read(result: Path, artifact: Artifact) -> Artifact:
    try:
        record = json.loads((result / STEP_NAME).read_text(encoding="utf-8"))
        step = Step(**record["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepositoryError(
            f"{result} is damaged", found=error, fix=f"remove {result.parent}, and it is made again"
        ) from error
    path = result / MODEL_NAME
    if onnx_model.model_sha256(path) != step.output_sha256:
        raise RepositoryError(
            f"{path} is not what was written", fix=f"remove {result.parent}, and it is made again"
        )
    return replace(artifact, path=path, precision=record["precision"], steps=(*artifact.steps, step))


@contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    """Only one process at a time works on one result; the lock goes with the process."""
    existing_parent(folder / MODEL_NAME)
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that makes the same model")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
