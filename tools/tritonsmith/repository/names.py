"""What may name a model, which versions a model's folder holds, and which of them are served."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritonsmith.errors import RepositoryError

if TYPE_CHECKING:
    from tritonclient.grpc import model_config_pb2

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


def is_model(folder: Path) -> bool:
    """Whether a folder holds a configuration; one that may not be entered (lost+found) does not."""
    return os.path.isfile(folder / "config.pbtxt")  # noqa: PTH113 - Path.is_file raises there


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


def served_versions(config: model_config_pb2.ModelConfig, versions: Sequence[int]) -> tuple[int, ...]:
    """Those of `versions` that Triton loads, oldest first: the newest alone where nothing else is said."""
    policy, ordered = config.version_policy, tuple(sorted(versions))
    if policy.HasField("all"):
        return ordered
    if policy.HasField("specific"):
        return tuple(version for version in ordered if version in policy.specific.versions)
    return ordered[-(policy.latest.num_versions or 1) :]
