"""Structured pruning alone, on a classifier of our own. A part of `make bench-compression`.

The source is the PyTorch network of tools/recipes/shapes, trained in minutes. It is pruned to a quarter of
its FLOPs three ways: without training, which shows that the task is hard enough for pruning to hurt; on the
PyTorch module by torch-pruning, fine-tuned; and on the ONNX graph by the slicer, fine-tuned.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material, run_chain
from tritonsmith.compress.cost import cost_of
from tritonsmith.compress.steps import Prune, PruneTorch, StepSpec
from tritonsmith.engines import open_session
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import staging_folder
from tritonsmith.gate import judge, predict
from tritonsmith.ingest import convert
from tritonsmith.measure import compare_speed
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples

Say = Callable[[str], None]

TRAIN = Path(__file__).resolve().parents[1] / "tools" / "recipes" / "shapes" / "train.py"
SOURCE = "shapes_network:classifier"
BATCHES = (1, 16)
HEADLINE_BATCH = 1
BATCH_SIZE = 64  # of predictions
HEADLINE = "prune-torch"
VARIANTS: dict[str, StepSpec] = {
    "prune-torch untrained": PruneTorch(flops=0.25, round_to=16),
    HEADLINE: PruneTorch(flops=0.25, round_to=16, importance="taylor", epochs=6, learning_rate=3e-3),
    "prune": Prune(flops=0.25, round_to=16, importance="taylor", epochs=6, learning_rate=3e-3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The converted model, and what its steps and its judge need."""

    material: Material
    evaluation: Samples


def make_source(workspace: Path, say: Say) -> Path:
    """The folder of the trained source and its data, made once."""
    folder = workspace / "source"
    if not folder.exists():
        say("training the shapes classifier")
        with staging_folder(folder) as staging:
            command = [sys.executable, str(TRAIN), str(staging / "shapes")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise TritonsmithError(f"{TRAIN} failed", found=done.stderr[-2000:].strip())
            (staging / "shapes").replace(folder)
        say(done.stdout.strip().splitlines()[-1])
    return folder


def prepare(workspace: Path, say: Say) -> Subject:
    workspace.mkdir(parents=True, exist_ok=True)
    folder = make_source(workspace, say)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # where the source is found by its name
    fp32 = convert(SOURCE, workspace / "fp32" / "model.onnx", force=True, say=say)
    training, calibration, tuning, evaluation = (
        load_samples(folder / f"{name}.npz", fp32.inputs)
        for name in ("training", "calibration", "tuning", "evaluation")
    )
    material = Material(
        teacher=fp32,
        source=SOURCE,
        training=training,
        calibration=calibration,
        tuning=tuning,
        metric=parse_metric("accuracy"),
    )
    return Subject(material=material, evaluation=evaluation)


def publishable(workspace: Path, say: Say) -> tuple[Artifact, Artifact, Samples]:
    """The FP32 artifact, the pruned one that is published, and the evaluation samples."""
    subject = prepare(workspace, say)
    pruned = run_chain([VARIANTS[HEADLINE]], subject.material, store=workspace / "store", say=say)[-1]
    return subject.material.teacher, pruned, subject.evaluation


def rows(workspace: Path, say: Say) -> list[dict[str, Any]]:
    """A row for each variant; `served_metric` is left for who serves the headline."""
    subject = prepare(workspace, say)
    found = []
    for variant, spec in VARIANTS.items():
        pruned = run_chain([spec], subject.material, store=workspace / "store", say=say)[-1]
        found.append(row_of(variant, pruned, subject, say))
    return found


def row_of(variant: str, pruned: Artifact, subject: Subject, say: Say) -> dict[str, Any]:
    fp32, evaluation = subject.material.teacher, subject.evaluation
    pair = [open_session(artifact.path, threads=1) for artifact in (fp32, pruned)]
    outputs = [predict(session, evaluation, batched=True, batch_size=BATCH_SIZE) for session in pair]
    metric = parse_metric("accuracy")
    report = judge(
        metric,
        baseline=outputs[0],
        candidate=outputs[1],
        target=evaluation.target,
        max_drop=None,
        say=say,
    )
    speeds = {}
    for batch in BATCHES:
        say(f"timing {variant} at batch {batch}")
        inputs = {name: array[:batch] for name, array in evaluation.arrays.items()}
        speeds[batch] = compare_speed(pair[0], pair[1], inputs, batch_size=batch)
    headline = speeds[HEADLINE_BATCH]
    costs = [cost_of(artifact.path) for artifact in (fp32, pruned)]
    size_bytes = [onnx_model.model_bytes(artifact.path) for artifact in (fp32, pruned)]
    measured = pruned.steps[-1].measured
    return {
        "model": "shapes",
        "variant": variant,
        "bytes_before": size_bytes[0],
        "bytes_after": size_bytes[1],
        "size_ratio": size_bytes[0] / size_bytes[1],
        "flops_before": costs[0].flops,
        "flops_after": costs[1].flops,
        "flops_ratio": costs[0].flops / costs[1].flops,
        "parameters_ratio": costs[0].parameters / costs[1].parameters,
        "metric": metric.text,
        "baseline": report.baseline,
        "value": report.candidate,
        "drop": report.drop,
        "drop_ci95_high": report.ci95_high,
        "samples": report.samples,
        "speedup": headline.ratio,
        "speedup_low": headline.low,
        "speedup_high": headline.high,
        "speeds": {str(batch): speed.json() for batch, speed in speeds.items()},
        "channels": measured.get("channels"),
        "served_metric": None,
        "steps": [{"step": step.name, "options": dict(step.options)} for step in pruned.steps],
    }
