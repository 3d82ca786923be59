"""What serving costs: the digits model in this process and through the embedded Triton, in one run.

    python perf/overhead.py [--rounds N] [--out perf/results/overhead.json]

Both forms of the model (FP32, INT8) are built from the .h5. A round times each of them in this process
(batch 1, one thread) and through gRPC with perf_analyzer at concurrency 1 and 16; the order turns round after
each round. Latencies are microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tritonsmith.artifact import sha256_of
from tritonsmith.bench.measure import BenchOptions, Level, bench
from tritonsmith.build import build
from tritonsmith.console import print_line, print_table, progress
from tritonsmith.engines import Session, open_session
from tritonsmith.files import write_text_atomically
from tritonsmith.machine import describe_machine
from tritonsmith.recipe import BuildRequest
from tritonsmith.samples import load_samples
from tritonsmith.server import ServerOptions, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "recipes"))
import make_models

ROOT = make_models.ROOT
PRECISIONS = ("fp32", "int8")
CONCURRENCY = (1, 16)
CALLS = 2000  # of the model in this process, in a round


def measure(repository: Path, rounds: int) -> dict[str, Any]:
    """Build both models, measure them, and return the whole result."""
    with progress() as say:
        data = make_models.prepare("digits", say)
        reports = {
            precision: build(request_for(precision, data, repository), say=say) for precision in PRECISIONS
        }
        evaluation = data / "evaluation.npz"
        files = {
            precision: report.entry.version_folder / "model.onnx" for precision, report in reports.items()
        }
        samples = load_samples(evaluation, reports["fp32"].manifest.inputs)
        row = {name: array[:1] for name, array in samples.arrays.items()}
        sessions = {precision: open_session(file, threads=1) for precision, file in files.items()}
        inside: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        served: dict[str, list[Level]] = {f"{p} {c}": [] for p in PRECISIONS for c in CONCURRENCY}
        free_ports = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
        with serve(repository, free_ports, say=say) as server:
            for index in range(rounds):
                for precision in PRECISIONS if index % 2 == 0 else PRECISIONS[::-1]:
                    inside[precision].append(median_call_us(sessions[precision], row))
                    options = BenchOptions(
                        concurrency=CONCURRENCY, rounds=1, interval_ms=500, samples=evaluation
                    )
                    for level in bench(f"digits_{precision}", server.grpc_url, options, say=say).levels:
                        served[f"{precision} {level.concurrency}"].append(level)
    return {
        "command": "python perf/overhead.py",
        "machine": describe_machine(),
        "rounds": rounds,
        "rows": [
            row_of(
                precision,
                files[precision],
                inside[precision],
                [served[f"{precision} {c}"] for c in CONCURRENCY],
            )
            for precision in PRECISIONS
        ],
    }


def request_for(precision: str, data: Path, repository: Path) -> BuildRequest:
    gate = {"evaluation": data / "evaluation.npz", "metric": "accuracy", "max_drop": 0.01}
    return BuildRequest(
        name=f"digits_{precision}",
        source=str(data / "digits.h5"),
        repository=repository,
        precision=precision,
        calibration=data / "calibration.npz" if precision == "int8" else None,
        max_batch_size=64,
        config={"parameters": {"intra_op_thread_count": 1}, "dynamic_batching": {}},
        **gate,  # type: ignore[arg-type]
    )


def median_call_us(session: Session, row: dict[str, Any]) -> float:
    """The median of CALLS calls in this process, in microseconds."""
    times = []
    for _ in range(CALLS):
        began_ns = time.perf_counter_ns()
        session.run(row)
        times.append((time.perf_counter_ns() - began_ns) / 1000)
    return statistics.median(times)


def row_of(precision: str, file: Path, inside: list[float], served: list[list[Level]]) -> dict[str, Any]:
    """One model: medians over the rounds, every round beside them."""
    alone, busy = served
    alone_us, inside_us = statistics.median(level.p50_us for level in alone), statistics.median(inside)
    return {
        "model": f"digits_{precision}",
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
        "in_process_p50_us": inside_us,
        "in_process_p50_us_rounds": inside,
        "served_p50_us": alone_us,
        "served_p50_us_rounds": [level.p50_us for level in alone],
        "added_us": alone_us - inside_us,
        "split_us": {
            part: statistics.median(level.split_us[part] for level in alone) for part in alone[0].split_us
        },
        "served_per_s_at_16": statistics.median(level.throughput_per_s for level in busy),
        "served_per_s_at_16_rounds": [level.throughput_per_s for level in busy],
        "in_process_per_s_one_thread": 1e6 / inside_us,
    }


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    latencies, throughputs = row["served_p50_us_rounds"], row["served_per_s_at_16_rounds"]
    return (
        row["model"],
        f"{row['in_process_p50_us']:.0f}",
        f"{row['served_p50_us']:.0f}",
        f"{min(latencies):.0f} to {max(latencies):.0f}",
        f"{row['added_us']:.0f}",
        f"{row['served_per_s_at_16']:,.0f}",
        f"{min(throughputs):,.0f} to {max(throughputs):,.0f}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What serving costs, beside a call in this process.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "overhead.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tritonsmith-perf-") as folder:
        result = measure(Path(folder) / "repository", options.rounds)
    write_text_atomically(options.out, json.dumps(result, indent=1) + "\n")
    columns = (
        "model",
        "in process p50 us",
        "served p50 us",
        "rounds",
        "added us",
        "served/s at 16",
        "rounds",
    )
    print_table(columns, [table_row(row) for row in result["rows"]])
    print_line(f"{result['machine']['cpu']}, {result['machine']['cpu_count']} cores; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
