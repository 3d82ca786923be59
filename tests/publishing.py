"""A Python model whose every file carries one payload, so that a mixture of two publishes shows.

Run as a program, it publishes and kills itself with SIGKILL before each change of the file system in
turn, and prints a line of JSON for each: see tests/repository/test_kills.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tritonsmith.artifact import Artifact, Manifest, Step, TensorSpec, sha256_of
from tritonsmith.manifest import read_manifest
from tritonsmith.repository import staging
from tritonsmith.repository.config import config_from_artifact
from tritonsmith.repository.entry import Entry, publish, read_config

# Answers what its own file says, and what the configuration that it was loaded with says.
MODEL = """
import json
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        told = json.loads(args["model_config"])["parameters"]["payload"]["string_value"]
        self.answer = np.array([["PAYLOAD", told]], dtype=object)

    def execute(self, requests):
        return [pb.InferenceResponse([pb.Tensor("y", self.answer)]) for _ in requests]
"""


def tensor(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def artifact_of(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], path: str = "model.onnx"
) -> Artifact:
    return Artifact(
        path=Path(path),
        format="onnx",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batched=all(spec.shape[:1] == ("batch",) for spec in (*inputs, *outputs)),
        precision="fp32",
        steps=(),
    )


PAYLOAD_ARTIFACT = artifact_of([tensor("x", "float32", "batch", 1)], [tensor("y", "string", "batch", 2)])


def manifest_of(artifact: Artifact, fingerprint: str) -> Manifest:
    step = Step(
        name="convert",
        options={"opset": 17, "axes": ("batch", 2)},
        input_sha256="a",
        output_sha256="b",
        tools={"onnx": "1.0"},
        duration_s=0.5,
        bytes_before=10,
        bytes_after=5,
        measured={"max_abs_error": 1e-7},
    )
    return Manifest(
        name="",
        version=0,
        fingerprint=fingerprint,
        source="model.h5",
        source_sha256="c",
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        batched=artifact.batched,
        precision="fp32",
        backend="python",
        files={},
        steps=(step,),
        gate=None,
        candidates=(),
    )


def publish_payload(repository: Path, payload: str, *, name: str = "m", **options: Any) -> Entry:
    config = config_from_artifact(
        PAYLOAD_ARTIFACT, name=name, backend="python", extra={"parameters": {"payload": payload}}
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.py").write_text(MODEL.replace("PAYLOAD", payload))
        label = Path(folder).parent / f"{Path(folder).name}.txt"
        label.write_text(f"{payload}\n{payload}\n")
        try:
            return publish(
                Path(folder),
                config,
                repository,
                manifest=manifest_of(PAYLOAD_ARTIFACT, payload),
                labels={"labels.txt": label},
                warmup={"x.bin": payload.encode()},
                **options,
            )
        finally:
            label.unlink()


def state_of(repository: Path) -> dict[str, Any]:
    """For each model folder, hidden ones too: what its parts say, or what is wrong with it."""
    state: dict[str, Any] = {}
    for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
        try:
            state[folder.name] = _parts_of(folder)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is the finding
            state[folder.name] = f"broken: {error}"
    return state


def _parts_of(folder: Path) -> dict[str, Any]:
    versions = {}
    for path in sorted(entry for entry in folder.iterdir() if entry.name.isdecimal()):
        manifest = read_manifest(path / "manifest.json")
        for name, digest in manifest.files.items():
            if sha256_of(path / name) != digest:
                raise ValueError(f"{path / name} is not what its manifest says")
        versions[path.name] = manifest.fingerprint
    return {
        "config": read_config(folder.parent, folder.name).parameters["payload"].string_value,
        "labels": (folder / "labels.txt").read_text().split()[0],
        "warmup": (folder / "warmup" / "x.bin").read_text(),
        "versions": versions,
    }


CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.utime",
    "ctypes.dlsym",
)


def publish_and_die(repository: Path, event_number: int, options: dict[str, Any]) -> None:
    """Publish in this process, and kill it before the change of that number."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:  # renameat2 is announced by the look-up of its symbol
            seen += 1
            if seen == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    publish_payload(repository, "new", **options)


def main() -> None:
    template, work, how, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    if how == "two renames":  # as on a file system without RENAME_EXCHANGE
        staging._exchange = lambda first, second: False
    if how == "inside":  # as where the repository is a mount point
        staging._can_rename_into = lambda root, repository: False
    for event_number in range(1, 2000):
        shutil.rmtree(work, ignore_errors=True)
        repository = work / "repository"
        shutil.copytree(template, repository) if template.exists() else work.mkdir()
        child = os.fork()
        if child == 0:
            publish_and_die(repository, event_number, options)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = state_of(repository) if repository.exists() else {}
        publish_payload(repository, "after")
        report = {
            "event": event_number,
            "killed": killed,
            "found": found,
            "after": state_of(repository),
            "left": sorted(path.name for path in work.iterdir() if path != repository),
        }
        print(json.dumps(report), flush=True)
        if not killed:
            return


if __name__ == "__main__":
    main()
