"""Every derived value against the measurement that it comes from, computed here by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from measured import MEASURED
from tritonsmith.deploy.sizes import (
    MARGINS,
    explain_sizes,
    liveness_probe_for,
    memory_bytes_for,
    shm_bytes_for,
    sizes_from_measurements,
    startup_probe_for,
)

MIB = 1 << 20


def test_shared_memory_of_instances_and_payloads() -> None:
    # 2 instances x (1 + 10 + 20 MiB) + 1 x (1 + 1 + 1 MiB) = 65 MiB, above the measured 50; x 1.25 = 81.25
    assert shm_bytes_for(MEASURED) == 96 * MIB


def test_shared_memory_is_never_less_than_measured() -> None:
    assert (
        shm_bytes_for(replace(MEASURED, shm_bytes=400 * MIB)) == 512 * MIB
    )  # 400 x 1.25 = 500, in steps of 16


def test_shared_memory_is_at_least_what_docker_gives() -> None:
    assert shm_bytes_for(replace(MEASURED, models=(), shm_bytes=0)) == 64 * MIB


def test_memory() -> None:
    # 1000 MiB x 1.25, /dev/shm 96 - 50 MiB beyond the measured, /tmp 16 MiB: 1312, in steps of 64 MiB
    assert memory_bytes_for(MEASURED) == 1344 * MIB
    assert memory_bytes_for(replace(MEASURED, peak_bytes=2000 * MIB)) == 2624 * MIB  # 2500 + 46 + 16 = 2562


def test_processor() -> None:
    sizes = sizes_from_measurements(MEASURED)
    assert (sizes.cpu_request_milli, sizes.cpu_limit_milli) == (1300, 2000)  # 1.234 cores of 2
    assert sizes_from_measurements(replace(MEASURED, cpu_s_per_s=0.001)).cpu_request_milli == 100


@pytest.mark.parametrize(
    ("ready_s", "period_s", "patience_s"), [(0.5, 1, 30), (20.0, 2, 80), (95.0, 10, 380), (600.0, 60, 2400)]
)
def test_startup_probe_waits_four_times_the_measured_start(
    ready_s: float, period_s: int, patience_s: int
) -> None:
    probe = startup_probe_for(ready_s)
    assert (probe.period_s, probe.patience_s) == (period_s, patience_s)


def test_liveness_waits_longer_than_the_longest_execution() -> None:
    assert liveness_probe_for(MEASURED).timeout_s == 5
    slow = replace(MEASURED, models=(replace(MEASURED.models[0], compute_s=30.2),))
    assert (liveness_probe_for(slow).timeout_s, liveness_probe_for(slow).period_s) == (31, 62)


def test_end_of_a_server() -> None:
    sizes = sizes_from_measurements(MEASURED)
    assert sizes.exit_timeout_s == 17  # 4 x 2.5 s in flight, 1.5 x 4.2 s to stop: 16.3
    assert sizes.grace_s == 15 + 17 + 5
    assert sizes.connection_age_s < sizes.drain_s
    assert sizes.grace_s > sizes.drain_s + sizes.exit_timeout_s


def test_explanations_name_the_measurements() -> None:
    texts = explain_sizes(MEASURED, sizes_from_measurements(MEASURED))
    assert "1000Mi" in texts["memory"]
    assert "1344Mi" in texts["memory"]
    assert "50Mi" in texts["shm"]
    assert "20 s" in texts["startup-probe"]
    assert "2.5 s" in texts["exit-timeout"]


def test_margins_are_named_once_and_explained() -> None:
    assert len({margin.name for margin in MARGINS}) == len(MARGINS)
    assert all(margin.why and margin.unit for margin in MARGINS)
