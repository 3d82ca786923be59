"""What the teacher says to every row, computed once by ONNX Runtime and kept beside the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, RepositoryError
from tritonsmith.samples import Samples
from tritonsmith.train.checkpoint import hash_request
from tritonsmith.train.data import Batch, Padding, read_all
from tritonsmith.train.losses import pool

BATCH = 32

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Arrays `[N, ...]` by tensor name, mapped from disk; `padded` names those with a padded axis 1."""

    arrays: Mapping[str, Array]
    padded: frozenset[str]

    def of(self, name: str, batch: Batch) -> torch.Tensor:
        part = self.arrays[name][batch.rows]
        if name in self.padded and batch.length is not None:
            part = part[:, : batch.length]
        return torch.from_numpy(np.array(part, order="C"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What of the teacher is wanted: tensors whole (outputs or hidden states), and outputs pooled."""

    whole: tuple[str, ...]
    pooled: Mapping[str, tuple[int, ...]]  # output -> the free axes to pool over

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.whole, *self.pooled)))


def pooled_name(name: str) -> str:
    """What the pooled answer of an output is kept under; no tensor has a name with a line feed."""
    return f"{name}\npooled"


def collect_answers(
    teacher: Artifact,
    data: Samples,
    questions: Questions,
    padding: Padding | None,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Answers:
    """The teacher's answers to all rows: from `folder` where the same were asked before.

    Raises:
        CompressionError: the teacher has no tensor of a wanted name.
        EngineError: it cannot be run.
        RepositoryError: the folder cannot be written.
    """
    asked = {"whole": questions.whole, "pooled": {n: list(a) for n, a in questions.pooled.items()}}
    text = json.dumps([onnx_model.model_sha256(teacher.path), asked])
    key = hash_request(text, [data.arrays[name] for name in sorted(data.arrays)])
    kept = folder / f"answers-{key}"
    if not kept.is_dir():
        say(f"asking the teacher about {data.count} samples")
        staged = folder / f".answers-{key}.unfinished"
        staged.mkdir(parents=True, exist_ok=True)
        try:
            _ask(teacher, data, questions, padding, staged)
            staged.replace(kept)
        except OSError as error:
            raise RepositoryError(f"cannot keep the teacher's answers in {folder}", found=error) from error
    record = json.loads((kept / "record.json").read_text(encoding="utf-8"))
    arrays = {
        name: np.load(kept / f"{index}.npy", mmap_mode="r") for index, name in enumerate(record["names"])
    }
    return Answers(arrays=arrays, padded=frozenset(record["padded"]))


def _ask(
    teacher: Artifact, data: Samples, questions: Questions, padding: Padding | None, folder: Path
) -> None:
    asked = _with_outputs(teacher, questions.names(), folder)
    session = open_session(asked)
    if asked != teacher.path:
        for file in onnx_model.model_files(asked):
            file.unlink()
    free = {spec.name for spec in teacher.outputs if isinstance((*spec.shape, 0, 0)[1], str)}
    known = {spec.name for spec in teacher.outputs}
    files: dict[str, Array] = {}
    padded = set()
    longest = 0 if padding is None else int(padding.lengths.max())
    for batch in read_all(data, BATCH, padding):
        found = session.run({name: tensor.numpy() for name, tensor in batch.inputs.items()})
        for name, array in _wanted(found, questions, batch).items():
            # Of a hidden state no axis has a name; three of them are rows, tokens and features.
            padded_axis = name in free or (name not in known and array.ndim == 3 and name in questions.whole)
            grows = padded_axis and batch.length is not None and array.shape[1] == batch.length
            if name not in files:
                axes = (data.count, longest, *array.shape[2:]) if grows else (data.count, *array.shape[1:])
                file = folder / f"{len(files)}.npy"
                files[name] = np.lib.format.open_memmap(file, mode="w+", dtype=array.dtype, shape=axes)
                padded |= {name} if grows else set()
            if grows:
                files[name][batch.rows, : batch.length] = array
            else:
                files[name][batch.rows] = array
    record = {"names": list(files), "padded": sorted(padded)}
    for array in files.values():
        array.flush()  # type: ignore[attr-defined]
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    _sync(folder)


def _wanted(found: Mapping[str, Array], questions: Questions, batch: Batch) -> dict[str, Array]:
    arrays = {name: found[name] for name in questions.whole}
    for name, axes in questions.pooled.items():
        pooled = pool(torch.from_numpy(found[name]), axes, batch.mask)
        arrays[pooled_name(name)] = pooled.numpy()
    return arrays


def _with_outputs(teacher: Artifact, names: Sequence[str], folder: Path) -> Path:
    """The teacher with hidden states among its outputs."""
    hidden = [name for name in names if name not in {spec.name for spec in teacher.outputs}]
    if not hidden:
        return teacher.path
    model = onnx_model.load_editable(teacher.path)
    made = {name for node in model.graph.node for name in node.output}
    if unknown := [name for name in hidden if name not in made]:
        raise CompressionError(f"{teacher.path.name} has no hidden states of these names", found=unknown)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in hidden)
    path = folder / "teacher.onnx"
    onnx_model.save_model(model, path, weights_from=teacher.path.parent)
    return path


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
