"""Triton's backend `onnxruntime`, in Python: it reads the config.pbtxt of the native one.

Of the native backend's options it lacks GPUs, ragged batches, and `--backend-config`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from onnxruntime.capi import onnxruntime_pybind11_state

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tritonsmith_backend import config as model_config
from tritonsmith_backend.batch import Batcher
from tritonsmith_backend.config import ConfigError, Port

sys.path.pop(0)  # its folders are named as the engines are

ERRORS_ONLY = 3  # OrtLoggingLevel
BFLOAT16 = 16  # onnx.proto3, TensorProto.DataType
TRITON_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(bfloat16)": "TYPE_BF16",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
    "tensor(bool)": "TYPE_BOOL",
    **{
        f"tensor({sign}int{bits})": f"TYPE_{sign.upper()}INT{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}
# optimization { graph { level } }, as the native backend reads it; any other level is "all"
GRAPH_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
KNOWN_PARAMETERS = (
    "intra_op_thread_count",
    "inter_op_thread_count",
    "execution_mode",
    "enable_mem_arena",
    "enable_mem_pattern",
    "memory.enable_memory_arena_shrinkage",
)
SESSION_ENTRY = "session."


class OnnxRuntime:
    """A session of ONNX Runtime as `tritonsmith_backend.batch` wants an engine."""

    failures = (
        *(
            kind
            for kind in vars(onnxruntime_pybind11_state).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        ),
        RuntimeError,
        ValueError,
        TypeError,
    )

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        parameters = model_config.parameters_of(config)
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), _session_options(config, parameters), providers=["CPUExecutionProvider"]
            )
        except self.failures as error:
            raise ConfigError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}"
            ) from error
        self._run_options = _run_options(parameters)
        self.inputs = tuple(
            [_port(value) for value in self._session.get_inputs()]
            + [_port(value, optional=True) for value in self._session.get_overridable_initializers()]
        )
        self.outputs = tuple(_port(value) for value in self._session.get_outputs())
        self._strings = {
            port.name for port in (*self.inputs, *self.outputs) if port.data_type == "TYPE_STRING"
        }
        self._bfloats = {port.name for port in (*self.inputs, *self.outputs) if port.data_type == "TYPE_BF16"}
        if self._bfloats and any(port.name in self._strings for port in self.inputs):
            raise ConfigError(
                f"{path} takes strings and has bfloat16 tensors: ONNX Runtime's Python does only either"
            )

    def run(self, arrays: Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
        if self._bfloats:
            return self._run_values(arrays, names)
        if not self._strings:
            return self._session.run(names, arrays, self._run_options)
        feeds = {
            name: _texts(name, array) if name in self._strings else array for name, array in arrays.items()
        }
        outputs = self._session.run(names, feeds, self._run_options)
        return [
            _bytes(array) if name in self._strings else array
            for name, array in zip(names, outputs, strict=True)
        ]

    def _run_values(self, arrays: Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
        """Run on OrtValues, the only form in which ONNX Runtime's Python takes and gives bfloat16."""
        values = {}
        for name, array in arrays.items():
            if name in self._bfloats:
                values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    np.require(array, requirements="C"), BFLOAT16
                )
            else:
                given = _texts(name, array) if name in self._strings else array
                values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(given)
        outputs = self._session.run_with_ort_values(names, values, self._run_options)
        return [self._array(name, value) for name, value in zip(names, outputs, strict=True)]

    def _array(self, name: str, value: Any) -> np.ndarray:
        if name in self._bfloats:
            size = value.tensor_size_in_bytes()
            bits = ctypes.string_at(value.data_ptr(), size) if size else b""
            return np.frombuffer(bits, np.uint16).reshape(value.shape())
        array = value.numpy()
        return _bytes(array) if name in self._strings else array


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        config = auto_complete_model_config.as_dict()
        if not (config["input"] and config["output"]):
            folder = model_config.version_folder(config, pb_utils.get_model_dir())
            engine = OnnxRuntime(_path(config, folder), config)
            batchable = model_config.is_batchable((*engine.inputs, *engine.outputs))
            required = tuple(port for port in engine.inputs if not port.optional)
            model_config.complete(config, required, engine.outputs, batchable=batchable)
        return auto_complete_model_config

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        engine = OnnxRuntime(_path(config, Path(args["model_repository"], args["model_version"])), config)
        for name in model_config.accelerators(config):
            pb_utils.Logger.log_warn(f"{config['name']}: no accelerator {name!r} here, running on the CPU")
        model_config.check(config, engine.inputs, engine.outputs)
        self._batcher = Batcher(engine, config)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self._batcher.answer(requests)


def _path(config: Mapping[str, Any], folder: Path) -> Path:
    return model_config.model_file(config, folder, "model.onnx")


def _session_options(config: Mapping[str, Any], parameters: Mapping[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = model_config.whole_number(parameters, "intra_op_thread_count")
    options.inter_op_num_threads = model_config.whole_number(parameters, "inter_op_thread_count")
    if model_config.one_of(parameters, "execution_mode", ("0", "1")) == "1":
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    arena = model_config.flag(parameters, "enable_mem_arena")
    if arena is not None:
        options.enable_cpu_mem_arena = arena
    pattern = model_config.flag(parameters, "enable_mem_pattern")
    if pattern is not None:
        options.enable_mem_pattern = pattern
    level = int((config.get("optimization") or {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = GRAPH_LEVELS.get(
        level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    for key, value in parameters.items():
        if key.startswith(SESSION_ENTRY):
            options.add_session_config_entry(key, value)
        elif key not in KNOWN_PARAMETERS:
            pb_utils.Logger.log_warn(f"{config['name']}: the backend onnxruntime has no parameter {key!r}")
    return options


def _run_options(parameters: Mapping[str, str]) -> Any:
    key = "memory.enable_memory_arena_shrinkage"
    if key not in parameters:
        return None
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(key, parameters[key])
    return options


def _port(value: Any, *, optional: bool = False) -> Port:
    shape = value.shape
    dims = None if shape is None else tuple(axis if isinstance(axis, int) else -1 for axis in shape)
    return Port(value.name, TRITON_TYPES.get(value.type, value.type), dims, optional)


def _texts(name: str, array: np.ndarray) -> np.ndarray:
    """Strings as `str`: ONNX Runtime's Python would take bytes by their repr."""
    try:
        return _objects([item.decode("utf-8") for item in array.ravel()], array.shape)
    except UnicodeDecodeError as error:
        raise ValueError(f"input {name!r} is not UTF-8: {error}") from error


def _bytes(array: np.ndarray) -> np.ndarray:
    return _objects([text.encode("utf-8") for text in array.ravel()], array.shape)


def _objects(items: list[object], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)
