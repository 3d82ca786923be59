"""Where a model's new folder is built, and how it takes the place of the old one.

Triton reads every folder in a repository as a model, hidden ones too, and in the control modes `none`
and `poll` does not start when one of them is broken. Files in the repository, and folders in a model's
folder that are no number, it passes over. So a new folder is built

1. beside the repository, in `.<repository>.staging`;
2. where that is another file system or cannot be written (the repository is a mount point), in a folder
   of another model of the repository;
3. where there is no other model, in the model's own folder: it then stands beside the old one, whole, for
   the time of two renames, in which a server that starts refuses it;
4. where there is no model at all, in the repository itself: a server that starts in the meantime refuses
   it. What a kill leaves there, the next publish removes.

It then takes the old folder's place in one `renameat2(RENAME_EXCHANGE)`. A file system without that
call gets two renames; a kill between them is repaired by the next publish.

One lock, on the repository's folder, covers all of it. What lies in a staging folder while the lock is
held was left by a publish that was killed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STAGING_NAME = ".tritonsmith.staging"
_PROBE = ".tritonsmith.probe"
_LOCK = ".tritonsmith.lock"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Hold the repository's lock; it falls with the process that holds it."""
    descriptor = os.open(repository, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # NFS locks only what is open for writing, which a folder cannot be
            os.close(descriptor)
            descriptor = os.open(repository / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staged(repository: Path, name: str) -> Iterator[Path]:
    """A fresh folder from which `replace_folder` can move `new` to `<repository>/<name>`.

    The caller holds the lock.
    """
    root = _staging_root(repository, name)
    try:
        stage = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
        stage.chmod(0o755)
        yield stage
    finally:
        shutil.rmtree(root, ignore_errors=True)


def replace_folder(stage: Path, target: Path) -> None:
    """Put `stage/new` in the place of `target`; what was there is left in the stage."""
    new = stage / "new"
    if not target.exists():
        new.rename(target)
    elif stage.is_relative_to(target):
        _replace_around(new, target)
    elif not _exchange(new, target):
        try:
            target.rename(stage / "old")
            new.rename(target)
        finally:
            if not target.exists():
                (stage / "old").rename(target)
    sync_folder(target.parent)


def _replace_around(new: Path, target: Path) -> None:
    """A folder cannot change places with one inside of it: the new one first comes out beside the old."""
    out = _outside(target)
    new.rename(out)
    if not _exchange(out, target):
        raise OSError(errno.ENOTSUP, "the file system cannot exchange two folders", str(target))
    (target / STAGING_NAME).mkdir()
    out.rename(target / STAGING_NAME / "old")
    shutil.rmtree(target / STAGING_NAME, ignore_errors=True)


def _outside(target: Path) -> Path:
    return target.parent / f".{target.name}.tritonsmith"


def clean_up(repository: Path) -> None:
    """Remove what killed publishes left, and put back a folder that was on its way out.

    The caller holds the lock.
    """
    (repository / _PROBE).unlink(missing_ok=True)
    folders = [entry for entry in repository.iterdir() if entry.is_dir()]
    for folder in folders:
        shutil.rmtree(_outside(folder), ignore_errors=True)
    inside = (folder / STAGING_NAME for folder in folders)
    for root in (_beside(repository), repository / STAGING_NAME, *inside):
        if not root.is_dir():
            continue
        for stage in root.iterdir():
            target = repository / stage.name.rpartition(".")[0]
            if (stage / "old").is_dir() and not target.exists():
                (stage / "old").rename(target)
        shutil.rmtree(root, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(repository: Path) -> Path:
    return repository.parent / f".{repository.name}.staging"


def _staging_root(repository: Path, name: str) -> Path:
    root = _beside(repository)
    if _can_rename_into(root, repository):
        return root
    hosts = sorted(
        entry for entry in repository.iterdir() if entry.name != name and (entry / "config.pbtxt").is_file()
    )
    own = [repository / name] if (repository / name).is_dir() else []
    root = [*hosts, *own, repository][0] / STAGING_NAME
    root.mkdir()
    return root


def _can_rename_into(root: Path, repository: Path) -> bool:
    """Tried, not asked: bind mounts share a device number and still refuse a rename between them."""
    try:
        root.mkdir()
        (root / _PROBE).touch()
        (root / _PROBE).rename(repository / _PROBE)
    except OSError as error:
        shutil.rmtree(root, ignore_errors=True)
        if error.errno in (errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise
    (repository / _PROBE).unlink()
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the kernel or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
