"""What the tests of both backends share: models of every data type, and requests that Triton batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from onnx_models import model_from_text
from tritonsmith import dtypes
from tritonsmith.artifact import Json
from tritonsmith.server.process import Server

ONNX_NAMES = {"float32": "float", "float64": "double"}  # where ONNX's text form has its own

Arrays = Mapping[str, NDArray[Any]]


def publish(
    repository: Path, name: str, model: onnx.ModelProto, config: str | None, *, file: str = "model.onnx"
) -> None:
    path = repository / name / "1" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(model.SerializeToString())
    if config is not None:
        (repository / name / "config.pbtxt").write_text(config)


def identity_model(names: Sequence[str], shape: str) -> onnx.ModelProto:
    """An output `<type>_out` for each input `<type>`, equal to it."""
    types = {name: f"{ONNX_NAMES.get(name, name)}{shape}" for name in names}
    inputs = ", ".join(f"{kind} {name}" for name, kind in types.items())
    outputs = ", ".join(f"{kind} {name}_out" for name, kind in types.items())
    nodes = " ".join(f"{name}_out = Identity({name})" for name in names)
    return model_from_text(f"identity ({inputs}) => ({outputs}) {{ {nodes} }}")


def identity_config(names: Sequence[str], dims: str) -> str:
    return "".join(
        f'input {{ name: "{name}" data_type: {dtypes.BY_NAME[name].config} dims: {dims} }}\n'
        f'output {{ name: "{name}_out" data_type: {dtypes.BY_NAME[name].config} dims: {dims} }}\n'
        for name in names
    )


def example(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Values of a data type that differ from row to row, the extremes of its range among them."""
    data_type = dtypes.BY_NAME[name].numpy
    count = int(np.prod(shape))
    if name == "string":
        texts = [b"", "Zürich 東京".encode(), b"nul\0inside", b"end\0"]
        values = np.empty(count, object)
        values[:] = [texts[index % len(texts)] for index in range(count)]
        return values.reshape(shape)
    if data_type.kind in "iu":
        limits = np.iinfo(data_type)
        return np.resize(np.array([limits.min, limits.max, 0, 1], data_type), shape)
    if data_type.kind == "b":
        return np.resize(np.array([True, False, False]), shape)
    return np.resize(np.array([0.5, -2.25, 96.0, 0.0], data_type), shape)


def ask(
    module: ModuleType,
    client: Any,
    model: str,
    inputs: Arrays,
    outputs: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, NDArray[Any]]:
    """One request; all outputs that came back, by name. `module` is tritonclient.http or .grpc."""
    tensors = []
    for name, array in inputs.items():
        kind = dtypes.BY_NAME[dtypes.name_from_numpy(array.dtype) or ""].wire
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    wanted = None if outputs is None else [module.InferRequestedOutput(name) for name in outputs]
    result = client.infer(model, tensors, outputs=wanted, **options)
    response = result.get_response()
    listed = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [entry["name"] if isinstance(entry, dict) else entry.name for entry in listed]
    return {name: result.as_numpy(name) for name in names}


def ask_in_one_call(
    server: Server, model: str, requests: Sequence[Arrays]
) -> list[dict[str, NDArray[Any]] | InferenceServerException]:
    """An answer or an error for each request, of a try in which Triton computed all in one execution.

    The requests leave at the same moment, each on its own thread, and the model waits for a batch; on a busy
    machine that can still take a few tries.
    """
    for _ in range(5):
        barrier = Barrier(len(requests))
        _, before = execution_counts(server, model)
        with ThreadPoolExecutor(len(requests)) as pool:
            sent = [pool.submit(_send_at, barrier, server, model, inputs) for inputs in requests]
            answers = [future.result() for future in sent]
        _, after = execution_counts(server, model)
        if after == before + 1:
            return answers
    raise AssertionError(f"{model} never had {len(requests)} requests in one execution")


def _send_at(
    barrier: Barrier, server: Server, model: str, inputs: Arrays
) -> dict[str, NDArray[Any]] | InferenceServerException:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.is_server_live()  # connected before the barrier opens
        barrier.wait(timeout=30)
        try:
            return ask(tritonclient.grpc, client, model, inputs)
        except InferenceServerException as error:
            return error


def execution_counts(server: Server, model: str) -> tuple[int, int]:
    """How many inferences a model has computed, and in how many executions."""
    with tritonclient.http.InferenceServerClient(server.http_address) as client:
        entry = client.get_inference_statistics(model)["model_stats"][0]
    return int(entry["inference_count"]), int(entry["execution_count"])


def stub_threads(server: Server, model: str) -> list[int]:
    """The number of threads of each process that runs an instance of a model."""
    counts = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            words = (process / "cmdline").read_bytes().split(b"\0")
            if parent == server.pid and f"/{model}/1/".encode() in words[1]:
                counts.append(len(list((process / "task").iterdir())))
        except (OSError, IndexError):  # it ended while it was looked at
            continue
    return counts


def parameters(**values: Json) -> str:
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in values.items()
    )
