"""Rows to train on: chosen from what a chain has, drawn in a seeded order, trimmed where they are padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tritonsmith.artifact import BATCH_AXIS, Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.steps import Trained
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.samples import Samples

MASK = "attention_mask"
WINDOW = 32  # batches whose rows are sorted by length, so that short rows meet short rows

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Inputs of a free length with a mask; `lengths` `[N]` counts up to the last token that is no padding."""

    axis: str  # the name of the free axis
    inputs: frozenset[str]  # those that have it as axis 1
    lengths: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    rows: Array  # which samples, ascending or not
    inputs: dict[str, torch.Tensor]
    length: int | None  # what padded inputs were cut to
    mask: torch.Tensor | None  # [B, length], 1 for tokens


def choose_data(material: Material, spec: Trained) -> tuple[Samples, float]:
    """What to train on, and the weight of its labels: training data, else calibration data without labels.

    Raises:
        SamplesError: there are neither, or no labels where they are asked for.
        CompressionError: every loss has the weight 0.
    """
    if material.training is not None:
        data = material.training
        labels = spec.labels if spec.labels is not None else float(data.target is not None)
    elif material.calibration is not None and not spec.labels:
        data, labels = material.calibration, 0.0
    else:
        raise SamplesError(
            "there is nothing to train on",
            expected="training data with labels" if spec.labels else "training data, labelled or not",
            fix="give training data (an .npz with an array for each input); without labels, calibration "
            "data do as well",
        )
    if labels and data.target is None:
        raise SamplesError(f"{data.path} has no labels to learn from", expected="an array named 'target'")
    if not (labels or spec.logits or spec.hidden or spec.embedding):
        raise CompressionError(
            "there is nothing to learn: every loss has the weight 0",
            expected="labels (with labelled data), logits, hidden or embedding above 0",
        )
    return data, labels


def check_data(data: Samples, artifact: Artifact) -> None:
    """Refuse what cannot be fed in batches of tensors."""
    if not artifact.batched:
        raise CompressionError(
            "a model without a batch axis cannot be trained here",
            found="; ".join(map(str, artifact.inputs)),
            expected=f"{BATCH_AXIS!r} as the first axis of every input and output",
        )
    for name, array in data.arrays.items():
        if array.dtype.kind not in "fiub":
            raise CompressionError(f"input {name!r} holds no numbers to train with", found=array.dtype)


def find_padding(data: Samples, artifact: Artifact) -> Padding | None:
    """The padding that an input named `attention_mask` tells of."""
    shapes = {spec.name: spec.shape for spec in artifact.inputs}
    mask, shape = data.arrays.get(MASK), shapes.get(MASK, ())
    if mask is None or mask.ndim != 2 or not isinstance(shape[1], str):
        return None
    columns = np.arange(1, mask.shape[1] + 1)
    return Padding(
        axis=shape[1],
        inputs=frozenset(name for name, axes in shapes.items() if axes[1:2] == (shape[1],)),
        lengths=np.maximum(1, (columns * (mask != 0)).max(axis=1)),
    )


def draw_batches(count: int, size: int, *, seed: int, epoch: int, padding: Padding | None) -> list[Array]:
    """The rows of each batch of an epoch; the same for the same seed and epoch."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count)
    if padding is not None:
        window = size * WINDOW
        parts = [order[start : start + window] for start in range(0, count, window)]
        order = np.concatenate([part[np.argsort(padding.lengths[part], kind="stable")] for part in parts])
    batches = [order[start : start + size] for start in range(0, count, size)]
    if len(batches) > 1 and len(batches[-1]) == 1:  # one row has no batch statistics
        batches.pop()
    if padding is not None:
        batches = [batches[index] for index in random.permutation(len(batches))]
    return batches


def read_batch(data: Samples, rows: Array, padding: Padding | None) -> Batch:
    length = None if padding is None else int(padding.lengths[rows].max())
    inputs = {}
    for name, array in data.arrays.items():
        part = array[rows]
        if padding is not None and name in padding.inputs:
            part = part[:, :length]
        inputs[name] = torch.from_numpy(np.ascontiguousarray(part))
    return Batch(rows=rows, inputs=inputs, length=length, mask=None if length is None else inputs[MASK])


def read_all(data: Samples, size: int, padding: Padding | None) -> Iterator[Batch]:
    """All rows, those of a length together where there is padding: `Batch.rows` says which."""
    order = np.arange(data.count) if padding is None else np.argsort(padding.lengths, kind="stable")
    for start in range(0, data.count, size):
        yield read_batch(data, order[start : start + size], padding)
