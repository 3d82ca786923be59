"""The PyTorch side: eager, torch.compile and CUDA graphs, as it is asked to on stdin. Needs torch and numpy.

torch_rows.py MODELS [--cpu]     --cpu: eager on the CPU alone, to try this file without a GPU
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    sys.exit(f"torch_rows.py: {error}")
from modules import make_module
from reference import agreement, first_rows, read_rows
from worker import WorkerError, answer_requests

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
COMPILED_SHAPES = 64  # of one module; beyond its limit, torch.compile falls back to eager without a word
WARMUP_CALLS = 3  # before a capture, on the side stream that PyTorch asks for


class Rows:
    """What one process has loaded: a function a subject, from tensors on the GPU to a tensor there."""

    def __init__(self, models: Path, device: str) -> None:
        self.models, self.device = models, torch.device(device)
        self._rows: dict[str, tuple[Any, Any]] = {}
        self._modules: dict[tuple[str, str], torch.nn.Module] = {}
        self._functions: dict[tuple[str, str, str, int], Callable[[], torch.Tensor]] = {}
        self._inputs: dict[tuple[str, str, str, int], list[torch.Tensor]] = {}
        # What a plan with TF32 may do, PyTorch may do too.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    def facts(self) -> dict[str, Any]:
        """Versions and the GPU, or why there is none."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return {"unavailable": f"PyTorch {torch.__version__} sees no GPU"}
        triton = sys.modules.get("triton") or _find("triton")
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton_compiler": getattr(triton, "__version__", None),
            "gpu": torch.cuda.get_device_name() if self.device.type == "cuda" else None,
        }

    def prepare(self, model: str, precision: str, mode: str, batch: int) -> dict[str, Any]:
        """Compile or capture for this batch, run it, and compare with ONNX Runtime's FP32.

        Raises:
            WorkerError: the mode cannot be had here; PyTorch's reason is in the message.
        """
        began_s = time.perf_counter()
        key = (model, precision, mode, batch)
        rows, answers = self._all(model)
        inputs = [torch.from_numpy(array).to(self.device) for array in first_rows(rows, batch).values()]
        self._inputs[key] = inputs
        module = self._module(model, precision)
        try:
            function = self._function(module, inputs, precision, mode)
            found = function().float().cpu().numpy()
        except Exception as error:
            raise WorkerError(f"{mode} does not run: {type(error).__name__}: {error}") from error
        self._functions[key] = function
        (name,) = answers
        gap = agreement(first_rows(answers, batch), {name: found})
        return {"agreement": gap, "prepare_s": time.perf_counter() - began_s}

    def time(
        self, model: str, precision: str, mode: str, batch: int, *, clock: str, runs: int, warmup: int
    ) -> dict[str, Any]:
        """ns of each of `runs` calls; `clock` "gpu" by CUDA events, "call" from numpy to numpy."""
        key = (model, precision, mode, batch)
        function = self._functions[key]
        for _ in range(warmup):
            function()
        if clock == "call":
            arrays = list(first_rows(self._all(model)[0], batch).values())
            return {"ns": [self._call_ns(function, self._inputs[key], arrays) for _ in range(runs)]}
        if self.device.type == "cpu":
            return {"ns": [_wall_ns(function) for _ in range(runs)]}
        return {"ns": [_gpu_ns(function) for _ in range(runs)]}

    def _function(
        self, module: torch.nn.Module, inputs: list[torch.Tensor], precision: str, mode: str
    ) -> Callable[[], torch.Tensor]:
        def run(called: Callable[..., torch.Tensor] = module) -> torch.Tensor:
            with torch.inference_mode():
                return called(
                    *(part.to(DTYPES[precision]) if part.is_floating_point() else part for part in inputs)
                )

        if mode == "eager":
            return run
        if mode == "compile":
            compiled = torch.compile(module, dynamic=False)
            return lambda: run(compiled)
        return _captured(run)

    def _module(self, model: str, precision: str) -> torch.nn.Module:
        key = (model, precision)
        if key not in self._modules:
            module = make_module(self.models / model).to(self.device, DTYPES[precision])
            if model == "resnet50":
                module = module.to(memory_format=torch.channels_last)
            self._modules[key] = module
        return self._modules[key]

    def _all(self, model: str) -> tuple[Any, Any]:
        if model not in self._rows:
            self._rows[model] = read_rows(self.models / model)
        return self._rows[model]

    def _call_ns(
        self, function: Callable[[], torch.Tensor], inputs: list[torch.Tensor], arrays: list[np.ndarray]
    ) -> int:
        began_ns = time.perf_counter_ns()
        for tensor, array in zip(inputs, arrays, strict=True):
            tensor.copy_(torch.from_numpy(array))
        function().cpu().numpy()
        return time.perf_counter_ns() - began_ns


def _captured(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`run` as a CUDA graph: its tensors stay where they are, and only the launch is left."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return answer

    return replay


def _gpu_ns(function: Callable[[], torch.Tensor]) -> int:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return round(start.elapsed_time(end) * 1_000_000)


def _wall_ns(function: Callable[[], torch.Tensor]) -> int:
    began_ns = time.perf_counter_ns()
    function()
    return time.perf_counter_ns() - began_ns


def _find(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        return None


def main() -> None:
    import torch._dynamo

    for limit in ("recompile_limit", "cache_size_limit"):  # its names, new and old
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, COMPILED_SHAPES)
    rows = Rows(Path(sys.argv[1]), "cpu" if "--cpu" in sys.argv[2:] else "cuda")
    answer_requests(
        {"facts": rows.facts, "prepare": rows.prepare, "time": rows.time}, (WorkerError, RuntimeError)
    )


if __name__ == "__main__":
    main()
