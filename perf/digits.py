"""The digits classifier by its own recipe: pruned twice and in INT8."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases import Case

from tritonsmith.console import Say
from tritonsmith.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "recipes"))
import make_models

TARGETS = {"size_ratio": 20.0, "baseline": 0.985, "drop": 0.005, "drop_ci95_high": 0.015, "speedup": 3.0}


def cases(workspace: Path, say: Say) -> Sequence[Case]:
    """One case; `make_models` prepares it where the recipe looks for it."""
    make_models.prepare("digits", say)
    (build,) = load_recipe(make_models.RECIPES / "digits" / "recipe.toml", repository=workspace).builds
    assert build.evaluation is not None  # noqa: S101 - the recipe has it
    assert build.metric is not None  # noqa: S101
    assert build.max_drop is not None  # noqa: S101
    return (
        Case(
            model="digits",
            variant="pruned-int8",
            source=build.source,
            steps=build.steps,
            calibration=build.calibration,
            training=build.training,
            tuning=build.tuning,
            evaluation=build.evaluation,
            metric=build.metric,
            max_drop=build.max_drop,
            headline_batch=32,
            batches=(1, 8, 32),
            targets=TARGETS,
        ),
    )
