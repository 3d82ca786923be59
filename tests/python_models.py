"""Models of Triton's Python backend, one line of Python each, and what a server may leave behind."""

from __future__ import annotations

import json
from pathlib import Path

from tritonsmith.server.launch import _runs_folder
from tritonsmith.server.ports import ask_http

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108

CONFIG = """
backend: "python"
max_batch_size: 0
input [{ name: "x" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
"""

MODEL = """
import os, signal, time
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        return [self.answer(pb.get_input_tensor_by_name(r, "x").as_numpy()) for r in requests]

    def answer(self, x):
        {answer}
        return pb.InferenceResponse([pb.Tensor("y", x * 2)])
"""


def write_model(
    repository: Path, name: str, *, initialize: str = "pass", answer: str = "pass", config: str = ""
) -> Path:
    """`<repository>/<name>`, which answers y = 2x; returns `repository`."""
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL.format(initialize=initialize, answer=answer), encoding="utf-8")
    (folder.parent / "config.pbtxt").write_text(CONFIG + config, encoding="utf-8")
    return repository


def ask(port: int, name: str, x: float, timeout_s: float = 30.0) -> float:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [x]}]}
    status, text = ask_http(port, "POST", f"/v2/models/{name}/infer", body, timeout_s)
    assert status == 200, text
    return float(json.loads(text)["outputs"][0]["data"][0])


def runs() -> set[str]:
    """The names of the folders of the servers that run in this cache."""
    return {path.name for path in _runs_folder().glob("tritonsmith-*")}


def segments(runs: set[str]) -> set[str]:
    """The shared memory of those runs."""
    return {path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(tuple(runs))}


def processes_under(pid: int) -> set[int]:
    """`pid` and all its descendants."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def still_running(pids: set[int]) -> set[int]:
    """Those of `pids` that run; a zombie does not."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.add(pid)
    return running
