"""Which losses a training has on this model and these data, and what they add up to for one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tritonsmith.artifact import BATCH_AXIS, Artifact
from tritonsmith.compress.steps import Trained
from tritonsmith.errors import CompressionError, SamplesError, UsageError
from tritonsmith.metrics import (
    CLASSIFICATION,
    REGRESSION,
    Metric,
    class_labels,
    parse_metric,
    scored_output,
)
from tritonsmith.samples import Samples
from tritonsmith.train.answers import Answers, Questions, pooled_name
from tritonsmith.train.data import Batch
from tritonsmith.train.losses import (
    embedding_loss,
    hidden_loss,
    label_loss,
    logits_loss,
    pool,
    value_loss,
)

Array = NDArray[Any]
Forward: TypeAlias = Callable[..., dict[str, Tensor]]

ROUNDING = 1e-3  # of probabilities that add up to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    output: str
    values: Array  # classes of int64, or numbers, each `[N, ...]`
    are_classes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenPair:
    student: str
    teacher: str
    axis: int | None  # where their widths differ, and a projection is learned
    widths: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """All that the loss of a batch is made of; a weight of 0 leaves a part out."""

    spec: Trained
    label_weight: float
    labels: Labels | None
    outputs: tuple[str, ...]  # those of floats
    probabilities: frozenset[str]  # outputs that are distributions over their last axis
    chances: frozenset[str]  # outputs within 0 and 1
    pooled: Mapping[str, tuple[int, ...]]
    hidden: tuple[HiddenPair, ...]

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(pair.student for pair in self.hidden)

    def questions(self) -> Questions:
        """What the teacher must be asked."""
        whole = self.outputs if self.spec.logits else ()
        return Questions(
            whole=(*whole, *(pair.teacher for pair in self.hidden)),
            pooled=self.pooled if self.spec.embedding else {},
        )

    def make_projections(self, seed: int) -> nn.ModuleDict:
        """A linear layer for each pair of widths that differ; they are dropped after training."""
        projections = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for index, pair in enumerate(self.hidden):
                if pair.axis is not None:
                    projections[str(index)] = nn.Linear(*pair.widths)
        return projections

    def loss(
        self, found: Mapping[str, Tensor], answers: Answers, projections: nn.ModuleDict, batch: Batch
    ) -> Tensor:
        """The weighted sum for what a module gave for a batch, a scalar."""
        spec, parts = self.spec, []
        if self.labels is not None:
            parts.append(self.label_weight * self._label_loss(found[self.labels.output], batch))
        if spec.logits:
            each = [
                logits_loss(
                    found[name],
                    answers.of(name, batch),
                    probabilities=name in self.probabilities,
                    temperature=spec.temperature,
                    mask=batch.mask,
                )
                for name in self.outputs
            ]
            parts.append(spec.logits * torch.stack(each).mean())
        if spec.embedding:
            each = [
                embedding_loss(pool(found[name], axes, batch.mask), answers.of(pooled_name(name), batch))
                for name, axes in self.pooled.items()
            ]
            parts.append(spec.embedding * torch.stack(each).mean())
        if self.hidden:
            each = []
            for index, pair in enumerate(self.hidden):
                state = found[pair.student]
                if pair.axis is not None:
                    state = projections[str(index)](state.movedim(pair.axis, -1)).movedim(-1, pair.axis)
                each.append(hidden_loss(state, answers.of(pair.teacher, batch), mask=batch.mask))
            parts.append(spec.hidden * torch.stack(each).mean())
        return torch.stack(parts).sum()

    def _label_loss(self, output: Tensor, batch: Batch) -> Tensor:
        labels = self.labels
        assert labels is not None  # noqa: S101 - `loss` asks
        wanted = torch.from_numpy(labels.values[batch.rows])
        if not labels.are_classes:
            return value_loss(output, wanted)
        if batch.length is not None and wanted.ndim == 2 and output.ndim == 3:
            wanted = wanted[:, : output.shape[1]]
        single = output.ndim == 1 or output.shape[-1] == 1
        likely = labels.output in (self.chances if single else self.probabilities)
        return label_loss(output, wanted, probabilities=likely, mask=batch.mask)


def plan_lessons(
    spec: Trained,
    artifact: Artifact,
    data: Samples,
    *,
    label_weight: float,
    metric: Metric | None,
    probe: Mapping[str, Array],
    hidden: Sequence[HiddenPair] = (),
) -> Lessons:
    """Read off from a few answers, `probe`, what kind each output of `artifact` is.

    Raises:
        SamplesError, UsageError: labels that fit no output, or more than one.
    """
    floats = tuple(spec.name for spec in artifact.outputs if probe[spec.name].dtype.kind == "f")
    if not floats:
        raise CompressionError("there is nothing to learn: no output is of floats")
    free = {
        spec.name: tuple(index for index, axis in enumerate(spec.shape) if _is_free(axis))
        for spec in artifact.outputs
        if spec.name in floats
    }
    pooled = {name: axes for name, axes in free.items() if axes} or free
    return Lessons(
        spec=spec,
        label_weight=label_weight,
        labels=_find_labels(data, metric, probe) if label_weight else None,
        outputs=floats,
        probabilities=frozenset(name for name in floats if _is_distribution(probe[name])),
        chances=frozenset(name for name in floats if _within_one(probe[name])),
        pooled=pooled,
        hidden=tuple(hidden) if spec.hidden else (),
    )


def pair_states(
    pairs: Sequence[tuple[str, str]], ours: Mapping[str, Array], theirs: Mapping[str, Array]
) -> tuple[HiddenPair, ...]:
    """Hidden states `(student, teacher)` as pairs to compare; their shapes differ in one axis at most.

    Raises:
        CompressionError: a pair whose shapes cannot be compared.
    """
    found = []
    for student, teacher in pairs:
        mine, other = ours[student].shape, theirs[teacher].shape
        apart = [axis for axis, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b]
        if len(mine) != len(other) or len(apart) > 1:
            raise CompressionError(
                f"the hidden states {student!r} and {teacher!r} cannot be compared",
                found=f"{list(mine)} and {list(other)}",
                expected="shapes that differ in one axis at most",
                fix="leave the hidden loss out",
            )
        axis = apart[0] if apart else None
        widths = (0, 0) if axis is None else (mine[axis], other[axis])
        found.append(HiddenPair(student=student, teacher=teacher, axis=axis, widths=widths))
    return tuple(found)


def _find_labels(data: Samples, metric: Metric | None, probe: Mapping[str, Array]) -> Labels:
    """The output that the labels are of, as the gate finds it."""
    target = data.target
    assert target is not None  # noqa: S101 - `choose_data` refuses labels that are not there
    # Stand-ins of the right shapes: only they decide which output fits.
    shapes = {
        name: np.broadcast_to(np.zeros((), array.dtype), (len(target), *array.shape[1:]))
        for name, array in probe.items()
    }
    if metric is not None and metric.name in (*CLASSIFICATION, *REGRESSION):
        candidates = [metric]
    else:
        candidates = [parse_metric("accuracy"), parse_metric("mse")]
    failure: UsageError | SamplesError | None = None
    for candidate in candidates:
        try:
            name = scored_output(candidate, shapes, target)
            if candidate.name in CLASSIFICATION:
                classes = np.ascontiguousarray(class_labels(name, shapes[name], target))
                return Labels(output=name, values=classes, are_classes=True)
        except (UsageError, SamplesError) as error:
            failure = failure or error
            continue
        _check_values(name, shapes[name], target)
        values = np.ascontiguousarray(target.astype(np.float32))
        return Labels(output=name, values=values, are_classes=False)
    assert failure is not None  # noqa: S101 - there is a candidate, and it failed
    raise failure


def _check_values(name: str, output: Array, target: Array) -> None:
    if target.dtype.kind not in "fiub" or target.size != output.size:
        raise SamplesError(
            f"the labels fit output {name!r} neither as classes nor as numbers",
            found=f"'target' {target.dtype} of shape {list(target.shape)}",
            expected=f"numbers of shape {list(output.shape)}",
        )


def _is_free(axis: int | str) -> bool:
    return isinstance(axis, str) and axis != BATCH_AXIS


def _within_one(array: Array) -> bool:
    return bool(array.min() >= -ROUNDING and array.max() <= 1 + ROUNDING)


def _is_distribution(array: Array) -> bool:
    if array.ndim < 2 or array.shape[-1] < 2 or not _within_one(array):
        return False
    return bool(np.abs(array.sum(axis=-1) - 1).max() <= ROUNDING)
