"""ResNet-50 in INT8: how much smaller, how close, how much faster. A part of `make bench-compression`.

The model is the Keras application with random weights in an .h5, so there is no accuracy to lose: the logits
are compared with FP32's, on seeded images that calibration never saw.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress import steps
from tritonsmith.compress.chain import Material, apply_step
from tritonsmith.engines import open_session
from tritonsmith.gate import judge, predict
from tritonsmith.ingest import convert
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.measure import compare_speed
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples

Say = Callable[[str], None]

CALIBRATION_IMAGES, EVALUATION_IMAGES = 64, 64
SIDE = 224
BATCHES = (1, 8)
HEADLINE_BATCH = 8  # throughput
MEANS = (103.939, 116.779, 123.68)  # what keras.applications.resnet50.preprocess_input takes off, BGR
STEP = steps.Quantize(method="static")
METRIC = "cosine"
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


def publishable(workspace: Path, say: Say) -> tuple[Artifact, Artifact, Samples]:
    """The FP32 artifact, the INT8 artifact that is published, and the evaluation samples."""
    workspace.mkdir(parents=True, exist_ok=True)
    source = make_source(workspace, say)
    fp32_path = workspace / "fp32" / "model.onnx"
    fp32_path.parent.mkdir(exist_ok=True)
    fp32 = convert(str(source), fp32_path, ConvertOptions(), force=True, say=say)
    calibration = _samples(workspace / "calibration.npz", fp32, CALIBRATION_IMAGES, seed=1)
    evaluation = _samples(workspace / "evaluation.npz", fp32, EVALUATION_IMAGES, seed=2)
    material = Material(teacher=fp32, calibration=calibration, source=str(source))
    int8_path = workspace / "int8" / "model.onnx"
    int8_path.parent.mkdir(exist_ok=True)
    checkpoint = workspace / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    int8 = apply_step(STEP, fp32, material, int8_path, checkpoint=checkpoint, say=say)
    return fp32, int8, evaluation


def rows(workspace: Path, say: Say) -> list[dict[str, Any]]:
    """One row for `perf/results/compression.json`; `served_metric` is left for who serves the model."""
    fp32, int8, evaluation = publishable(workspace, say)
    outputs = [
        predict(open_session(artifact.path), evaluation, batched=True, batch_size=8)
        for artifact in (fp32, int8)
    ]
    metric = parse_metric(METRIC)
    report = judge(metric, baseline=outputs[0], candidate=outputs[1], target=None, max_drop=None, say=say)
    pair = [open_session(artifact.path, threads=1) for artifact in (fp32, int8)]
    speeds = {}
    for batch in BATCHES:
        say(f"timing batch {batch}")
        inputs = {name: array[:batch] for name, array in evaluation.arrays.items()}
        speeds[batch] = compare_speed(pair[0], pair[1], inputs, batch_size=batch)
    headline = speeds[HEADLINE_BATCH]
    bytes_before, bytes_after = (onnx_model.model_bytes(artifact.path) for artifact in (fp32, int8))
    measured = int8.steps[-1].measured
    return [
        {
            "model": "resnet50",
            "variant": "int8-static",
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
            "size_ratio": bytes_before / bytes_after,
            "metric": metric.text,
            "baseline": report.baseline,
            "value": report.candidate,
            "drop": report.drop,
            "drop_ci95_high": report.ci95_high,
            "samples": report.samples,
            "cosine_centred": _centred_cosine(*outputs),
            "speedup": headline.ratio,
            "speedup_low": headline.low,
            "speedup_high": headline.high,
            "speeds": {str(batch): speed.json() for batch, speed in speeds.items()},
            "int8_ops": measured["int8_ops"],
            "ops": measured["ops"],
            "ops_by_type": measured["ops_by_type"],
            "int8_convolutions": _share_of_convolutions(int8),
            "served_metric": None,
            "steps": [{"step": step.name, "options": dict(step.options)} for step in int8.steps],
        }
    ]


def _centred_cosine(before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> float:
    """The cosine once the mean logits are taken off: with random weights, all images answer much alike."""
    (name,) = before
    mean = before[name].mean(axis=0)
    ours, theirs = before[name] - mean, after[name] - mean
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / lengths).mean())


def _share_of_convolutions(artifact: Artifact) -> float:
    """Of the source's convolutions, the share that runs in INT8 on ONNX Runtime."""
    counts = artifact.steps[-1].measured["ops_by_type"]
    assert isinstance(counts, dict)  # noqa: S101 - as the audit writes it
    convolutions = {kind: count for kind, count in counts.items() if "Conv" in kind}
    total = sum(float(str(count)) for count in convolutions.values())
    return float(str(convolutions.get("QLinearConv", 0))) / total


def _samples(path: Path, artifact: Artifact, count: int, *, seed: int) -> Samples:
    if not path.exists():
        (name,) = (spec.name for spec in artifact.inputs)
        arrays: dict[str, Any] = {name: draw_images(count, seed)}
        np.savez(path, **arrays)
    return load_samples(path, artifact.inputs)
