"""Structured pruning: whole channels, heads and neurons leave the graph, and it becomes smaller."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from tritonsmith import onnx_model
from tritonsmith.artifact import BATCH_AXIS, Artifact, Json
from tritonsmith.compress import step
from tritonsmith.compress.chain import Material
from tritonsmith.compress.cost import Cost, cost_of, lengths_in
from tritonsmith.compress.pruning.axes import node_name
from tritonsmith.compress.pruning.choice import (
    Budget,
    Kept,
    choose_budget,
    choose_ratio,
    least_left,
    score_per_cost,
)
from tritonsmith.compress.pruning.groups import Group, Plan
from tritonsmith.compress.pruning.importance import Scores, score_by_magnitude, score_by_taylor
from tritonsmith.compress.pruning.slicer import plan_pruning, prune_channels
from tritonsmith.compress.steps import Prune
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, EngineError, SamplesError
from tritonsmith.files import staging_folder
from tritonsmith.ingest.seeds import draw_inputs, index_ranges
from tritonsmith.samples import Samples

Say = Callable[[str], None]

TRIED_SIZES = ((1, 16), (3, 16), (1, 128), (3, 128))  # batch and other free axes, before it is renamed
IMPORTANCES = ("magnitude", "taylor")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pruned:
    """A model after some iterations, with the sizes of its groups before and now."""

    model: onnx.ModelProto
    sizes: Mapping[str, tuple[int, int]]
    frozen: Mapping[str, str]
    reports: tuple[Mapping[str, Json], ...]


def apply_prune(
    spec: Prune,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Say = lambda _: None,
) -> Artifact:
    """Remove the least important channels of an ONNX model, in iterations, with training after each.

    Raises:
        CompressionError: options that contradict each other, a node to keep that is not there, a ratio that
            would empty a layer, a goal that the groups cannot reach, or a graph that cannot be followed.
        SamplesError: Taylor terms or training without data.
    """
    _check_spec(spec)
    work = step.begin("prune", asdict(spec))
    lengths = lengths_in(material.calibration or material.training, artifact)
    before = cost_of(artifact.path, lengths=lengths)
    with staging_folder(out) as folder:
        pruned = _prune(spec, artifact, material, before, checkpoint, say)
        staged = folder / out.name
        onnx_model.save_model(pruned.model, staged)
        _try_model(staged, artifact, pruned.model)
        after = cost_of(staged, lengths=lengths)
        say(
            f"pruned: {after.flops / max(1, before.flops):.1%} of the FLOPs and "
            f"{after.parameters / max(1, before.parameters):.1%} of the parameters are left"
        )
        tools = (*step.TOOLS, "torch") if spec.epochs or spec.importance == "taylor" else step.TOOLS
        measured = _measured(before, after, pruned)
        return step.finish(
            work, artifact, staged, out, precision=artifact.precision, measured=measured, tools=tools
        )


def _check_spec(spec: Prune) -> None:
    goals = {name: getattr(spec, name) for name in ("flops", "parameters", "ratio")}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise CompressionError(
            "how much to prune is not clear",
            found=", ".join(f"{name} = {value}" for name, value in given.items()) or "no goal",
            expected="exactly one of flops, parameters and ratio",
        )
    ((name, value),) = given.items()
    if name != "ratio" and not 0 < value < 1:
        raise CompressionError(
            f"{name} = {value:g} is no share that may be left", expected="a number between 0 and 1"
        )
    if name == "ratio" and not 0 <= value < 1:
        raise CompressionError(
            f"a ratio of {value:g} would empty every layer", expected="a share from 0 up to 1 that goes"
        )
    if spec.round_to < 1 or spec.iterations < 1:
        raise CompressionError(
            "pruning needs at least 1", found=f"round_to = {spec.round_to}, iterations = {spec.iterations}"
        )
    if spec.importance not in IMPORTANCES:
        raise CompressionError(
            f"no importance is named {spec.importance!r}", expected=" or ".join(IMPORTANCES)
        )


def _prune(
    spec: Prune, artifact: Artifact, material: Material, before: Cost, checkpoint: Path, say: Say
) -> _Pruned:
    model = onnx_model.load_model(artifact.path)
    model, plan = plan_pruning(model)
    _check_names(spec, model)
    original = {group.name: group.size for group in plan.groups}
    _say_frozen(plan, say)
    reports: list[Mapping[str, Json]] = []
    for number in range(1, spec.iterations + 1):
        if number > 1:
            model, plan = plan_pruning(model)
        groups = _free_groups(plan, spec.keep, model)
        if not groups:
            raise _nothing_to_prune(artifact, plan, spec)
        scores = _score(spec, model, plan, artifact, material, say)
        kept = _choose(spec, number, plan, groups, scores, before, original)
        model = prune_channels(model, plan, kept)
        say(_iteration_line(spec, number, groups, kept))
        if spec.epochs:
            reports.append(_train(spec, model, material, checkpoint, say))
    sizes = {
        group.name: (original[group.name], len(kept[group.name]) if group.name in kept else group.size)
        for group in plan.groups
        if group.name in original
    }
    reasons = {group.name: group.frozen for group in plan.frozen if group.frozen is not None}
    reasons |= {group.name: "asked to be kept" for group in plan.prunable if group not in groups}
    return _Pruned(model=model, sizes=sizes, frozen=reasons, reports=tuple(reports))


def _iteration_line(spec: Prune, number: int, groups: Sequence[Group], kept: Kept) -> str:
    left, total = sum(map(len, kept.values())), sum(group.size for group in groups)
    turn = f"iteration {number} of {spec.iterations}: " if spec.iterations > 1 else ""
    return f"{turn}{left} of {total} channels stay, in {len(groups)} groups"


def _score(
    spec: Prune, model: onnx.ModelProto, plan: Plan, artifact: Artifact, material: Material, say: Say
) -> Scores:
    if spec.importance == "magnitude":
        return score_by_magnitude(model, plan)
    return score_by_taylor(
        model, plan, artifact, _data(material), metric=material.metric, seed=spec.seed, say=say
    )


def _data(material: Material) -> Samples:
    data = material.training or material.calibration
    if data is None:
        raise SamplesError(
            "importance by Taylor terms needs samples",
            expected="training or calibration data",
            fix="give one of them, or prune with importance=magnitude",
        )
    return data


def _choose(
    spec: Prune,
    number: int,
    plan: Plan,
    groups: Sequence[Group],
    scores: Scores,
    before: Cost,
    original: Mapping[str, int],
) -> Kept:
    """What stays after this iteration: each takes an equal part of the way to the goal."""
    if spec.ratio is not None:
        step_ratio = spec.ratio / spec.iterations
        ratio = 1 - (1 - step_ratio * number) / (1 - step_ratio * (number - 1))
        return choose_ratio(groups, scores, ratio=ratio, round_to=spec.round_to)
    goal, share, whole = "flops", spec.flops, before.flops
    if share is None:
        goal, share, whole = "parameters", spec.parameters, before.parameters
    now = 1 - (1 - (share or 0.0)) * number / spec.iterations
    least = {group.name: least_left(original.get(group.name, group.size)) for group in groups}
    budget = Budget(goal=goal, limit=int(now * whole), whole=whole)
    if spec.importance == "taylor":
        scores = score_per_cost(plan, groups, scores, budget)
    return choose_budget(plan, groups, scores, budget, round_to=spec.round_to, least=least)


def _train(
    spec: Prune, model: onnx.ModelProto, material: Material, checkpoint: Path, say: Say
) -> Mapping[str, Json]:
    from tritonsmith.train.loop import train
    from tritonsmith.train.module import OnnxModule

    module = OnnxModule(model)
    report = train(module, material, spec, teacher=material.teacher, checkpoint=checkpoint, say=say)
    module.write_weights(model)
    return report.measured()


def _check_names(spec: Prune, model: onnx.ModelProto) -> None:
    known = [node_name(node) for node in model.graph.node]
    for name in spec.keep:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise CompressionError(
                f"no node is named {name!r}, so it cannot be kept",
                expected=", ".join(near) or "a name as Netron or onnx.load shows it",
            )


def _free_groups(plan: Plan, keep: Sequence[str], model: onnx.ModelProto) -> list[Group]:
    """The prunable groups that no node to keep gives channels of."""
    outputs = {node_name(node): list(node.output) for node in model.graph.node}
    kept: set[int] = set()
    for name in keep:
        for output in outputs.get(name, ()):
            for _, ids in plan.flow.get(output, ()):
                kept |= set(ids.tolist())
    return [group for group in plan.prunable if not kept & set(group.ids.tolist())]


def _say_frozen(plan: Plan, say: Say) -> None:
    count = len(plan.prunable)
    say(f"{count} groups of channels can be pruned, {len(plan.frozen)} cannot")
    for reason, times in Counter(group.frozen for group in plan.frozen).most_common():
        names = [group.name for group in plan.frozen if group.frozen == reason]
        say(f"stays whole: {', '.join(names[:3])}{' ...' if times > 3 else ''}: {reason}")


def _nothing_to_prune(artifact: Artifact, plan: Plan, spec: Prune) -> CompressionError:
    reasons = "; ".join(f"{group.name}: {group.frozen}" for group in plan.frozen[:5])
    return CompressionError(
        f"{artifact.path.name} has no channels that can be pruned",
        found=reasons or ("everything is kept" if spec.keep else "no convolution or product with weights"),
        fix="prune the source with prune-torch, or leave the step out",
    )


def _try_model(staged: Path, artifact: Artifact, model: onnx.ModelProto) -> None:
    """Check the file by ONNX's rules, and run it on ONNX Runtime where the model before it runs.

    Raises:
        CompressionError: it does not run, or gives other shapes than before.
    """
    onnx_model.check_file(staged)
    ranges = index_ranges(model, artifact.inputs)
    names = {axis for spec in artifact.inputs for axis in spec.shape if isinstance(axis, str)}
    before = open_session(artifact.path)
    try:
        after = open_session(staged)
        for batch, length in TRIED_SIZES:
            axes = {name: batch if name == BATCH_AXIS else length for name in names}
            inputs = draw_inputs(artifact.inputs, axes, ranges, frozenset(), seed=1)
            try:
                expected = before.run(inputs)
            except EngineError:
                continue  # not a size that the model takes
            found = after.run(inputs)
            for name, array in expected.items():
                _check_output(name, array.shape, found[name].shape)
    except EngineError as error:
        raise CompressionError(
            f"the pruned {artifact.path.name} does not run", found=error.found or error.what
        ) from error


def _check_output(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    if expected != found:
        raise CompressionError(
            f"pruning changed the shape of output {name!r}", found=list(found), expected=list(expected)
        )


def _measured(before: Cost, after: Cost, pruned: _Pruned) -> dict[str, Json]:
    return {
        "flops_before": before.flops,
        "flops_after": after.flops,
        "parameters_before": before.parameters,
        "parameters_after": after.parameters,
        "groups": {name: list(sizes) for name, sizes in pruned.sizes.items()},
        "frozen": dict(pruned.frozen),
        "training": list(pruned.reports),
    }
