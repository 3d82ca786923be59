"""PyTorch sources: what each kind of module becomes, and what is said of those that cannot be read."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import torch_models
from tritonsmith.artifact import Artifact
from tritonsmith.engines import open_session
from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest import convert
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.torch import export_torch


def signature(artifact: Artifact) -> list[str]:
    return [str(spec) for spec in (*artifact.inputs, *artifact.outputs)]


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(artifact.path).graph.node)


# Recurrent layers stay whole; a module left in training loses its dropout and batch statistics.
OPERATORS = {
    "recurrent": {"LSTM": 2, "GRU": 1, "Loop": 0, "Scan": 0},
    "training": {"Gemm": 1, "Dropout": 0, "BatchNormalization": 0},
    "convolutions": {"Conv": 3},
}
CASTS = {"half": "float16 to float32", "brain": "bfloat16 to float32"}


def save_program(
    path: Path, module: torch.nn.Module, args: tuple[Any, ...], shapes: Any = None, **kwargs: Any
) -> str:
    torch.export.save(torch.export.export(module, args, kwargs, dynamic_shapes=shapes), path)
    return str(path)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("mlp", ["input: float32[batch, 4]", "output: float32[batch, 3]"]),
        ("training", ["input: float32[batch, 4]", "output: float32[batch, 6]"]),
        (
            "recurrent",
            ["ids: int64[batch, 5]", "steps: float32[batch, 5, 4]", "last: float32[batch, 4]"],
        ),
        (
            "attention",
            [
                "ids: int64[batch, sequence]",
                "padding: bool[batch, sequence]",
                "output: float32[batch, sequence, 8]",
            ],
        ),
        (
            "convolutions",
            [
                "line: float32[batch, 2, 9]",
                "plane: float32[batch, 3, 12, 12]",
                "space: float32[batch, 1, 4, 4, 4]",
                "output_0: float32[batch, 4]",
                "output_1: float32[batch, 4]",
            ],
        ),
        (
            "named_outputs",
            [
                "features: float32[batch, 4]",
                "keep: bool[batch, 1]",
                "logits: float32[batch, 3]",
                "best: int64[batch]",
            ],
        ),
        ("half", ["input: float32[batch, 4]", "output: float32[batch, 3]"]),
        ("brain", ["input: float32[batch, 4]", "output: float32[batch, 3]"]),
        ("unbatched", ["signal: float32[4]", "gain: float32[]", "output: float32[]"]),
        ("fixed_rows", ["table: float32[3, 2]", "output: float32[5, 2]"]),
    ],
)
def test_a_factory_is_converted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], factory: str, expected: list[str]
) -> None:
    artifact = convert(f"torch_models:{factory}", tmp_path / "model.onnx")
    assert signature(artifact) == expected
    assert artifact.batched == ("batch" in expected[0])
    assert artifact.precision == "fp32"
    assert capfd.readouterr() == ("", "")
    check_answers(artifact, factory)
    if factory in OPERATORS:
        count = operators(artifact)
        assert {name: count[name] for name in OPERATORS[factory]} == OPERATORS[factory]
    if factory in CASTS:
        assert artifact.steps[0].options["cast"] == CASTS[factory]


def check_answers(artifact: Artifact, factory: str) -> None:
    """Hold the file against the module itself, in eval mode and float32, on the factory's examples."""
    module, inputs, *_ = getattr(torch_models, factory)()
    module = module.float().eval()
    tensors = list(inputs.values() if isinstance(inputs, dict) else inputs)
    tensors = [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]
    with torch.no_grad():
        expected = module(*tensors)
    if isinstance(expected, dict):
        expected = list(expected.values())
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    feed = {spec.name: tensor.numpy() for spec, tensor in zip(artifact.inputs, tensors, strict=True)}
    found = open_session(artifact.path).run(feed)
    for spec, tensor in zip(artifact.outputs, expected, strict=True):
        np.testing.assert_allclose(found[spec.name], tensor.numpy(), rtol=1e-4, atol=1e-6)


def test_an_axis_that_was_named_and_cannot_be_free_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"axis 0 \(rows\) of input 'table' is fixed at 3"):
        export_torch("torch_models:frozen_axis", tmp_path, ConvertOptions())


FACTORIES = """
import torch

def fails():
    raise ValueError("no weights here")

def returns_module():
    return torch.nn.Linear(2, 2)

def returns_number():
    return 1, (torch.ones(1, 2),)

def no_inputs():
    return torch.nn.Linear(2, 2), ()

def number_input():
    return torch.nn.Linear(2, 2), (3,)

def wrong_name():
    return torch.nn.Linear(2, 2), {"x": torch.ones(1, 2)}

def wrong_shape():
    return torch.nn.Linear(2, 2), (torch.ones(1, 5),)

def unknown_axis():
    return torch.nn.Linear(2, 2), (torch.ones(1, 2),), {"x": {0: "batch"}}

def no_such_axis():
    return torch.nn.Linear(2, 2), (torch.ones(1, 2),), {"input": {2: "batch"}}

def nameless_axis():
    return torch.nn.Linear(2, 2), (torch.ones(1, 2),), {"input": {0: 7}}

class Branch(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def branch():
    return Branch(), (torch.ones(2, 2),)

class Text(torch.nn.Module):
    def forward(self, x):
        return {"value": x, "text": "no"}

def text():
    return Text(), (torch.ones(2, 2),)

class Complex(torch.nn.Module):
    def forward(self, x):
        return torch.complex(x, x)

def complex_output():
    return Complex(), (torch.ones(2, 2),)

number = 3
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere:model", "no Python module is named 'nowhere'"),
        ("factories.deeper:model", "cannot be imported|no Python module is named 'factories.deeper'"),
        ("broken:model", "broken cannot be imported"),
        ("lacking:model", "no_such_package"),
        ("factories:nothing", "has no function 'nothing'"),
        ("factories:number", "is not a function"),
        ("factories:fails", "no weights here"),
        ("factories:returns_module", r"returned something else\n  found: Linear"),
        ("factories:returns_number", "returned no module first"),
        ("factories:no_inputs", "returned no example inputs"),
        ("factories:number_input", "is no tensor"),
        ("factories:wrong_name", "do not fit"),
        ("factories:wrong_shape", "fails on its example inputs"),
        ("factories:unknown_axis", "name an input that is not there"),
        ("factories:no_such_axis", "axis that input 'input' has not"),
        ("factories:nameless_axis", "has no name"),
        ("factories:branch", "cannot trace"),
        ("factories:text", "found: str as text"),
        ("factories:complex_output", "complex64"),
        ("model:", "names no factory"),
    ],
)
def test_a_wrong_factory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "broken.py").write_text("def model(:")
    (tmp_path / "lacking.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("factories", "broken", "lacking"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SourceError, match=message):
        export_torch(source, tmp_path, ConvertOptions())


@pytest.mark.parametrize("package", ["torch", "onnxscript"])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"tritonsmith\[torch\]"):
        export_torch("torch_models:mlp", tmp_path, ConvertOptions())


class Scaled(torch.nn.Module):
    """Several inputs, one of them in a dictionary, a constant argument and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(5, 3)

    def forward(
        self, rows: torch.Tensor, bias: dict[str, torch.Tensor], skip: Any = None, scale: int = 2
    ) -> dict[str, Any]:
        hidden = self.dense(rows.to(self.dense.weight.dtype)) * scale
        return {"sum": hidden + bias["low"], "parts": (hidden, skip, rows.flatten(1))}


def scaled_program(path: Path, module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> str:
    batch = torch.export.Dim("batch", max=4)
    args = (torch.ones(2, 4, 5, dtype=dtype), {"low": torch.ones(2, 4, 3, dtype=dtype)}, None, 3)
    shapes = {"rows": {0: batch}, "bias": {"low": {0: batch}}, "skip": None, "scale": None}
    return save_program(path, module.to(dtype).eval(), args, shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_program_keeps_its_names_and_its_batch_axis(tmp_path: Path, dtype: torch.dtype) -> None:
    module = Scaled()
    source = scaled_program(tmp_path / "model.pt2", module, dtype)
    artifact = convert(source, tmp_path / "model.onnx")
    assert signature(artifact) == [
        "rows: float32[batch, 4, 5]",
        "bias_low: float32[batch, 4, 3]",
        "sum: float32[batch, 4, 3]",
        "parts_0: float32[batch, 4, 3]",
        "parts_2: float32[batch, 20]",
    ]
    rows, low = np.ones((6, 4, 5), np.float32), np.full((6, 4, 3), 0.5, np.float32)
    weight, bias = (value.detach().float().numpy() for value in (module.dense.weight, module.dense.bias))
    found = open_session(artifact.path).run({"rows": rows, "bias_low": low})["sum"]
    np.testing.assert_allclose(found, (rows @ weight.T + bias) * 3 + 0.5, rtol=1e-5, atol=1e-6)


def test_a_program_of_a_fixed_batch_has_no_batch_axis(tmp_path: Path) -> None:
    source = save_program(tmp_path / "model.pt2", torch.nn.Linear(4, 2), (torch.ones(1, 4),))
    artifact = convert(source, tmp_path / "model.onnx")
    assert signature(artifact) == ["input: float32[1, 4]", "output: float32[1, 2]"]
    assert not artifact.batched


def test_a_program_keeps_its_other_free_axes_within_their_bounds(tmp_path: Path) -> None:
    module = torch.nn.Conv1d(2, 3, 5)
    free = {"input": {0: torch.export.Dim("batch"), 2: torch.export.Dim("time", min=16, max=64)}}
    source = save_program(tmp_path / "model.pt2", module, (torch.ones(2, 2, 20),), free)
    artifact = convert(source, tmp_path / "model.onnx")
    assert signature(artifact)[0] == "input: float32[batch, 2, sequence]"
    assert artifact.outputs[0].shape[:2] == ("batch", 3)
    assert isinstance(artifact.outputs[0].shape[2], str)
    compared = artifact.steps[0].measured["parity"]["compared"]  # type: ignore[index, call-overload]
    assert {case["sequence"] for case in compared} == {16, 17, 18, 22}  # type: ignore[index, call-overload, union-attr]


class Halves(torch.nn.Module):
    def forward(self, steps: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return steps + pairs.unflatten(1, (-1, 2)).sum(2)


def test_an_axis_that_is_a_multiple_of_another_is_tried_at_lengths_that_fit(tmp_path: Path) -> None:
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    free = {"steps": {0: batch, 1: steps}, "pairs": {0: batch, 1: 2 * steps}}
    inputs = (torch.ones(2, 5), torch.ones(2, 10))
    source = save_program(tmp_path / "model.pt2", Halves(), inputs, free)
    artifact = convert(source, tmp_path / "model.onnx")
    feed = {"steps": np.ones((3, 4), np.float32), "pairs": np.arange(24, dtype=np.float32).reshape(3, 8)}
    found = open_session(artifact.path).run(feed)["output"]
    np.testing.assert_array_equal(found, 1 + feed["pairs"][:, 0::2] + feed["pairs"][:, 1::2])


@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3)])
def test_a_program_in_training_mode_is_refused(tmp_path: Path, layer: torch.nn.Module) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), layer).train()
    source = save_program(tmp_path / "model.pt2", module, (torch.ones(2, 4),))
    with pytest.raises(SourceError, match="training mode"):
        export_torch(source, tmp_path, ConvertOptions())


@pytest.mark.parametrize("allow_code", [False, True])
def test_a_pickled_module_is_refused_with_what_to_do(tmp_path: Path, allow_code: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(SourceError, match=r"example inputs(.|\n)*torch\.export\.save(.|\n)*factory"):
        export_torch(str(path), tmp_path, ConvertOptions(allow_code=allow_code))
