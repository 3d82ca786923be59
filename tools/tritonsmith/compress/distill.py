"""Distillation: a student, given or derived from the artifact, trained to answer as the teacher does.

Logits by Hinton et al., 2015 (arXiv 1503.02531); hidden states with learned projections where widths differ
by FitNets (arXiv 1412.6550); a student of every n-th layer by DistilBERT (arXiv 1910.01108).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from tritonsmith import dtypes, onnx_model
from tritonsmith.artifact import BATCH_AXIS, Artifact, Json, TensorSpec
from tritonsmith.compress import step
from tritonsmith.compress.chain import Material
from tritonsmith.compress.choice import choose_ratio
from tritonsmith.compress.depth import drop_blocks, find_runs, spread
from tritonsmith.compress.importance import score_by_magnitude
from tritonsmith.compress.slicer import plan_pruning, prune_channels
from tritonsmith.compress.steps import Distill
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, MissingExtraError
from tritonsmith.files import staging_folder
from tritonsmith.ingest import convert, source_sha256

if TYPE_CHECKING:
    from tritonsmith.train.module import OnnxModule

Say = Callable[[str], None]

ROUND_TO = 8  # channels of a student derived by width
CHECKED_ROWS = 4
TOLERANCE = 1e-3  # of the written file against what was trained, of the largest number there


@dataclass(frozen=True, slots=True, kw_only=True)
class _Student:
    model: onnx.ModelProto
    hidden: tuple[tuple[str, str], ...] | None  # pairs of states; None: those of equal name
    measured: dict[str, Json]


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
) -> _Student:
    if spec.student is not None:
        return _read_student(spec.student, spec, artifact, material, checkpoint, say)
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
    return _Student(model=model, hidden=None, measured=measured)


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


def _read_student(
    source: str, spec: Distill, artifact: Artifact, material: Material, checkpoint: Path, say: Say
) -> _Student:
    """Convert a student once: an untrained one would have other weights each time."""
    folder = checkpoint / f"student-{source_sha256(source)[:16]}"
    path = folder / "model.onnx"
    if not path.exists():
        convert(source, path, material.convert, say=say)
    model = onnx_model.load_model(path)
    inputs, outputs = onnx_model.signature_of(model)
    _check_signature(source, inputs + outputs, artifact)
    _adopt_signature(model.graph, artifact)
    _untie_constants(model.graph)
    hidden = _match_blocks(model, material.teacher) if spec.hidden else None
    return _Student(model=model, hidden=hidden, measured={"student_sha256": onnx_model.model_sha256(path)})


def _check_signature(source: str, found: tuple[TensorSpec, ...], artifact: Artifact) -> None:
    """Raise one CompressionError that lists all differences; free axes may have other names."""
    wanted = {spec.name: spec for spec in artifact.inputs + artifact.outputs}
    given = {spec.name: spec for spec in found}
    differences = [f"the student lacks {wanted[name]}" for name in wanted if name not in given]
    differences += [f"the teacher has no {given[name]}" for name in given if name not in wanted]
    differences += [
        f"{given[name]} is not {wanted[name]}"
        for name in wanted
        if name in given and not _is_alike(given[name], wanted[name])
    ]
    sides = {spec.name for spec in artifact.inputs} ^ {spec.name for spec in found[: len(artifact.inputs)]}
    if not differences and sides:
        differences.append(f"inputs and outputs are exchanged: {', '.join(sorted(sides))}")
    if differences:
        raise CompressionError(
            f"the student {source} does not fit the teacher",
            found="; ".join(differences),
            expected="; ".join(map(str, wanted.values())),
            fix="give the student inputs and outputs of the teacher's names, data types and shapes",
        )


def _is_alike(student: TensorSpec, teacher: TensorSpec) -> bool:
    return (
        student.dtype == teacher.dtype
        and len(student.shape) == len(teacher.shape)
        and all(
            ours == theirs
            or (isinstance(ours, str) and isinstance(theirs, str) and BATCH_AXIS not in (ours, theirs))
            for ours, theirs in zip(student.shape, teacher.shape, strict=True)
        )
    )


def _adopt_signature(graph: onnx.GraphProto, artifact: Artifact) -> None:
    """The teacher's order of inputs and outputs, and its names of free axes."""
    for values, specs in ((graph.input, artifact.inputs), (graph.output, artifact.outputs)):
        infos = [
            onnx.helper.make_tensor_value_info(spec.name, dtypes.BY_NAME[spec.dtype].onnx, spec.shape)
            for spec in specs
        ]
        del values[:]
        values.extend(infos)
    del graph.value_info[:]


def _untie_constants(graph: onnx.GraphProto) -> None:
    """Give each reader its own copy of weights that are one number throughout.

    Exporters share equal tensors, and all biases of an untrained layer size are equal zeros.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    seen: set[str] = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            tensor = tensors.get(name)
            if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or not tensor.dims:
                continue
            if name not in seen:
                seen.add(name)
                continue
            values = onnx.numpy_helper.to_array(tensor)
            if values.size > 1 and (values == values.flat[0]).all():
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = f"{name}_of_{node.output[0]}_{index}"
                graph.initializer.append(copy)
                node.input[index] = copy.name


def _match_blocks(student: onnx.ModelProto, teacher: Artifact) -> tuple[tuple[str, str], ...] | None:
    """What the student's repeated blocks give beside what as deep a block of the teacher's gives."""
    graphs = (student.graph, onnx_model.load_model(teacher.path, with_weights=False).graph)
    ours, theirs = (max(find_runs(graph), key=lambda run: run.blocks, default=None) for graph in graphs)
    if ours is None or theirs is None or ours.blocks > theirs.blocks:
        return None
    places = spread(theirs.blocks + 1, ours.blocks + 1)
    return tuple(zip(ours.borders, (theirs.borders[place] for place in places), strict=True))


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
