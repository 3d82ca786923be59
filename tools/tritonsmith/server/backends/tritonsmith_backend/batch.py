"""The requests of one execute call, run together where they can be and alone where they must."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import triton_python_backend_utils as pb_utils

from tritonsmith_backend.config import Port
from tritonsmith_backend.states import States
from tritonsmith_backend.tensors import array_from_tensor, tensor_from_array


class Engine(Protocol):
    """A loaded model. Strings are object arrays of bytes, bfloat16 is its bits in uint16."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    failures: tuple[type[Exception], ...]  # what `run` raises for a request that cannot be computed

    def run(self, arrays: Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
        """The outputs of these names, in their order."""


class RequestError(Exception):
    """A request whose answer is this error."""


class _Job:
    """One request: its arrays, the outputs that it wants, and in the end its response."""

    __slots__ = ("arrays", "names", "request", "response")

    def __init__(self, request: Any, arrays: dict[str, np.ndarray]) -> None:
        self.request = request
        self.arrays = arrays
        self.names = list(request.requested_output_names())  # a set; engines want a list
        self.response: Any = None


class Batcher:
    """Answers requests to one model instance. The parts of config.pbtxt that it needs are read once, here."""

    def __init__(self, engine: Engine, config: Mapping[str, Any]) -> None:
        self._engine = engine
        self._batched = config["max_batch_size"] > 0
        self._input_types = {port.name: port.data_type for port in engine.inputs}
        self._output_types = {port.name: port.data_type for port in engine.outputs}
        self._scalars = {port.name for port in engine.inputs if port.dims == ()}
        scalar_outputs = {port.name for port in engine.outputs if port.dims == ()}
        self._scalar_dims = {
            entry["name"]: [int(dim) for dim in entry["dims"]]
            for entry in config["output"]
            if entry["name"] in scalar_outputs
        }
        self._states = States.of(config)

    def answer(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order; a request that fails gets its own error."""
        jobs = [_Job(request, self._read(request)) for request in requests]
        if len(jobs) > 1 and self._batched and not self._states:
            self._answer_together(jobs)
        else:
            for job in jobs:  # a sequence's state is its own
                self._answer_alone(job)
        return [job.response for job in jobs]

    def _read(self, request: Any) -> dict[str, np.ndarray]:
        arrays = {}
        for tensor in request.inputs():
            name = tensor.name()
            array = array_from_tensor(tensor, self._input_types[name])
            arrays[name] = array.reshape(()) if name in self._scalars else array
        return arrays

    def _answer_together(self, jobs: list[_Job]) -> None:
        """Run the jobs as one batch; where that fails, run each alone, so that each has its own result."""
        names = list(dict.fromkeys(name for job in jobs for name in job.names))
        rows = [_rows(job.arrays) for job in jobs]
        try:
            joined = {name: np.concatenate([job.arrays[name] for job in jobs]) for name in jobs[0].arrays}
            outputs = dict(zip(names, self._run(joined, names, sum(rows)), strict=True))
        except (RequestError, *self._engine.failures):
            for job in jobs:
                self._answer_alone(job)
            return
        start = 0
        for job, count in zip(jobs, rows, strict=True):
            end = start + count
            self._respond(job, ((name, outputs[name][start:end]) for name in job.names))
            start = end

    def _answer_alone(self, job: _Job) -> None:
        try:
            names, arrays = job.names, job.arrays
            if self._states:
                arrays = self._states.entering(job.request, arrays)
                names = list(dict.fromkeys([*names, *self._states.output_names]))
            rows = _rows(arrays) if self._batched else None
            outputs = dict(zip(names, self._run(arrays, names, rows), strict=True))
            if self._states:
                self._states.leaving(job.request, outputs)
            self._respond(job, ((name, outputs[name]) for name in job.names))
        except (RequestError, *self._engine.failures) as error:
            job.response = pb_utils.InferenceResponse(error=pb_utils.TritonError(_reason(error)))

    def _run(self, arrays: Mapping[str, np.ndarray], names: list[str], rows: int | None) -> list[np.ndarray]:
        outputs = self._engine.run(arrays, names)
        if rows is not None:
            for name, array in zip(names, outputs, strict=True):
                if array.ndim == 0 or len(array) != rows:
                    raise RequestError(
                        f"output {name!r} has shape {list(array.shape)} for a batch of {rows}: "
                        "its first axis is not the batch"
                    )
        return outputs

    def _respond(self, job: _Job, outputs: Iterable[tuple[str, np.ndarray]]) -> None:
        tensors = []
        for name, array in outputs:
            if name in self._scalar_dims and array.ndim == 0:
                array = array.reshape(self._scalar_dims[name])
            tensors.append(tensor_from_array(name, array, self._output_types[name]))
        job.response = pb_utils.InferenceResponse(tensors)


def _rows(arrays: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(arrays.values())))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
