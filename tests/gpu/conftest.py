"""Fixtures of the tests that need an NVIDIA GPU and TensorRT; elsewhere each is skipped, and says why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu.tiny import Tiny, write_tiny
from tritonsmith.engines.tensorrt.builder import build_plan
from tritonsmith.engines.tensorrt.facts import PlanFacts
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions
from tritonsmith.engines.tensorrt.profiles import default_profile, filled_profiles
from tritonsmith.engines.tensorrt.versions import (
    Capabilities,
    capabilities_of,
    import_tensorrt,
    why_unavailable,
)

Build = Callable[..., tuple[Path, PlanFacts]]
LARGEST = 8


@functools.cache
def missing() -> str | None:
    return why_unavailable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := missing()):
        pytest.skip(f"no GPU: {reason}")


@pytest.fixture(scope="session")
def capabilities() -> Capabilities:
    """What the TensorRT of this machine offers."""
    return capabilities_of(str(import_tensorrt().__version__))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A function that builds a tiny model for batches of 1 to LARGEST and gives the plan and its facts."""

    def build_tiny(
        model: Tiny,
        options: PlanOptions | None = None,
        *,
        external: bool = False,
        timing_cache: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> tuple[Path, PlanFacts]:
        onnx = write_tiny(model, tmp_path, external=external)
        options = options or PlanOptions()
        if not options.profiles and "length" in model.x.shape:
            ranges = {"length": AxisRange(minimum=1, best=4, maximum=16)}
            profile = default_profile((model.x,), LARGEST, ranges=ranges)
            options = PlanOptions(profiles=(profile,))
        plan = tmp_path / f"{model.name}.plan"
        facts = build_plan(
            onnx,
            plan,
            inputs=(model.x,),
            options=filled_profiles(options, (model.x,), LARGEST),
            precision=model.precision,
            timing_cache=timing_cache,
            say=say,
        )
        return plan, facts

    return build_tiny
