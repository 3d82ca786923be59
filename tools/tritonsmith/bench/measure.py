"""Benchmark one served model: rounds of perf_analyzer over concurrencies, summed up with their spread."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import Json
from tritonsmith.bench import perf_analyzer
from tritonsmith.client import Client, Signature
from tritonsmith.console import Say
from tritonsmith.engines import Arrays
from tritonsmith.errors import UsageError
from tritonsmith.machine import describe_machine
from tritonsmith.samples import Samples, load_served_samples

# A level whose rounds lie further apart than this is called unstable: perf_analyzer's own default.
STABILITY = 0.10
MAX_SAMPLES = 256  # that perf_analyzer cycles through; more only slows its start
MIN_INTERVAL_MS = 50  # below, a window holds too few requests
FREE_AXIS = 16  # length of a free axis in random inputs
SEEDED_COUNT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure. Time for a level: rounds * 3 windows of `interval_ms`.

    Raises UsageError for a number out of range.
    """

    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_size: int = 1
    interval_ms: int = 1000
    rounds: int = 3
    samples: Path | None = None

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise UsageError("no such concurrency", found=self.concurrency, expected="1 or more")
        least = {"batch_size": 1, "interval_ms": MIN_INTERVAL_MS, "rounds": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {getattr(self, name)}", expected=f"{limit} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One concurrency: medians over the rounds, in inferences per second and microseconds."""

    concurrency: int
    throughput_per_s: float
    throughput_rounds: tuple[float, ...]
    p50_us: float
    p90_us: float
    p95_us: float
    p99_us: float
    split_us: Mapping[str, float]  # where the average request spends its time
    latencies_us: tuple[float, ...]  # raw, all rounds; empty where perf_analyzer cannot keep them
    unstable: str | None  # why, if the rounds disagree


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What was measured, on what, with which inputs."""

    model: str
    url: str
    protocol: str
    batch_size: int
    inputs: str
    inputs_sha256: str | None
    interval_ms: int
    rounds: int
    measured_at: str
    perf_analyzer: str
    machine: Mapping[str, Json]
    levels: tuple[Level, ...]
    notes: tuple[str, ...] = ()

    def best(self) -> Level:
        return max(self.levels, key=lambda level: level.throughput_per_s)

    def json(self, *, raw: bool = False) -> dict[str, Json]:
        """Everything measured; the raw latencies of every request only where `raw`."""
        value = asdict(self)
        if not raw:
            for level in value["levels"]:
                del level["latencies_us"]
        return value


SPLIT = (
    "client_send_us",
    "network_us",
    "queue_us",
    "compute_input_us",
    "compute_infer_us",
    "compute_output_us",
    "client_receive_us",
)


def parse_concurrency(text: str) -> tuple[int, ...]:
    """ "4" is one level; "1:16" doubles from 1 to 16; "2:10:4" counts up in fours.

    Raises:
        UsageError: for anything else.
    """
    wrong = UsageError(f"--concurrency {text}", expected="N, FROM:TO (doubling) or FROM:TO:STEP")
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        raise wrong from None
    if len(numbers) > 3 or min(numbers) < 1:
        raise wrong
    if len(numbers) == 1:
        return (numbers[0],)
    first, last = numbers[:2]
    if last < first:
        raise wrong
    if len(numbers) == 3:
        return tuple(range(first, last + 1, numbers[2]))
    levels = []
    while first < last:
        levels.append(first)
        first *= 2
    return (*levels, last)


def bench(
    model: str, url: str, options: BenchOptions = BenchOptions(), *, say: Say = lambda _: None
) -> BenchResult:
    """Measure `model` at every concurrency; `url` is grpc://host:port or http://host:port.

    The order of the levels turns round after each round, so that a drift of the machine does not favour
    one of them.

    Raises:
        BenchError: perf_analyzer failed or measured nothing.
        ClientError: the server or the model cannot be reached.
        UsageError: a batch that the model does not take.
        SamplesError: samples that the model does not take.
    """
    if "://" not in url:
        url = f"grpc://{url}"
    with Client(url) as client:
        signature = client.model(model).signature
    _check_batch_size(options.batch_size, signature)
    samples = None
    if options.samples:
        samples = load_served_samples(options.samples, signature)
    arrays = samples.arrays if samples else _seeded_inputs(signature)
    analyzer = perf_analyzer.ensure_perf_analyzer(say=say)
    protocol, _, address = url.partition("://")
    with tempfile.TemporaryDirectory(prefix="tritonsmith-bench-") as folder:
        load = perf_analyzer.Load(
            model=model,
            url=address,
            protocol=protocol,
            concurrency=1,
            batch_size=options.batch_size,
            interval_ms=options.interval_ms,
            input_data=_write_inputs(arrays, Path(folder)),
            keep_samples=_values_per_request(signature, arrays) * options.batch_size
            <= perf_analyzer.PROFILE_VALUES_PER_REQUEST,
        )
        runs = _run_rounds(analyzer, load, options, say)
    return BenchResult(
        model=model,
        url=url,
        protocol=protocol,
        batch_size=options.batch_size,
        inputs=f"{min(samples.count, MAX_SAMPLES)} samples of {samples.path.name}" if samples else "random",
        inputs_sha256=samples.sha256 if samples else None,
        interval_ms=options.interval_ms,
        rounds=options.rounds,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        perf_analyzer=analyzer.origin,
        machine=describe_machine(),
        levels=tuple(summarize(level, runs[level]) for level in options.concurrency),
        notes=tuple(_notes(signature, samples)),
    )


def _notes(signature: Signature, samples: Samples | None) -> Iterator[str]:
    if signature.config.get("response_cache", {}).get("enable"):
        yield "the model has a response cache: repeated inputs are answered from it, not computed"
    if samples is None:
        yield "random inputs: real ones, from --samples X.npz, may be faster or slower"


def _run_rounds(
    analyzer: perf_analyzer.PerfAnalyzer, load: perf_analyzer.Load, options: BenchOptions, say: Say
) -> dict[int, list[perf_analyzer.Run]]:
    """The runs of each concurrency; every second round goes backwards."""
    runs: dict[int, list[perf_analyzer.Run]] = {level: [] for level in options.concurrency}
    for index in range(options.rounds):
        order = options.concurrency if index % 2 == 0 else tuple(reversed(options.concurrency))
        for concurrency in order:
            say(f"round {index + 1} of {options.rounds}: {load.model} at concurrency {concurrency}")
            runs[concurrency].append(perf_analyzer.run(analyzer, replace(load, concurrency=concurrency)))
    return runs


def summarize(concurrency: int, runs: Sequence[perf_analyzer.Run]) -> Level:
    """Medians over rounds; percentiles come from the raw latencies of all rounds where they were kept."""
    throughputs = tuple(run.throughput_per_s for run in runs)
    middle = statistics.median(throughputs)
    spread = (max(throughputs) - min(throughputs)) / middle
    latencies = tuple(value for run in runs for value in run.latencies_us)
    if latencies:
        p50, p90, p95, p99 = (float(value) for value in np.percentile(latencies, (50, 90, 95, 99)))
    else:
        p50, p90, p95, p99 = (
            statistics.median(getattr(run, name) for run in runs)
            for name in ("p50_us", "p90_us", "p95_us", "p99_us")
        )
    unstable = None
    if len(runs) > 1 and spread > STABILITY:
        unstable = f"throughput of the rounds differs by {spread:.0%}"
    return Level(
        concurrency=concurrency,
        throughput_per_s=middle,
        throughput_rounds=throughputs,
        p50_us=p50,
        p90_us=p90,
        p95_us=p95,
        p99_us=p99,
        split_us={name: statistics.median(getattr(run, name) for run in runs) for name in SPLIT},
        latencies_us=latencies,
        unstable=unstable,
    )


def _check_batch_size(batch_size: int, signature: Signature) -> None:
    if batch_size > max(signature.max_batch_size, 1):
        raise UsageError(
            f"--batch-size {batch_size} is more than {signature.model!r} takes",
            expected=f"{signature.max_batch_size} at most"
            if signature.max_batch_size
            else "1: no batch axis",
        )


def _write_inputs(arrays: Arrays, folder: Path) -> Path:
    path = folder / "inputs.json"
    perf_analyzer.write_input_data({name: array[:MAX_SAMPLES] for name, array in arrays.items()}, path)
    return path


def _seeded_inputs(signature: Signature) -> Arrays:
    """Random inputs, the same every time: numbers in 0..1, whole numbers in 0..9, short strings.

    perf_analyzer's own random inputs are not used: it breaks its profile over models without a batch axis.
    """
    random = np.random.default_rng(0)
    skip = 1 if signature.max_batch_size > 0 else 0
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in signature.inputs:
        shape = (SEEDED_COUNT, *(FREE_AXIS if axis < 0 else axis for axis in tensor.shape[skip:]))
        dtype = dtypes.BY_WIRE[tensor.datatype]
        if dtype.name == "string":
            arrays[tensor.name] = random.integers(0, 10, shape).astype("S").astype(object)
        elif dtype.name.startswith(("int", "uint")):
            arrays[tensor.name] = random.integers(0, 10, shape).astype(dtype.numpy)
        elif dtype.name == "bool":
            arrays[tensor.name] = random.random(shape) < 0.5
        else:
            arrays[tensor.name] = random.random(shape).astype(dtype.numpy)
    return arrays


def _values_per_request(signature: Signature, arrays: Arrays) -> int:
    """About how many numbers one request of one sample carries in and out."""
    skip = 1 if signature.max_batch_size > 0 else 0
    total = sum(np.asarray(array[0]).size for array in arrays.values())
    for tensor in signature.outputs:
        total += math.prod(FREE_AXIS if axis < 0 else axis for axis in tensor.shape[skip:])
    return total
