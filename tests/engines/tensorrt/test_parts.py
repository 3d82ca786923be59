"""The small parts: progress, messages, tensors, the driver's version, the timing cache's name."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritonsmith.engines.tensorrt.cuda import version_from_text
from tritonsmith.engines.tensorrt.facts import Device
from tritonsmith.engines.tensorrt.log import reason_from_lines
from tritonsmith.engines.tensorrt.progress import Interruption, Phases, interruptible
from tritonsmith.engines.tensorrt.tensors import Binding, fed_array, shape_fits
from tritonsmith.engines.tensorrt.timing_cache import timing_cache_name
from tritonsmith.errors import PlanError

PLAN = Path("model.plan")


def binding(kind: str, *shape: int) -> Binding:
    return Binding(name="x", kind=kind, shape=shape, is_input=True, smallest=shape, largest=shape)


def test_progress_is_said_at_intervals() -> None:
    now, said = [0.0], list[str]()
    phases = Phases(said.append, seconds_between=2, clock=lambda: now[0])
    phases.start("Timing graph nodes", 300)
    for step, at in ((0, 0.0), (1, 1.0), (99, 1.9), (149, 2.5), (299, 60.0)):
        now[0] = at
        phases.step("Timing graph nodes", step)
    phases.finish("Timing graph nodes")
    assert said == [f"TensorRT: Timing graph nodes {done} of 300" for done in (1, 150, 300)]


def test_a_signal_is_delivered_when_the_block_has_ended() -> None:
    reached = []

    def work() -> None:
        with interruptible(enabled=True) as interruption:
            reached.append(interruption.requested())
            signal.raise_signal(signal.SIGINT)
            reached.append(interruption.requested())

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == [False, True]
    with interruptible(enabled=True) as interruption:  # nothing is left of the first
        assert not interruption.requested()


def test_a_signal_is_seen_while_the_main_thread_is_inside_of_a_library() -> None:
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros: an unlocked pthread_mutex_t
    held, seen = threading.Event(), []

    def callback(interruption: Interruption) -> None:
        libc.pthread_mutex_lock(mutex)
        held.set()
        time.sleep(0.1)  # the main thread waits in pthread_mutex_lock, where Python cannot run a handler
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            if interruption.requested():
                seen.append(True)
                break
            time.sleep(0.01)
        libc.pthread_mutex_unlock(mutex)

    def work() -> None:
        with interruptible(enabled=True) as interruption:
            thread = threading.Thread(target=callback, args=(interruption,))
            thread.start()
            held.wait()
            libc.pthread_mutex_lock(mutex)
            thread.join()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [True]


def test_errors_are_quoted_before_warnings_and_once() -> None:
    lines = [
        ("WARNING", "slow"),
        ("ERROR", "no kernel"),
        ("ERROR", "no kernel"),
        ("INTERNAL_ERROR", "broken"),
    ]
    assert reason_from_lines(lines, "none") == "no kernel\n    broken"
    assert reason_from_lines(lines[:1], "none") == "slow"
    assert reason_from_lines([], "none") == "none"


def test_the_drivers_version_is_found_in_what_the_system_says() -> None:
    assert version_from_text("580.159.04\n") == "580.159.04"
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"
    assert version_from_text(line) == "535.104.05"
    assert version_from_text("no number") is None


def test_the_timing_cache_is_one_for_a_version_and_a_gpu() -> None:
    device = Device(gpu="NVIDIA H100 80GB HBM3", compute_capability="9.0", driver="580", memory_bytes=1)
    assert timing_cache_name("10.16.1.11", device) == "timing-10.16.1.11-sm90-nvidia-h100-80gb-hbm3.cache"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("FLOAT", "float32"), ("HALF", "float16"), ("INT64", "int64"), ("BOOL", "bool"), ("BF16", "bfloat16")],
)
def test_types_are_numpys(kind: str, dtype: str) -> None:
    assert binding(kind).numpy_type().name == dtype


def test_a_type_that_numpy_lacks_is_refused() -> None:
    with pytest.raises(PlanError, match="'x' is FP8"):
        binding("FP8").numpy_type()


def test_inputs_are_passed_contiguous_and_scalars_stay_scalars() -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    fed = fed_array(binding("FLOAT", 3, 2), turned, PLAN)
    assert fed.flags.c_contiguous
    np.testing.assert_array_equal(fed, turned)
    assert fed_array(binding("FLOAT"), np.array(1, np.float32), PLAN).shape == ()


def test_int64_is_narrowed_where_the_plan_has_int32_and_values_fit() -> None:
    ids = np.array([1, 30_000], np.int64)
    fed = fed_array(binding("INT32", 2), ids, PLAN)
    assert fed.dtype == np.int32
    assert fed.tolist() == [1, 30_000]
    with pytest.raises(PlanError, match="is int32") as caught:
        fed_array(binding("INT32", 1), np.array([2**31], np.int64), PLAN)
    assert "2147483648" in str(caught.value.found)


def test_other_types_are_refused() -> None:
    with pytest.raises(PlanError, match="another data type"):
        fed_array(binding("FLOAT", 1), np.zeros(1, np.float64), PLAN)


@pytest.mark.parametrize("shape", [(0, 3), (9, 3), (4, 2), (4,), (4, 3, 1)])
def test_shapes_outside_of_the_profile_are_refused(shape: Any) -> None:
    ranged = Binding(name="x", kind="FLOAT", shape=(-1, 3), is_input=True, smallest=(1, 3), largest=(8, 3))
    shape_fits(ranged, (8, 3), PLAN)
    with pytest.raises(PlanError, match="does not take this shape") as caught:
        shape_fits(ranged, shape, PLAN)
    assert caught.value.expected == "[1 to 8, 3]"
