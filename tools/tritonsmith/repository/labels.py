"""Label files: what the positions along an output's last axis are called, a line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.artifact import TensorSpec
from tritonsmith.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What goes into config.pbtxt and what is copied into the model's folder."""

    names: Mapping[str, str]  # output -> file name in the model's folder
    files: Mapping[str, Path]  # file name in the model's folder -> the file to copy


def labels_from_files(files: Mapping[str, Path], outputs: tuple[TensorSpec, ...]) -> Labels:
    """Each output's label file, held against the output's last axis where that is fixed.

    Raises:
        RecipeError: an output that the model lacks, a file that is missing, no text or of another
            length than the axis, two files of one name.
    """
    axes = {spec.name: spec.shape[-1] if len(spec.shape) > 1 else None for spec in outputs}
    names: dict[str, str] = {}
    copies: dict[str, Path] = {}
    for output, path in files.items():
        if output not in axes:
            raise RecipeError(
                f"labels.{output}: the model has no such output", expected=f"one of {', '.join(axes)}"
            )
        _check_lines(output, path, axes[output])
        if copies.setdefault(path.name, path) != path:
            raise RecipeError(
                f"labels.{output}: two label files are named {path.name!r}",
                found=[str(copies[path.name]), str(path)],
                fix="rename one",
            )
        names[output] = path.name
    return Labels(names=names, files=copies)


def _check_lines(output: str, path: Path, axis: int | str | None) -> None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"labels.{output}: {path} cannot be read as text", found=error) from error
    if path.name in ("config.pbtxt", "warmup") or path.name.startswith(".") or path.name.isdecimal():
        raise RecipeError(
            f"labels.{output}: a label file cannot be named {path.name!r}", fix="rename it, say to labels.txt"
        )
    if not lines or (isinstance(axis, int) and len(lines) != axis):
        raise RecipeError(
            f"labels.{output}: {path} does not fit the output",
            found=f"{len(lines)} lines",
            expected=f"{axis} lines, one for each value"
            if isinstance(axis, int)
            else "a line for each value",
        )
