"""One request from texts and files, against a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from served_models import Addresses
from tritonsmith.client import Signature, Tensor
from tritonsmith.errors import ClientError, TritonsmithError, UsageError
from tritonsmith.infer import Class, infer, parse_inputs


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, served_models: Addresses) -> str:
    return str(getattr(served_models, request.param))


def test_numbers_in_and_out(url: str) -> None:
    answer = infer("affine", ["x=[1, 2, 3.5]"], url=url)
    assert str(answer).splitlines()[:3] == ["y (FP32)", "  [[3. 5. 8.]]", "  shape [1, 3]"]
    written = json.loads(json.dumps(answer.json()))
    assert written["outputs"] == {"y": {"datatype": "FP32", "shape": [1, 3], "data": [3.0, 5.0, 8.0]}}
    assert written["model"] == "affine"
    assert 0 < written["latency_ms"] < 60_000


def test_one_number_keeps_its_digits(url: str) -> None:
    answer = infer("picky", ["x=0.9999"], url=url)
    assert str(answer).splitlines()[1] == "  0.9999"


def test_text_in_and_out(url: str) -> None:
    answer = infer("length", ["image=häl=lo"], url=url)
    assert "  7 bytes, ä" in str(answer).splitlines()
    assert answer.json()["outputs"]["label"]["data"] == ["7 bytes, ä"]  # type: ignore[index, call-overload]


def test_a_file_goes_as_its_bytes(url: str, tmp_path: Path) -> None:
    photo = tmp_path / "a photo.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))  # ends in NULs, which numpy would strip
    answer = infer("length", [f"image=@{photo}"], url=url)
    assert answer.json()["outputs"]["bytes"]["data"] == [58]  # type: ignore[index, call-overload]


def test_labels_are_shown(url: str) -> None:
    answer = infer("scores", ["x=[0.25, 0.5, 0.125]"], url=url)
    assert answer.outputs[0].answer == (
        (
            Class(index=1, label="one", value=0.5),
            Class(index=0, label="zero", value=0.25),
            Class(index=2, label="two", value=0.125),
        ),
    )
    assert str(answer).splitlines()[1:4] == ["  one   0.5000", "  zero  0.2500", "  two   0.1250"]
    assert answer.json()["outputs"]["p"]["classes"][0][0] == {  # type: ignore[index, call-overload]
        "index": 1,
        "label": "one",
        "value": 0.5,
    }


def test_long_answers_are_shortened(served_models: Addresses) -> None:
    answer = infer("ragged", ["n=100"], url=served_models.http)
    assert "..." in str(answer)
    assert "shape [1, 100]" in str(answer)
    assert len(answer.json()["outputs"]["zeros"]["data"]) == 100  # type: ignore[index, call-overload, arg-type]


def test_nan_and_empty_answers_can_be_written(served_models: Addresses) -> None:
    assert "empty, of shape [1, 0]" in str(infer("ragged", ["n=0"], url=served_models.http))
    answer = infer("affine", ["x=[NaN, 1, Infinity]"], url=served_models.http)
    written = json.loads(json.dumps(answer.json(), allow_nan=False))
    assert written["outputs"]["y"]["data"] == ["nan", 3.0, "inf"]


SIGNATURE = Signature(
    model="m",
    version="",
    max_batch_size=4,
    inputs=(
        Tensor(name="pixels", datatype="UINT8", shape=(-1, -1)),
        Tensor(name="x", datatype="FP32", shape=(-1, 2)),
        Tensor(name="text", datatype="BYTES", shape=(-1, 1)),
    ),
    outputs=(),
    config={},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=[1, 2]", {"x": [[1, 2]]}),
        ("x=[[1, 2], [3, 4]]", {"x": [[1, 2], [3, 4]]}),
        ("text=hello", {"text": [["hello"]]}),
        ("text=a=b", {"text": [["a=b"]]}),
        ("text=", {"text": [[""]]}),
        ('text="@home"', {"text": [["@home"]]}),
        ('text=[["a"], ["b"]]', {"text": [["a"], ["b"]]}),
    ],
)
def test_values(text: str, expected: dict[str, Any]) -> None:
    assert parse_inputs(SIGNATURE, [text]) == expected


def test_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    (tmp_path / "x.json").write_text("[1, 2]")
    (tmp_path / "raw").write_bytes(b"\x00\x01\xff")
    assert parse_inputs(SIGNATURE, [f"x=@{tmp_path / 'x.npy'}"])["x"].shape == (3, 2)
    assert parse_inputs(SIGNATURE, [f"x=@{tmp_path / 'x.json'}"]) == {"x": [[1, 2]]}
    assert parse_inputs(SIGNATURE, [f"pixels=@{tmp_path / 'raw'}"])["pixels"].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("texts", "kind", "words"),
    [
        (["x"], UsageError, "'x' is no input"),
        (["=1"], UsageError, "'=1' is no input"),
        (["x=1", "x=2"], UsageError, "given twice"),
        (["y=1"], ClientError, "has no input 'y'"),
        (["x=one"], UsageError, "no number or JSON array"),
        (["x=@/no/such/file"], UsageError, "cannot be read"),
        (["x=@/dev/null"], UsageError, "cannot take the bytes"),
        (["x=@/dev/null.npy"], UsageError, "cannot be read"),
    ],
)
def test_what_is_no_input(texts: list[str], kind: type[TritonsmithError], words: str) -> None:
    with pytest.raises(kind, match=words):
        parse_inputs(SIGNATURE, texts)
