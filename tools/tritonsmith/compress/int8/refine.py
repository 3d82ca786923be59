"""Between calibration and writing: fine-tuning, and the choice of what stays in floating point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Json
from tritonsmith.compress import steps
from tritonsmith.compress.chain import Material
from tritonsmith.compress.int8.mixed import Budget, Mixed, choose_mixed
from tritonsmith.compress.int8.qat import finetune_quantized
from tritonsmith.compress.int8.sensitivity import find_layers
from tritonsmith.compress.int8.static import Calibrated, write_static

Say = Callable[[str], None]


def refine_static(
    calibrated: Calibrated,
    folder: Path,
    *,
    spec: steps.Quantize,
    material: Material,
    budget: Budget | None,
    checkpoint: Path,
    say: Say = lambda _: None,
) -> tuple[Calibrated, dict[str, Json]]:
    """Fine-tune where `spec` has epochs, then choose layers where there is a budget; with what was measured.

    Weights that learned to be rounded may do worse in floating point than before. So where no choice of
    layers keeps the budget after fine-tuning, one is made without it as well, and the better is taken.

    Raises:
        CompressionError: a graph that cannot be trained, or without a layer to quantize.
        SamplesError: no data to train on.
    """
    measured: dict[str, Json] = {}
    graphs = [calibrated]
    if spec.epochs:
        tuned, report = _finetuned(calibrated, folder, spec, material, checkpoint=checkpoint, say=say)
        measured["finetuning"] = {**report, "used": True}
        graphs = [tuned, calibrated]
    if budget is None:
        return graphs[0], measured
    found = _mixed(graphs[0], folder, budget, say)
    best = 0
    if spec.epochs and not found.passed:
        say("the budget does not hold with fine-tuning; choosing layers without it")
        without = _mixed(graphs[1], folder, budget, say)
        if without.passed or without.drop < found.drop:
            found, best = without, 1
            measured["finetuning"] = {**report, "used": False}
    measured["mixed"] = found.measured()
    return replace(graphs[best], spared=graphs[best].spared | found.nodes), measured


def _mixed(calibrated: Calibrated, folder: Path, budget: Budget, say: Say) -> Mixed:
    def write(keep: frozenset[str], path: Path) -> None:
        write_static(calibrated, path, keep=keep)

    layers = find_layers(calibrated.prepared, calibrated.kinds, calibrated.spared)
    return choose_mixed(write, layers, calibrated.prepared, folder, budget=budget, say=say)


def _finetuned(
    calibrated: Calibrated,
    folder: Path,
    spec: steps.Quantize,
    material: Material,
    *,
    checkpoint: Path,
    say: Say,
) -> tuple[Calibrated, dict[str, Json]]:
    quantized = folder / "untrained.onnx"
    write_static(calibrated, quantized)
    tuned = finetune_quantized(
        spec,
        material,
        calibrated.prepared,
        quantized,
        calibrated.ranges,
        checkpoint=checkpoint,
        say=say,
    )
    path = calibrated.prepared.with_name("finetuned.onnx")
    onnx_model.save_model(tuned.model, path)
    return replace(calibrated, prepared=path, ranges=tuned.ranges), tuned.report.measured()
