"""A rendered folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tritonsmith.errors import UsageError
from tritonsmith.files import refuse_overwrite, staging_folder
from tritonsmith.repository.staging import replace_folder

MARK = ".tritonsmith-rendered"  # in every folder that is rendered: the paths of what was written, one a line
KEPT = (".env", "secrets")  # what its owner laid there, never rendered; a new rendering has them too
_SHOWN = 5


def check_folder(out: Path, *, force: bool) -> None:
    """Raise UsageError where `out` may not be written.

    That is: it exists and `force` is not given; it is no folder that was rendered; or it holds something
    that is neither in the list of its MARK nor in KEPT.
    """
    refuse_overwrite(out, force=force)
    if out.is_symlink():
        raise UsageError(f"{out} is a link", expected="the folder itself", fix=f"--out {out.resolve()}")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file", fix="name another folder")
    if not any(out.iterdir()):
        return
    if not (out / MARK).is_file():
        raise UsageError(
            f"{out} was not rendered by tritonsmith, so it is not replaced",
            found=f"a folder without {MARK}",
            fix="name another folder",
        )
    if others := _others_in(out):
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise UsageError(
            f"{out} holds what was not rendered, so it is not replaced",
            found=", ".join(others[:_SHOWN]) + more,
            fix="move that elsewhere, or name another folder",
        )


def _others_in(out: Path) -> list[str]:
    listed = set((out / MARK).read_text(encoding="utf-8").splitlines()) | {MARK}
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted(str(path) for path in files if path.parts[0] not in KEPT and path.as_posix() not in listed)


def write_folder(out: Path, files: Mapping[str, str | bytes], *, force: bool) -> None:
    """Write `files`, by path below `out`, and put the folder into its place in one rename.

    Files that start with `#!` may be executed. MARK lists them. Keys and settings of a folder that is
    replaced stay (KEPT). Raises UsageError as `check_folder`.
    """
    check_folder(out, force=force)
    with staging_folder(out) as staging:
        made = staging / "new"
        for name, content in {**files, MARK: "".join(f"{name}\n" for name in sorted(files))}.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            path.chmod(0o755 if path.read_bytes()[:2] == b"#!" else 0o644)
        for name in KEPT:
            if (out / name).is_dir():
                shutil.copytree(out / name, made / name, symlinks=True)
            elif (out / name).is_file():
                shutil.copy2(out / name, made / name)
        replace_folder(staging, out)
