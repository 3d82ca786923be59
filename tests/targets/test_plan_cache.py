"""Plans kept by order, TensorRT and GPU; built once, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import plan_orders
from plan_orders import H100, OnnxTools, write_order
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.errors import PlanError
from tritonsmith.targets.choose import ChosenPlan, choose_plan
from tritonsmith.targets.order import PlanOrder
from tritonsmith.targets.plan_cache import CachedPlan, entry_name, find_plan, plan_from_cache


class Builder:
    """Builds as a GPU machine would, counts how often, and may be slow."""

    def __init__(self, order: PlanOrder, folder: Path) -> None:
        self.order, self.folder, self.count, self.lines = order, folder, 0, list[str]()

    def __call__(self, out: Path, timing_cache: Path) -> ChosenPlan:
        self.count += 1
        return choose_plan(self.order, self.folder, out, tools=OnnxTools().tools())

    def get(self, cache: Path, **options: Any) -> CachedPlan:
        options = {"tensorrt": "10.16.1.11", "device": H100, **options}
        return plan_from_cache(cache, self.order, build=self, say=self.lines.append, **options)


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(write_order(tmp_path), tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "a cache" / "plans"


def test_the_second_time_is_a_hit(builder: Builder, cache: Path) -> None:
    first, second = builder.get(cache), builder.get(cache)
    assert builder.count == 1
    assert (first.built, second.built) == (True, False)
    assert second.path.read_bytes() == (builder.folder / "gpu.fp32.onnx").read_bytes()
    assert dataclasses.replace(second, built=True) == first
    assert second.candidates[0]["chosen"] is True
    assert second.path.stat().st_mode & 0o444 == 0o444
    assert builder.get(cache, force=True).built
    assert builder.count == 2


def test_another_machine_is_another_entry(builder: Builder, cache: Path) -> None:
    builder.get(cache)
    builder.get(cache, tensorrt="10.16.1.12")
    builder.get(cache, device=dataclasses.replace(H100, gpu="H200"))
    builder.get(cache, device=dataclasses.replace(H100, compute_capability="8.6"))
    assert builder.count == 4
    builder.get(cache, device=dataclasses.replace(H100, driver="590.2", memory_bytes=1))
    assert builder.count == 4


def test_another_order_is_another_entry(tmp_path: Path, builder: Builder) -> None:
    other = write_order(tmp_path, plan=PlanOptions(profiles=builder.order.plan.profiles, tf32=True))
    names = {entry_name(order, tensorrt="10.1", device=H100) for order in (builder.order, other)}
    assert len(names) == 2
    assert all(name.startswith("gpu-sm90-") for name in names)


def test_a_plan_for_all_gpus_of_a_kind_is_one_entry(tmp_path: Path) -> None:
    order = write_order(tmp_path, plan=PlanOptions(hardware_compatibility="same_compute_capability"))
    h200 = dataclasses.replace(H100, gpu="H200")
    assert entry_name(order, tensorrt="10.1", device=H100) == entry_name(order, tensorrt="10.1", device=h200)


@pytest.mark.parametrize("damage", ["plan", "facts", "schema", "no plan"])
def test_a_damaged_entry_is_built_again(builder: Builder, cache: Path, damage: str) -> None:
    plan = builder.get(cache).path
    facts = plan.with_name("plan.json")
    if damage == "plan":
        content = bytearray(plan.read_bytes())
        content[-1] ^= 1
        plan.write_bytes(content)
    elif damage == "facts":
        facts.write_text(facts.read_text()[:-20])
    elif damage == "schema":
        facts.write_text(facts.read_text().replace('"schema": 1', '"schema": 0'))
    else:
        plan.unlink()
    builder.lines.clear()
    assert builder.get(cache).built
    assert any("building it again" in line for line in builder.lines)
    assert not builder.get(cache).built


def test_a_failed_or_interrupted_build_leaves_nothing(builder: Builder, cache: Path) -> None:
    for error in (PlanError("no"), KeyboardInterrupt(), SystemExit(143)):

        def fail(out: Path, timing_cache: Path, error: BaseException = error) -> ChosenPlan:
            out.write_bytes(b"half a plan")
            raise error

        with pytest.raises(type(error)):
            plan_from_cache(cache, builder.order, tensorrt="10.16.1.11", device=H100, build=fail)
        assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == ["timing"]
    assert builder.get(cache).built


def test_a_forced_build_that_fails_keeps_the_plan(builder: Builder, cache: Path) -> None:
    kept = builder.get(cache)

    def fail(out: Path, timing_cache: Path) -> ChosenPlan:
        raise PlanError("no")

    with pytest.raises(PlanError):
        plan_from_cache(cache, builder.order, tensorrt="10.16.1.11", device=H100, build=fail, force=True)
    assert find_plan(kept.path.parent) is not None


def test_two_at_once_build_once(builder: Builder, cache: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def build(out: Path, timing_cache: Path) -> ChosenPlan:
        began.set()
        assert go_on.wait(20)
        return builder(out, timing_cache)

    def get() -> CachedPlan:
        say = builder.lines.append
        return plan_from_cache(cache, builder.order, tensorrt="10.1", device=H100, build=build, say=say)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(get)
        assert began.wait(20)
        second = pool.submit(get)
        while not builder.lines:
            time.sleep(0.01)
        assert builder.lines == ["another tritonsmith is at work on this plan; waiting for it"]
        go_on.set()
        assert (first.result(20).built, second.result(20).built) == (True, False)
    assert builder.count == 1


STUCK = """
import sys, time
from pathlib import Path
import plan_orders
from plan_orders import H100
from tritonsmith.targets.order_file import read_order
from tritonsmith.targets.plan_cache import plan_from_cache

def build(out, timing_cache):
    out.write_bytes(b"half a plan")
    print("building", flush=True)
    time.sleep(60)

order = read_order(Path(sys.argv[2]))
plan_from_cache(Path(sys.argv[1]), order, tensorrt="10.16.1.11", device=H100, build=build)
"""


def test_a_killed_build_is_cleared(tmp_path: Path, builder: Builder, cache: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(cache), str(tmp_path / "gpu.order.json")]
    variables = os.environ | {"PYTHONPATH": str(Path(plan_orders.__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"building\n"
        process.kill()
    assert list(cache.glob(".*.staging"))
    assert builder.get(cache).built
    assert not list(cache.glob(".*.staging"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, builder: Builder) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PlanError, match="cannot be written"):
        builder.get(tmp_path / "file" / "plans")
