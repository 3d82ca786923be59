"""Structured pruning of a PyTorch module before it is exported, with training in between.

The module comes from the source itself, so its BatchNorm is still there and adapts while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step
from tritonsmith.compress.cost import cost_of
from tritonsmith.compress.shapes import DEFAULT_LENGTH
from tritonsmith.compress.steps import PruneTorch
from tritonsmith.errors import CompressionError, MissingExtraError
from tritonsmith.files import staging_folder, write_text_atomically
from tritonsmith.ingest.detect import detect_kind
from tritonsmith.ingest.finish import finish
from tritonsmith.ingest.torch_module import TorchModule, export_loaded, load_module

if TYPE_CHECKING:
    from tritonsmith.compress.chain import Material
    from tritonsmith.compress.pruning.torch_cut import Cut

Say = Callable[[str], None]
TARGETS = ("flops", "parameters", "ratio")
TOOLS = ("torch", "torch-pruning", "onnxscript", "onnx", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The module before any pruning."""

    flops: int
    parameters: int
    channels: Mapping[str, int]  # layer -> output channels


def apply_prune_torch(
    spec: PruneTorch,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Say = lambda _: None,
) -> Artifact:
    """Prune the module of `material.source`, train it where `spec` says so, and export it to `out`.

    What was planned and trained before a kill is read from `checkpoint`.

    Raises:
        CompressionError: the source has no PyTorch module, a layer would be emptied, or the target
            cannot be reached.
        MissingExtraError: torch-pruning is not installed.
        SamplesError: data that are needed are missing.
    """
    _check_spec(spec)
    source = _check_source(artifact, material)
    try:
        from tritonsmith.compress.pruning import torch_cut
    except ImportError as error:
        raise MissingExtraError(
            "prune-torch needs torch-pruning", package=error.name or "torch_pruning", extra="train"
        ) from error

    work = step.begin("prune-torch", {key: value for key, value in asdict(spec).items() if value is not None})
    loaded = load_module(source, material.convert)
    start = Start(
        flops=torch_cut.flops_of_module(loaded),
        parameters=torch_cut.parameters_of_module(loaded),
        channels=torch_cut.channels_of_module(loaded),
    )
    alone: tuple[str, ...] = ()
    training: list[Json] = []
    for number in range(1, spec.iterations + 1):
        say(f"pruning, round {number} of {spec.iterations}")
        folder = checkpoint / f"round-{number}"
        plan, left_alone = _kept_plan(spec, loaded, material, folder, number / spec.iterations, start)
        alone = alone or left_alone  # later rounds add groups that are small by now
        torch_cut.cut(loaded, plan)
        if spec.epochs:
            training.append(_train(spec, loaded, artifact, material, folder, say))
    with staging_folder(out) as folder:
        staged = folder / "pruned" / out.name
        converted = finish(export_loaded(loaded, folder), staged, material.convert, say=say)
        costs = _costs(artifact.path, staged, longest=loaded.options.get("longest_sequence"))
        say(_summary(costs, alone))
        measured: dict[str, Json] = {
            **costs,
            "channels": _sizes(start, torch_cut.channels_of_module(loaded)),
            "left_alone": alone,
            "training": training,
            "parity": converted.steps[0].measured["parity"],
        }
        return step.finish(work, artifact, staged, out, precision="fp32", measured=measured, tools=TOOLS)


def _check_spec(spec: PruneTorch) -> None:
    asked = [name for name in TARGETS if getattr(spec, name) is not None]
    if len(asked) != 1:
        raise CompressionError(
            "prune-torch does not know how much to remove",
            found=" and ".join(asked) or "none of them",
            expected=f"exactly one of {', '.join(TARGETS)}",
        )
    share = getattr(spec, asked[0])
    if not 0 < share < 1:
        found = f"{asked[0]}={share:g}"
        raise CompressionError("prune-torch needs a share", found=found, expected="more than 0, less than 1")
    if spec.importance not in ("magnitude", "taylor"):
        raise CompressionError(f"no importance is named {spec.importance!r}", expected="magnitude or taylor")
    if min(spec.iterations, spec.round_to) < 1:
        found = f"iterations={spec.iterations}, round_to={spec.round_to}"
        raise CompressionError("prune-torch needs counts", found=found, expected="1 or more of each")
    if spec.hidden:
        raise CompressionError(
            "prune-torch cannot compare hidden states: the module has no tensors of the teacher's names",
            fix="leave out `hidden`, or use prune, which works on the ONNX graph",
        )


def _check_source(artifact: Artifact, material: Material) -> str:
    """The source, where it has a module and the artifact is what was made of it."""
    kind = None if material.source is None else detect_kind(material.source)
    if material.source is None or kind not in ("torch-factory", "huggingface"):
        found = {None: "no source", "torch": "a .pt2 file, which holds a program and no module"}
        raise CompressionError(
            "prune-torch needs the PyTorch module itself",
            found=found.get(kind, f"a source of kind {kind}"),
            expected="package.module:factory, or a Hugging Face folder",
            fix="use prune, which works on the ONNX graph of any source",
        )
    if onnx_model.model_sha256(artifact.path) != onnx_model.model_sha256(material.teacher.path):
        raise CompressionError(
            "prune-torch must be the first step: it works on the PyTorch module itself",
            found=f"a model after {artifact.steps[-1].name}" if artifact.steps else "another model",
            fix="put it first, or use prune, which works on the ONNX graph",
        )
    return material.source


def _kept_plan(
    spec: PruneTorch, loaded: TorchModule, material: Material, folder: Path, part: float, start: Start
) -> tuple[tuple[Cut, ...], tuple[str, ...]]:
    """What a round cuts, made once: importance would differ after a training that was cut short."""
    from tritonsmith.compress.pruning.torch_cut import Cut

    file = folder / "plan.json"
    if not file.exists():
        plan, alone = _plan(spec, loaded, material, part, start)
        text = json.dumps({"cuts": [asdict(item) for item in plan], "left_alone": alone})
        write_text_atomically(file, text)
    kept = json.loads(file.read_text(encoding="utf-8"))
    cuts = (Cut(layer=c["layer"], channels=tuple(c["channels"]), heads=c["heads"]) for c in kept["cuts"])
    return tuple(cuts), tuple(kept["left_alone"])


def _plan(
    spec: PruneTorch, loaded: TorchModule, material: Material, part: float, start: Start
) -> tuple[tuple[Cut, ...], tuple[str, ...]]:
    """The cuts of one round: what is left falls by the same factor in each."""
    from tritonsmith.compress.pruning.torch_cut import flops_of_module, parameters_of_module
    from tritonsmith.compress.pruning.torch_groups import find_groups
    from tritonsmith.compress.pruning.torch_named import gradients
    from tritonsmith.compress.pruning.torch_plan import plan_ratio, plan_target

    taylor = spec.importance == "taylor"
    groups, alone = find_groups(
        loaded,
        gradients=gradients(loaded, material, seed=spec.seed) if taylor else None,
        round_to=spec.round_to,
        keep=spec.keep,
    )
    loaded.module.zero_grad(set_to_none=True)
    if not groups:
        found = "; ".join(alone[:5]) or "no layer of channels"
        raise CompressionError(f"nothing of {loaded.source} can be pruned", found=found)
    if spec.ratio is not None:
        return plan_ratio(groups, spec.ratio, part=part, channels=start.channels), alone
    if spec.flops is not None:
        most = start.flops * spec.flops**part
        return plan_target(loaded, groups, flops_of_module, most), alone
    most = start.parameters * (spec.parameters or 1.0) ** part
    return plan_target(loaded, groups, parameters_of_module, most), alone


def _train(
    spec: PruneTorch, loaded: TorchModule, artifact: Artifact, material: Material, folder: Path, say: Say
) -> Json:
    """Train the module in place, or load what was trained before; what the training reports."""
    import torch

    from tritonsmith.compress.pruning.torch_named import ByName
    from tritonsmith.train.loop import train

    weights, report = folder / "weights.pt", folder / "training.json"
    if not report.exists():
        module = ByName(loaded, outputs=[output.name for output in artifact.outputs])
        done = train(
            module, material, spec, teacher=material.teacher, checkpoint=folder / "training", say=say
        )
        unfinished = weights.with_suffix(".unfinished")
        torch.save(loaded.module.state_dict(), unfinished)
        unfinished.replace(weights)
        write_text_atomically(report, json.dumps(asdict(done)))
    loaded.module.load_state_dict(torch.load(weights, weights_only=True))
    loaded.module.eval()
    trained: Json = json.loads(report.read_text(encoding="utf-8"))
    return trained


def _costs(before: Path, after: Path, *, longest: Json) -> dict[str, int]:
    length = min(DEFAULT_LENGTH, longest) if isinstance(longest, int) else DEFAULT_LENGTH
    old, new = cost_of(before, default_length=length), cost_of(after, default_length=length)
    return {
        "parameters_before": old.parameters,
        "parameters_after": new.parameters,
        "flops_before": old.flops,
        "flops_after": new.flops,
    }


def _sizes(start: Start, after: Mapping[str, int]) -> dict[str, Json]:
    """Channels before and after, of the layers that have fewer."""
    return {layer: [size, after[layer]] for layer, size in start.channels.items() if after[layer] != size}


def _summary(costs: Mapping[str, int], alone: Sequence[str]) -> str:
    line = f"{costs['flops_before'] / max(1, costs['flops_after']):.2f} times fewer FLOPs"
    return f"{line}; left alone: {'; '.join(alone)}" if alone else line
