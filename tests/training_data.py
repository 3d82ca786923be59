"""A small teacher of the digits, a student that knows nothing yet, and data to train it on.

Run as a script it trains the student and pauses after two epochs, so that a test can kill it:
`python training_data.py FOLDER`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnx

from digits_models import mlp_model, split_digits, write_artifact, write_samples
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.steps import Trained
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples
from tritonsmith.train.loop import TrainReport, train
from tritonsmith.train.module import OnnxModule

SPEC = Trained(epochs=4, batch_size=30, learning_rate=1e-2)


def make_samples(path: Path, artifact: Artifact, rows: slice, *, labelled: bool = True) -> Samples:
    digits = split_digits()
    labels = digits.train_labels[rows] if labelled else None
    write_samples(path, digits.train_images[rows].reshape(-1, 64), labels)
    return load_samples(path, artifact.inputs)


def make_material(folder: Path, *, labelled: bool = True) -> Material:
    """The MLP of digits_models as the teacher, 600 rows to train on, 200 to tune on."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = write_artifact(mlp_model(), folder / "teacher.onnx")
    return Material(
        teacher=teacher,
        training=make_samples(folder / "training.npz", teacher, slice(600), labelled=labelled),
        tuning=make_samples(folder / "tuning.npz", teacher, slice(600, 800)),
        metric=parse_metric("accuracy"),
    )


def untrained_model(*, hidden: int = 64) -> onnx.ModelProto:
    """The teacher's graph with seeded weights instead of trained ones, and a hidden layer of this width."""
    model = onnx.ModelProto()
    model.CopyFrom(mlp_model())
    random = np.random.default_rng(8)
    for tensor in model.graph.initializer:
        shape = [hidden if size == 64 and tensor.name != "w1" else size for size in tensor.dims]
        shape = [64, hidden] if tensor.name == "w1" else shape
        values = random.normal(0, 0.1, shape).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model


def train_student(folder: Path, checkpoint: Path, *, pause_s: float = 0.0) -> tuple[OnnxModule, TrainReport]:
    material = make_material(folder)
    module = OnnxModule(untrained_model())

    def say(line: str) -> None:
        print(line, flush=True)
        if line.startswith("epoch 2/"):
            time.sleep(pause_s)

    report = train(module, material, SPEC, teacher=material.teacher, checkpoint=checkpoint, say=say)
    return module, report


if __name__ == "__main__":
    train_student(Path(sys.argv[1]), Path(sys.argv[1]) / "checkpoint", pause_s=30.0)
