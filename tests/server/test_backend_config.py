"""The rules by which the backends hold config.pbtxt against a model; they need no server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tritonsmith.server import launch

Config = dict[str, Any]


@pytest.fixture(scope="module")
def rules() -> Iterator[ModuleType]:
    """`tritonsmith_backend.config`, which Triton's stub imports from beside the backends."""
    spec = importlib.util.spec_from_file_location(
        "backend_config_under_test", Path(launch.BACKENDS) / "tritonsmith_backend" / "config.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def config(**changes: Any) -> Config:
    entry = {"data_type": "TYPE_FP32", "dims": ["3"]}  # Triton writes 64-bit numbers as strings
    return {
        "max_batch_size": 4,
        "input": [{"name": "x", **entry}],
        "output": [{"name": "y", **entry}],
        **changes,
    }


def entries(name: str, **changes: Any) -> list[Config]:
    return [{"name": name, "data_type": "TYPE_FP32", "dims": ["3"], **changes}]


def check(
    rules: ModuleType, given: Config, x: tuple[int, ...] = (-1, 3), y: tuple[int, ...] = (-1, 3)
) -> None:
    rules.check(given, (rules.Port("x", "TYPE_FP32", x),), (rules.Port("y", "TYPE_FP32", y),))


@pytest.mark.parametrize(
    ("given", "x", "y"),
    [
        pytest.param(config(), (-1, 3), (-1, 3), id="batched"),
        pytest.param(config(max_batch_size=0), (3,), (3,), id="no batch"),
        pytest.param(config(), (-1, -1), (-1, -1), id="fixed where the model is free"),
        pytest.param(config(input=entries("x", dims=["-1"])), (-1, 3), (-1, 3), id="free input axis"),
        pytest.param(
            config(input=entries("x", reshape={"shape": ["1", "3"]})), (-1, 1, 3), (-1, 3), id="reshape"
        ),
        pytest.param(
            config(input=entries("x", dims=["1"], reshape={})), (-1,), (-1, 3), id="reshape to none"
        ),
        pytest.param(
            config(max_batch_size=0, input=entries("x", dims=["1"]), output=entries("y", dims=["1", "1"])),
            (),
            (),
            id="scalars",
        ),
    ],
)
def test_a_configuration_that_fits_is_taken(
    rules: ModuleType, given: Config, x: tuple[int, ...], y: tuple[int, ...]
) -> None:
    check(rules, given, x, y)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"input": entries("z")},
            r"config\.pbtxt has input 'z'; the model's inputs are 'x' TYPE_FP32 \[-1, 3\]",
        ),
        ({"output": entries("z")}, r"config\.pbtxt has output 'z'; the model's outputs are 'y'"),
        ({"input": entries("x", data_type="TYPE_INT8")}, "says TYPE_INT8, the model says TYPE_FP32"),
        ({"input": entries("x", dims=["4"])}, r"says dims \[4\], the model says \[-1, 3\]"),
        ({"input": entries("x", dims=["-1", "3"])}, "the first axis is the batch, which dims leave out"),
        ({"output": entries("y", dims=["-1"])}, r"output 'y': .* says dims \[-1\]"),
        ({"max_batch_size": 0}, r"input 'x': .* says dims \[3\], the model says \[-1, 3\]$"),
        ({"input": []}, "the model needs input 'x'"),
        ({"model_transaction_policy": {"decoupled": True}}, "decoupled"),
        ({"batch_input": [{"kind": "BATCH_ELEMENT_COUNT"}]}, "batch_input is not supported"),
        ({"input": entries("x", allow_ragged_batch=True)}, "allow_ragged_batch"),
        ({"input": entries("x", optional=True)}, "optional, which needs max_batch_size: 0"),
        (
            {"sequence_batching": {"control_input": [{"name": "start"}]}},
            "sequence_batching feeds input 'start'",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    rules: ModuleType, changes: Config, reason: str
) -> None:
    with pytest.raises(rules.ConfigError, match=reason):
        check(rules, config(**changes))


def test_batching_over_a_fixed_first_axis_is_refused(rules: ModuleType) -> None:
    with pytest.raises(rules.ConfigError, match=r"the model says \[1, 3\], whose first axis is not free"):
        check(rules, config(), (1, 3), (1, 3))


def test_dims_other_than_one_are_refused_for_a_scalar(rules: ModuleType) -> None:
    with pytest.raises(rules.ConfigError, match=r"the model says a scalar; expected dims: \[1\]"):
        check(rules, config(max_batch_size=0), (), (3,))


def completed(rules: ModuleType, given: Config, *, batchable: bool) -> Config:
    x, y = rules.Port("x", "TYPE_FP32", (-1, 3)), rules.Port("y", "TYPE_INT8", (-1,))
    rules.complete(given, (x,), (y,), batchable=batchable)
    return given


def test_silence_is_filled_in_for_a_model_that_batches(rules: ModuleType) -> None:
    assert completed(rules, {"max_batch_size": 0, "input": [], "output": []}, batchable=True) == {
        "max_batch_size": 4,
        "dynamic_batching": {},
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}],
        "output": [{"name": "y", "data_type": "TYPE_INT8", "dims": [1], "reshape": {"shape": []}}],
    }


def test_silence_is_filled_in_for_a_model_that_does_not_batch(rules: ModuleType) -> None:
    assert completed(rules, {"max_batch_size": 0, "input": [], "output": []}, batchable=False) == {
        "max_batch_size": 0,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]}],
        "output": [{"name": "y", "data_type": "TYPE_INT8", "dims": [-1]}],
    }


def test_what_is_said_is_left_as_it_is(rules: ModuleType) -> None:
    given = config(max_batch_size=2)
    assert completed(rules, dict(given), batchable=True) == given
    sequences = {"max_batch_size": 2, "sequence_batching": {}, "input": [], "output": []}
    assert "dynamic_batching" not in completed(rules, sequences, batchable=True)


def test_a_batch_size_for_a_model_that_cannot_batch_is_refused(rules: ModuleType) -> None:
    with pytest.raises(rules.ConfigError, match="max_batch_size is 8, but the model has no free batch axis"):
        completed(rules, {"max_batch_size": 8, "input": [], "output": []}, batchable=False)


@pytest.mark.parametrize("text", ["-1", "two", "", "1.5"])
def test_a_parameter_that_is_no_count_is_refused(rules: ModuleType, text: str) -> None:
    with pytest.raises(rules.ConfigError, match="expected a whole number"):
        rules.whole_number({"threads": text}, "threads")


def test_accelerators_are_listed_to_be_warned_of(rules: ModuleType) -> None:
    asked = {
        "gpu_execution_accelerator": [{"name": "tensorrt", "parameters": {}}],
        "cpu_execution_accelerator": [{"name": "openvino"}],
    }
    accelerated = config(optimization={"execution_accelerators": asked})
    assert rules.accelerators(accelerated) == ["tensorrt", "openvino"]
    assert rules.accelerators(config()) == []
    assert rules.accelerators(config(optimization={"execution_accelerators": None})) == []
