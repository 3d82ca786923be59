"""Pruning PyTorch modules: what is left computes as if the rest were silent; refusals; resumption."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from torch import nn

from onnx_models import linear_model, write_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.cost import cost_of
from tritonsmith.compress.pruning.prune_torch import apply_prune_torch
from tritonsmith.compress.pruning.torch_cut import cut_copy
from tritonsmith.compress.pruning.torch_groups import find_groups
from tritonsmith.compress.pruning.torch_named import gradients
from tritonsmith.compress.pruning.torch_plan import plan_ratio
from tritonsmith.compress.steps import PruneTorch
from tritonsmith.errors import CompressionError, MissingExtraError, SamplesError
from tritonsmith.ingest import convert
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.torch_module import TorchModule, load_module
from tritonsmith.samples import load_samples

RESIDUAL, ATTENTION = "prunable_torch:residual", "prunable_torch:attention"
CHANNELS = {"stem": 16, "conv1": 24, "conv2": 16}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("residual")
    teacher = convert(RESIDUAL, folder / "model.onnx")
    random = np.random.default_rng(1)
    np.savez(
        folder / "training.npz",
        image=random.random((48, 1, 6, 6), dtype=np.float32),
        target=random.integers(0, 3, 48),
    )
    training = load_samples(folder / "training.npz", teacher.inputs)
    return Material(teacher=teacher, source=RESIDUAL, training=training)


def loaded(source: str) -> TorchModule:
    return load_module(source, ConvertOptions())


def prune(material: Material, spec: PruneTorch, tmp_path: Path, name: str = "out") -> Artifact:
    out, checkpoint = tmp_path / name / "model.onnx", tmp_path / f"{name}-checkpoint"
    return apply_prune_torch(spec, material.teacher, material, out, checkpoint=checkpoint)


def test_what_is_left_computes_as_if_cut_channels_were_silent() -> None:
    source = loaded(RESIDUAL)
    groups, alone = find_groups(source, gradients=None, round_to=4, keep=())
    assert sorted(group.layer for group in groups) == ["conv1", "conv2"]
    assert any(line.startswith("head:") for line in alone)
    plan = plan_ratio(groups, 0.5, part=1.0, channels=CHANNELS)
    pruned = cut_copy(source, plan).module
    silent = copy.deepcopy(source.module)
    gone = {item.layer: list(item.channels) for item in plan}
    assert {layer: len(channels) for layer, channels in gone.items()} == {"conv1": 12, "conv2": 8}
    norms = {"norm1": gone["conv1"], "norm2": gone["conv2"], "stem_norm": gone["conv2"]}
    with torch.no_grad():
        for name, channels in norms.items():
            norm = silent.get_submodule(name)
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight[channels], norm.bias[channels] = 0.0, 0.0
        image = torch.rand(3, 1, 6, 6)
        torch.testing.assert_close(pruned(image), silent(image))
    assert pruned.get_submodule("stem").weight.shape == (8, 1, 3, 3)
    assert pruned.get_submodule("conv1").weight.shape == (12, 8, 3, 3)


def test_the_least_important_channels_go() -> None:
    source = loaded(RESIDUAL)
    with torch.no_grad():
        for name in ("conv1", "norm1"):
            source.module.get_submodule(name).weight[5:17] *= 1e-3
        source.module.get_submodule("conv2").weight[:, 5:17] *= 1e-3
    groups, _ = find_groups(source, gradients=None, round_to=4, keep=("conv2",))
    (only,) = plan_ratio(groups, 0.5, part=1.0, channels=CHANNELS)
    assert (only.layer, only.channels) == ("conv1", tuple(range(5, 17)))


def test_heads_go_whole() -> None:
    source = loaded(ATTENTION)
    groups, alone = find_groups(source, gradients=None, round_to=8, keep=())
    sizes = {group.layer: (len(group.units), group.head_channels) for group in groups}
    assert sizes == {"value": (4, 4), "wide": (32, None)}
    assert any("it makes an output" in line for line in alone)
    plan = plan_ratio(groups, 0.5, part=1.0, channels={"value": 16, "wide": 32})
    pruned = cut_copy(source, plan).module
    silent = copy.deepcopy(source.module)
    gone = {item.layer: list(item.channels) for item in plan}
    with torch.no_grad():
        silent.get_submodule("out").weight[:, gone["value"]] = 0.0
        silent.get_submodule("narrow").weight[:, gone["wide"]] = 0.0
        states = torch.rand(2, 7, 16)
        torch.testing.assert_close(pruned(states), silent(states))
    assert pruned.num_heads == 2
    assert pruned.get_submodule("query").weight.shape == (8, 16)


def test_a_flops_target_is_met_on_the_file(material: Material, tmp_path: Path) -> None:
    spec = PruneTorch(flops=0.4, round_to=4, importance="taylor")
    artifact = prune(material, spec, tmp_path)
    before, after = cost_of(material.teacher.path), cost_of(artifact.path)
    assert 0.25 < after.flops / before.flops <= 0.4
    assert (artifact.inputs, artifact.outputs) == (material.teacher.inputs, material.teacher.outputs)
    assert artifact.steps[:-1] == material.teacher.steps
    step = artifact.steps[-1]
    assert step.name == "prune-torch"
    assert step.bytes_after < step.bytes_before
    channels = step.measured["channels"]
    assert isinstance(channels, dict)
    assert channels
    assert all(after % 4 == 0 and after < before for before, after in channels.values())
    session = InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": np.zeros((5, 1, 6, 6), np.float32)})
    assert logits.shape == (5, 3)


def test_taylor_terms_see_what_magnitude_does_not(material: Material) -> None:
    """Large weights that nothing downstream reads have no gradient."""
    source = loaded(RESIDUAL)
    with torch.no_grad():
        source.module.get_submodule("conv2").weight[:, :12] = 0.0
        source.module.get_submodule("conv1").weight[:12] *= 100.0
    terms = gradients(source, material, seed=1)
    groups, _ = find_groups(source, gradients=terms, round_to=4, keep=("conv2",))
    (only,) = plan_ratio(groups, 0.5, part=1.0, channels=CHANNELS)
    assert only.channels == tuple(range(12))


def test_a_kill_while_training_is_taken_up(material: Material, tmp_path: Path) -> None:
    spec = PruneTorch(ratio=0.5, round_to=4, iterations=2, epochs=1, batch_size=16)
    whole = prune(material, spec, tmp_path, "whole")
    out, checkpoint = tmp_path / "killed" / "model.onnx", tmp_path / "killed-checkpoint"
    lines: list[str] = []

    def die_in_the_second_round(line: str) -> None:
        lines.append(line)
        if line.startswith("epoch") and any("round 2" in said for said in lines):
            raise KeyboardInterrupt

    def attempt(say: object) -> Artifact:
        return apply_prune_torch(
            spec,
            material.teacher,
            material,
            out,
            checkpoint=checkpoint,
            say=say,  # type: ignore[arg-type]
        )

    with pytest.raises(KeyboardInterrupt):
        attempt(die_in_the_second_round)
    assert not out.exists()
    again: list[str] = []
    resumed = attempt(again.append)
    assert not any(line.startswith("epoch 1/1") for line in again)  # both rounds were trained before
    image = material.training.arrays["image"] if material.training else None
    answers = [
        InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"]).run(None, {"image": image})
        for artifact in (whole, resumed)
    ]
    np.testing.assert_allclose(answers[0][0], answers[1][0], atol=1e-5)
    training = resumed.steps[-1].measured["training"]
    assert isinstance(training, list)
    assert len(training) == 2
    assert resumed.steps[-1].measured["channels"] == {"stem": [16, 8], "conv1": [24, 12], "conv2": [16, 8]}


def test_requests_that_make_no_sense(material: Material, tmp_path: Path) -> None:
    for spec, words in (
        (PruneTorch(), "how much"),
        (PruneTorch(flops=0.5, ratio=0.5), "how much"),
        (PruneTorch(ratio=1.5), "share"),
        (PruneTorch(ratio=0.99, round_to=1), "would empty"),
        (PruneTorch(flops=0.001, round_to=4), "cannot be pruned so far"),
        (PruneTorch(ratio=0.5, keep=("nowhere",)), "no module is named 'nowhere'"),
        (PruneTorch(ratio=0.5, importance="luck"), "luck"),
        (PruneTorch(ratio=0.5, hidden=1.0), "hidden"),
    ):
        with pytest.raises(CompressionError, match=words):
            prune(material, spec, tmp_path)
    assert not (tmp_path / "out" / "model.onnx").exists()
    with pytest.raises(SamplesError, match="taylor needs data"):
        prune(
            replace(material, training=None),
            PruneTorch(ratio=0.5, importance="taylor", seed=2),
            tmp_path,
            "no-data",
        )


def test_other_sources_are_sent_to_prune(material: Material, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.onnx", linear_model())
    spec = PruneTorch(ratio=0.5)
    program = tmp_path / "model.pt2"
    module, inputs = nn.Linear(4, 3), (torch.rand(2, 4),)
    torch.export.save(torch.export.export(module, inputs), program)
    for source, found in ((str(other), "kind onnx"), (str(program), "program"), (None, "no source")):
        with pytest.raises(CompressionError) as caught:
            prune(replace(material, source=source), spec, tmp_path)
        assert found in str(caught.value.found)
        assert "use prune" in str(caught.value.fix)
    pruned = replace(material.teacher, path=other)
    with pytest.raises(CompressionError, match="first step"):
        apply_prune_torch(spec, pruned, material, tmp_path / "out.onnx", checkpoint=tmp_path / "checkpoint")


def test_without_torch_pruning(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_cut", "torch_plan", "torch_groups"):
        monkeypatch.delitem(sys.modules, f"tritonsmith.compress.pruning.{name}", raising=False)
    import tritonsmith.compress.pruning as package

    monkeypatch.delattr(package, "torch_cut", raising=False)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"torch-pruning") as caught:
        prune(material, PruneTorch(ratio=0.5), tmp_path)
    assert "tritonsmith[train]" in str(caught.value.fix)
