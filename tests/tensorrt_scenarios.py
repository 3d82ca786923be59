"""What is done with TensorRT's stand-ins, all in one process for a version: run by test_calls.py.

Each function is a scenario: it gets a fresh `Workshop` and says what came of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import tensorrt_stand_in
from tritonsmith.artifact import TensorSpec
from tritonsmith.engines.tensorrt.builder import build_plan
from tritonsmith.engines.tensorrt.facts import PlanFacts
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.engines.tensorrt.profiles import filled_profiles
from tritonsmith.engines.tensorrt.refit import refit_plan
from tritonsmith.engines.tensorrt.session import open_plan
from tritonsmith.errors import PlanError

INPUTS = (TensorSpec(name="x", dtype="float32", shape=("batch", 3)),)


class Workshop:
    """A folder with an ONNX file, and the world that TensorRT is here."""

    def __init__(self, world: tensorrt_stand_in.World, folder: Path) -> None:
        folder.mkdir()
        world.reset()
        self.world, self.folder, self.said = world, folder, list[str]()
        self.onnx, self.plan = folder / "model.onnx", folder / "model.plan"
        self.onnx.write_text("whole", encoding="utf-8")

    def build(
        self, options: PlanOptions | None = None, *, precision: str = "fp32", timing_cache: Path | None = None
    ) -> PlanFacts:
        return build_plan(
            self.onnx,
            self.plan,
            inputs=INPUTS,
            options=filled_profiles(options or PlanOptions(), INPUTS, 8),
            precision=precision,
            timing_cache=timing_cache,
            say=self.said.append,
        )

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())


def build_with_every_option(shop: Workshop) -> dict[str, Any]:
    options = PlanOptions(
        sparse_weights=True,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        tf32=False,
        workspace_bytes=1 << 20,
        optimization_level=5,
    )
    return {"facts": asdict(shop.build(options, timing_cache=shop.folder / "timing")), "files": shop.files()}


def build_a_cast_to_fp16(shop: Workshop) -> dict[str, Any]:
    shop.world.data_type = "HALF"
    shop.build(precision="fp16")
    return {}


def build_fp16_weights(shop: Workshop) -> dict[str, Any]:
    shop.world.data_type, shop.world.layer_type = "HALF", "CONSTANT"
    shop.build(precision="fp16")
    return {}


def build_int8_pairs(shop: Workshop) -> dict[str, Any]:
    shop.world.data_type, shop.world.layer_type = "INT8", "QUANTIZE"
    shop.build(precision="int8")
    return {}


def refuse_a_precision_that_the_graph_lacks(shop: Workshop) -> dict[str, Any]:
    return refused(shop, lambda: shop.build(precision="fp16"))


def refuse_what_the_parser_refuses(shop: Workshop) -> dict[str, Any]:
    shop.onnx.write_text("broken", encoding="utf-8")
    return refused(shop, shop.build)


def refuse_a_missing_file(shop: Workshop) -> dict[str, Any]:
    shop.onnx.unlink()
    return refused(shop, shop.build)


def refuse_inputs_that_set_shapes(shop: Workshop) -> dict[str, Any]:
    shop.world.shape_tensor = True
    return refused(shop, shop.build)


def refuse_what_the_builder_refuses(shop: Workshop) -> dict[str, Any]:
    shop.world.builds = False
    return refused(shop, shop.build)


def refuse_another_plan(shop: Workshop) -> dict[str, Any]:
    another = shop.folder / "another.plan"
    another.write_bytes(b"of another version")
    return refused(shop, lambda: open_plan(another))


def end_a_build_by_ctrl_c(shop: Workshop) -> dict[str, Any]:
    shop.world.during_build = lambda: os.kill(os.getpid(), signal.SIGINT)
    try:
        shop.build(timing_cache=shop.folder / "timing")
    except KeyboardInterrupt:
        restored = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return {"ended_by": shop.world.build_end, "restored": restored, "files": shop.files()}
    return {"ended_by": None, "files": shop.files()}


def keep_the_timing_cache(shop: Workshop) -> dict[str, Any]:
    shop.build(timing_cache=shop.folder)
    (cache,) = shop.folder.glob("*.cache")
    first = cache.read_bytes().decode()
    shop.build(timing_cache=shop.folder)
    second = cache.read_bytes().decode()
    shop.world.during_build = lambda: cache.write_bytes(b"of another build")
    shop.build(timing_cache=shop.folder)
    combined = sum(call[:2] == ["ITimingCache", "combine"] for call in shop.world.calls)
    shop.world.during_build = lambda: None
    cache.write_bytes(b"another GPU")
    shop.build(timing_cache=shop.folder)
    fresh = cache.read_bytes().decode()
    return {"name": cache.name, "first": first, "second": second, "combined": combined, "fresh": fresh}


def strip_and_refit(shop: Workshop) -> dict[str, Any]:
    shop.world.stripped = True
    try:
        facts = shop.build(PlanOptions(strip_weights=True))
    except PlanError as error:
        return {"cannot": str(error), "files": shop.files()}
    without = refused(shop, lambda: open_plan(shop.plan))["error"]
    with open_plan(shop.plan, onnx=shop.onnx) as session:
        y = session.run({"x": np.ones((1, 3), np.float32)})["y"].tolist()
    shop.world.stripped = True
    refit_plan(shop.plan, shop.onnx, shop.folder / "whole.plan")
    return {"stripped": facts.stripped, "without": without, "y": y, "files": shop.files()}


def run_and_time(shop: Workshop) -> dict[str, Any]:
    shop.build()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with open_plan(shop.plan, onnx=shop.onnx) as session:  # which it does not need
        small = session.run({"x": x})["y"]
        large = session.run({"x": np.ones((8, 3), np.float32)})["y"]
        again = session.run({"x": x})["y"]
        times = [
            session.time_runs({"x": x}, runs=5, warmup=2, clock=clock, graph=graph)
            for clock in ("gpu", "wall")
            for graph in (False, True)
        ]
        wrong = [{"x": np.ones((9, 3), np.float32)}, {"x": np.ones((2, 3))}, {"z": x}, {}]
        errors = [refused(shop, lambda feed=feed: session.run(feed))["error"] for feed in wrong]
    driver = ctypes.CDLL("libcuda.so.1")
    return {
        "small": small.tolist(),
        "large": float(large.sum()),
        "again": again.tolist(),
        "times": times,
        "errors": errors,
        "left": [driver.stand_in_allocations(), driver.stand_in_contexts()],
        "launches": driver.stand_in_graph_launches(),
    }


def call_what_no_binding_has(shop: Workshop) -> dict[str, Any]:
    config = shop.world.trt.Builder(shop.world.trt.Logger()).create_builder_config()
    wrong: tuple[Callable[[], Any], ...] = (
        lambda: config.set_precision("fp16"),
        lambda: config.set_timing_cache(None),
        lambda: setattr(config, "num_optimization_profiles", 2),
        lambda: shop.world.trt.Runtime(),
        lambda: config.set_memory_pool_limit(shop.world.trt.MemoryPoolType.WORKSPACE, "all"),
    )
    errors = []
    for call in wrong:
        try:
            call()
        except (AttributeError, TypeError, AssertionError) as error:
            errors.append(type(error).__name__)
    return {"errors": errors}


def refused(shop: Workshop, work: Callable[[], Any]) -> dict[str, Any]:
    try:
        work()
    except PlanError as error:
        return {"error": str(error), "files": shop.files()}
    return {"error": "", "files": shop.files()}


SCENARIOS = (
    build_with_every_option,
    build_a_cast_to_fp16,
    build_fp16_weights,
    build_int8_pairs,
    refuse_a_precision_that_the_graph_lacks,
    refuse_what_the_parser_refuses,
    refuse_a_missing_file,
    refuse_inputs_that_set_shapes,
    refuse_what_the_builder_refuses,
    refuse_another_plan,
    end_a_build_by_ctrl_c,
    keep_the_timing_cache,
    strip_and_refit,
    run_and_time,
    call_what_no_binding_has,
)


def main(folder: Path) -> None:
    world = tensorrt_stand_in.install()
    answers = {}
    for scenario in SCENARIOS:
        shop = Workshop(world, folder / scenario.__name__)
        answers[scenario.__name__] = {**scenario(shop), "calls": world.calls, "said": shop.said}
    json.dump(answers, sys.stdout, default=str)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
