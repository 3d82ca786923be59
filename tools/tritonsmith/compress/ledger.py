"""The size ledger: what each step of a chain did to bytes, parameters, FLOPs and latency.

Every factor is measured on the written file: bytes on disk, parameters and FLOPs from its graph, latency on
the engine in rounds that alternate over all files of the chain. The factors of the lines multiply to those of
the last file against the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress.cost import cost_of, lengths_in
from tritonsmith.engines import open_session
from tritonsmith.measure import THREADS, compare_speeds
from tritonsmith.samples import Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of the chain; a factor is how many times smaller or faster than the file before it."""

    step: str  # "fp32" for the first
    size_bytes: int
    parameters: int
    flops: int  # of one sample, free axes as long as in the samples
    latency_ms: float  # of one run at the ledger's batch size, one thread; the median of the rounds
    bytes_factor: float
    parameters_factor: float
    flops_factor: float
    speed_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The lines of a chain, and the product of each factor."""

    engine: str
    batch_size: int
    entries: tuple[Entry, ...]
    speed_low: float  # of the last file against the first, the 95 % interval
    speed_high: float

    @property
    def bytes_factor(self) -> float:
        return math.prod(entry.bytes_factor for entry in self.entries)

    @property
    def parameters_factor(self) -> float:
        return math.prod(entry.parameters_factor for entry in self.entries)

    @property
    def flops_factor(self) -> float:
        return math.prod(entry.flops_factor for entry in self.entries)

    @property
    def speed_factor(self) -> float:
        return math.prod(entry.speed_factor for entry in self.entries)

    def json(self) -> dict[str, Json]:
        return {
            "engine": self.engine,
            "batch_size": self.batch_size,
            "threads": THREADS,
            "entries": [asdict(entry) for entry in self.entries],
            "product": {
                "bytes_factor": self.bytes_factor,
                "parameters_factor": self.parameters_factor,
                "flops_factor": self.flops_factor,
                "speed_factor": self.speed_factor,
                "speed_low": self.speed_low,
                "speed_high": self.speed_high,
            },
        }


def measure_ledger(
    artifacts: Sequence[Artifact], samples: Samples, *, engine: str = "onnxruntime", batch_size: int = 1
) -> Ledger:
    """The ledger of a chain: the FP32 artifact first, then the artifact after each step.

    `samples` are what latency is measured on, the first `batch_size` of them.

    Raises:
        EngineError: the engine refuses one of the files.
    """
    first = artifacts[0]
    size = batch_size if first.batched else 1
    rows = [index % samples.count for index in range(size)]
    inputs = {name: array[rows] if first.batched else array[0] for name, array in samples.arrays.items()}
    sessions = [open_session(artifact.path, engine=engine, threads=THREADS) for artifact in artifacts]
    # An artifact alone is timed beside itself: a latency needs a round as well.
    ratios = compare_speeds(sessions[0], sessions[1:] or sessions, inputs, batch_size=size)
    latencies = [ratios[0].baseline_ms, *(ratio.candidate_ms for ratio in ratios)][: len(artifacts)]
    speeds = [1.0, *(ratio.ratio for ratio in ratios)][: len(artifacts)]
    lengths = lengths_in(samples, first)
    costs = [cost_of(artifact.path, lengths=lengths) for artifact in artifacts]
    sizes = [onnx_model.model_bytes(artifact.path) for artifact in artifacts]
    entries = []
    for index, artifact in enumerate(artifacts):
        before = max(0, index - 1)
        entries.append(
            Entry(
                step=artifact.steps[-1].name if index else artifact.precision,
                size_bytes=sizes[index],
                parameters=costs[index].parameters,
                flops=costs[index].flops,
                latency_ms=latencies[index],
                bytes_factor=sizes[before] / sizes[index],
                parameters_factor=_factor(costs[before].parameters, costs[index].parameters),
                flops_factor=_factor(costs[before].flops, costs[index].flops),
                speed_factor=speeds[index] / speeds[before],
            )
        )
    last = ratios[-1]
    alone = len(artifacts) == 1
    return Ledger(
        engine=engine,
        batch_size=size,
        entries=tuple(entries),
        speed_low=1.0 if alone else last.low,
        speed_high=1.0 if alone else last.high,
    )


def _factor(before: int, after: int) -> float:
    """1 where there is nothing to count: a graph without products has no FLOPs."""
    return before / after if after else 1.0
