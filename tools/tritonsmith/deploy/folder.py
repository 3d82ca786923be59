"""A rendered folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tritonsmith.errors import UsageError
from tritonsmith.files import refuse_overwrite, staging_folder

MARK = "measurements.json"  # in every folder that is rendered; nothing else is ever replaced
KEPT = (".env", "secrets")  # what its owner laid there, never rendered; a new rendering has them too


def check_folder(out: Path, *, force: bool) -> None:
    """Raise UsageError where `out` may not be written: it exists, or is no rendered folder to replace."""
    refuse_overwrite(out, force=force)
    if out.exists() and not (out / MARK).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(
            f"{out} was not rendered by tritonsmith, so it is not replaced",
            found="a file" if out.is_file() else f"a folder without {MARK}",
            fix="name another folder",
        )


def write_folder(out: Path, files: Mapping[str, str | bytes], *, force: bool) -> None:
    """Write `files`, by path below `out`, and put the folder into its place in one rename.

    Files that start with `#!` may be executed. Keys and settings of a folder that is replaced stay (KEPT).
    Raises UsageError as `check_folder`.
    """
    check_folder(out, force=force)
    with staging_folder(out) as staging:
        made = staging / "made"
        for name, content in files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            path.chmod(0o755 if path.read_bytes()[:2] == b"#!" else 0o644)
        for name in KEPT:
            if (out / name).is_dir():
                shutil.copytree(out / name, made / name)
            elif (out / name).is_file():
                shutil.copy2(out / name, made / name)
        if out.exists():
            out.rename(staging / "before")
        made.rename(out)
