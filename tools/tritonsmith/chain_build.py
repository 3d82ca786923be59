"""A chain of compression steps on one model: made, judged after each step, and accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritonsmith.artifact import Artifact
from tritonsmith.candidates import Candidate, Goal, chain_candidates, judge_candidates
from tritonsmith.compress.chain import Material, check_roles, run_chain
from tritonsmith.compress.ledger import Ledger, measure_ledger
from tritonsmith.compress.steps import StepSpec
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.metrics import Metric
from tritonsmith.samples import Samples, load_samples

if TYPE_CHECKING:
    from tritonsmith.compress.search.goal import Progress, SearchGoal
    from tritonsmith.compress.search.outcome import SearchResult

Say = Callable[[str], None]
Show = Callable[["Progress"], None]

ROLES = ("calibration", "training", "tuning", "evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The artifacts, FP32 first and one after each step, the candidates made of them, and their ledger."""

    artifacts: tuple[Artifact, ...]
    candidates: tuple[Candidate, ...]
    ledger: Ledger
    specs: tuple[StepSpec, ...]
    material: Material


def load_roles(paths: Mapping[str, Path | None], fp32: Artifact) -> dict[str, Samples | None]:
    """The samples of each role in `ROLES`, held against the model's signature.

    Raises:
        SamplesError: as `load_samples`.
    """
    return {
        role: None if path is None else load_samples(path, fp32.inputs, batched=fp32.batched)
        for role, path in paths.items()
    }


def material_from(
    fp32: Artifact,
    data: Mapping[str, Samples | None],
    *,
    engine: str,
    metric: Metric | None,
    max_drop: float | None,
    source: str,
    convert: ConvertOptions,
) -> Material:
    """What the steps may draw on; data that two roles share are refused.

    Raises:
        SamplesError: samples that stand in two roles that must be kept apart.
    """
    material = Material(
        teacher=fp32,
        engine=engine,
        calibration=data["calibration"],
        training=data["training"],
        tuning=data["tuning"],
        metric=metric,
        max_drop=max_drop,
        source=source,
        convert=convert,
    )
    check_roles(material, data["evaluation"])
    return material


def choose_steps(
    steps: Sequence[StepSpec],
    goal: SearchGoal | None,
    material: Material,
    evaluation: Samples | None,
    *,
    store: Path,
    say: Say,
    show: Show = lambda _: None,
) -> tuple[tuple[StepSpec, ...], Material, SearchResult | None]:
    """The steps as they are, or those that a search finds best, with the material that they were found with.

    Raises:
        UsageError: a search with nothing to judge by.
    """
    if goal is None:
        return tuple(steps), material, None
    from tritonsmith.compress.search.search import search

    if evaluation is None:
        raise UsageError("a search needs evaluation data", fix="give --evaluation X.npz and --metric")
    found = search(material.teacher, goal, material, evaluation, store=store, say=say, show=show)
    # Less the tuning data that were held back: the steps are the same then.
    return found.best.specs, found.material, found


def make_chain(
    specs: Sequence[StepSpec], material: Material, goal: Goal, folder: Path, *, store: Path, say: Say
) -> Chain:
    """Run the steps, judge the model after each of them, and measure the ledger.

    `folder` gets a folder for each candidate.

    Raises:
        CompressionError, SamplesError: a step that cannot be done.
    """
    artifacts = (material.teacher, *run_chain(specs, material, store=store, say=say))
    candidates = chain_candidates(artifacts, goal, folder, say=say)
    candidates = judge_candidates(candidates, goal, say=say)
    say("measuring the ledger")
    samples = goal.evaluation or material.calibration or material.training
    if samples is None:
        raise SamplesError(
            "there are no samples to measure latency on", expected="evaluation or calibration data"
        )
    ledger = measure_ledger(artifacts, samples, engine=goal.engine)
    return Chain(
        artifacts=artifacts,
        candidates=tuple(candidates),
        ledger=ledger,
        specs=tuple(specs),
        material=material,
    )
