"""What a plan's served answers are held against: the ONNX file that it was built from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnx_models import linear_weights
from plan_orders import H100, OnnxTools, publish_order
from tritonsmith.artifact import Json
from tritonsmith.client import Client, Signature
from tritonsmith.client.signature import Tensor
from tritonsmith.errors import ValidationError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.repository.amend import amend
from tritonsmith.repository.entry import read_entry
from tritonsmith.targets.plans import PlanRequest, build_plans
from tritonsmith.validate.references import open_references


def served(**config: Json) -> Signature:
    """What a server with a GPU tells of the model `linear`."""
    return Signature(
        model="linear",
        version="1",
        max_batch_size=8,
        inputs=(Tensor(name="features", datatype="FP32", shape=(-1, 4)),),
        outputs=(Tensor(name="scores", datatype="FP32", shape=(-1, 3)),),
        config={"backend": "tensorrt", **config},
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The linear model with a published INT8 plan."""
    repository = tmp_path / "repository"
    publish_order(repository, tmp_path / "work", ("fp32", "int8"))
    machine = OnnxTools(device=H100, milliseconds={"fp32": 2.0, "int8": 1.0})
    build_plans(PlanRequest(repository=repository, cache=tmp_path / "cache"), tools=machine.tools())
    assert read_entry(repository, "linear").manifest.targets[0].precision == "int8"
    return repository


def test_a_plan_is_held_against_its_onnx_file(repository: Path) -> None:
    signature = served(default_model_filename="gpu.sm90.plan")
    features = np.random.default_rng(3).uniform(-1, 1, (5, 4)).astype(np.float32)
    with (
        Client("http://127.0.0.1:1") as client,
        open_references(repository, signature, client, None, ConvertOptions(), lambda _: None) as (
            reference,
        ),
    ):
        found = reference.run({"features": features})["scores"]
        tolerance = reference.tolerances["scores"]
    weights = linear_weights()
    exact = features @ weights["weight"] + weights["bias"]
    error = np.abs(found - exact).max()
    assert 1e-4 < error < 0.05  # the INT8 file's, not the FP32 model's
    assert tolerance == 5e-2


def test_a_plan_of_someone_elses_has_nothing_to_be_held_against(repository: Path) -> None:
    signature = served(default_model_filename="theirs.plan")
    with (
        Client("http://127.0.0.1:1") as client,
        pytest.raises(ValidationError, match="nothing to compare"),
        open_references(repository, signature, client, None, ConvertOptions(), lambda _: None),
    ):
        pass


def test_a_fallbacks_file_has_its_own_precision(repository: Path) -> None:
    entry = read_entry(repository, "linear")
    row = {"file": "gpu.int8.onnx", "precision": "int8", "chosen": True}
    target = replace(entry.manifest.targets[0], candidates=(row,))
    amend(entry, files={}, targets=(target,), configs={})
    signature = replace(
        served(), config={"backend": "onnxruntime", "default_model_filename": "gpu.int8.onnx"}
    )
    with (
        Client("http://127.0.0.1:1") as client,
        open_references(repository, signature, client, None, ConvertOptions(), lambda _: None) as (
            reference,
        ),
    ):
        tolerance = reference.tolerances["scores"]
    assert tolerance == 5e-2
