"""model_repository/ built again from its recipes, and what it answers on a real server."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tritonsmith.client import Client
from tritonsmith.errors import ClientError
from tritonsmith.server import ServerOptions, serve
from tritonsmith.server.environment import ServerEnvironment
from tritonsmith.validate import validate

ROOT = Path(__file__).resolve().parents[2]
DIGITS, MINILM = ROOT / "build" / "digits", ROOT / "build" / "minilm"
COMMITTED = ROOT / "model_repository"
MODELS = sorted(path.parent.name for path in COMMITTED.glob("*/config.pbtxt"))
CONFIGS = sorted(
    str(path.relative_to(COMMITTED))
    for pattern in ("*/config.pbtxt", "*/configs/*.pbtxt")
    for path in COMMITTED.glob(pattern)
)

SENTENCES = (
    "A short sentence.",
    "Hello!",
    "Der Übergang über die Brücke: 你好, Привет, ça va? 🙂",
    "",
    "Triton serves models. " * 120,  # some 500 tokens; the model reads 256
    "the cat sat on the mat and looked at the moon until the morning came",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running server of the rebuilt repository."""

    repository: Path
    http: str
    grpc: str


@pytest.fixture(scope="session")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make models` builds, in an empty folder; a minute, two where build/ is empty."""
    repository = tmp_path_factory.mktemp("rebuilt") / "model repository"
    script = ROOT / "tools" / "recipes" / "make_models.py"
    done = subprocess.run(
        [sys.executable, str(script), "--repository", str(repository)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return repository


@pytest.fixture(scope="session")
def served(rebuilt: Path, server_environment: ServerEnvironment) -> Iterator[Served]:
    with serve(rebuilt, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as server:
        yield Served(repository=rebuilt, http=server.http_url, grpc=f"grpc://{server.grpc_url}")


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[Client]:
    with Client(served.grpc) as client:
        yield client


# --- the configurations -------------------------------------------------------------------------------


def test_all_models_are_here(rebuilt: Path) -> None:
    assert MODELS
    assert sorted(path.name for path in rebuilt.iterdir() if not path.name.startswith(".")) == MODELS


def test_all_configurations_are_here(rebuilt: Path) -> None:
    """Those of further targets too: the GPU's, of the models that run on one."""
    found = sorted(str(path.relative_to(rebuilt)) for path in rebuilt.rglob("*.pbtxt"))
    assert found == CONFIGS
    assert {"digits/configs/gpu.pbtxt", "minilm/configs/gpu.pbtxt"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_the_committed_one(rebuilt: Path, name: str) -> None:
    assert (rebuilt / name).read_text() == (COMMITTED / name).read_text()


# --- digits -------------------------------------------------------------------------------------------


def test_the_accuracy_as_served(client: Client) -> None:
    """Of the INT8 model, on the third that neither training nor calibration saw."""
    with np.load(DIGITS / "evaluation.npz") as data:
        pixels, target = data["pixels"], data["target"]
    assert len(target) == 599
    answers = client.model("digits")(pixels=pixels)["probabilities"]
    assert answers.shape == (599, 10)
    assert (answers.argmax(axis=1) == target).mean() >= 0.98


def scan(digit: int) -> Image.Image:
    """A held-out scan, 8 by 8, bright ink on black."""
    return Image.open(DIGITS / "samples" / f"{digit}.png")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def as_jpeg(image: Image.Image) -> bytes:
    return encode(image, "JPEG", quality=95)


def as_photo(image: Image.Image) -> bytes:
    """Large, in colour, dark ink on white paper."""
    large = image.resize((320, 320), Image.Resampling.BICUBIC)
    return encode(ImageOps.invert(large).convert("RGB"), "JPEG", quality=90)


def as_sideways_photo(image: Image.Image) -> bytes:
    """As a telephone stores it: turned by 90 degrees, and a note of that."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    large = image.resize((320, 320), Image.Resampling.BICUBIC).transpose(Image.Transpose.ROTATE_90)
    return encode(large, "JPEG", quality=90, exif=exif)


def as_ink_without_paper(image: Image.Image) -> bytes:
    """Black ink, transparent elsewhere."""
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    clear.putalpha(image)
    return encode(clear, "PNG")


def as_16_bits(image: Image.Image) -> bytes:
    return encode(Image.fromarray(np.asarray(image).astype(np.uint16) * 257), "PNG")


def as_palette(image: Image.Image) -> bytes:
    return encode(image.convert("P"), "PNG")


@pytest.mark.parametrize(
    "encoded",
    [as_jpeg, as_photo, as_sideways_photo, as_ink_without_paper, as_16_bits, as_palette],
)
def test_the_same_digit_in_another_file(client: Client, encoded: Callable[[Image.Image], bytes]) -> None:
    images = np.array([[encoded(scan(digit))] for digit in range(10)], dtype=object)
    answer = client.model("digits_image")(image=images)
    assert [label.decode() for label in answer["label"][:, 0]] == list("0123456789")
    assert (answer["confidence"] > 0.3).all()


def test_a_scan_is_answered_as_the_model_answers(client: Client) -> None:
    files = [(DIGITS / "samples" / f"{digit}.png").read_bytes() for digit in range(10)]
    answer = client.model("digits_image")(image=np.array([[file] for file in files], dtype=object))
    pixels = np.stack([np.asarray(scan(digit), np.float32) / 255 for digit in range(10)])[..., None]
    probabilities = client.model("digits")(pixels=pixels)["probabilities"]
    assert [label.decode() for label in answer["label"][:, 0]] == list("0123456789")
    np.testing.assert_allclose(answer["confidence"][:, 0], probabilities.max(axis=1), rtol=1e-6)


def test_a_broken_image_fails_alone(client: Client) -> None:
    """Requests that are batched together: each gets its own answer."""
    good = (DIGITS / "samples" / "3.png").read_bytes()
    bad = [b"", b"no image", good[:60], b"GIF89a" + bytes(40)]
    requests = [good, *bad] * 4

    def ask(data: bytes) -> str:
        try:
            answer = client.model("digits_image")(image=np.array([[data]], dtype=object))
        except ClientError as error:
            return str(error)
        return str(answer["label"][0, 0].decode())

    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(ask, requests))
    for data, answer in zip(requests, answers, strict=True):
        if data == good:
            assert answer == "3"
        else:
            assert "PNG or JPEG" in answer
            assert "'image'" in answer


# --- minilm -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(rebuilt: Path) -> NDArray[np.float32]:
    """The embeddings of SENTENCES [N, 384] by PyTorch, from the weights of the package, one by one."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = str(MINILM / "source")
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    rows = []
    with torch.no_grad():
        for sentence in SENTENCES:
            tokens = tokenizer(sentence, truncation=True, max_length=256, return_tensors="pt")
            mean = model(**tokens).last_hidden_state[0].mean(dim=0)
            rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def embed(client: Client, *sentences: str) -> NDArray[np.float32]:
    texts = np.array([[sentence.encode()] for sentence in sentences], dtype=object)
    return np.asarray(client.model("minilm_text")(text=texts)["embedding"])


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Embeddings of length 1 that point the same way."""
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert ((found * expected).sum(axis=1) > 0.9999).all()


def test_sentences_of_all_lengths_in_one_request(client: Client, expected: NDArray[np.float32]) -> None:
    assert_same(embed(client, *SENTENCES), expected)


def test_sentences_at_the_same_time(client: Client, expected: NDArray[np.float32]) -> None:
    with ThreadPoolExecutor(len(SENTENCES)) as pool:
        found = list(pool.map(lambda sentence: embed(client, sentence)[0], SENTENCES))
    assert_same(np.stack(found), expected)


def test_embeddings_tell_sentences_apart(expected: NDArray[np.float32]) -> None:
    """The control of the tests above: other sentences are far below their bound."""
    likeness = expected @ expected.T
    assert likeness[~np.eye(len(SENTENCES), dtype=bool)].max() < 0.9


def test_text_that_is_not_utf_8(client: Client) -> None:
    with pytest.raises(ClientError, match="'text' is not UTF-8"):
        client.model("minilm_text")(text=np.array([[b"\xff\xfe"]], dtype=object))


# --- validation ---------------------------------------------------------------------------------------


def few(source: Path, folder: Path, count: int) -> Path:
    with np.load(source) as data:
        np.savez(folder / source.name, **{name: data[name][:count] for name in data.files})
    return folder / source.name


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("digits", DIGITS / "evaluation.npz"),
        ("digits_image", DIGITS / "samples.npz"),
        ("minilm", MINILM / "tokens.npz"),
        ("minilm_text", MINILM / "samples.npz"),
    ],
)
def test_what_is_served_is_what_was_built(served: Served, name: str, samples: Path, tmp_path: Path) -> None:
    report = validate(
        served.repository,
        name,
        few(samples, tmp_path, 599 if name == "digits" else 12),
        http_url=served.http,
        grpc_url=served.grpc,
    )
    assert report.passed
    assert {check.protocol for check in report.checks} == {"http", "grpc"}
    assert all(check.values_count > 0 for check in report.checks)
    if name == "digits":
        assert report.metric is not None
        assert report.metric.candidate >= 0.98
