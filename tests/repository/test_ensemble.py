"""Ensembles derived from their steps; test_served.py asks Triton whether it agrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from publishing import publish_payload
from tritonsmith.errors import EnsembleError, RecipeError
from tritonsmith.repository.config import text_from_config
from tritonsmith.repository.ensemble import (
    EnsembleRequest,
    EnsembleStep,
    config_from_steps,
    publish_ensemble,
)
from tritonsmith.repository.entry import read_config, read_entry

Tensors = Sequence[tuple[str, str, str]]


def write_stage(
    repository: Path, name: str, size: int, inputs: Tensors, outputs: Tensors, more: str = ""
) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("# a stage")
    lines = [f'backend: "python"\nmax_batch_size: {size}\n{more}']
    for kind, tensors in (("input", inputs), ("output", outputs)):
        lines += [f'{kind} {{ name: "{n}" data_type: TYPE_{t} dims: {dims} }}' for n, t, dims in tensors]
    (folder.parent / "config.pbtxt").write_text("\n".join(lines))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_stage(tmp_path, "decode", 16, [("file", "STRING", "[1]")], [("pixels", "FP32", "[8, 8, 1]")])
    write_stage(tmp_path, "classify", 8, [("image", "FP32", "[-1, -1, 1]")], [("scores", "FP32", "[10]")])
    write_stage(
        tmp_path,
        "name",
        4,
        [("scores", "FP32", "[-1]")],
        [("label", "STRING", "[1]"), ("confidence", "FP32", "[1]")],
        'input { name: "threshold" data_type: TYPE_FP32 dims: [1] optional: true }\n',
    )
    write_stage(tmp_path, "bytes", 4, [("scores", "UINT8", "[10]")], [("y", "FP32", "[1]")])
    write_stage(tmp_path, "wide", 4, [("scores", "FP32", "[11]")], [("y", "FP32", "[1]")])
    write_stage(tmp_path, "flat", 0, [("scores", "FP32", "[2, 5, 10]")], [("y", "FP32", "[1]")])
    write_stage(tmp_path, "stream", 4, [("scores", "FP32", "[10]")], [("y", "FP32", "[1]")],
                "model_transaction_policy { decoupled: true }\n")  # fmt: skip
    (tmp_path / "silent" / "1").mkdir(parents=True)
    (tmp_path / "silent" / "config.pbtxt").write_text('backend: "python"\n')
    return tmp_path


DECODE = EnsembleStep(model="decode", inputs={"file": "FILE"}, outputs={"pixels": "pixels"})
CLASSIFY = EnsembleStep(model="classify", inputs={"image": "pixels"}, outputs={"scores": "scores"})
NAME = EnsembleStep(
    model="name", inputs={"scores": "scores"}, outputs={"label": "label", "confidence": "confidence"}
)


def request(repository: Path, *steps: EnsembleStep, **options: Any) -> EnsembleRequest:
    return EnsembleRequest(
        name="pipe", repository=repository, steps=steps or (DECODE, CLASSIFY, NAME), **options
    )


def test_everything_is_derived(repository: Path) -> None:
    text = text_from_config(config_from_steps(request(repository)))
    assert (
        text
        == """\
# Written by tritonsmith from the model and its recipe. Change those, not this file.
name: "pipe"
platform: "ensemble"
max_batch_size: 4
input {
  name: "FILE"
  data_type: TYPE_STRING
  dims: [1]
}
output {
  name: "label"
  data_type: TYPE_STRING
  dims: [1]
}
output {
  name: "confidence"
  data_type: TYPE_FP32
  dims: [1]
}
ensemble_scheduling {
  step {
    model_name: "decode"
    model_version: -1
    input_map {
      key: "file"
      value: "FILE"
    }
    output_map {
      key: "pixels"
      value: "pixels"
    }
  }
  step {
    model_name: "classify"
    model_version: -1
    input_map {
      key: "image"
      value: "pixels"
    }
    output_map {
      key: "scores"
      value: "scores"
    }
  }
  step {
    model_name: "name"
    model_version: -1
    input_map {
      key: "scores"
      value: "scores"
    }
    output_map {
      key: "confidence"
      value: "confidence"
    }
    output_map {
      key: "label"
      value: "label"
    }
  }
}
"""
    )


def test_own_tensors_can_be_named_and_ordered(repository: Path) -> None:
    asked = request(repository, inputs=("FILE",), outputs=("confidence", "scores", "label"))
    config = config_from_steps(asked)
    assert [tensor.name for tensor in config.output] == ["confidence", "scores", "label"]
    assert list(config.output[1].dims) == [10]


def test_a_fixed_axis_wins_over_a_free_one(repository: Path) -> None:
    other = EnsembleStep(model="wide", inputs={"scores": "in"}, outputs={"y": "b"})
    free = EnsembleStep(model="name", inputs={"scores": "in"}, outputs={"label": "a"})
    config = config_from_steps(request(repository, free, other))
    assert list(config.input[0].dims) == [11]


def test_options_version_and_labels(repository: Path) -> None:
    step = dataclasses.replace(NAME, version=1)
    config = config_from_steps(
        request(
            repository,
            DECODE,
            CLASSIFY,
            step,
            config={"response_cache": {"enable": True}, "ensemble_scheduling": {"max_inflight_requests": 4}},
            labels={"label": repository / "labels.txt"},
        )
    )
    assert config.response_cache.enable
    assert config.ensemble_scheduling.max_inflight_requests == 4
    assert [step.model_version for step in config.ensemble_scheduling.step] == [-1, -1, 1]
    assert config.output[0].label_filename == "labels.txt"


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], **options: Any) -> EnsembleStep:
    return EnsembleStep(model=model, inputs=inputs, outputs=outputs, **options)


WRONG: list[tuple[tuple[EnsembleStep, ...], dict[str, Any], list[str]]] = [
    ((DECODE, step("clasify", {}, {})), {}, ["step 2", "no model 'clasify'", "'classify'"]),
    ((step("pipe", {"x": "x"}, {"y": "y"}),), {}, ["step 1", "the ensemble itself"]),
    ((step("silent", {"x": "x"}, {"y": "y"}),), {}, ["step 1 (silent)", "declares no inputs"]),
    (
        (step("decode", {"file": "F"}, {"pixels": "p"}, version=3),),
        {},
        ["step 1", "no version 3", "versions 1"],
    ),
    ((step("decode", {"fil": "F"}, {"pixels": "p"}),), {}, ["step 1 (decode)", "no input 'fil'", "'file'"]),
    ((step("decode", {"file": "F"}, {"pixel": "p"}),), {}, ["no output 'pixel'", "'pixels'"]),
    ((step("decode", {"file": "F"}, {}),), {}, ["step 1 (decode)", "no outputs connected"]),
    ((step("name", {"threshold": "t"}, {"label": "l"}),), {}, ["step 1 (name)", "'scores' is not connected"]),
    (
        (DECODE, step("classify", {"image": "pixles"}, {"scores": "scores"})),
        {},
        ["'pixles' is written by no step", "step 2 (classify) 'image'", "did you mean 'pixels'?"],
    ),
    ((DECODE, CLASSIFY, NAME), {"inputs": ("FILES",)}, ["'FILE' is written by no step"]),
    ((DECODE, CLASSIFY, NAME), {"inputs": ("FILE", "x")}, ["input 'x' is read by no step"]),
    ((DECODE, CLASSIFY, NAME), {"inputs": ("FILE", "pixels")}, ["'pixels' is also written", "step 1"]),
    ((DECODE, CLASSIFY, NAME), {"outputs": ("lable",)}, ["'lable' is written by no step", "'label'"]),
    ((DECODE, CLASSIFY, NAME), {"outputs": ("FILE",)}, ["'FILE' is one of its inputs"]),
    ((DECODE, CLASSIFY, NAME), {"outputs": ("label",)}, ["'confidence' is never used", "step 3 (name)"]),
    (
        (DECODE, CLASSIFY, step("decode", {"file": "G"}, {"pixels": "pixels"})),
        {},
        ["'pixels' is written twice", "step 1 (decode)", "step 3 (decode)"],
    ),
    (
        (CLASSIFY, DECODE, NAME),
        {},
        ["'pixels' is read before", "put step 2 (decode) before step 1 (classify)"],
    ),
    (
        (
            step("classify", {"image": "a"}, {"scores": "b"}),
            step("classify", {"image": "b"}, {"scores": "a"}),
        ),
        {},
        ["no input of its own"],
    ),
    (
        (
            DECODE,
            step("wide", {"scores": "a"}, {"y": "b"}),
            step("wide", {"scores": "b"}, {"y": "a"}),
            CLASSIFY,
        ),
        {},
        ["a cycle", "'a'"],
    ),
    (
        (DECODE, CLASSIFY, step("bytes", {"scores": "scores"}, {"y": "y"})),
        {},
        ["'scores'", "different data types", "'scores': FP32 [batch, 10]", "step 3 (bytes) 'scores': UINT8"],
    ),
    (
        (DECODE, CLASSIFY, step("wide", {"scores": "scores"}, {"y": "y"})),
        {},
        ["different shapes", "step 2 (classify)", "[batch, 10]", "step 3 (wide)", "[batch, 11]"],
    ),
    (
        (DECODE, CLASSIFY, step("flat", {"scores": "scores"}, {"y": "y"})),
        {},
        ["different shapes", "[2, 5, 10]", "flat has max_batch_size 0"],
    ),
    (
        (DECODE, CLASSIFY, step("stream", {"scores": "scores"}, {"y": "y"})),
        {"config": {"response_cache": {"enable": True}}},
        ["decoupled", "stream"],
    ),
]


@pytest.mark.parametrize(("steps", "options", "parts"), WRONG)
def test_the_step_and_tensor_that_are_wrong(
    repository: Path, steps: tuple[EnsembleStep, ...], options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(EnsembleError) as error:
        config_from_steps(request(repository, *steps, **options))
    for part in ["ensemble 'pipe'", *parts]:
        assert part in str(error.value)


def test_fields_that_belong_to_the_steps(repository: Path) -> None:
    for field in ("dynamic_batching", "instance_group", "model_warmup", "optimization"):
        with pytest.raises(RecipeError, match=f"config.{field} cannot be set"):
            config_from_steps(request(repository, config={field: {}}))
    with pytest.raises(RecipeError, match="step cannot be set"):
        config_from_steps(request(repository, config={"ensemble_scheduling": {"step": []}}))


def test_publishing_twice_changes_nothing(repository: Path) -> None:
    said: list[str] = []
    first = publish_ensemble(request(repository), say=said.append)
    written = first.config_path.stat()
    second = publish_ensemble(request(repository), say=said.append)
    assert (first.version, second.version) == (1, 1)
    assert first.config_path.stat().st_ino == written.st_ino
    assert "up to date" in said[-1]
    assert read_config(repository, "pipe").platform == "ensemble"
    manifest = read_entry(repository, "pipe").manifest
    assert manifest.backend == "ensemble"
    assert [spec.name for spec in manifest.outputs] == ["label", "confidence"]
    steps = manifest.steps[0].options["steps"]
    assert [step["model"] for step in steps] == ["decode", "classify", "name"]  # type: ignore[union-attr, index]


def test_a_changed_ensemble_is_a_new_version(repository: Path) -> None:
    publish_ensemble(request(repository))
    assert publish_ensemble(request(repository, outputs=("label", "confidence", "scores"))).version == 2


def test_other_labels_are_a_new_version(repository: Path) -> None:
    labels = repository.parent / "labels.txt"
    wanted = request(repository, labels={"label": labels})
    for text, version in (("a\n", 1), ("a\n", 1), ("b\n", 2)):
        labels.write_text(text, encoding="utf-8")
        assert publish_ensemble(wanted).version == version
        assert (repository / wanted.name / "labels.txt").read_text(encoding="utf-8") == text


def test_a_step_that_was_never_built(repository: Path) -> None:
    (repository / "decode" / "1" / "model.py").unlink()
    with pytest.raises(EnsembleError, match="'decode' has no published version"):
        publish_ensemble(request(repository))
    assert not (repository / "pipe").exists()


def test_a_model_of_the_same_name_is_left_alone(repository: Path) -> None:
    publish_payload(repository, "old", name="pipe")
    with pytest.raises(EnsembleError, match="pipe"):
        publish_ensemble(request(repository, step("pipe", {"x": "x"}, {"y": "y"})))
    with pytest.raises(Exception, match="another kind of model"):
        publish_ensemble(request(repository))
