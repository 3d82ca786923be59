"""A module asked for answers: one batch, or the metric on the tuning data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.engines import open_session
from tritonsmith.gate import predict
from tritonsmith.metrics import score

Array = NDArray[Any]

ROWS = 32  # at a time


class Exam:
    """The metric on the tuning data; `metric` is None where one of them is missing."""

    def __init__(self, module: nn.Module, material: Material, teacher: Artifact | None) -> None:
        metric, tuning = material.metric, material.tuning
        usable = (
            metric is not None
            and tuning is not None
            and (tuning.target is not None or not metric.needs_target)
        )
        self.metric = metric if usable else None
        self._module, self._tuning = module, tuning
        self._teacher = teacher or material.teacher
        self._reference: dict[str, Array] | None = None

    def mark(self) -> float:
        metric, tuning = self.metric, self._tuning
        assert metric is not None  # noqa: S101 - callers ask for `metric` first
        assert tuning is not None  # noqa: S101
        if self._reference is None:
            session = open_session(self._teacher.path)
            self._reference = predict(session, tuning, batched=True, batch_size=ROWS)
        ours = predict(InTorch(self._module), tuning, batched=True, batch_size=ROWS)
        return score(metric, ours, target=tuning.target, reference=self._reference).value()


class InTorch:
    """A module as a session: arrays in, arrays out, without gradients."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def run(self, inputs: Mapping[str, Array], taps: tuple[str, ...] = ()) -> dict[str, Array]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        self._module.eval()
        with torch.no_grad():
            found = run_module(self._module, tensors, taps)
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def run_module(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], taps: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = module(inputs, taps) if taps else module(inputs)
    return found
