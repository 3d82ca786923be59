"""What a source is: told by its content, so that a wrong suffix is named for what it hides."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from tritonsmith.errors import SourceError

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")
READ = (
    ".h5, .hdf5 or .keras (Keras), a SavedModel folder, .pt2 (torch.export), package.module:factory, "
    "a Hugging Face folder (config.json and *.safetensors), or .onnx"
)
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
ZIP_MAGIC = b"PK\x03\x04"
OTHER_MAGICS = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x7fELF", "a program or library"),
    (b"ORTM", "an ONNX Runtime .ort model"),
    (b"TFL3", "a TensorFlow Lite model"),
)
KINDS = {
    ".h5": "keras",
    ".hdf5": "keras",
    ".keras": "keras",
    ".pt2": "torch",
    ".onnx": "onnx",
}
CONTENTS = {
    ".h5": ("an HDF5 file",),
    ".hdf5": ("an HDF5 file",),
    ".keras": ("a Keras 3 archive", "an HDF5 file"),
    ".pt2": ("a torch.export archive",),
    ".onnx": ("an ONNX model",),
}


def detect_kind(source: str) -> str:
    """The reader of a source: "keras", "saved-model", "torch", "torch-factory", "huggingface" or "onnx".

    Raises:
        SourceError: nothing is there, or it is nothing that is read; the message says what it is.
    """
    path = Path(source)
    if not source:
        raise SourceError("the source has no name", expected=READ)
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.exists():
        if FACTORY.match(source):
            return "torch-factory"
        raise SourceError(f"there is no {source}", expected=READ)
    content = describe_file(path)
    suffix = path.suffix.lower()
    if suffix in CONTENTS and content in CONTENTS[suffix]:
        return KINDS[suffix]
    by_content = {found: KINDS[known] for known, contents in CONTENTS.items() for found in contents}
    if suffix not in CONTENTS and content in by_content:
        return by_content[content]
    raise SourceError(
        f"{source} cannot be converted",
        found=content,
        expected=" or ".join(CONTENTS.get(suffix, (READ,))),
        fix=_advice(content, suffix),
    )


def describe_file(path: Path) -> str:
    """What a file is, in words, from its first bytes and, for an archive, its members' names."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise SourceError(f"{path} cannot be read", found=error.strerror or error) from error
    if not head:
        return "an empty file"
    if head.startswith(HDF5_MAGIC):
        return "an HDF5 file"
    if head.startswith(ZIP_MAGIC):
        return _describe_zip(path)
    for magic, words in OTHER_MAGICS:
        if head.startswith(magic) or head[4:].startswith(magic):
            return words
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle"
    if _is_text(head):
        return "a text file"
    if _is_safetensors(head, path.stat().st_size):
        return "a safetensors file without its config.json"
    return "an ONNX model" if _is_onnx(head) else "an unknown binary file"


def _kind_of_folder(path: Path) -> str:
    if (path / "saved_model.pb").is_file():
        return "saved-model"
    names = sorted(file.name for file in path.iterdir())
    if "config.json" in names:
        return "huggingface"
    raise SourceError(
        f"{path} is a folder of no known kind",
        found=names[:10] or "an empty folder",
        expected="saved_model.pb, or config.json with *.safetensors",
    )


def _describe_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return "a truncated or damaged zip archive"
    tails = {name.partition("/")[2] or name for name in names} | set(names)
    if "config.json" in names and any(name.endswith(".weights.h5") for name in names):
        return "a Keras 3 archive"
    if any(
        tail.startswith("models/") or tail == "serialized_exported_program.json" for tail in tails
    ) and any(tail in ("archive_format", "archive_version", "version") for tail in tails):
        return "a torch.export archive"
    if "constants.pkl" in tails:
        return "a TorchScript archive"
    if "data.pkl" in tails:
        return "a PyTorch checkpoint (a pickle)"
    return (
        "a NumPy .npz archive" if names and all(name.endswith(".npy") for name in names) else "a zip archive"
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(char.isprintable() or char in "\t\n\r\f" for char in text)


def _is_safetensors(head: bytes, size: int) -> bool:
    return 2 < int.from_bytes(head[:8], "little") < size and head[8:10] in (b'{"', b"{ ")


def _is_onnx(head: bytes) -> bool:
    """Whether the bytes start as a ModelProto does: with the tag of one of its fields (onnx.proto3)."""
    number, wire_type = head[0] >> 3, head[0] & 7
    return wire_type == (0 if number in (1, 5) else 2) and number in (1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25)


def _advice(content: str, suffix: str) -> str | None:
    if content in ("a PyTorch checkpoint (a pickle)", "a Python pickle", "a TorchScript archive"):
        return (
            "save it with torch.export.save(torch.export.export(model, args), 'model.pt2'), or name a factory"
        )
    if content in ("an empty file", "a truncated or damaged zip archive"):
        return "write or download the file again"
    known = [known for known, contents in CONTENTS.items() if content in contents and known != suffix]
    return f"rename it to *{known[0]}" if known and suffix in CONTENTS else None
