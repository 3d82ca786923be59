"""Benchmarks of models on a real server: what is summed up, what is refused, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from python_models import processes_under, still_running
from served_models import Addresses
from tritonsmith.bench.measure import SPLIT, BenchOptions, bench, parse_concurrency, summarize
from tritonsmith.bench.perf_analyzer import COLUMNS, Run, ensure_perf_analyzer
from tritonsmith.errors import BenchError, ClientError, SamplesError, UsageError
from tritonsmith.server.environment import ServerEnvironment

QUICK = BenchOptions(concurrency=(1, 4), interval_ms=200, rounds=2)


@pytest.fixture(scope="module", autouse=True)
def _analyzer(server_environment: ServerEnvironment) -> None:
    ensure_perf_analyzer()


def run_of(throughput_per_s: float, latencies_us: tuple[float, ...] = (), **values: float) -> Run:
    numbers = dict.fromkeys(COLUMNS, 1.0) | {"throughput_per_s": throughput_per_s} | values
    return Run(**numbers, latencies_us=latencies_us)


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("1", (1,)),
        ("1:16", (1, 2, 4, 8, 16)),
        ("3:20", (3, 6, 12, 20)),
        ("4:4", (4,)),
        ("2:10:4", (2, 6, 10)),
        ("1:6:2", (1, 3, 5)),
    ],
)
def test_concurrency_is_read(text: str, levels: tuple[int, ...]) -> None:
    assert parse_concurrency(text) == levels


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1.5", "1:", ":4", "8:1", "1:8:0", "1:8:2:1", "1,2"])
def test_wrong_concurrency_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_concurrency(text)
    assert text in str(caught.value)
    assert "FROM:TO:STEP" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"interval_ms": 0}, "--interval-ms 0"),
        ({"batch_size": -1}, "--batch-size -1"),
        ({"concurrency": ()}, "concurrency"),
        ({"concurrency": (1, 0)}, "concurrency"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(options: dict[str, int], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        BenchOptions(**options)  # type: ignore[arg-type]


def test_a_level_is_the_median_of_its_rounds() -> None:
    level = summarize(
        8,
        [
            run_of(100, queue_us=5, p50_us=7, p99_us=50),
            run_of(104, queue_us=1, p50_us=9, p99_us=70),
            run_of(98, queue_us=3, p50_us=8, p99_us=60),
        ],
    )
    assert (level.concurrency, level.throughput_per_s, level.throughput_rounds) == (8, 100, (100, 104, 98))
    assert (level.p50_us, level.p99_us) == (8, 60)
    assert level.split_us["queue_us"] == 3
    assert list(level.split_us) == list(SPLIT)
    assert level.unstable is None


def test_percentiles_come_from_all_raw_latencies() -> None:
    """1 to 101 in two unequal rounds: the 50th percentile is 51, the 90th 91, whatever the reports say."""
    level = summarize(1, [run_of(10, tuple(range(1, 31)), p50_us=999), run_of(10, tuple(range(31, 102)))])
    assert (level.p50_us, level.p90_us, level.p95_us, level.p99_us) == (51, 91, 96, 100)
    assert len(level.latencies_us) == 101


@pytest.mark.parametrize(
    ("throughputs", "unstable"),
    [
        ((100.0, 111.0, 100.0), "throughput of the rounds differs by 11%"),
        ((80.0, 100.0, 105.0), "throughput of the rounds differs by 25%"),
        ((100.0, 109.0, 100.0), None),
        ((100.0,), None),
    ],
)
def test_rounds_that_disagree_are_called_unstable(
    throughputs: tuple[float, ...], unstable: str | None
) -> None:
    assert summarize(1, [run_of(throughput) for throughput in throughputs]).unstable == unstable


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_benchmark_says_what_it_measured(served_models: Addresses, protocol: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((300, 3), np.float32))
    options = BenchOptions(
        concurrency=(1, 4), interval_ms=200, rounds=2, batch_size=2, samples=tmp_path / "x.npz"
    )
    said: list[str] = []
    result = bench("affine", getattr(served_models, protocol), options, say=said.append)
    assert said == [
        "round 1 of 2: affine at concurrency 1",
        "round 1 of 2: affine at concurrency 4",
        "round 2 of 2: affine at concurrency 4",
        "round 2 of 2: affine at concurrency 1",
    ]
    assert (result.protocol, result.batch_size, result.inputs) == (protocol, 2, "256 samples of x.npz")
    assert result.machine["cpu_count"] == len(os.sched_getaffinity(0))
    assert [level.concurrency for level in result.levels] == [1, 4]
    for level in result.levels:
        assert level.p50_us == np.percentile(level.latencies_us, 50)
        assert level.throughput_per_s == pytest.approx(np.median(level.throughput_rounds))
    assert result.best().throughput_per_s == max(level.throughput_per_s for level in result.levels)
    assert "latencies_us" not in result.json()["levels"][0]  # type: ignore[operator, index]
    raw = result.json(raw=True)["levels"]
    assert raw[1]["latencies_us"] == result.levels[1].latencies_us  # type: ignore[index, call-overload]


def test_an_address_without_scheme_is_of_grpc(served_models: Addresses) -> None:
    options = BenchOptions(concurrency=(1,), interval_ms=200, rounds=1)
    result = bench("affine", served_models.grpc.partition("://")[2], options)
    assert (result.url, result.protocol, result.inputs) == (served_models.grpc, "grpc", "random")


def test_random_inputs_get_a_length_for_free_axes(served_models: Addresses) -> None:
    options = BenchOptions(concurrency=(1,), interval_ms=200, rounds=1)
    result = bench("columns", served_models.http, options)  # without a batch axis, too
    assert result.levels[0].latencies_us
    assert any("random inputs" in note for note in result.notes)


def test_a_model_that_refuses_is_told_with_its_reason(served_models: Addresses, tmp_path: Path) -> None:
    np.savez(tmp_path / "below.npz", x=np.full((2, 1), -3, np.float32))
    options = BenchOptions(concurrency=(1,), interval_ms=200, rounds=1, samples=tmp_path / "below.npz")
    with pytest.raises(BenchError) as caught:
        bench("picky", served_models.grpc, options)
    assert "below zero: -3.0" in str(caught.value)


def test_what_cannot_be_measured(served_models: Addresses, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="no_such_model"):
        bench("no_such_model", served_models.grpc, QUICK)
    with pytest.raises(ClientError, match="stream"):
        bench("stream", served_models.http, QUICK)
    with pytest.raises(ClientError, match=r"127\.0\.0\.1:9"):
        bench("affine", "grpc://127.0.0.1:9", QUICK)
    with pytest.raises(ClientError, match="no address"):
        bench("affine", "ftp://127.0.0.1:9", QUICK)


@pytest.mark.parametrize(("model", "expected"), [("affine", "4 at most"), ("columns", "no batch axis")])
def test_a_batch_that_the_model_does_not_take(served_models: Addresses, model: str, expected: str) -> None:
    with pytest.raises(UsageError, match="--batch-size 5") as caught:
        bench(model, served_models.http, BenchOptions(batch_size=5))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.ones((2, 3), np.float32)}, "lacks an array for 'x'"),
        ({"x": np.ones((2, 4), np.float32)}, "does not fit"),
        ({"x": np.ones((0, 3), np.float32)}, "no samples"),
        ({"x": np.full((2, 3), np.nan, np.float32)}, "NaN"),
    ],
)
def test_samples_that_do_not_fit(
    served_models: Addresses, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(SamplesError, match=message):
        bench("affine", served_models.grpc, BenchOptions(samples=tmp_path / "x.npz"))


@pytest.fixture
def long_bench(served_models: Addresses, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tritonsmith", "bench", "affine", "--url", served_models.grpc]
    process = subprocess.Popen(
        [*command, "--interval-ms", "20000", "--concurrency", "1", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    yield process
    process.kill()
    process.communicate()


def _measures(pid: int) -> bool:
    try:
        return b"--measurement-interval" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_for_analyzer(process: subprocess.Popen[str]) -> set[int]:
    """`process` and its perf_analyzer, once that is up."""
    for _ in range(200):
        found = processes_under(process.pid)
        if any(_measures(pid) for pid in found):
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no perf_analyzer was started")


def test_ctrl_c_ends_perf_analyzer_too(long_bench: subprocess.Popen[str], tmp_path: Path) -> None:
    family = wait_for_analyzer(long_bench)
    long_bench.send_signal(signal.SIGINT)
    out, err = long_bench.communicate(timeout=20)
    assert long_bench.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert still_running(family) == set()
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]  # made before the work, and empty
