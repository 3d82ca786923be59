"""What a search may try on a model: read from its graph and from the data at hand.

The order is that of cost: narrower numbers first (seconds), then fewer channels or blocks with training
(minutes), each finished by the narrowings that did best on the whole model.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.graph import is_transformer
from tritonsmith.compress.steps import Distill, Prune, StepSpec

STEPS_OF_TRAINING = 800  # that one fine-tuning should have at least
FEWEST_EPOCHS, MOST_EPOCHS = 2, 40
BATCH_SIZE = 64
MILD = 2  # levels down without training: 71 % is left
DEEPEST = 28  # levels: 1/128 is left
QUARTER, HALF = 2**0.25, 2**0.5
ROWS_MULTIPLE = 64

Chain = tuple[StepSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What decides which steps make sense."""

    transformer: bool
    convolved: float  # shares of the weights, by what reads them
    multiplied: float
    embedded: float
    table_rows: int  # of the largest embedding table; 0: none
    used_rows: int  # different numbers in the calibration data's integer inputs
    trained_on: str  # "training", "calibration" (its inputs, without labels), or "" for nothing
    untrained: str  # the reason why nothing can be trained; "" where something can
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Chains that shrink a model more and more: at level k the share `step ** -k` is left."""

    name: str
    axis: str  # "parameters", "flops", "depth"
    step: float
    deepest: int
    epochs: int
    chain: Callable[[float], Chain]
    patient: Callable[[float], Chain] | None  # the same with more patience, where the first one just fails

    def share(self, level: int) -> float:
        return float(f"{self.step**-level:.3g}")

    def level_for(self, share: float) -> int:
        """The first level that leaves at most this share."""
        return max(1, math.ceil(-math.log(share) / math.log(self.step) - 1e-6))


def facts_of(teacher: Artifact, material: Material, *, epochs: int | None) -> Facts:
    graph = onnx_model.load_model(teacher.path, with_weights=False).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    total = max(1, sum(sizes.values()))
    counts = dict.fromkeys(("Conv", "MatMul", "Gather"), 0)
    kinds = {"ConvTranspose": "Conv", "Gemm": "MatMul", "LSTM": "MatMul", "GRU": "MatMul"}
    for node in graph.node:
        kind = kinds.get(node.op_type, node.op_type)
        if kind in counts:
            counts[kind] += sum(sizes.pop(name, 0) for name in node.input)
    role, reason = _trained_on(material)
    return Facts(
        transformer=is_transformer(graph),
        convolved=counts["Conv"] / total,
        multiplied=counts["MatMul"] / total,
        embedded=counts["Gather"] / total,
        table_rows=_table_rows(graph),
        used_rows=_used_rows(material),
        trained_on=role,
        untrained=reason,
        epochs=epochs or _epochs_for(material, role),
    )


def families_of(facts: Facts, *, sized: bool, paced: bool) -> list[Family]:
    """Ways to make the model smaller itself; `sized` and `paced`: size and speed are bounded.

    Pruning by parameters serves the size, pruning by FLOPs the speed.
    """
    axes = ["flops"] if paced and not sized else ["parameters", "flops"] if paced else ["parameters"]
    families = [_pruning(axis, facts) for axis in axes]
    if facts.transformer and facts.trained_on:
        families.append(
            Family(
                name="fewer blocks",
                axis="depth",
                step=HALF,
                deepest=4,
                epochs=facts.epochs,
                chain=lambda share: (Distill(depth=share, epochs=facts.epochs, hidden=1.0),),
                patient=lambda share: (Distill(depth=share, epochs=3 * facts.epochs, hidden=1.0),),
            )
        )
    return families


def _pruning(axis: str, facts: Facts) -> Family:
    epochs = facts.epochs if facts.trained_on else 0

    def prune(share: float, *, iterations: int = 1) -> Prune:
        flops, parameters = (share, None) if axis == "flops" else (None, share)
        return Prune(flops=flops, parameters=parameters, epochs=epochs, iterations=iterations)

    def patient(share: float) -> Chain:
        return (prune(share, iterations=3), Distill(epochs=2 * epochs))

    return Family(
        name=f"pruned by {axis}",
        axis=axis,
        step=QUARTER,
        deepest=DEEPEST if epochs else MILD,
        epochs=epochs,
        chain=lambda share: (prune(share),),
        patient=patient if epochs else None,
    )


def _trained_on(material: Material) -> tuple[str, str]:
    if importlib.util.find_spec("torch") is None:
        return "", "PyTorch is not installed (the extra tritonsmith[train])"
    if material.training is not None:
        return "training", ""
    if material.calibration is not None:
        return "calibration", ""
    return "", "there is neither training nor calibration data"


def _epochs_for(material: Material, role: str) -> int:
    samples = material.training if role == "training" else material.calibration
    if not role or samples is None:
        return 0
    steps = math.ceil(samples.count / BATCH_SIZE)
    return int(np.clip(math.ceil(STEPS_OF_TRAINING / steps), FEWEST_EPOCHS, MOST_EPOCHS))


def _table_rows(graph: onnx.GraphProto) -> int:
    tables = {tensor.name: tensor.dims for tensor in graph.initializer if len(tensor.dims) == 2}
    rows = [tables[node.input[0]][0] for node in graph.node
            if node.op_type == "Gather" and node.input[0] in tables]  # fmt: skip
    return max(rows, default=0)


def _used_rows(material: Material) -> int:
    if material.calibration is None:
        return 0
    used = [
        len(np.unique(array)) for array in material.calibration.arrays.values() if array.dtype.kind in "iu"
    ]
    return max(used, default=0)
