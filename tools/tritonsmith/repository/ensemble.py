"""Ensembles: steps in order, tensors connected by name, everything else derived and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tritonsmith.artifact import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleStep:
    """One model of an ensemble; `inputs` and `outputs` map its tensors to the ensemble's."""

    model: str
    inputs: Mapping[str, str]  # the step's input -> the ensemble's tensor
    outputs: Mapping[str, str]  # the step's output -> the ensemble's tensor
    version: int | None = None  # None: the newest that the model's version policy serves


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleRequest:
    """An ensemble to publish into `repository`, where the models of its steps already are.

    `inputs` and `outputs` name the ensemble's own tensors, in order. None: the tensors that no step
    writes, and those that no step reads.
    """

    name: str
    repository: Path
    steps: tuple[EnsembleStep, ...]
    inputs: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    version: int | None = None
    force: bool = False
    config: Mapping[str, Json] = field(default_factory=dict)
    labels: Mapping[str, Path] = field(default_factory=dict)  # output -> label file
