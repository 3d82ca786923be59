"""Sentences of the text that lies on this machine, tokenized for MiniLM: `corpus.py FOLDER`.

Text is taken from docstrings and comments of the standard library and of installed packages, from their
documents, from /usr/share/doc, manual pages and C headers. Sentences are split by file, so that no file is on
two sides, and a sentence occurs once, on the side that is judged first. FOLDER gets

    training.npz           what a model may be trained on
    calibration.npz        1,000 of those, for calibration
    tuning.npz             1,000 to choose on
    evaluation.npz         5,000 to judge neighbours on
    evaluation_2000.npz    the first 2,000 of these
    sentences.txt          the 5,000, in order
    corpus.json            how many sentences, and where they are from

Each .npz has `input_ids`, `attention_mask` and `token_type_ids`, int64 `[N, 64]`. The same files give the
same sentences in the same order.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import json
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))
from prepare import package_folder

LENGTH = 64  # tokens
WANTED = {"evaluation": 5000, "tuning": 1000, "training": 48_000}
SHARES = {"evaluation": 12, "tuning": 4, "training": 84}  # per cent of the files
PER_FILE = {"evaluation": 30, "tuning": 30, "training": 400}  # one long file must not be the whole corpus
PARTS = {"training": ("calibration", 1000), "evaluation": ("evaluation_2000", 2000)}
LARGEST_FILE_BYTES = 3_000_000

SUFFIXES = {
    **dict.fromkeys((".py", ".pyi"), "python"),
    **dict.fromkeys((".h", ".hpp", ".hh"), "c"),
    **dict.fromkeys((".html", ".htm"), "html"),
    **dict.fromkeys((".md", ".rst", ".txt"), "prose"),
}
MANUALS = Path("/usr/share/man")
END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(`]?[A-Z])")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|No|Fig|Eq|al|approx|resp)\.$")
MARKUP = re.compile(r":[a-zA-Z:]+:`~?([^`<]*)(?:<[^>]*>)?`|\[([^\]]+)\]\([^)]*\)|[`*]{1,2}|\\f[BIRP]")
WORD = re.compile(r"[(\"']?[A-Za-z][a-z'-]*[.,;:!?)\"']*")
BLANK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.|:param|:return|@param)\s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Sentences of each side, and how many files of each root they came from."""

    sides: Mapping[str, tuple[str, ...]]
    files: Mapping[str, int]


def collect(roots: Sequence[Path], *, workers: int = 2) -> Corpus:
    """Read every file below `roots` that holds prose, and split what is found."""
    paths = list(dict.fromkeys(path for root in roots for path in files_below(root)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = dict(zip(paths, pool.map(sentences_of_file, paths, chunksize=64), strict=True))
    files = Counter(str(_root_of(path, roots)) for path, sentences in found.items() if sentences)
    taken: set[str] = set()
    sides: dict[str, tuple[str, ...]] = {}
    for side in SHARES:
        ranked: list[tuple[str, str]] = []
        for path in paths:
            relative = path.relative_to(_root_of(path, roots)).as_posix()
            if side_of(relative) != side:
                continue
            fresh = 0
            for sentence in found[path]:
                letters = re.sub(r"[^a-z]+", " ", sentence.lower())
                if letters in taken or fresh == PER_FILE[side]:
                    continue
                taken.add(letters)
                fresh += 1
                ranked.append((hashlib.sha256(sentence.encode()).hexdigest(), sentence))
        sides[side] = tuple(sentence for _, sentence in sorted(ranked)[: WANTED[side]])
    return Corpus(sides=sides, files=dict(sorted(files.items())))


def side_of(relative: str) -> str:
    """The side that a file is on, by a hash of its path below its root."""
    place = int(hashlib.sha256(relative.encode()).hexdigest()[:8], 16) % 100
    for side, share in SHARES.items():
        if place < share:
            return side
        place -= share
    raise AssertionError("the shares add up to 100")


def roots_of_machine() -> list[Path]:
    """Where prose may lie; what is not there gives nothing."""
    paths = sysconfig.get_paths()
    candidates = [paths["stdlib"], paths["purelib"], "/usr/share/doc", str(MANUALS), "/usr/include"]
    candidates += ["/usr/lib/python3", "/usr/share/perl", "/usr/share/vim"]
    return [Path(path) for path in dict.fromkeys(candidates) if Path(path).is_dir()]


def files_below(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_file() or ("site-packages/" in inner):
            continue
        kind = kind_of(path)
        if kind is not None and path.stat().st_size <= LARGEST_FILE_BYTES:
            yield path


def kind_of(path: Path) -> str | None:
    """How a file is read; None where it holds no prose."""
    name = path.name.removesuffix(".gz")
    if path.is_relative_to(MANUALS):
        english = re.fullmatch(r"man\d", path.relative_to(MANUALS).parts[0])
        return "manual" if english else None
    return SUFFIXES.get(Path(name).suffix)


def sentences_of_file(path: Path) -> list[str]:
    """Sentences of one file, in order; none where it cannot be read as text."""
    warnings.simplefilter("ignore")  # of escapes in the docstrings of others
    kind = kind_of(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
        paragraphs = list(READERS[kind or "prose"](text))
    except (OSError, EOFError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return list(dict.fromkeys(s for paragraph in paragraphs for s in sentences_of(paragraph)))


def sentences_of(paragraph: str) -> Iterator[str]:
    text = MARKUP.sub(lambda match: match.group(1) or match.group(2) or "", paragraph)
    held = ""
    for piece in END.split(" ".join(text.split())):
        held = f"{held} {piece}".strip()
        if ABBREVIATION.search(held):
            continue
        if is_sentence(held):
            yield held
        held = ""


def is_sentence(text: str) -> bool:
    """Whether this is plain English of some length, not code, a table or a list of names."""
    words = text.split()
    if not (25 <= len(text) <= 320 and 5 <= len(words) <= 50 and text.isascii()):
        return False
    if not text[0].isupper() or text[-1] not in ".!?":
        return False
    plain = sum(char.isalpha() or char == " " for char in text)
    spoken = sum(WORD.fullmatch(word) is not None for word in words)
    return plain >= 0.9 * len(text) and spoken >= 0.8 * len(words)


def _prose(text: str) -> Iterator[str]:
    for block in BLANK.split(text):
        if ">>>" not in block:
            yield re.sub(r"^\s*([-*+]|\d+\.)\s+", "", block)


def _python(text: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds):
            yield from _prose(ast.get_docstring(node) or "")
    yield from _runs(text, re.compile(r"\s*#\s?(.*)"))


def _c(text: str) -> Iterator[str]:
    for match in re.finditer(r"/\*(.*?)\*/", text, re.DOTALL):
        yield from _prose(re.sub(r"^\s*\*+ ?", "", match.group(1), flags=re.MULTILINE))
    yield from _runs(text, re.compile(r"\s*//[/!]*\s?(.*)"))


def _runs(text: str, comment: re.Pattern[str]) -> Iterator[str]:
    """Comments on lines of their own that follow each other."""
    run: list[str] = []
    for line in (*text.splitlines(), ""):
        match = comment.match(line)
        if match:
            run.append(match.group(1))
        elif run:
            yield from _prose("\n".join(run))
            run = []


def _html(text: str) -> Iterator[str]:
    blocks = re.finditer(r"<(p|li|dd|td)\b[^>]*>(.*?)(?=</\1>|<p\b|<li\b|<dd\b|<pre)", text, re.DOTALL)
    for match in blocks:
        yield html.unescape(re.sub(r"<[^>]+>", "", match.group(2)))


def _manual(text: str) -> Iterator[str]:
    """Paragraphs of troff source; lines that only set a font go on."""
    block: list[str] = []
    for line in (*text.splitlines(), ""):
        font = re.match(r"\.(?:B|I|BR|IR|BI|IB|RB)\s+(.*)", line)
        if font:
            block.append(font.group(1).replace('"', ""))
        elif not line.strip() or line[0] in ".'":
            yield " ".join(block)
            block = []
        else:
            block.append(line.replace("\\-", "-"))


READERS = {"prose": _prose, "python": _python, "c": _c, "html": _html, "manual": _manual}


def tokenize(sentences: Sequence[str], tokenizer: Path) -> dict[str, NDArray[Any]]:
    """The three inputs of the model, int64 `[N, LENGTH]`."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(LENGTH)
    encoder.enable_padding(length=LENGTH)
    encodings = encoder.encode_batch(list(sentences))
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
        "token_type_ids": np.array([encoding.type_ids for encoding in encodings], dtype=np.int64),
    }


def write_corpus(folder: Path, roots: Sequence[Path], tokenizer: Path) -> Corpus:
    """Write all files of a corpus into `folder`.

    Raises:
        SystemExit: fewer sentences than the evaluation needs.
    """
    corpus = collect(roots)
    counts = {side: len(sentences) for side, sentences in corpus.sides.items()}
    if counts["evaluation"] < WANTED["evaluation"]:
        sys.exit(
            f"too little text on this machine: {counts['evaluation']} held-out sentences from "
            f"{sum(corpus.files.values())} files, {WANTED['evaluation']} are needed\n"
            f"  looked in: {', '.join(map(str, roots))}\n"
            "  to do: install documentation, such as python3-doc, or more Python packages"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for side, sentences in corpus.sides.items():
        arrays = tokenize(sentences, tokenizer)
        _write(folder / f"{side}.npz", arrays)
        if side in PARTS:
            part, count = PARTS[side]
            _write(folder / f"{part}.npz", {name: array[:count] for name, array in arrays.items()})
    (folder / "sentences.txt").write_text("\n".join(corpus.sides["evaluation"]) + "\n", encoding="utf-8")
    record = {"sentences": counts, "files": corpus.files}
    (folder / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return corpus


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(
        path,
        input_ids=arrays["input_ids"],
        attention_mask=arrays["attention_mask"],
        token_type_ids=arrays["token_type_ids"],
    )


def _root_of(path: Path, roots: Sequence[Path]) -> Path:
    """The innermost root that holds a file."""
    return max((root for root in roots if path.is_relative_to(root)), key=lambda root: len(root.parts))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: corpus.py FOLDER")
    written = write_corpus(Path(sys.argv[1]), roots_of_machine(), package_folder() / "tokenizer.json")
    for side, sentences in written.sides.items():
        print(f"{side}: {len(sentences)} sentences")
    for root, count in written.files.items():
        print(f"{count} files of {root}")
