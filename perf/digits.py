"""The digits classifier by its own recipe, pruned twice; and in INT8 on top of that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cases import Case

from tritonsmith.compress.steps import Quantize
from tritonsmith.console import Say
from tritonsmith.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "recipes"))
import make_models

TARGETS = {"size_ratio": 20.0, "baseline": 0.985, "drop": 0.005, "drop_ci95_high": 0.015, "speedup": 3.0}


def cases(workspace: Path, say: Say) -> Sequence[Case]:
    """Two cases; `make_models` prepares them where the recipe looks."""
    folder = make_models.prepare("digits", say)
    (build,) = load_recipe(make_models.RECIPES / "digits" / "recipe.toml", repository=workspace).builds
    assert build.evaluation is not None  # noqa: S101 - the recipe has it
    assert build.metric is not None  # noqa: S101
    assert build.max_drop is not None  # noqa: S101
    pruned = Case(
        model="digits",
        variant="pruned",
        source=build.source,
        steps=build.steps,
        calibration=folder / "calibration.npz",
        training=build.training,
        tuning=build.tuning,
        evaluation=build.evaluation,
        metric=build.metric,
        max_drop=build.max_drop,
        headline_batch=32,
        batches=(1, 8, 32),
        targets=TARGETS,
    )
    return pruned, replace(pruned, variant="pruned-int8", steps=(*build.steps, Quantize()), targets={})
