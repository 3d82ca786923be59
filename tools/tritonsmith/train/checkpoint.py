"""Where a training stands, on disk: written atomically, read only by the request that wrote it."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tritonsmith.errors import RepositoryError


def hash_request(text: str, arrays: Iterable[NDArray[Any]], module: nn.Module | None = None) -> str:
    """A key for all that a training depends on: options, data, and the weights that it begins with."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    if module is not None:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Raises RepositoryError where the folder cannot be written or the disk is full."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise RepositoryError(f"cannot write the checkpoint {path}", found=error) from error


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state, or None where there is none; weights only, so that no code in the file can run.

    Raises:
        RepositoryError: a file that is no checkpoint.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise RepositoryError(
            f"the checkpoint {path} is damaged",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="remove it, and the training begins anew",
        ) from error
    return state
