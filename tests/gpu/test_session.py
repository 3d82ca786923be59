"""Plans run on a real GPU: answers, shapes, profiles, timing."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.conftest import LARGEST, Build
from gpu.tiny import Tiny, affine, all_tiny, doubled_length, draw, product
from tritonsmith.engines.tensorrt.cuda import open_cuda
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.engines.tensorrt.session import open_plan
from tritonsmith.errors import PlanError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("model", all_tiny(), ids=lambda model: model.name)
def test_a_plan_answers_as_numpy_does(build: Build, model: Tiny) -> None:
    plan, _ = build(model)
    with open_plan(plan) as session:
        for batch in (1, 2, 3, LARGEST, 1):
            x = draw(model, batch, length=3 + batch, seed=batch)
            y = session.run({"x": x})["y"]
            assert y.dtype == np.float32
            np.testing.assert_allclose(y, model.answer(x), atol=model.tolerance, rtol=1e-3)


def test_shapes_of_outputs_follow_the_inputs(build: Build) -> None:
    plan, _ = build(doubled_length())
    with open_plan(plan) as session:
        assert session.output_shapes({"x": (2, 7)}) == {"y": (2, 14)}


def test_every_profile_runs_its_own_range(build: Build) -> None:
    profiles = tuple(
        Profile(axes={"batch": AxisRange(minimum=1, best=best, maximum=most)})
        for best, most in ((LARGEST, LARGEST), (1, 2 * LARGEST))
    )
    model = affine()
    plan, _ = build(model, PlanOptions(profiles=profiles))
    x = draw(model, 2 * LARGEST)
    with open_plan(plan, profile=1) as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], model.answer(x))
    with open_plan(plan) as session, pytest.raises(PlanError, match="does not take this shape"):
        session.run({"x": x})
    with pytest.raises(PlanError, match="has no profile 2"):
        open_plan(plan, profile=2)


@pytest.mark.parametrize("clock", ["gpu", "wall"])
@pytest.mark.parametrize("graph", [False, True])
def test_times_are_taken_and_answers_stay_right(build: Build, clock: str, graph: bool) -> None:
    model = product("fp16")
    plan, _ = build(model)
    x = draw(model, LARGEST)
    with open_plan(plan) as session:
        times = session.time_runs({"x": x}, runs=20, clock=clock, graph=graph)
        assert len(times) == 20
        assert all(0 < time < 1_000_000_000 for time in times)
        other = draw(model, 2, seed=5)
        np.testing.assert_allclose(
            session.run({"x": other})["y"], model.answer(other), atol=model.tolerance, rtol=1e-3
        )


def test_two_sessions_live_beside_each_other(build: Build) -> None:
    first, second = affine(), product()
    with open_plan(build(first)[0]) as one, open_plan(build(second)[0]) as other:
        for seed in range(3):
            x, z = draw(first, 2, seed=seed), draw(second, 3, seed=seed)
            np.testing.assert_array_equal(one.run({"x": x})["y"], first.answer(x))
            np.testing.assert_allclose(other.run({"x": z})["y"], second.answer(z), atol=second.tolerance)


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match="there is no GPU 99"), open_cuda(99):
        pass
