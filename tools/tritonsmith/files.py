"""Writing files so that a kill at any moment leaves what was there before."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tritonsmith.errors import RepositoryError, UsageError


@contextmanager
def staging_folder(beside: Path) -> Iterator[Path]:
    """A fresh hidden folder on the same file system as `beside`; gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=".staging", dir=existing_parent(beside)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_staging(beside: Path) -> None:
    """Remove what a killed process left in `staging_folder(beside)`; the caller holds the lock over it."""
    for stage in beside.parent.glob(f".{glob.escape(beside.name)}.*.staging"):
        shutil.rmtree(stage, ignore_errors=True)


def existing_parent(path: Path) -> Path:
    """The folder that will hold `path`; it is made where its own parent may be written."""
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RepositoryError(f"cannot write in {parent}", found=error.strerror or error) from error
    if not os.access(parent, os.W_OK):
        raise RepositoryError(f"cannot write in {parent}", found="no permission")
    return parent


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary sibling, flush it to disk, and rename it over `path`."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, data: bytes | memoryview) -> None:
    """As `write_text_atomically`, for bytes."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=existing_parent(path))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)  # mkstemp gives 0600; a server may run as another user
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails does not say of which file
        raise


@contextmanager
def locked(
    path: Path, *, what: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; it goes with the process, however that ends.

    `what` is said of the work while another process does it; left out, the lock's own name.
    """
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another tritonsmith is at work on {what or path.stem}; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        # A child that outlives this process (a pip whose parent was killed) keeps the lock until it ends.
        os.set_inheritable(stream.fileno(), True)
        yield


def path_inside(folder: Path, name: str) -> Path | None:
    """`name` in `folder`; None where it leads out of it: absolute, with `..`, or a link to elsewhere."""
    relative = Path(name)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\0" in name:
        return None
    try:
        real = (folder / relative).resolve()
    except (OSError, RuntimeError):  # a loop of links; before Python 3.13 a RuntimeError
        return None
    return folder / relative if real.is_relative_to(folder.resolve()) else None


def refuse_overwrite(path: Path, *, force: bool) -> None:
    """Raise UsageError where `path` exists and `force` is not given."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists", fix="name another path, or add --force to replace it")
