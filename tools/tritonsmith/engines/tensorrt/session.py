"""A plan in this process: numpy in and out over the CUDA driver API, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tritonsmith.engines.tensorrt.cuda import Cuda, open_cuda
from tritonsmith.engines.tensorrt.plan_file import load_engine
from tritonsmith.engines.tensorrt.refit import refit_engine
from tritonsmith.engines.tensorrt.tensors import Binding, fed_array, shape_fits
from tritonsmith.engines.tensorrt.versions import need_tensorrt
from tritonsmith.errors import PlanError

Arrays = Mapping[str, NDArray[Any]]


class PlanSession:
    """A loaded plan with one of its profiles; one call at a time, in the thread that opened it."""

    def __init__(self, path: Path, trt: ModuleType, engine: Any, cuda: Cuda, profile: int) -> None:
        self._path, self._trt, self._engine, self._cuda = path, trt, engine, cuda
        self._stack = ExitStack()
        self._memory: dict[str, tuple[int, int]] = {}  # tensor -> address, bytes
        self.inputs = tuple(b for b in bindings_of(trt, engine, profile) if b.is_input)
        self.outputs = tuple(b for b in bindings_of(trt, engine, profile) if not b.is_input)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise PlanError(
                f"TensorRT cannot run {path}",
                fix="a plan without its weights is opened with the ONNX file that it was built from",
            )
        self._stream = cuda.make_stream()
        try:
            self._context.set_optimization_profile_async(profile, self._stream)
        except RuntimeError as error:
            raise PlanError(f"{path} has no usable profile {profile}", found=error) from error
        cuda.wait(self._stream)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """All outputs by name, for arrays by input name, batch axis included.

        Raises:
            PlanError: an input is missing, unknown, or of another type or shape than the profile takes, or
                the computation fails.
        """
        outputs = self._prepare(inputs)
        feeds = self._copy_in(inputs)
        self._enqueue()
        for name, array in outputs.items():
            self._cuda.copy_out(array, self._memory[name][0], self._stream)
        self._cuda.wait(self._stream)
        del feeds  # alive until the copies are done
        return outputs

    def time_runs(
        self,
        inputs: Arrays,
        *,
        runs: int,
        warmup: int = 10,
        clock: Literal["gpu", "wall"] = "gpu",
        graph: bool = False,
    ) -> tuple[int, ...]:
        """How long each of `runs` executions took, in ns.

        "gpu": from the first to the last kernel, by CUDA events; inputs lie on the GPU. "wall": by this
        process' clock, from numpy to numpy where `graph` is false, from launch to done where it is true.
        `graph` launches a captured CUDA graph instead of queueing every kernel.

        Raises:
            PlanError: as `run`; `graph` where the plan cannot be captured.
        """
        if clock == "wall" and not graph:
            for _ in range(warmup):
                self.run(inputs)
            return tuple(_wall_ns(lambda: self.run(inputs)) for _ in range(runs))
        self.run(inputs)  # inputs and shapes stay as this call sets them; a capture needs one run before it
        with ExitStack() as stack:
            work: Callable[[], None] = self._enqueue
            if graph:
                work = stack.enter_context(self._cuda.captured(self._stream, self._enqueue))
            start, end = stack.enter_context(self._cuda.events(2))
            for _ in range(warmup):
                work()
            self._cuda.wait(self._stream)
            if clock == "wall":
                return tuple(_wall_ns(lambda: self._done(work)) for _ in range(runs))
            return tuple(self._gpu_ns(work, start, end) for _ in range(runs))

    def output_shapes(self, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of all outputs for these shapes of the inputs; nothing is computed.

        Raises:
            PlanError: a shape that the profile does not take, or an output whose shape depends on values.
        """
        for binding in self.inputs:
            shape = inputs[binding.name]
            if not self._context.set_input_shape(binding.name, shape):
                raise PlanError(
                    f"TensorRT refuses the shape of {binding.name!r} of {self._path}", found=shape
                )
        shapes = {
            binding.name: tuple(self._context.get_tensor_shape(binding.name)) for binding in self.outputs
        }
        for name, shape in shapes.items():
            if any(axis < 0 for axis in shape):
                raise PlanError(
                    f"the shape of output {name!r} of {self._path} depends on values",
                    found=shape,
                    expected="shapes that follow from the inputs' shapes",
                )
        return shapes

    def close(self) -> None:
        """Free the memory of the GPU; the session cannot be used after that."""
        while self._memory:
            self._cuda.free(self._memory.popitem()[1][0])
        if self._stream:
            self._context = self._engine = None
            self._cuda.end_stream(self._stream)
            self._stream = 0
        self._stack.close()

    def __enter__(self) -> PlanSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Check the inputs, set shapes and addresses, and give empty arrays for the outputs."""
        if sorted(inputs) != sorted(binding.name for binding in self.inputs):
            raise PlanError(
                f"{self._path} was given other inputs than it has",
                found=", ".join(sorted(inputs)) or "none",
                expected=", ".join(sorted(binding.name for binding in self.inputs)),
            )
        for binding in self.inputs:
            shape_fits(binding, inputs[binding.name].shape, self._path)
        shapes = self.output_shapes({name: array.shape for name, array in inputs.items()})
        outputs = {b.name: np.empty(shapes[b.name], b.numpy_type()) for b in self.outputs}
        for binding in (*self.inputs, *self.outputs):
            shape = inputs[binding.name].shape if binding.is_input else shapes[binding.name]
            self._place(binding.name, int(np.prod(shape)) * binding.numpy_type().itemsize)
        return outputs

    def _place(self, name: str, size_bytes: int) -> None:
        """Memory of at least this size for a tensor, kept for later calls, and its address set."""
        address, have = self._memory.get(name, (0, -1))
        if have < size_bytes:
            if have >= 0:
                self._cuda.free(self._memory.pop(name)[0])
            address = self._cuda.allocate(size_bytes)
            self._memory[name] = (address, size_bytes)
        if not self._context.set_tensor_address(name, address):
            raise PlanError(f"TensorRT refuses the address of {name!r} of {self._path}")

    def _copy_in(self, inputs: Arrays) -> list[NDArray[Any]]:
        feeds = [fed_array(binding, inputs[binding.name], self._path) for binding in self.inputs]
        for binding, array in zip(self.inputs, feeds, strict=True):
            self._cuda.copy_in(self._memory[binding.name][0], array, self._stream)
        return feeds

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise PlanError(f"TensorRT cannot run {self._path}")

    def _done(self, work: Callable[[], None]) -> None:
        work()
        self._cuda.wait(self._stream)

    def _gpu_ns(self, work: Callable[[], None], start: int, end: int) -> int:
        self._cuda.record(start, self._stream)
        work()
        self._cuda.record(end, self._stream)
        self._cuda.wait(self._stream)
        return self._cuda.elapsed_ns(start, end)


def open_plan(path: Path, *, device: int = 0, profile: int = 0, onnx: Path | None = None) -> PlanSession:
    """Load a plan; a plan without weights gets them from `onnx`. Close it, or use it in `with`.

    Raises:
        PlanError: no TensorRT or GPU here, or TensorRT refuses the plan.
    """
    trt = need_tensorrt(device)
    with ExitStack() as stack:
        cuda = stack.enter_context(open_cuda(device))
        engine = load_engine(trt, path)
        if onnx is not None and engine.refittable:  # nothing else is built so that it can be refitted
            refit_engine(trt, engine, path, onnx)
        if not 0 <= profile < engine.num_optimization_profiles:
            raise PlanError(
                f"{path} has no profile {profile}", expected=f"0 to {engine.num_optimization_profiles - 1}"
            )
        session = PlanSession(path, trt, engine, cuda, profile)
        session._stack = stack.pop_all()
    return session


def bindings_of(trt: ModuleType, engine: Any, profile: int) -> tuple[Binding, ...]:
    """The inputs and outputs of an engine, with the shapes that a profile takes."""
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        low, high = None, None
        if is_input:
            low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile))
        found.append(
            Binding(
                name=name,
                kind=engine.get_tensor_dtype(name).name,
                shape=tuple(engine.get_tensor_shape(name)),
                is_input=is_input,
                smallest=low,
                largest=high,
            )
        )
    return tuple(found)


def _wall_ns(work: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - start
