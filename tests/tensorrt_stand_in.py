"""TensorRT's objects without TensorRT, as strict as a published binding: run in a process that imported it.

Every object here stands for a class of the binding that is imported. It has only the names that this class
really has in this version, takes only as many arguments, of the kinds, as the binding's own signatures say,
and sets only what can be set. So a call that a version removed fails here as it would on a GPU. Enums,
ILogger and IProgressMonitor are the binding's own. The one model doubles its input: y = 2 x, float32
[batch, 3].
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

KINDS = {
    "int": int,
    "typing.SupportsInt": int,
    "str": str,
    "bool": bool,
    "buffer": (bytes, memoryview),
    "typing_extensions.Buffer": (bytes, memoryview),
}
REPLACED = ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter")
REPORT = {
    "Layers": [
        {
            "Name": "double",
            "LayerType": "kgen",
            "Inputs": [{"Name": "x", "Dimensions": [4, 3], "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "y", "Dimensions": [4, 3], "Format/Datatype": "Row major linear FP32"}],
            "Metadata": "[ONNX Layer: double]",
        }
    ]
}


class Strict:
    """An object of the class `real`, with `answers` for what is read of it and called on it."""

    def __init__(self, real: type, answers: Mapping[str, Any], calls: list[list[Any]]) -> None:
        for name in answers:
            assert hasattr(real, name) or name == "is_shape_tensor", f"{real.__name__} has no {name}"
        self.__dict__.update(_real=real, _answers=dict(answers), _calls=calls)

    def __getattr__(self, name: str) -> Any:
        real, answers = self.__dict__["_real"], self.__dict__["_answers"]
        attribute = getattr(real, name)  # AttributeError: as the binding itself would say
        if isinstance(attribute, property):
            return answers[name]

        def call(*arguments: Any) -> Any:
            check_call(real, name, attribute.__doc__ or "", arguments)
            self.__dict__["_calls"].append([real.__name__, name, *map(plain, arguments)])
            answer = answers.get(name)
            return answer(*arguments) if callable(answer) else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # how the binding is told which layer it has handed out
            self.__dict__["_real"] = value
            return
        attribute = getattr(self.__dict__["_real"], name)
        assert isinstance(attribute, property), f"{name} is no property"
        assert attribute.fset is not None, f"{name} cannot be set"
        self.__dict__["_answers"][name] = value
        self.__dict__["_calls"].append([self.__dict__["_real"].__name__, f"{name}=", plain(value)])


def check_call(real: type, name: str, doc: str, arguments: tuple[Any, ...]) -> None:
    """Raise TypeError where no signature in the binding's docstring takes these arguments."""
    signatures = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)(?: -> .*)?$", doc, re.MULTILINE)
    signatures = [text for text in signatures if text.startswith("self")]
    assert signatures, f"{real.__name__}.{name} says nothing of its arguments: {doc[:80]}"
    if not any(_takes(text, arguments) for text in signatures):
        raise TypeError(f"{real.__name__}.{name} takes {signatures}, not {arguments}")


def _takes(signature: str, arguments: tuple[Any, ...]) -> bool:
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", signature)][1:]
    needed = [part for part in parts if "=" not in part]
    if not len(needed) <= len(arguments) <= len(parts):
        return False
    for part, argument in zip(parts, arguments, strict=False):
        kind = part.partition(":")[2].partition("=")[0].strip()
        if kind in KINDS and not isinstance(argument, KINDS[kind]):
            return False
    return True


def plain(value: Any) -> Any:
    if isinstance(value, Strict):
        return value.__dict__["_real"].__name__
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if hasattr(value, "name") and hasattr(value, "value"):
        return value.name
    return value if isinstance(value, bool | int | str) else type(value).__name__


class World:
    """The stand-ins of one binding; `calls` is what was asked of them."""

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt
        self.real = {name: getattr(trt, name, None) for name in REPLACED}
        self.reset()

    def reset(self) -> None:
        """A fresh world for the next scenario."""
        self.calls: list[list[Any]] = []
        self.data_type, self.layer_type = "FLOAT", "CAST"  # of the network's one layer
        self.during_build: Callable[[], object] = lambda: None
        self.stripped = False
        self.shape_tensor = False
        self.builds = True
        self.build_end = "the plan"
        self.install()

    def make(self, kind: str, **answers: Any) -> Strict:
        return Strict(getattr(self.trt, kind), answers, self.calls)

    def install(self) -> None:
        """Put the stand-ins in the place of the classes that need TensorRT's libraries."""
        makers = (self.builder, self.parser, self.runtime, self.refitter, self.parser_refitter)
        for name, maker in zip(REPLACED, makers, strict=True):
            if (real := self.real[name]) is not None:
                setattr(self.trt, name, maker_with_class(real, maker))

    def builder(self, real: type, _logger: Any) -> Strict:
        return Strict(
            real,
            {
                "create_network": self.network,
                "create_builder_config": self.config,
                "create_optimization_profile": lambda: self.make("IOptimizationProfile"),
                "build_serialized_network": self.build,
            },
            self.calls,
        )

    def network(self, _flags: int) -> Strict:
        kind = getattr(self.trt.DataType, self.data_type)
        x = self.make("ITensor", name="x", dtype=self.trt.DataType.FLOAT, shape=(-1, 3))
        x.__dict__["_answers"]["is_shape_tensor"] = self.shape_tensor
        # 8.6 does not know the types of inner tensors before it builds; the others are strongly typed
        known = (
            kind if hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else self.trt.float32
        )
        layer = self.make(
            "ILayer",
            type=getattr(self.trt.LayerType, self.layer_type),
            num_outputs=1,
            get_output=lambda _: self.make("ITensor", dtype=known),
        )
        more = {
            "to_type": kind,
            "weights": np.zeros(1, np.float16 if self.data_type == "HALF" else np.float32),
        }
        layer.__dict__["_answers"].update(
            more
        )  # once the layer is told to be an ICastLayer or IConstantLayer
        return self.make(
            "INetworkDefinition", num_inputs=1, get_input=lambda _: x, num_layers=1, get_layer=lambda _: layer
        )

    def parser(self, real: type, _network: Any, _logger: Any) -> Strict:
        def parse(path: str) -> bool:
            return Path(path).read_text(encoding="utf-8") != "broken"

        error = self.make("ParserError", desc=lambda: "no such operator: Frobnicate")
        answers = {"parse_from_file": parse, "num_errors": 1, "get_error": lambda _: error}
        return Strict(real, answers, self.calls)

    def config(self) -> Strict:
        profiles: list[Any] = []

        def add(profile: Any) -> int:
            profiles.append(profile)
            return len(profiles) - 1

        def timing_cache(serialized: bytes) -> Strict | None:
            if serialized == b"another GPU":
                return None
            return self.make("ITimingCache", serialize=lambda: serialized + b"+", combine=True)

        config = self.make(
            "IBuilderConfig",
            add_optimization_profile=add,
            create_timing_cache=timing_cache,
            set_timing_cache=lambda cache, _: (
                config.__dict__["_answers"].update(get_timing_cache=lambda: cache) or True
            ),
            get_tactic_sources=(1 << 5) - 1,
            set_tactic_sources=True,
        )
        return config

    def build(self, _network: Strict, config: Strict) -> bytes | None:
        monitor = config.__dict__["_answers"].get("progress_monitor")
        try:
            self.during_build()
        except BaseException:
            self.build_end = "an exception inside of the builder"
            raise
        if not self.builds:
            return None
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            goes_on = monitor.step_complete("Building", 0)
            monitor.phase_finish("Building")
            if not goes_on:
                self.build_end = "the monitor"
                return None
        return b"plan"

    def runtime(self, real: type, _logger: Any) -> Strict:
        def load(plan: bytes) -> Strict | None:
            return self.engine() if plan == b"plan" else None

        return Strict(real, {"deserialize_cuda_engine": load}, self.calls)

    def engine(self) -> Strict:
        trt = self.trt
        inspector = self.make("EngineInspector", get_engine_information=lambda _: json.dumps(REPORT))
        answers: dict[str, Any] = {
            "create_engine_inspector": lambda: inspector,
            "create_execution_context": lambda: None if self.stripped else self.context(),
            "num_optimization_profiles": 1,
            "refittable": self.stripped,
            "num_io_tensors": 2,
            "get_tensor_name": lambda index: "xy"[index],
            "get_tensor_mode": lambda name: (
                trt.TensorIOMode.INPUT if name == "x" else trt.TensorIOMode.OUTPUT
            ),
            "get_tensor_dtype": trt.DataType.FLOAT,
            "get_tensor_shape": (-1, 3),
            "get_tensor_profile_shape": [(1, 3), (4, 3), (8, 3)],
        }
        if hasattr(trt.ICudaEngine, "create_serialization_config"):
            answers["create_serialization_config"] = lambda: self.make(
                "ISerializationConfig", clear_flag=True
            )
            answers["serialize_with_config"] = b"plan"
        return self.make("ICudaEngine", **answers)

    def context(self) -> Strict:
        shapes: dict[str, tuple[int, ...]] = {}
        addresses: dict[str, int] = {}

        def set_shape(name: str, shape: tuple[int, ...]) -> bool:
            shapes[name] = tuple(shape)
            return True

        def set_address(name: str, address: int) -> bool:
            addresses[name] = address
            return True

        def execute(_stream: int) -> bool:
            count = shapes["x"][0] * shapes["x"][1]
            x = (ctypes.c_float * count).from_address(addresses["x"])
            y = (ctypes.c_float * count).from_address(addresses["y"])
            for index in range(count):
                y[index] = 2 * x[index]
            return True

        return self.make(
            "IExecutionContext",
            set_input_shape=set_shape,
            get_tensor_shape=lambda _: shapes["x"],
            set_tensor_address=set_address,
            execute_async_v3=execute,
            set_optimization_profile_async=True,
        )

    def refitter(self, real: type, _engine: Any, _logger: Any) -> Strict:
        def refit() -> bool:
            self.stripped = False
            return True

        return Strict(real, {"refit_cuda_engine": refit}, self.calls)

    def parser_refitter(self, real: type, _refitter: Any, _logger: Any) -> Strict:
        def refit(path: str) -> bool:
            return Path(path).is_file()

        return Strict(real, {"refit_from_file": refit}, self.calls)


def maker_with_class(real: type, maker: Callable[..., Strict]) -> Callable[..., Strict]:
    """A function in the place of a class: its arguments are checked against the constructor's signature."""

    def make(*arguments: Any) -> Strict:
        check_call(real, "__init__", real.__init__.__doc__ or "", arguments)
        return maker(real, *arguments)

    return make


def install() -> World:
    """Import the binding and stand in for it."""
    from tritonsmith.engines.tensorrt.versions import import_tensorrt

    return World(import_tensorrt())
