"""Distillation: a student, given or derived from the artifact, trained to answer as the teacher does.

Logits by Hinton et al., 2015 (arXiv 1503.02531); hidden states with learned projections where widths differ
by FitNets (arXiv 1412.6550); a student of every n-th layer by DistilBERT (arXiv 1910.01108).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step
from tritonsmith.compress.chain import Material
from tritonsmith.compress.distillation.depth import drop_blocks
from tritonsmith.compress.distillation.student import Student, read_student
from tritonsmith.compress.pruning.choice import choose_ratio
from tritonsmith.compress.pruning.importance import score_by_magnitude
from tritonsmith.compress.pruning.slicer import plan_pruning, prune_channels
from tritonsmith.compress.steps import Distill
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, MissingExtraError
from tritonsmith.files import staging_folder

if TYPE_CHECKING:
    from tritonsmith.train.module import OnnxModule

Say = Callable[[str], None]

ROUND_TO = 8  # channels of a student derived by width
CHECKED_ROWS = 4
TOLERANCE = 1e-3  # of the written file against what was trained, of the largest number there


def apply_distill(
    spec: Distill,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Say = lambda _: None,
) -> Artifact:
    """Train a student on the teacher's answers, on labels too where there are any; `out` gets the student.

    Raises:
        CompressionError: a student whose inputs or outputs are not the teacher's, a depth or width that the
            graph cannot be brought to, or a training that cannot be done.
        SamplesError: no data to train on.
        MissingExtraError: PyTorch is not installed.
        SourceError: the student cannot be converted.
    """
    _check_spec(spec, artifact)
    try:
        from tritonsmith.train.loop import train
        from tritonsmith.train.module import OnnxModule
    except ImportError as error:
        raise MissingExtraError("a student cannot be trained", package="torch", extra="train") from error
    work = step.begin("distill", asdict(spec))
    with staging_folder(out) as folder:
        student = _make_student(spec, artifact, material, checkpoint, say)
        module = OnnxModule(student.model)
        report = train(
            module,
            material,
            spec,
            teacher=material.teacher,
            checkpoint=checkpoint,
            hidden=student.hidden,
            say=say,
        )
        module.write_weights(student.model)
        staged = folder / out.name
        onnx_model.save_model(student.model, staged)
        onnx_model.check_file(staged)
        _check_written(staged, module, material)
        return step.finish(
            work,
            artifact,
            staged,
            out,
            precision="fp32",
            measured={**student.measured, **report.measured()},
            tools=(*step.TOOLS, "torch"),
        )


def _check_spec(spec: Distill, artifact: Artifact) -> None:
    if artifact.precision != "fp32":
        raise CompressionError(
            f"{artifact.path.name} cannot be trained: its weights are not FP32",
            found=artifact.precision,
            fix="distill first, then quantize or cast",
        )
    for name, share in (("width", spec.width), ("depth", spec.depth)):
        if share is not None and not 0 < share < 1:
            raise CompressionError(f"{name} = {share:g} is no share", expected="a number between 0 and 1")
    if spec.student is not None and (spec.width is not None or spec.depth is not None):
        raise CompressionError("a student is given, so none can be derived by width or depth as well")


def _make_student(
    spec: Distill, artifact: Artifact, material: Material, checkpoint: Path, say: Say
) -> Student:
    if spec.student is not None:
        return read_student(spec, artifact, material, checkpoint, say)
    model = onnx_model.load_model(artifact.path)
    measured: dict[str, Json] = {}
    if spec.depth is not None:
        blocks = drop_blocks(model.graph, spec.depth)
        measured["blocks"] = {name: list(counts) for name, counts in blocks.items()}
        before, after = (sum(counts[side] for counts in blocks.values()) for side in (0, 1))
        say(f"depth: {after} of {before} repeated blocks stay")
    if spec.width is not None:
        model, groups = _narrow(model, spec.width)
        measured["groups"] = groups
        say(f"width: {len(groups)} groups of channels are narrowed")
    return Student(model=model, hidden=None, measured=measured)


def _narrow(model: onnx.ModelProto, width: float) -> tuple[onnx.ModelProto, dict[str, Json]]:
    """Every group of channels at this share, the largest weights first."""
    model, plan = plan_pruning(model)
    if not plan.prunable:
        reasons = "; ".join(f"{group.name}: {group.frozen}" for group in plan.frozen[:5])
        raise CompressionError(
            "no width can be taken: the graph has no channels that can be removed", found=reasons or None
        )
    scores = score_by_magnitude(model, plan)
    kept = choose_ratio(plan.prunable, scores, ratio=1 - width, round_to=ROUND_TO)
    groups: dict[str, Json] = {
        group.name: [group.size, len(kept[group.name])]
        for group in plan.prunable
        if len(kept[group.name]) < group.size
    }
    if not groups:
        raise CompressionError(
            f"width = {width:g} leaves every channel",
            found=f"groups of {', '.join(str(group.size) for group in plan.prunable[:8])}",
            expected=f"sizes that can shrink to a multiple of {ROUND_TO}",
            fix="a smaller share, or the step prune with round_to",
        )
    return prune_channels(model, plan, kept), groups


def _check_written(staged: Path, module: OnnxModule, material: Material) -> None:
    """Raise CompressionError where the file does not compute what was trained."""
    from tritonsmith.train.exam import InTorch

    data = material.training or material.calibration
    if data is None:
        return
    rows = {name: array[:CHECKED_ROWS] for name, array in data.arrays.items()}
    trained, written = InTorch(module).run(rows), open_session(staged).run(rows)
    for name, array in trained.items():
        largest = max(1.0, float(np.abs(array).max(initial=0.0)))
        error = float(np.abs(array.astype(np.float64) - written[name]).max(initial=0.0))
        if not error <= TOLERANCE * largest:
            raise CompressionError(
                f"the trained student does not compute the same on ONNX Runtime: output {name!r}",
                found=f"an error of {error:.3g}",
                expected=f"at most {TOLERANCE * largest:.3g}",
            )
