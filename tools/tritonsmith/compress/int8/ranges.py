"""The smallest and largest value of every float tensor in a graph, seen on real inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Reader:
    """What onnxruntime.quantization asks for samples: `get_next` until None."""

    def __init__(self, inputs: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        self._inputs = iter(inputs)

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        return next(self._inputs, None)


def find_ranges(
    prepared: Path, inputs: Iterable[Mapping[str, NDArray[Any]]], folder: Path
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value by tensor name; weights and inputs of other types are left out."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    calibrator = create_calibrator(
        prepared,
        [],
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
        use_external_data_format=True,
    )
    calibrator.collect_data(Reader(inputs))
    found = calibrator.compute_data()
    return {name: (float(np.min(data.lowest)), float(np.max(data.highest))) for name, data in found.items()}
