"""What each layer loses when it alone is quantized: loss by layer, measured.

A layer is a node with its own arithmetic (Conv, MatMul, Add of two activations ...) together with what only
passes its values on (Relu, MaxPool, Reshape, a bias). It is quantized while all others stay in floating
point, and the outputs are compared with the FP32 model's on the same samples: the signal-to-noise ratio in
decibels, and the metric's drop where there is one. Where a graph has very many layers, groups of neighbours
are measured first, and then the layers of the groups that lose most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith import drawing, onnx_model
from tritonsmith.artifact import Json
from tritonsmith.compress.graph import constants_of
from tritonsmith.engines import open_session
from tritonsmith.gate import predict
from tritonsmith.metrics import Metric, score
from tritonsmith.samples import Samples

Say = Callable[[str], None]
# Writes the model to a path, with these nodes in floating point and all others quantized.
Write = Callable[[frozenset[str], Path], object]
Outputs = Mapping[str, NDArray[Any]]

# They compute nothing that rounding could hurt beside what their input has lost already.
PASSING_OPS = frozenset(
    {"Clip", "Flatten", "LeakyRelu", "MaxPool", "Pad", "Relu", "Reshape", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
WITH_CONSTANT = frozenset({"Add", "Mul"})  # a bias or a scale belongs to the layer before it
MOST_RUNS = 32  # of the model in a measurement; ResNet-50 has 70 layers, MiniLM 40
MOST_SAMPLES, FEWEST_SAMPLES = 512, 32
SAMPLE_BYTES = 1 << 25  # inputs of one measurement; bounds its time
BATCH_SIZE = 16
ROW_COLUMNS = ("layer", "op", "alone, dB", "drop", "weights", "stays")
MOST_BARS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is quantized or kept together: `node` and the `followers` that pass its values on."""

    node: str
    op: str
    followers: tuple[str, ...]
    bytes: int  # of its weights in FP32

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset({self.node, *self.followers})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSensitivity:
    """What the model loses when this layer alone is quantized."""

    node: str
    op: str
    sqnr_db: float | None  # of the worst output; infinite where nothing changed, None: not measured
    drop: float | None  # of the metric, positive is worse; None: no metric, or not measured
    bytes: int
    kept: bool = False  # in floating point in the model that was chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Layers from the most fragile on; those that were not measured come last."""

    layers: tuple[LayerSensitivity, ...]
    samples: int
    metric: str | None

    def json(self) -> dict[str, Json]:
        return {
            "samples": self.samples,
            "metric": self.metric,
            "layers": [
                {
                    "node": layer.node,
                    "op": layer.op,
                    "sqnr_db": _finite(layer.sqnr_db),
                    "drop": _finite(layer.drop),
                    "bytes": layer.bytes,
                    "kept": layer.kept,
                }
                for layer in self.layers
            ],
        }

    def keeping(self, kept: frozenset[str]) -> Sensitivity:
        """The same, with the layers of these nodes marked."""
        marked = tuple(replace(layer, kept=layer.node in kept) for layer in self.layers)
        return replace(self, layers=marked)


def sensitivity_from_json(record: Mapping[str, Any]) -> Sensitivity:
    """What `Sensitivity.json` wrote; an infinite ratio comes back as one that was not measured."""
    layers = tuple(LayerSensitivity(**layer) for layer in record["layers"])
    return Sensitivity(layers=layers, samples=record["samples"], metric=record["metric"])


def find_layers(prepared: Path, kinds: Sequence[str], spared: frozenset[str] = frozenset()) -> list[Layer]:
    """The layers among nodes of these `kinds`, in the order of the graph; `spared` nodes are none.

    What passes on an input of the graph belongs to the layer that reads it.
    """
    graph = onnx_model.load_model(prepared, with_weights=False).graph
    constants = constants_of(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    owners: dict[str, str] = {}  # tensor -> the layer whose values it carries
    followers: dict[str, list[str]] = {}
    orphans: dict[str, list[str]] = {}  # tensor -> nodes that passed an input on to it
    found: list[tuple[onnx.NodeProto, int]] = []
    for node in graph.node:
        if node.op_type not in kinds or node.name in spared or set(node.output) <= constants:
            continue
        data = next((name for name in node.input if name and name not in constants), "")
        passing = node.op_type in PASSING_OPS
        if passing or (node.op_type in WITH_CONSTANT and constants & set(node.input) and data in owners):
            if data in owners:
                followers[owners[data]].append(node.name)
                owners.update(dict.fromkeys(node.output, owners[data]))
            else:
                orphans.update((name, [*orphans.get(data, []), node.name]) for name in node.output)
            continue
        before = [name for tensor in node.input for name in orphans.pop(tensor, [])]
        followers[node.name] = before
        owners.update(dict.fromkeys(node.output, node.name))
        found.append((node, sum(_bytes(weights[name]) for name in node.input if name in weights)))
    return [
        Layer(node=node.name, op=node.op_type, followers=tuple(followers[node.name]), bytes=size)
        for node, size in found
    ]


def measure_sensitivity(
    write: Write,
    layers: Sequence[Layer],
    reference: Path,
    samples: Samples,
    folder: Path,
    *,
    batched: bool,
    engine: str = "onnxruntime",
    metric: Metric | None = None,
    most_runs: int = MOST_RUNS,
    say: Say = lambda _: None,
) -> Sensitivity:
    """Quantize each layer alone, and measure what the outputs lose against those of `reference`.

    `write` must quantize with the same ranges each time; `folder` is for the models that it writes.
    Of more than `most_runs` layers, those of the most fragile groups are measured one by one.
    """
    few = some_of(samples, sample_count(samples))
    expected = predict_with(reference, few, batched=batched, engine=engine)
    everything = frozenset(name for layer in layers for name in layer.nodes)

    def outputs_of(quantized: Sequence[Layer]) -> Outputs:
        path = folder / "alone.onnx"
        write(everything - {name for layer in quantized for name in layer.nodes}, path)
        return predict_with(path, few, batched=batched, engine=engine)

    ordered, runs = list(layers), most_runs
    if len(layers) > most_runs:
        size = math.isqrt(len(layers) - 1) + 1
        groups = [ordered[start : start + size] for start in range(0, len(layers), size)]
        say(f"{len(layers)} layers: looking for the {len(groups)} groups that lose most")
        groups.sort(key=lambda group: sqnr_db(expected, outputs_of(group)))
        ordered = [layer for group in groups for layer in group]
        runs = max(1, most_runs - len(groups))
    measured: list[tuple[float, LayerSensitivity]] = []
    began_s, count = time.perf_counter(), min(len(ordered), runs)
    for index, layer in enumerate(ordered[:runs], 1):
        found = outputs_of([layer])
        ratio = sqnr_db(expected, found)
        drop = None if metric is None else drop_of(metric, expected, found, few)
        left_s = (time.perf_counter() - began_s) / index * (count - index)
        say(f"sensitivity {index} of {count}: {layer.node} alone {ratio:.1f} dB, {left_s:.0f} s left")
        measured.append((ratio, _record(layer, ratio, drop)))
    measured.sort(key=lambda pair: pair[0])
    rest = [_record(layer, None, None) for layer in ordered[runs:]]
    return Sensitivity(
        layers=(*(record for _, record in measured), *rest),
        samples=few.count,
        metric=None if metric is None else metric.text,
    )


def sqnr_db(expected: Outputs, found: Outputs) -> float:
    """Signal over quantization noise, 10 log10(sum x^2 / sum (x - y)^2), of the worst output of numbers.

    Infinite where nothing differs, minus infinity where something is not finite.
    """
    ratios = [math.inf]
    for name, array in expected.items():
        if array.dtype.kind != "f":
            continue
        signal = array.astype(np.float64)
        noise = np.square(found[name].astype(np.float64) - signal).sum()
        if not np.isfinite(noise):
            return -math.inf
        if noise > 0:
            power = np.square(signal).sum()
            ratios.append(float(10 * np.log10(power / noise)) if power > 0 else -math.inf)
    return min(ratios)


def drop_of(metric: Metric, baseline: Outputs, candidate: Outputs, samples: Samples) -> float:
    """How much worse the candidate is on the metric; infinite where its outputs are not finite."""
    broken = any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in candidate.values())
    if broken:
        return math.inf
    before, after = (
        score(metric, outputs, target=samples.target, reference=baseline).value()
        for outputs in (baseline, candidate)
    )
    drop = float(metric.drop(np.float64(before), np.float64(after)))
    return drop if math.isfinite(drop) else math.inf


def predict_with(path: Path, samples: Samples, *, batched: bool, engine: str) -> Outputs:
    """Outputs by name of the model at `path`, `[N, ...]`."""
    session = open_session(path, engine=engine if engine == "openvino" else "onnxruntime")
    return predict(session, samples, batched=batched, batch_size=BATCH_SIZE)


def sample_count(samples: Samples) -> int:
    """How many samples a measurement takes: more of small ones."""
    row_bytes = sum(array[:1].nbytes for array in samples.arrays.values())
    return int(np.clip(SAMPLE_BYTES // max(1, row_bytes), FEWEST_SAMPLES, MOST_SAMPLES))


def some_of(samples: Samples, count: int) -> Samples:
    """At most `count` samples, evenly spread, so that sorted data are seen whole."""
    if samples.count <= count:
        return samples
    rows = np.linspace(0, samples.count - 1, count).astype(int)
    arrays = {name: array[rows] for name, array in samples.arrays.items()}
    return replace(samples, arrays=arrays, target=None if samples.target is None else samples.target[rows])


def sensitivity_rows(sensitivity: Sensitivity) -> list[tuple[str, ...]]:
    """A row of text for each layer, under `ROW_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for layer in sensitivity.layers:
        ratio = "not measured" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
        drop = "-" if layer.drop is None else f"{layer.drop:+.4f}"
        rows.append(
            (layer.node, layer.op, ratio, drop, str(layer.bytes), "floating point" if layer.kept else "INT8")
        )
    return rows


def plot_sensitivity(sensitivity: Sensitivity, *, title: str = "Sensitivity by layer") -> str:
    """A bar for each of the most fragile layers, as SVG text.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    shown = [(layer, ratio) for layer in sensitivity.layers if (ratio := _finite(layer.sqnr_db)) is not None]
    shown = shown[:MOST_BARS]
    figure, axes = drawing.figure(title, "signal to noise at the outputs, this layer alone in INT8 (dB)", "")
    figure.set_size_inches(drawing.SIZE_INCHES[0], 1.4 + 0.2 * max(4, len(shown)))
    for kept, colour, label in (
        (True, drawing.COLOURS[2], "stays in floating point"),
        (False, drawing.COLOURS[4], "INT8"),
    ):
        bars = [(place, ratio) for place, (layer, ratio) in enumerate(shown) if layer.kept == kept]
        axes.barh([place for place, _ in bars], [ratio for _, ratio in bars], color=colour, label=label)
    axes.set_yticks(range(len(shown)), [f"{layer.node} ({layer.op})" for layer, _ in shown], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=drawing.GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)
    return drawing.svg_of(figure)


def _record(layer: Layer, ratio: float | None, drop: float | None) -> LayerSensitivity:
    return LayerSensitivity(node=layer.node, op=layer.op, sqnr_db=ratio, drop=drop, bytes=layer.bytes)


def _bytes(tensor: onnx.TensorProto) -> int:
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * width if tensor.data_type == onnx.TensorProto.FLOAT else 0


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
