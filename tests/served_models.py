"""A repository of tiny Python models that show a client every kind of tensor and failure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.server.options import ServerOptions
from tritonsmith.server.process import serve

# Data type of config.pbtxt -> of the wire. BF16 is not among them: Triton's Python models have no BF16.
TYPES = {
    "TYPE_BOOL": "BOOL",
    "TYPE_UINT8": "UINT8",
    "TYPE_UINT16": "UINT16",
    "TYPE_UINT32": "UINT32",
    "TYPE_UINT64": "UINT64",
    "TYPE_INT8": "INT8",
    "TYPE_INT16": "INT16",
    "TYPE_INT32": "INT32",
    "TYPE_INT64": "INT64",
    "TYPE_FP16": "FP16",
    "TYPE_FP32": "FP32",
    "TYPE_FP64": "FP64",
    "TYPE_STRING": "BYTES",
}

EXECUTE = """
import time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer({t.name(): t.as_numpy() for t in request.inputs()}) for request in requests]

    def answer(self, inputs):
"""

MODELS: dict[str, tuple[str, str]] = {
    # y = 2x + 1, batched by the server
    "affine": (
        """
        max_batch_size: 4
        dynamic_batching { max_queue_delay_microseconds: 5000 }
        input [{ name: "x" data_type: TYPE_FP32 dims: [3] }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [3] }]
        """,
        "return reply(y=2 * inputs['x'] + 1)",
    ),
    # every data type, each as it came
    "types": (
        "max_batch_size: 4\n"
        + "".join(
            f'input [{{ name: "{wire}" data_type: {kind} dims: [-1] optional: true }}]\n'
            f'output [{{ name: "{wire}_out" data_type: {kind} dims: [-1] }}]\n'
            for kind, wire in TYPES.items()
        ),
        "return reply(**{name + '_out': array for name, array in inputs.items()})",
    ),
    # b is optional
    "pair": (
        """
        max_batch_size: 4
        input [{ name: "a" data_type: TYPE_FP32 dims: [2] }]
        input [{ name: "b" data_type: TYPE_FP32 dims: [2] optional: true }]
        output [{ name: "sum" data_type: TYPE_FP32 dims: [2] }]
        output [{ name: "b_given" data_type: TYPE_BOOL dims: [1] }]
        """,
        """
        given = np.full((len(inputs['a']), 1), 'b' in inputs)
        return reply(sum=inputs['a'] + inputs.get('b', 0), b_given=given)
        """,
    ),
    # no batch axis
    "columns": (
        """
        max_batch_size: 0
        input [{ name: "x" data_type: TYPE_INT64 dims: [-1, 3] }]
        output [{ name: "sum" data_type: TYPE_INT64 dims: [3] }]
        """,
        "return reply(sum=inputs['x'].sum(axis=0))",
    ),
    # labels.txt names the classes
    "scores": (
        """
        max_batch_size: 4
        input [{ name: "x" data_type: TYPE_FP32 dims: [3] }]
        output [{ name: "p" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }]
        """,
        "return reply(p=inputs['x'])",
    ),
    # as many columns out as the first row of the request says
    "ragged": (
        """
        max_batch_size: 2
        input [{ name: "n" data_type: TYPE_INT32 dims: [1] }]
        output [{ name: "zeros" data_type: TYPE_FP32 dims: [-1] }]
        """,
        "return reply(zeros=np.zeros((len(inputs['n']), int(inputs['n'][0, 0])), np.float32))",
    ),
    "slow": (
        """
        max_batch_size: 0
        input [{ name: "seconds" data_type: TYPE_FP32 dims: [1] }]
        output [{ name: "done" data_type: TYPE_BOOL dims: [1] }]
        """,
        "time.sleep(float(inputs['seconds'][0])); return reply(done=np.array([True]))",
    ),
    # one sample an execution, three at a time
    "sleepy": (
        """
        max_batch_size: 1
        instance_group { count: 3 kind: KIND_CPU }
        input [{ name: "seconds" data_type: TYPE_FP32 dims: [1] }]
        output [{ name: "done" data_type: TYPE_BOOL dims: [1] }]
        """,
        "time.sleep(float(inputs['seconds'][0, 0])); return reply(done=np.array([[True]]))",
    ),
    "picky": (
        """
        max_batch_size: 4
        input [{ name: "x" data_type: TYPE_FP32 dims: [1] }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
        """,
        """
        if (inputs['x'] < 0).any():
            return pb.InferenceResponse(error=pb.TritonError(f"below zero: {inputs['x'].min()}"))
        return reply(y=inputs['x'])
        """,
    ),
    # reads bytes, answers text
    "length": (
        """
        max_batch_size: 4
        input [{ name: "image" data_type: TYPE_STRING dims: [1] }]
        output [{ name: "label" data_type: TYPE_STRING dims: [1] }]
        output [{ name: "bytes" data_type: TYPE_INT32 dims: [1] }]
        """,
        """
        sizes = np.array([[len(row[0])] for row in inputs['image']], np.int32)
        return reply(bytes=sizes, label=np.array([[f'{n[0]} bytes, ä'.encode()] for n in sizes], object))
        """,
    ),
    "stream": (
        """
        max_batch_size: 0
        model_transaction_policy { decoupled: true }
        input [{ name: "x" data_type: TYPE_FP32 dims: [1] }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
        """,
        "return None",
    ),
}

REPLY = """

def reply(**arrays):
    return pb.InferenceResponse([pb.Tensor(name, array) for name, array in arrays.items()])
"""

# twice = affine of affine: 4x + 3
TWICE = """
platform: "ensemble"
max_batch_size: 4
input [{ name: "x" data_type: TYPE_FP32 dims: [3] }]
output [{ name: "z" data_type: TYPE_FP32 dims: [3] }]
ensemble_scheduling {
  step [
    {
      model_name: "affine" model_version: -1
      input_map { key: "x" value: "x" }
      output_map { key: "y" value: "once" }
    },
    {
      model_name: "affine" model_version: -1
      input_map { key: "x" value: "once" }
      output_map { key: "y" value: "z" }
    }
  ]
}
"""


def write_repository(folder: Path) -> Path:
    """The models above, ready to serve."""
    for name, (config, body) in MODELS.items():
        answer = textwrap.indent(textwrap.dedent(body).strip(), " " * 8)
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(EXECUTE + answer + REPLY, encoding="utf-8")
        (folder / name / "config.pbtxt").write_text(f'backend: "python"\n{textwrap.dedent(config)}')
    (folder / "scores" / "labels.txt").write_text("zero\none\ntwo\n")
    (folder / "twice" / "1").mkdir(parents=True)
    (folder / "twice" / "config.pbtxt").write_text(TWICE)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a running server answers, as URLs of the client."""

    repository: Path
    http: str
    grpc: str


@contextmanager
def serve_models(folder: Path) -> Iterator[Addresses]:
    """The models above on a real server."""
    repository = write_repository(folder / "repository")
    with serve(repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as server:
        yield Addresses(repository=repository, http=server.http_url, grpc=f"grpc://{server.grpc_url}")
