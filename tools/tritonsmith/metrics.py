"""What the gate measures: a score for each sample, and how scores add up to one number.

`METRIC` or `METRIC@OUTPUT`, where METRIC is one of

    accuracy       share of samples whose most likely class is the label
    top5           share of samples whose label is among the five most likely classes
    f1             mean over the classes of the F1 score (macro), for classes that occur
    mae, mse       mean absolute and squared error against `target`
    cosine         mean cosine between the outputs and those of the FP32 model; needs no labels
    recall10       share of a sample's ten nearest among the others, by cosine, that are the FP32 model's ten
                   nearest too: for embeddings [N, D], more than ten of them; needs no labels
    max-abs-error  the largest difference from the outputs of the FP32 model; needs no labels
    package.module:function   function(outputs by name, target) -> one score per sample, or one number;
                              higher is better unless the function has `higher_is_better = False`

Which output is scored: the one named after `@`; else the only one; else the only one whose shape fits the
labels. `cosine`, `recall10` and `max-abs-error` take all outputs of numbers, and the worst of them for each
sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.user_code import import_user_module

Array = NDArray[Any]
Outputs = Mapping[str, Array]  # each [N, ...]

CLASSIFICATION = ("accuracy", "top5", "f1")
REGRESSION = ("mae", "mse")
FIDELITY = ("cosine", "recall10", "max-abs-error")
METRICS = (*CLASSIFICATION, *REGRESSION, *FIDELITY)
LOWER_IS_BETTER = ("mae", "mse", "max-abs-error")
SHARES = ("accuracy", "top5", "f1", "cosine", "recall10")  # 1 is perfect
TOP = 5
NEIGHBOURS = 10
QUERIES = 1024  # similarities of this many samples at a time are held in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A parsed `METRIC[@OUTPUT]`; `function` is the user's own, already imported."""

    text: str
    name: str
    output: str | None
    function: Callable[[Outputs, Array | None], Any] | None
    higher_is_better: bool

    @property
    def needs_target(self) -> bool:
        return self.name not in FIDELITY and self.function is None

    def drop(self, baseline: Array, candidate: Array) -> Array:
        """How much worse the candidate is: positive is worse, whatever the direction of the metric."""
        return baseline - candidate if self.higher_is_better else candidate - baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A metric's parts for each sample, and how they add up.

    `rows` is `[N, K]`; `total` takes rows `[U, K]` and counts `[R, U]` (how often each row occurs in each
    of R samples) to values `[R]`. A function that gives one number has no rows: `scalar`.
    """

    rows: Array
    total: Callable[[Array, Array], Array]
    scalar: float | None = None
    classes: Array | None = None  # [N] the true class, and `hits` [N] whether it was found
    hits: Array | None = None

    def value(self) -> float:
        if self.scalar is not None:
            return self.scalar
        return float(self.total(self.rows, np.ones((1, len(self.rows))))[0])


def parse_metric(text: str) -> Metric:
    """Read `METRIC[@OUTPUT]`; a `package.module:function` is imported.

    Raises:
        UsageError: no such metric, module or function.
    """
    name, _, output = text.partition("@")
    function = _import_function(name) if metric_module(text) is not None else None
    if function is None and name not in METRICS:
        raise UsageError(
            f"no metric is named {name!r}", expected=f"{', '.join(METRICS)} or package.module:function"
        )
    higher = name not in LOWER_IS_BETTER
    if function is not None:
        higher = bool(getattr(function, "higher_is_better", True))
    return Metric(text=text, name=name, output=output or None, function=function, higher_is_better=higher)


def metric_module(text: str) -> str | None:
    """The Python module that a metric's text names; an output's name may hold a colon, too."""
    module, colon, _ = text.partition("@")[0].partition(":")
    return module if colon else None


def score(metric: Metric, outputs: Outputs, *, target: Array | None, reference: Outputs) -> Scores:
    """Scores of `outputs`; `reference` holds the FP32 model's outputs for the same samples.

    Raises:
        SamplesError: labels that are missing or do not fit the scored output.
        UsageError: an output that does not exist, or several that fit, or a function that fails.
    """
    if metric.function is not None:
        return _score_function(metric, outputs, target)
    if metric.name in FIDELITY:
        return _score_fidelity(metric, outputs, reference)
    if target is None:
        raise SamplesError(f"the metric {metric.name} needs labels", expected="an array named 'target'")
    name = scored_output(metric, reference, target)
    if metric.name in REGRESSION:
        return _score_regression(metric.name, name, outputs[name], target)
    labels = class_labels(name, reference[name], target)
    if metric.name == "top5":
        hits = _top_hits(name, outputs[name], labels)
        return Scores(rows=hits[:, None], total=mean_of, classes=labels, hits=hits)
    predicted = predicted_classes(outputs[name], reference[name])
    hits = (predicted == labels).reshape(len(labels), -1).mean(axis=1)
    flat = labels if labels.ndim == 1 else None
    if metric.name == "accuracy":
        return Scores(rows=hits[:, None], total=mean_of, classes=flat, hits=hits)
    if labels.ndim != 1:
        raise SamplesError(
            "f1 takes one label per sample", found=f"labels of shape {list(target.shape)}", expected="[N]"
        )
    return Scores(rows=_coded(labels, predicted), total=macro_f1_of, classes=labels, hits=hits)


def mean_of(rows: Array, counts: Array) -> Array:
    means: Array = counts @ rows[:, 0] / counts.sum(axis=1)
    return means


def largest_of(rows: Array, counts: Array) -> Array:
    largest: Array = np.where(counts > 0, rows[:, 0], -np.inf).max(axis=1)
    return largest


def macro_f1_of(rows: Array, counts: Array) -> Array:
    """Rows hold (true class, predicted class) as numbers; a class that occurs in neither counts not."""
    true, predicted = rows[:, 0], rows[:, 1]
    classes = np.unique(rows[:, :2])
    total = np.zeros(len(counts))
    present = np.zeros(len(counts))
    for label in classes:
        is_true, is_predicted = true == label, predicted == label
        hits = counts[:, is_true & is_predicted].sum(axis=1)
        both = counts[:, is_true].sum(axis=1) + counts[:, is_predicted].sum(axis=1)
        total += np.divide(2 * hits, both, out=np.zeros(len(counts)), where=both > 0)
        present += both > 0
    return total / np.maximum(present, 1)


def scored_output(metric: Metric, outputs: Outputs, target: Array) -> str:
    """The output to score: the named, the only one, or the only one that fits the labels."""
    if metric.output is not None:
        if metric.output not in outputs:
            raise UsageError(f"the model has no output {metric.output!r}", expected=sorted(outputs))
        return metric.output
    if len(outputs) == 1:
        return next(iter(outputs))
    regression = metric.name in REGRESSION
    fitting = [
        name
        for name, array in outputs.items()
        if (_values_fit(array, target) if regression else _labels_fit(array, target))
    ]
    if len(fitting) != 1:
        raise UsageError(
            f"which output does {metric.name} score? The model has {len(outputs)}, and "
            f"{len(fitting)} of them fit labels of shape {list(target.shape)}",
            found=", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items()),
            fix=f"name it: --metric {metric.name}@{sorted(outputs)[0]}",
        )
    return fitting[0]


def class_labels(name: str, output: Array, target: Array) -> Array:
    """Labels `[N]` (or `[N, T]` for an output `[N, T, C]`) from class numbers or one-hot rows."""
    if not _labels_fit(output, target):
        raise SamplesError(
            f"the labels do not fit output {name!r}",
            found=f"'target' {target.dtype} of shape {list(target.shape)}",
            expected=_expected_labels(output),
        )
    if target.dtype.kind in "SU" or output.dtype == object:
        texts = target.reshape(_label_shape(output))
        return np.char.encode(texts, "utf-8") if texts.dtype.kind == "U" else texts.astype(bytes)
    if _is_one_hot(output, target):
        return np.asarray(target.argmax(axis=-1))
    labels = target.reshape(_label_shape(output))
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.floor(labels)):
        raise SamplesError("the labels are not classes", found="fractions", expected=_expected_labels(output))
    labels = labels.astype(np.int64)
    classes = _class_count(output)
    if classes and (labels.min() < 0 or labels.max() >= classes):
        raise SamplesError(
            f"a label is no class of output {name!r}",
            found=f"labels from {labels.min()} to {labels.max()}",
            expected=f"0 to {classes - 1}",
        )
    return labels


def predicted_classes(output: Array, reference: Array) -> Array:
    """The most likely class; one number per sample is a threshold (0.5 for probabilities, 0 for logits)."""
    if output.dtype == object:
        return output.reshape(_label_shape(output)).astype(bytes)
    if output.dtype.kind in "iub":
        return output.reshape(_label_shape(output)).astype(np.int64)
    if _class_count(output) > 2 or output.shape[-1:] == (2,):
        return np.asarray(output.argmax(axis=-1))
    probabilities = bool(reference.min() >= 0 and reference.max() <= 1)
    return (output.reshape(_label_shape(output)) >= (0.5 if probabilities else 0.0)).astype(np.int64)


def _labels_fit(output: Array, target: Array) -> bool:
    if output.ndim == 0 or (target.dtype.kind in "SU") != (output.dtype == object):
        return False
    if _is_one_hot(output, target):
        return True
    shape = _label_shape(output)
    return target.dtype.kind in "iubfSU" and target.shape in (shape, (*shape, 1))


def _values_fit(output: Array, target: Array) -> bool:
    numbers = output.dtype.kind in "fiub" and target.dtype.kind in "fiub"
    return numbers and _squeezed(output).shape == _squeezed(target).shape


def _squeezed(array: Array) -> Array:
    column: Array = array[..., 0] if array.ndim > 1 and array.shape[-1] == 1 else array
    return column


def _label_shape(output: Array) -> tuple[int, ...]:
    """The shape of one label per scored row: classes lie on the last axis of floats."""
    if output.ndim == 1 or (output.dtype.kind != "f" and output.shape[-1] != 1):
        return output.shape
    return output.shape[:-1]


def _class_count(output: Array) -> int:
    """How many classes floats tell apart; 0 where the output is the class itself."""
    if output.dtype.kind != "f":
        return 0
    return 2 if output.ndim == 1 else max(2, output.shape[-1])


def _is_one_hot(output: Array, target: Array) -> bool:
    if target.shape != output.shape or target.ndim < 2 or target.shape[-1] < 2:
        return False
    if target.dtype.kind not in "iubf" or output.dtype.kind != "f":
        return False
    return bool(np.isin(target, (0, 1)).all() and (target.sum(axis=-1) == 1).all())


def _expected_labels(output: Array) -> str:
    shape = list(_label_shape(output))
    classes = _class_count(output)
    if output.dtype == object:
        return f"strings of shape {shape}"
    return f"class numbers of shape {shape}" + (f", or one-hot {list(output.shape)}" if classes > 2 else "")


def _top_hits(name: str, output: Array, labels: Array) -> Array:
    if labels.ndim != 1 or output.ndim != 2 or output.shape[1] <= TOP:
        raise SamplesError(
            f"top5 needs more than {TOP} classes and one label per sample",
            found=f"output {name!r} of shape {list(output.shape)}",
            expected=f"[N, C] with C above {TOP}",
        )
    best = np.argpartition(-output, TOP, axis=1)[:, :TOP]
    return np.asarray((best == labels[:, None]).any(axis=1).astype(np.float64))


def _coded(labels: Array, predicted: Array) -> Array:
    """True and predicted classes `[N, 2]` as numbers that also stand for strings."""
    _, codes = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
    coded: Array = codes.reshape(2, -1).T.astype(np.float64)
    return coded


def _score_regression(kind: str, name: str, output: Array, target: Array) -> Scores:
    if not _values_fit(output, target):
        raise SamplesError(
            f"the labels do not fit output {name!r}",
            found=f"'target' {target.dtype} of shape {list(target.shape)}",
            expected=f"numbers of shape {list(output.shape)}",
        )
    error = _squeezed(output).astype(np.float64) - _squeezed(target).astype(np.float64)
    parts = np.abs(error) if kind == "mae" else np.square(error)
    return Scores(rows=parts.reshape(len(parts), -1).mean(axis=1)[:, None], total=mean_of)


def _score_fidelity(metric: Metric, outputs: Outputs, reference: Outputs) -> Scores:
    if metric.output is not None and metric.output not in outputs:
        raise UsageError(f"the model has no output {metric.output!r}", expected=sorted(outputs))
    names = [metric.output] if metric.output is not None else sorted(outputs)
    names = [name for name in names if outputs[name].dtype != object]
    if not names:
        raise UsageError(f"{metric.name} compares numbers", found="outputs of strings only")
    pairs = [
        tuple(side[name].reshape(len(side[name]), -1).astype(np.float64) for side in (outputs, reference))
        for name in names
    ]
    if metric.name == "cosine":
        rows = np.min([_cosine(ours, theirs) for ours, theirs in pairs], axis=0)
        return Scores(rows=rows[:, None], total=mean_of)
    if metric.name == "recall10":
        rows = np.min([_neighbour_recall(ours, theirs) for ours, theirs in pairs], axis=0)
        return Scores(rows=rows[:, None], total=mean_of)
    rows = np.max([np.abs(ours - theirs).max(axis=1, initial=0.0) for ours, theirs in pairs], axis=0)
    return Scores(rows=rows[:, None], total=largest_of)


def _cosine(ours: Array, theirs: Array) -> Array:
    """Of two rows of zeros 1: they are the same; of one row of zeros 0."""
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    same = (ours == theirs).all(axis=1)
    cosine = np.divide((ours * theirs).sum(axis=1), norms, out=np.zeros(len(ours)), where=norms > 0)
    return np.where(same, 1.0, np.minimum(cosine, 1.0))


def _neighbour_recall(ours: Array, theirs: Array) -> Array:
    """For each row the share of its nearest rows, itself left out, that both sides agree on."""
    count = len(ours)
    if count <= NEIGHBOURS:
        raise SamplesError(f"recall10 needs more than {NEIGHBOURS} samples", found=count)
    sides = [_unit_rows(ours), _unit_rows(theirs)]
    recalls = []
    for start in range(0, count, QUERIES):
        nearest = []
        for side in sides:
            similarity = side[start : start + QUERIES] @ side.T
            queries = np.arange(len(similarity))
            similarity[queries, queries + start] = -np.inf
            nearest.append(np.argpartition(-similarity, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
        found = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(axis=2)
        recalls.append(found.mean(axis=1))
    return np.concatenate(recalls)


def _unit_rows(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Array = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return unit


def _score_function(metric: Metric, outputs: Outputs, target: Array | None) -> Scores:
    assert metric.function is not None  # noqa: S101 - `score` calls this for functions only
    try:
        found = np.asarray(metric.function(dict(outputs), target), dtype=np.float64)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(
            f"the metric {metric.name} failed", found=f"{type(error).__name__}: {error}"
        ) from error
    count = len(next(iter(outputs.values())))
    if found.shape == ():
        return Scores(rows=np.empty((count, 0)), total=mean_of, scalar=float(found))
    if found.shape != (count,):
        raise UsageError(
            f"the metric {metric.name} gave an array of another length",
            found=f"shape {list(found.shape)}",
            expected=f"one score for each of {count} samples, or one number",
        )
    return Scores(rows=found[:, None], total=mean_of)


def _import_function(text: str) -> Callable[[Outputs, Array | None], Any]:
    module_name, _, attribute = text.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UsageError(f"no metric is named {text!r}", expected="package.module:function")
    module = import_user_module(module_name, f"metric {text}", UsageError)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]
