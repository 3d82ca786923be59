"""Importing a module that the user named: a factory's, a metric's, a Keras model's own classes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from tritonsmith.errors import TritonsmithError


def import_user_module(name: str, purpose: str, wrong: type[TritonsmithError]) -> ModuleType:
    """Import `name` as `python -m` would: the current folder is searched first.

    Raises:
        wrong: there is no such module, or its own code fails; `purpose` says what it was named for.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(missing + "."):
            raise wrong(
                f"{purpose}: no Python module is named {missing!r}",
                fix=f"run from the folder that holds it ({folder} was searched), or add it to PYTHONPATH",
            ) from error
        raise wrong(f"{purpose}: {name} cannot be imported", found=_reason(error)) from error
    except Exception as error:  # the user's own code may raise anything
        raise wrong(f"{purpose}: {name} cannot be imported", found=_reason(error)) from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
