"""ResNet-50 in INT8: how much smaller, how close, how much faster. A part of `make bench-compression`.

The model is the Keras application with random weights in an .h5, so there is no accuracy to lose: the logits
are compared with FP32's, on seeded images that calibration never saw.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from cases import Case
from numpy.typing import NDArray

from tritonsmith.compress.steps import Quantize

Say = Callable[[str], None]

CALIBRATION_IMAGES, EVALUATION_IMAGES = 64, 64
SIDE = 224
INPUT = "input_layer"  # what Keras names the first input of a process
MEANS = (103.939, 116.779, 123.68)  # what keras.applications.resnet50.preprocess_input takes off, BGR
# Keras is imported in a process of its own, so that its memory is free again before anything is timed.
MAKE = """
import sys, keras
keras.utils.set_random_seed(50)
model = keras.applications.ResNet50(weights=None, classifier_activation=None)
model.save(sys.argv[1])
"""


def make_source(workspace: Path, say: Say) -> Path:
    """The trained file that everything begins with: resnet50.h5, made once."""
    source = workspace / "resnet50.h5"
    if not source.exists():
        say("making ResNet-50 with random weights")
        partial = workspace / "partial.h5"
        subprocess.run([sys.executable, "-c", MAKE, str(partial)], check=True, capture_output=True)
        partial.replace(source)
    return source


def draw_images(count: int, seed: int) -> NDArray[np.float32]:
    """Images `[count, 224, 224, 3]` as ResNet-50 takes them: smooth random fields of several scales."""
    random = np.random.default_rng(seed)
    images = np.zeros((count, SIDE, SIDE, 3), np.float32)
    for cells in (2, 4, 7, 14, 28, 56):
        field = random.normal(0, 1.0 / np.log2(cells + 2), (count, cells, cells, 3)).astype(np.float32)
        images += field.repeat(SIDE // cells, axis=1).repeat(SIDE // cells, axis=2)
    low, high = images.min(axis=(1, 2, 3), keepdims=True), images.max(axis=(1, 2, 3), keepdims=True)
    pixels = 255 * (images - low) / (high - low)
    return np.asarray(pixels - np.array(MEANS), np.float32)


def cases(workspace: Path, say: Say) -> Sequence[Case]:
    workspace.mkdir(parents=True, exist_ok=True)
    return (
        Case(
            model="resnet50",
            variant="int8",
            source=str(make_source(workspace, say)),
            steps=(Quantize(method="static"),),
            calibration=_samples(workspace / "calibration.npz", CALIBRATION_IMAGES, seed=1),
            evaluation=_samples(workspace / "evaluation.npz", EVALUATION_IMAGES, seed=2),
            metric="cosine",
            max_drop=0.01,
            targets={"size_ratio": 3.9, "value": 0.99, "speedup": 2.5, "int8_convolutions": 0.95},
        ),
    )


def _samples(path: Path, count: int, *, seed: int) -> Path:
    if not path.exists():
        np.savez(path, **{INPUT: draw_images(count, seed)})
    return path
