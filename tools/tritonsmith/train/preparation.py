"""What a training needs to know before it begins: a few answers of both sides, held beside each other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.distillation.depth import find_states
from tritonsmith.compress.steps import Trained
from tritonsmith.errors import CompressionError
from tritonsmith.samples import Samples
from tritonsmith.train.answers import Questions, collect_answers
from tritonsmith.train.exam import InTorch
from tritonsmith.train.lessons import HiddenPair, Lessons, pair_states, plan_lessons

PROBE_ROWS = 16


def prepare_lessons(
    module: nn.Module,
    material: Material,
    spec: Trained,
    data: Samples,
    label_weight: float,
    teacher: Artifact | None,
    hidden: Sequence[tuple[str, str]] | None,
    folder: Path,
) -> Lessons:
    """The losses of a training, found on its first rows; nothing stays in `folder`.

    Raises:
        CompressionError: hidden states that are wanted and not shared, or cannot be compared.
    """
    pairs = _hidden_pairs(module, teacher, hidden) if spec.hidden and teacher is not None else ()
    rows = {name: array[:PROBE_ROWS] for name, array in data.arrays.items()}
    probe = InTorch(module).run(rows, tuple(dict.fromkeys(ours for ours, _ in pairs)))
    states: tuple[HiddenPair, ...] = ()
    if teacher is not None:
        names = (*(spec.name for spec in teacher.outputs), *(theirs for _, theirs in pairs))
        asked = Questions(whole=tuple(dict.fromkeys(names)), pooled={})
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as place:
            answers = collect_answers(teacher, replace(data, arrays=rows), asked, None, Path(place))
            told = {name: np.array(array) for name, array in answers.arrays.items()}
        states = pair_states(pairs, probe, told)
        probe = told
    outputs = {spec.name: probe[spec.name] for spec in material.teacher.outputs}
    return plan_lessons(
        spec,
        material.teacher,
        data,
        label_weight=label_weight,
        metric=material.metric,
        probe=outputs,
        hidden=states,
    )


def _hidden_pairs(
    module: nn.Module, teacher: Artifact, pairs: Sequence[tuple[str, str]] | None
) -> tuple[tuple[str, str], ...]:
    if pairs is not None:
        return tuple(pairs)
    has: frozenset[str] = getattr(module, "tensors", frozenset())
    states = find_states(onnx_model.load_model(teacher.path, with_weights=False).graph)
    shared = tuple((name, name) for name in states if name in has)
    if not shared:
        raise CompressionError(
            "teacher and student share no hidden states by name",
            found=f"between the teacher's blocks: {', '.join(states) or 'nothing'}",
            fix="leave the hidden loss out; logits and embedding need outputs alone",
        )
    return shared
