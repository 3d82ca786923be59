"""Triton's backend `openvino`, in Python: it reads the config.pbtxt of the native one.

The native backend compiles a batching model for max_batch_size alone, and without ENABLE_BATCH_PADDING it
refuses smaller batches; this one takes any batch up to max_batch_size. It has the CPU only.
INFERENCE_PRECISION_HINT is read here and not there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tritonsmith_backend import config as model_config
from tritonsmith_backend.batch import Batcher
from tritonsmith_backend.config import ConfigError, Port

sys.path.pop(0)  # its folders are named as the engines are

TRITON_TYPES = {
    "f32": "TYPE_FP32",
    "f16": "TYPE_FP16",
    "bf16": "TYPE_BF16",
    "f64": "TYPE_FP64",
    "boolean": "TYPE_BOOL",
    **{
        f"{sign}{bits}": f"TYPE_{word}INT{bits}"
        for sign, word in (("i", ""), ("u", "U"))
        for bits in (8, 16, 32, 64)
    },
}
SINK = "/sink_port_0"  # what OpenVINO appends to an output's name to name its Result node
NARROWED = ("TYPE_INT64", "TYPE_UINT64", "TYPE_UINT32")
INT32 = np.iinfo(np.int32)
YES = "YES"
HINTS = ("LATENCY", "THROUGHPUT", "CUMULATIVE_THROUGHPUT")
KNOWN_PARAMETERS = (
    "CPU_EXTENSION_PATH",
    "INFERENCE_NUM_THREADS",
    "COMPILATION_NUM_THREADS",
    "INFERENCE_PRECISION_HINT",
    "HINT_BF16",
    "NUM_STREAMS",
    "PERFORMANCE_HINT",
    "SKIP_OV_DYNAMIC_BATCHSIZE",
    "ENABLE_BATCH_PADDING",
    "RESHAPE_IO_LAYERS",
    "TARGET_DEVICE",
)


class OpenVino:
    """A compiled model of OpenVINO as `tritonsmith_backend.batch` wants an engine."""

    failures = (RuntimeError, ValueError, TypeError)

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        parameters = model_config.parameters_of(config)
        properties = _properties(parameters)
        for key in parameters:
            if key not in KNOWN_PARAMETERS:
                pb_utils.Logger.log_warn(f"{config['name']}: the backend openvino has no parameter {key!r}")
        try:
            model = _read(path, parameters)
            if parameters.get("RESHAPE_IO_LAYERS", "").upper() == YES:
                _reshape(model, config)
            self._ports = {_name(port): port for port in (*model.inputs, *model.outputs)}
            compiled = openvino.Core().compile_model(model, "CPU", properties)
        except self.failures as error:
            raise ConfigError(f"OpenVINO cannot load {path}: {error}") from error
        self.inputs = tuple(_port(port) for port in model.inputs)
        self.outputs = tuple(_port(port) for port in model.outputs)
        _refuse_types((*self.inputs, *self.outputs))
        self._request = compiled.create_infer_request()
        self._input_ports = {_name(port): port for port in compiled.inputs}
        self._output_ports = {_name(port): port for port in compiled.outputs}
        self._narrowed = {port.name for port in self.inputs if port.data_type in NARROWED}
        self._bfloats = {port.name for port in (*self.inputs, *self.outputs) if port.data_type == "TYPE_BF16"}

    def run(self, arrays: Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
        for name, port in self._input_ports.items():
            if name not in arrays:
                raise ValueError(f"input {name!r} is missing")
            self._request.set_tensor(port, self._tensor(name, arrays[name]))
        self._request.infer()
        return [self._array(name) for name in names]

    def _tensor(self, name: str, array: np.ndarray) -> Any:
        array = np.require(array, requirements="C")
        if name in self._narrowed and array.size and (array.min() < INT32.min or array.max() > INT32.max):
            raise ValueError(
                f"input {name!r} goes from {array.min()} to {array.max()}; it must fit int32, "
                f"in which OpenVINO computes {array.dtype} on a CPU"
            )
        if name in self._bfloats:
            return openvino.Tensor(array, openvino.Shape(array.shape), openvino.Type.bf16)
        return openvino.Tensor(array, shared_memory=array.flags.writeable)

    def _array(self, name: str) -> np.ndarray:
        data = np.array(self._request.get_tensor(self._output_ports[name]).data)  # the next run writes there
        return data.view(np.uint16) if name in self._bfloats else data


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        config = auto_complete_model_config.as_dict()
        if not (config["input"] and config["output"]):
            path = _path(config, model_config.version_folder(config, pb_utils.get_model_dir()))
            try:
                model = _read(path, model_config.parameters_of(config))
            except RuntimeError as error:
                raise ConfigError(f"OpenVINO cannot load {path}: {error}") from error
            inputs = tuple(_port(port) for port in model.inputs)
            outputs = tuple(_port(port) for port in model.outputs)
            _refuse_types((*inputs, *outputs))
            batchable = all(
                openvino.layout_helpers.has_batch(port.node.layout)
                for port in (*model.inputs, *model.outputs)
            )
            # like the native backend: a batching model need not say its layout
            batchable = batchable or (
                config["max_batch_size"] > 0 and model_config.is_batchable((*inputs, *outputs))
            )
            model_config.complete(config, inputs, outputs, batchable=batchable)
        return auto_complete_model_config

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        engine = OpenVino(_path(config, Path(args["model_repository"], args["model_version"])), config)
        model_config.check(config, engine.inputs, engine.outputs)
        padded = model_config.parameters_of(config).get("ENABLE_BATCH_PADDING", "").upper() == YES
        if config["max_batch_size"] > 1 and not padded:
            pb_utils.Logger.log_warn(
                f"{config['name']}: in a container the native backend openvino refuses batches smaller than "
                "max_batch_size unless the parameter ENABLE_BATCH_PADDING is YES"
            )
        self._batcher = Batcher(engine, config)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self._batcher.answer(requests)


def _path(config: Mapping[str, Any], folder: Path) -> Path:
    return model_config.model_file(config, folder, "model.xml")


def _read(path: Path, parameters: Mapping[str, str]) -> Any:
    core = openvino.Core()
    if extension := parameters.get("CPU_EXTENSION_PATH"):
        core.add_extension(extension)
    return core.read_model(str(path))


def _properties(parameters: Mapping[str, str]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for key in ("INFERENCE_NUM_THREADS", "COMPILATION_NUM_THREADS"):
        if key in parameters:
            properties[key] = model_config.whole_number(parameters, key)
    if hint := model_config.one_of(parameters, "PERFORMANCE_HINT", HINTS):
        properties["PERFORMANCE_HINT"] = hint
    streams = parameters.get("NUM_STREAMS", "").upper()
    if streams in ("AUTO", "NUMA"):
        properties["NUM_STREAMS"] = streams
    elif streams:
        properties["NUM_STREAMS"] = model_config.whole_number(parameters, "NUM_STREAMS")
    if model_config.one_of(parameters, "HINT_BF16", (YES,)):
        properties["INFERENCE_PRECISION_HINT"] = "bf16"
    if precision := model_config.one_of(parameters, "INFERENCE_PRECISION_HINT", ("F32", "F16", "BF16")):
        properties["INFERENCE_PRECISION_HINT"] = precision.lower()
    device = parameters.get("TARGET_DEVICE", "CPU")
    if device.upper() not in ("CPU", "AUTO"):
        raise ConfigError(f"parameter TARGET_DEVICE is {device!r}; the embedded backend has CPU")
    return properties


def _reshape(model: Any, config: Mapping[str, Any]) -> None:
    """RESHAPE_IO_LAYERS: the model takes the dims of config.pbtxt instead of its own."""
    batch = [-1] if config["max_batch_size"] > 0 else []
    names = {_name(port) for port in model.inputs}
    model.reshape(
        {
            entry["name"]: openvino.PartialShape(
                [
                    *batch,
                    *map(int, entry["reshape"].get("shape") or [] if "reshape" in entry else entry["dims"]),
                ]
            )
            for entry in config["input"]
            if entry["name"] in names
        }
    )


def _name(port: Any) -> str:
    """The name that the model's author gave: several can lie on one port where a tensor is passed through."""
    own = port.node.friendly_name.removesuffix(SINK)
    return own if own in port.names or not port.names else min(port.names)


def _port(port: Any) -> Port:
    shape = port.partial_shape
    dims = None
    if shape.rank.is_static:
        dims = tuple(axis.get_length() if axis.is_static else -1 for axis in shape)
    kind = port.element_type.get_type_name()
    return Port(_name(port), TRITON_TYPES.get(kind, kind), dims)


def _refuse_types(ports: tuple[Port, ...]) -> None:
    for port in ports:
        if not port.data_type.startswith("TYPE_"):
            # strings too: the Python bindings of openvino 2026.4 give stale text and free foreign memory
            raise ConfigError(
                f"OpenVINO cannot serve {port}: its data type is not supported; the backend onnxruntime may"
            )
