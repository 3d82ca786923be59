"""A repository of links to another: what Triton serves where the real one is read-only.

<view>/.tritonsmith-view.json     what it is a view of; without this file a folder is never replaced
<view>/<model>                    a link to the real model's folder, or, where something differs,
<view>/<model>/...                a folder of links, with what differs in place

A model is a folder with a config.pbtxt: hidden folders and a volume's lost+found are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tritonsmith.errors import RepositoryError, UsageError
from tritonsmith.files import clear_staging, existing_parent, staging_folder
from tritonsmith.repository.entry import CONFIG_NAME
from tritonsmith.repository.names import is_model
from tritonsmith.repository.staging import locked, replace_folder

Say = Callable[[str], None]

MARKER = ".tritonsmith-view.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewedModel:
    """What differs from the real folder of a model, by paths in that folder."""

    name: str
    texts: Mapping[str, str] = field(default_factory=dict)  # "configs/gpu.pbtxt" -> its text
    links: Mapping[str, Path] = field(default_factory=dict)  # "1/gpu.sm90.plan" -> the file to link to


def check_view(repository: Path, view: Path) -> None:
    """Raise before any long work for a place where no view can be laid."""
    real, place = repository.resolve(), view.absolute()
    inside = place.resolve()
    if inside == real or inside.is_relative_to(real) or real.is_relative_to(inside):
        raise UsageError(
            f"--view {view} and the repository {repository} lie in each other",
            expected="a folder apart from it",
        )
    if place.is_symlink() or (place.exists() and not (place / MARKER).is_file() and not _is_empty(place)):
        raise UsageError(
            f"{view} is no view that tritonsmith laid, and is not replaced",
            expected="an empty or absent folder, or an older view",
        )
    existing_parent(place)


def lay_view(
    repository: Path, view: Path, models: Sequence[ViewedModel] = (), *, say: Say = lambda _: None
) -> Path:
    """Lay `view` over `repository`, with `models` in place; an older view is replaced in one rename.

    A view that is already as it should be is left alone, so that a server that starts from it meanwhile is
    not disturbed.

    Raises:
        UsageError: `view` is another folder, or lies in the repository.
        RepositoryError: it cannot be written.
    """
    check_view(repository, view)
    real, place = repository.resolve(), view.absolute()
    try:
        with locked(place.parent):
            clear_staging(place)
            with staging_folder(place) as stage:
                left_out = _lay(stage / "new", real, {model.name: model for model in models})
                for name in left_out:
                    say(f"{name} holds no {CONFIG_NAME}, is no model, and is left out of the view")
                if place.is_dir() and _contents(place) == _contents(stage / "new"):
                    say(f"the view {view} is as it should be")
                    return place
                replace_folder(stage, place)
    except OSError as error:
        raise RepositoryError(
            f"the view {view} cannot be laid",
            found=f"{error.strerror or error}: {error.filename or place}",
            fix="name a folder inside a volume that may be written, not the volume's own root",
        ) from error
    say(f"laid the view {view} over {repository}")
    return place


def _lay(new: Path, real: Path, models: Mapping[str, ViewedModel]) -> list[str]:
    """Lay the links; the names of the folders that are no models come back."""
    new.mkdir(mode=0o755)
    told = {name: sorted((*model.texts, *model.links)) for name, model in sorted(models.items())}
    text = json.dumps({"repository": str(real), "models": told}, indent=2, ensure_ascii=False)
    (new / MARKER).write_text(text + "\n", encoding="utf-8")
    left_out = []
    for entry in sorted(real.iterdir()):
        if entry.name.startswith("."):
            continue  # Triton would read a hidden folder as a model: a .git, a publish on its way
        if entry.is_dir() and not is_model(entry):
            left_out.append(entry.name)
            continue
        model = models.get(entry.name)
        if model is None:
            (new / entry.name).symlink_to(entry)
        else:
            _lay_model(new / entry.name, entry, model)
    return left_out


def _lay_model(new: Path, real: Path, model: ViewedModel) -> None:
    changed = {*model.texts, *model.links}
    folders = {str(Path(path).parent) for path in changed} - {"."}
    _link_entries(new, real, leave_out={*changed, *folders})
    for folder in sorted(folders):
        _link_entries(new / folder, real / folder, leave_out={Path(path).name for path in changed})
    for path, target in model.links.items():
        (new / path).symlink_to(target.resolve())
    for path, text in model.texts.items():
        (new / path).write_text(text, encoding="utf-8")


def _link_entries(new: Path, real: Path, *, leave_out: set[str]) -> None:
    new.mkdir(mode=0o755)
    for entry in sorted(real.iterdir()) if real.is_dir() else ():
        if entry.name not in leave_out:
            (new / entry.name).symlink_to(entry)


def _contents(folder: Path) -> dict[str, str]:
    """Every link's target and every file's text, by path."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            key = str(path.relative_to(folder))
            if path.is_symlink():
                found[key] = f"-> {path.readlink()}"
            else:
                found[key] = path.read_text(encoding="utf-8") if path.is_file() else "folder"
    return found


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
