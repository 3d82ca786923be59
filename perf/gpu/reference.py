"""The prepared models: what they are, the rows to run them on, and how near an answer is. numpy alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def read_description(folder: Path) -> dict[str, Any]:
    """model.json of a prepared model."""
    description: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    return description


def read_rows(folder: Path) -> tuple[Arrays, Arrays]:
    """Inputs and ONNX Runtime's FP32 answers by name, 128 rows of each."""
    with np.load(folder / "reference.npz") as stored:
        return tuple(  # type: ignore[return-value]
            {name.partition(".")[2]: stored[name] for name in stored.files if name.startswith(kind)}
            for kind in ("input.", "output.")
        )


def first_rows(arrays: Arrays, count: int) -> dict[str, NDArray[Any]]:
    return {name: np.ascontiguousarray(array[:count]) for name, array in arrays.items()}


def read_weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The PyTorch module's parameters, out of fp32.onnx."""
    content = np.memmap(folder / "fp32.onnx", np.uint8, "r")
    weights = {}
    for name, place in read_description(folder)["weights"].items():
        count, offset = int(np.prod(place["shape"])), place["offset_bytes"]
        array = np.frombuffer(content[offset : offset + 4 * count].tobytes(), "<f4").reshape(place["shape"])
        weights[name] = array.T.copy() if place["transposed"] else array.copy()
    return weights


def agreement(expected: Arrays, found: Arrays) -> dict[str, dict[str, float]]:
    """By output: the largest absolute difference, the largest value, and the smallest cosine of a row."""
    result = {}
    for name, array in expected.items():
        a, b = (part.reshape(len(part), -1).astype(np.float64) for part in (array, found[name]))
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        result[name] = {
            "max_abs": float(np.abs(a - b).max()),
            "largest": float(np.abs(a).max()),
            "min_cosine": float(cosine.min()),
        }
    return result
