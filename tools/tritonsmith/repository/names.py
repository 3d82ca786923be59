"""What may name a model, and which versions a model's folder holds."""

from __future__ import annotations

import re
from pathlib import Path

from tritonsmith.errors import RepositoryError

NAME_RULE = "ASCII letters, digits, '_', '-' and '.', a letter or digit first, 128 characters at most"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
# GET /v2/models/stats answers the statistics of all models.
_RESERVED = {"stats"}


def check_name(name: str) -> None:
    """Raise RepositoryError unless `name` can name a model's folder and stand in its URL."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        found = f"{name!r}, which Triton's own URLs use" if name in _RESERVED else repr(name)
        raise RepositoryError("this cannot name a model", found=found, expected=NAME_RULE)


def check_version(version: int | None) -> None:
    """Raise RepositoryError unless `version` is None or a version that Triton can serve."""
    if version is None:
        return
    if isinstance(version, bool) or not isinstance(version, int) or not 0 < version < 2**63:
        raise RepositoryError("this is no version", found=repr(version), expected="an integer of 1 or more")


def versions_of(folder: Path) -> tuple[int, ...]:
    """The versions in a model's folder, oldest first; a folder with nothing but `.gitkeep` is none."""
    if not folder.is_dir():
        return ()
    numbers = (
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isascii() and entry.name.isdecimal() and not entry.name.startswith("0")
        if entry.is_dir() and any(file.name != ".gitkeep" for file in entry.iterdir())
    )
    return tuple(sorted(numbers))
