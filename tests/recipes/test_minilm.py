"""The sentences of this machine, and MiniLM as one module that gives sentence embeddings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPE = Path(__file__).resolve().parents[2] / "tools" / "recipes" / "minilm"
sys.path.insert(0, str(RECIPE))

import corpus  # noqa: E402
import embedder  # noqa: E402
from prepare import package_folder, sentences_of_docstrings  # noqa: E402

PYTHON = '''
"""Modules can say what they are for in a sentence."""
# Comments that stand on lines of their own are read as well,
# also where a sentence goes on in the next line.
x = 1  # This comment stands behind code and is not taken as a sentence.
def f(a):
    """Return what was given, e.g. Nothing at all, without a change.

    >>> f(1)  This looks like an example, so it is no sentence.
    1
    """
'''
MANUAL = """.TH GREP 1
.SH NAME
.B grep
searches for lines that match a pattern.
It prints each of those lines to its standard output.
.PP
Short.
"""
PAGE = (
    "<html><p>Paragraphs of a page are <b>read without</b> their tags.</p>"
    "<pre>Not this one, for it is code here.</pre>"
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_sentences_are_found_in_each_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MANUALS", tmp_path / "man")
    assert corpus.sentences_of_file(write(tmp_path / "a.py", PYTHON)) == [
        "Modules can say what they are for in a sentence.",
        "Return what was given, e.g. Nothing at all, without a change.",
        "Comments that stand on lines of their own are read as well, "
        "also where a sentence goes on in the next line.",
    ]
    assert corpus.sentences_of_file(write(tmp_path / "man" / "man1" / "grep.1", MANUAL)) == [
        "It prints each of those lines to its standard output."
    ]
    assert corpus.sentences_of_file(write(tmp_path / "page.html", PAGE)) == [
        "Paragraphs of a page are read without their tags."
    ]
    assert corpus.sentences_of_file(write(tmp_path / "bad.py", "def (:")) == []
    assert corpus.kind_of(tmp_path / "man" / "de" / "man1" / "grep.1") is None
    assert corpus.kind_of(tmp_path / "data.bin") is None


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "no capital letter at the beginning of it.",
        "A list: a=1, b=2, c=3, d=4, e=5, f=6.",
        "Naïve words are left out of this corpus.",
    ],
)
def test_what_is_no_sentence(text: str) -> None:
    assert not corpus.is_sentence(text)


def library(root: Path, files: int) -> Path:
    words = (
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "mu",
        "nu",
    )
    for number in range(files):
        names = [words[number // 12**place % 12] for place in range(3)]
        lines = [f"This file speaks of {' '.join(names)} and of {word} as well." for word in words]
        lines.append("One sentence stands in every single file of them.")
        write(root / f"{number}.txt", "\n\n".join(lines))
    return root


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "WANTED", {"evaluation": 40, "tuning": 12, "training": 100})
    monkeypatch.setattr(
        corpus, "PARTS", {"training": ("calibration", 10), "evaluation": ("evaluation_2000", 5)}
    )


@pytest.mark.usefixtures("small")
def test_sides_share_no_file_and_no_sentence(tmp_path: Path) -> None:
    root = library(tmp_path / "library", 150)
    tokenizer = package_folder() / "tokenizer.json"
    found = corpus.write_corpus(tmp_path / "corpus", [root], tokenizer)
    assert {side: len(sentences) for side, sentences in found.sides.items()} == corpus.WANTED
    every = [sentence for sentences in found.sides.values() for sentence in sentences]
    assert len(set(every)) == len(every)
    of_file = {name: corpus.side_of(name) for name in (f"{number}.txt" for number in range(150))}
    for side, sentences in found.sides.items():
        for sentence in sentences:
            holders = {of_file[path.name] for path in root.iterdir() if sentence in path.read_text()}
            assert side in holders
            if not sentence.startswith("One sentence"):
                assert holders == {side}
    again = corpus.collect([root], workers=1)
    assert again == found
    record = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert record == {"sentences": corpus.WANTED, "files": {str(root): 150}}


@pytest.mark.usefixtures("small")
def test_tokens_are_those_of_the_sentences(tmp_path: Path) -> None:
    tokenizer = package_folder() / "tokenizer.json"
    corpus.write_corpus(tmp_path / "corpus", [library(tmp_path / "library", 150)], tokenizer)
    arrays = np.load(tmp_path / "corpus" / "evaluation.npz")
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), ((40, 64), "int64")
    )
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer))
    sentences = (tmp_path / "corpus" / "sentences.txt").read_text().splitlines()
    ids, mask = arrays["input_ids"][7], arrays["attention_mask"][7]
    assert decoder.decode(ids.tolist()).replace(" .", ".") == sentences[7].lower()
    assert mask.sum() == (ids != 0).sum()
    half = np.load(tmp_path / "corpus" / "evaluation_2000.npz")["input_ids"]
    np.testing.assert_array_equal(half, arrays["input_ids"][:5])


@pytest.mark.usefixtures("small")
def test_too_little_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="too little text on this machine: 0 held-out sentences"):
        corpus.write_corpus(tmp_path / "corpus", [library(tmp_path / "library", 5)], Path("unused"))
    assert not (tmp_path / "corpus").exists()


def test_the_embedder_is_minilm_with_mean_pooling() -> None:
    from transformers import AutoModel, AutoTokenizer

    sentences = sentences_of_docstrings(6)
    folder = str(package_folder())
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        expected = means / means.norm(dim=1, keepdim=True)
        module, example, free = embedder.make_embedder()
        found = module(**batch)["embedding"]
    assert set(example) == set(free) == set(batch)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6)
