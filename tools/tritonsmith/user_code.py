"""A module that the user named, found or imported: a factory's, a metric's, a Keras model's own classes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tritonsmith.errors import TritonsmithError


def import_user_module(name: str, purpose: str, wrong: type[TritonsmithError]) -> ModuleType:
    """Import `name` as `python -m` would: the current folder is searched first.

    Raises:
        wrong: there is no such module, or its own code fails; `purpose` says what it was named for.
    """
    folder = _search_current_folder()
    try:
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


def files_of_module(name: str, purpose: str, wrong: type[TritonsmithError]) -> tuple[Path, ...]:
    """The Python files of a module, or of the whole package that it is in, found without importing them.

    Raises:
        wrong: there is no such module; `purpose` says what it was named for.
    """
    folder = _search_current_folder()
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        raise wrong(f"{purpose}: no Python module is named {name!r}", found=error) from error
    places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    files = tuple(file for place in places if place for file in _python_files(Path(place)))
    if not files:
        raise wrong(
            f"{purpose}: no Python module is named {top!r}",
            fix=f"run from the folder that holds it ({folder} was searched), or add it to PYTHONPATH",
        )
    return files


def _python_files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.is_file() else []


def _search_current_folder() -> str:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return folder


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
