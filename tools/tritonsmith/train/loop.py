"""One training loop for every source: AdamW, warm-up and cosine, teacher and labels, resumable by epoch."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress.chain import Material
from tritonsmith.compress.steps import Trained
from tritonsmith.errors import CompressionError
from tritonsmith.samples import Samples
from tritonsmith.train.answers import Answers, collect_answers
from tritonsmith.train.checkpoint import hash_request, read_checkpoint, write_checkpoint
from tritonsmith.train.data import (
    Padding,
    check_data,
    choose_data,
    draw_batches,
    find_padding,
    read_batch,
)
from tritonsmith.train.exam import Exam, run_module
from tritonsmith.train.lessons import Lessons
from tritonsmith.train.preparation import prepare_lessons

Say = Callable[[str], None]

WEIGHT_DECAY = 0.01  # of matrices and filters; biases and norms keep their size
WARM_UP = 0.05  # of all steps, but never more than WARM_UP_STEPS
WARM_UP_STEPS = 100
LARGEST_GRADIENT = 1.0  # norm over all weights
TALK_S = 15.0  # at least this long between two lines within an epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a training did. Losses are means over an epoch; the metric is that on tuning data."""

    epochs: int
    steps: int
    samples: int
    first_loss: float
    last_loss: float
    metric: str | None
    metric_before: float | None
    metric_after: float | None
    best_epoch: int  # whose weights were taken: the best on tuning data, else the last; 0 is before training
    duration_s: float  # of this run: what was resumed is not counted
    resumed_from: int | None  # the epoch that a checkpoint had

    def measured(self) -> dict[str, Json]:
        return asdict(self)


@dataclass(slots=True, kw_only=True)
class _State:
    """Where the training stands; written to the checkpoint after each epoch."""

    module: nn.Module
    projections: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    epoch: int
    steps: int
    losses: list[float]  # the mean of each epoch
    metrics: list[float]  # before training, then after each epoch; empty without tuning data
    best_epoch: int
    best: dict[str, Any] | None  # weights of that epoch; None without tuning data: the last

    def saved(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "projections": self.projections.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "steps": self.steps,
            "losses": self.losses,
            "metrics": self.metrics,
            "best_epoch": self.best_epoch,
            "best": self.best,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.module.load_state_dict(saved["module"])
        self.projections.load_state_dict(saved["projections"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.steps, self.best_epoch = saved["epoch"], saved["steps"], saved["best_epoch"]
        self.losses, self.metrics, self.best = saved["losses"], saved["metrics"], saved["best"]


def train(
    module: nn.Module,
    material: Material,
    spec: Trained,
    *,
    teacher: Artifact | None,
    checkpoint: Path,
    hidden: Sequence[tuple[str, str]] | None = None,
    say: Say = lambda _: None,
) -> TrainReport:
    """Train `module`, which takes and gives tensors by name, in place.

    A run that was killed is taken up after its last whole epoch, where the request is the same: options,
    data, teacher and the weights to begin with. It then ends as it would have without the kill. Of the
    epochs, the one that is best on the tuning data is taken, the untrained weights among them.

    Args:
        checkpoint: a folder that survives; trainings of other requests may share it.
        hidden: pairs of tensor names (of `module`, of the teacher) for the hidden loss; left out, those
            between the teacher's blocks that `module` has as well. Taps are asked of `module` as
            `forward(inputs, taps)`.

    Raises:
        CompressionError: nothing to learn from or to train, or a loss that is no number any more.
        SamplesError: data that are missing or do not fit.
        RepositoryError: the folder cannot be written, or a checkpoint in it is damaged.
    """
    began_s = time.perf_counter()
    _check_spec(spec, teacher)
    data, label_weight = choose_data(material, spec)
    check_data(data, material.teacher)
    padding = find_padding(data, material.teacher)
    checkpoint.mkdir(parents=True, exist_ok=True)
    lessons = prepare_lessons(module, material, spec, data, label_weight, teacher, hidden, checkpoint)
    questions = lessons.questions()
    answers = Answers(arrays={}, padded=frozenset())
    if teacher is not None and questions.names():
        answers = collect_answers(teacher, data, questions, padding, checkpoint, say=say)
    state = _begin(module, lessons)
    exam = Exam(module, material, teacher)
    path = checkpoint / f"training-{_key(module, material, data, lessons, teacher)}.pt"
    saved = read_checkpoint(path)
    if saved is not None:
        state.restore(saved)
        say(f"training goes on after epoch {state.epoch} of {spec.epochs}")
    elif exam.metric is not None:
        state.metrics.append(exam.mark())
        state.best = copy.deepcopy(module.state_dict())
    resumed = state.epoch
    while state.epoch < spec.epochs:
        _run_epoch(state, lessons, data, padding, answers, say)
        _note_best(state, exam)
        write_checkpoint(path, state.saved())
        left_s = (time.perf_counter() - began_s) / (state.epoch - resumed) * (spec.epochs - state.epoch)
        say(_line(state, spec, exam, left_s))
    if state.best is not None:
        module.load_state_dict(state.best)
    module.eval()
    return TrainReport(
        epochs=spec.epochs,
        steps=state.steps,
        samples=data.count,
        first_loss=state.losses[0],
        last_loss=state.losses[-1],
        metric=None if exam.metric is None else exam.metric.text,
        metric_before=state.metrics[0] if state.metrics else None,
        metric_after=state.metrics[state.best_epoch] if state.metrics else None,
        best_epoch=state.best_epoch,
        duration_s=round(time.perf_counter() - began_s, 3),
        resumed_from=None if saved is None else resumed,
    )


def _check_spec(spec: Trained, teacher: Artifact | None) -> None:
    wrong = {
        "epochs": spec.epochs < 1,
        "batch_size": spec.batch_size < 1,
        "learning_rate": not 0 < spec.learning_rate < math.inf,
        "temperature": not 0 < spec.temperature < math.inf,
    }
    if names := [name for name, bad in wrong.items() if bad]:
        found = ", ".join(f"{name} = {getattr(spec, name)}" for name in names)
        raise CompressionError("nothing can be trained with these options", found=found, expected="above 0")
    weights = {"labels": spec.labels or 0.0} | {
        name: getattr(spec, name) for name in ("logits", "hidden", "embedding")
    }
    if negative := {name: weight for name, weight in weights.items() if not 0 <= weight < math.inf}:
        raise CompressionError("a loss cannot have this weight", found=negative, expected="0 or more")
    if teacher is None and (spec.logits or spec.hidden or spec.embedding):
        raise CompressionError(
            "there is no teacher to learn from", expected="logits, hidden and embedding of weight 0"
        )


def _begin(module: nn.Module, lessons: Lessons) -> _State:
    spec = lessons.spec
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise CompressionError(
            "the model has no weights that can be trained",
            expected="weights in FP32; a quantized or cast model has none",
            fix="train before the steps that narrow the numbers",
        )
    projections = lessons.make_projections(spec.seed)
    trained += projections.parameters()
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return _State(
        module=module,
        projections=projections,
        # Fused: a third less time a step where most weights are an embedding table.
        optimizer=torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=spec.learning_rate, fused=True
        ),
        epoch=0,
        steps=0,
        losses=[],
        metrics=[],
        best_epoch=0,
        best=None,
    )


def _run_epoch(
    state: _State, lessons: Lessons, data: Samples, padding: Padding | None, answers: Answers, say: Say
) -> None:
    spec = lessons.spec
    batches = draw_batches(data.count, spec.batch_size, seed=spec.seed, epoch=state.epoch, padding=padding)
    weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    total, spoke_s = 0.0, time.perf_counter()
    state.module.train()
    with torch.random.fork_rng(devices=[]):  # dropout draws the same after a resumption
        torch.manual_seed(spec.seed * 1_000_003 + state.epoch)
        for index, rows in enumerate(batches):
            batch = read_batch(data, rows, padding)
            for group in state.optimizer.param_groups:
                group["lr"] = spec.learning_rate * rate_at(state.steps, spec.epochs * len(batches))
            loss = lessons.loss(
                run_module(state.module, batch.inputs, lessons.taps), answers, state.projections, batch
            )
            _check_loss(loss, spec, state.epoch, index)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, LARGEST_GRADIENT)
            state.optimizer.step()
            state.steps += 1
            total += float(loss.detach()) * len(rows)
            if time.perf_counter() - spoke_s > TALK_S:
                spoke_s = time.perf_counter()
                where = f"epoch {state.epoch + 1}/{spec.epochs}, batch {index + 1}/{len(batches)}"
                say(f"{where}: loss {float(loss.detach()):.4f}")
    state.epoch += 1
    state.losses.append(total / sum(map(len, batches)))


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a linear warm-up, then half a cosine down to 0."""
    warm = min(WARM_UP_STEPS, math.ceil(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _check_loss(loss: torch.Tensor, spec: Trained, epoch: int, batch: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise CompressionError(
            "the training has diverged",
            found=f"a loss of {float(loss.detach()):g} in epoch {epoch + 1}, batch {batch + 1}",
            expected="a finite loss",
            fix=f"a lower learning rate: {spec.learning_rate / 10:g} instead of {spec.learning_rate:g}",
        )


def _note_best(state: _State, exam: Exam) -> None:
    """Keep a copy of the weights that did best; of equals, the later."""
    if exam.metric is None:
        state.best_epoch = state.epoch
        return
    state.metrics.append(exam.mark())
    sign = 1.0 if exam.metric.higher_is_better else -1.0
    if sign * state.metrics[-1] >= sign * state.metrics[state.best_epoch]:
        state.best_epoch = state.epoch
        state.best = copy.deepcopy(state.module.state_dict())


def _line(state: _State, spec: Trained, exam: Exam, left_s: float) -> str:
    text = f"epoch {state.epoch}/{spec.epochs}: loss {state.losses[-1]:.4f}"
    if exam.metric is not None:
        text += f", {exam.metric.text} {state.metrics[-1]:.4f} on tuning data"
    return text + (f", {left_s:.0f} s left" if state.epoch < spec.epochs else "")


def _key(
    module: nn.Module, material: Material, data: Samples, lessons: Lessons, teacher: Artifact | None
) -> str:
    request = {
        "spec": asdict(lessons.spec),
        "labels": lessons.label_weight,
        "hidden": [asdict(pair) for pair in lessons.hidden],
        "teacher": None if teacher is None else onnx_model.model_sha256(teacher.path),
        "metric": None if material.metric is None else material.metric.text,
        "torch": torch.__version__,
    }
    samples = [data] if material.tuning is None else [data, material.tuning]
    arrays = [part.arrays[name] for part in samples for name in sorted(part.arrays)]
    arrays += [part.target for part in samples if part.target is not None]
    return hash_request(json.dumps(request, sort_keys=True, default=str), arrays, module)
