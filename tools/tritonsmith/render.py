"""Results as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json, Target, bytes_of
from tritonsmith.console import human_bytes, human_count, print_line, print_table

if TYPE_CHECKING:
    from tritonsmith.bench.measure import BenchResult
    from tritonsmith.build import BuildReport
    from tritonsmith.compress.search.outcome import SearchResult
    from tritonsmith.compression import CompressReport
    from tritonsmith.repository.entry import Entry
    from tritonsmith.server import Server
    from tritonsmith.server.doctor import Finding
    from tritonsmith.validate import ValidationReport


SERVER_SPLIT = ("queue_us", "compute_input_us", "compute_infer_us", "compute_output_us")
PERCENTILES = (50, 90, 95, 99)
CANDIDATE_COLUMNS = ("", "candidate", "size", "metric", "drop", "95 % interval", "speed", "note")


def json_from_artifact(artifact: Artifact) -> dict[str, Json]:
    return {**asdict(artifact), "path": str(artifact.path)}


def print_artifact(artifact: Artifact) -> None:
    print_line(f"{artifact.path}  {human_bytes(bytes_of(artifact.path))}, {artifact.precision}")
    for label, specs in (("takes", artifact.inputs), ("gives", artifact.outputs)):
        for spec in specs:
            print_line(f"  {label} {spec}")


def json_from_server(server: Server) -> dict[str, Json]:
    return {
        "http": server.http_url,
        "grpc": f"grpc://{server.grpc_url}",
        "metrics": server.metrics_url,
        "pid": server.pid,
    }


def print_server(server: Server) -> None:
    print_line(f"serving {server.repository} (Ctrl-C stops it)")
    print_line(f"  http     {server.http_url}")
    print_line(f"  grpc     grpc://{server.grpc_url}")
    print_line(f"  metrics  {server.metrics_url}")


def print_bench(result: BenchResult) -> None:
    rows = []
    for level in result.levels:
        rows.append(
            (
                level.concurrency,
                f"{level.throughput_per_s:,.0f}",
                *(
                    f"{value / 1000:.2f}"
                    for value in (level.p50_us, level.p90_us, level.p95_us, level.p99_us)
                ),
                *(f"{level.split_us[part] / 1000:.2f}" for part in SERVER_SPLIT),
                f"unstable: {level.unstable}" if level.unstable else "",
            )
        )
    print_table(
        (
            "concurrency",
            "inferences/s",
            *(f"p{percentile} ms" for percentile in PERCENTILES),
            *(f"{part.removeprefix('compute_').removesuffix('_us')} ms" for part in SERVER_SPLIT),
            "note",
        ),
        rows,
        title=f"{result.model} over {result.protocol}, batch {result.batch_size}, {result.inputs}",
    )
    for note in result.notes:
        print_line(f"note: {note}")
    print_line(f"{result.machine['cpu']}, {result.machine['cpu_count']} cores")


def print_findings(findings: Sequence[Finding]) -> None:
    rows = [(finding.status, finding.name, finding.detail, finding.fix or "") for finding in findings]
    print_table(("", "what", "found", "to do"), rows)


def print_validation(report: ValidationReport) -> None:
    rows = []
    for check in report.checks:
        judged = "recorded" if check.tolerance is None else "ok" if check.passed else "FAILED"
        rows.append(
            (
                judged,
                check.protocol,
                check.mode,
                check.output,
                check.against,
                check.samples_count,
                check.values_count,
                f"{check.max_abs_error:.2g}",
                "-" if check.tolerance is None else f"{check.tolerance:.2g}",
            )
        )
    print_table(
        ("", "over", "mode", "output", "against", "samples", "values", "largest error", "tolerance"), rows
    )
    for check in report.checks:
        if not check.passed and check.worst is not None:
            print_line(f"{check.protocol} {check.mode} {check.output}: {check.worst}")
    for mixing in report.mixing:
        print_line(
            f"{mixing.protocol} concurrent: {mixing.samples_count} samples of {mixing.model} in "
            f"{mixing.executions_count} executions, largest batch {mixing.largest_batch}"
        )
    if report.metric is not None:
        print_line(f"{report.metric.metric}: {report.metric.baseline:.4g} before, "
                   f"{report.metric.candidate:.4g} served; {report.metric.reason}")  # fmt: skip
    for note in report.notes:
        print_line(f"note: {note}")
    print_line("passed" if report.passed else "FAILED")


def print_build(report: BuildReport) -> None:
    manifest = report.manifest
    state = "unchanged, answered from the manifest" if report.unchanged else f"{report.duration_s:.1f} s"
    print_line(
        f"{manifest.name} version {report.entry.version}, {manifest.precision or 'an ensemble'}: "
        f"{report.entry.version_folder} ({state})"
    )
    if manifest.candidates:
        print_table(CANDIDATE_COLUMNS, candidate_rows(report.json()))
    if manifest.ledger is not None:
        print_ledger(manifest.ledger)
    for target in manifest.targets:
        print_target(target, report.entry)


def print_target(target: Target, entry: Entry) -> None:
    """What a further target serves, and, where its plan is still to be built, how that is done."""
    state = target.precision or "its plan is built on the GPU machine"
    path = entry.target_config_path(target.name)
    print_line(f"target {target.name}, {target.backend}: {path} ({state})")
    if target.order is not None:
        print_table(CANDIDATE_COLUMNS, candidate_rows({"candidates": target.candidates}, kept="kept"))
    if target.deferred:
        print_line(
            f"next, on the GPU machine: tritonsmith plans {entry.folder.parent} --target {target.name}"
        )
        print_line("      or start the container of docker/Dockerfile.gpu, which does it before it is ready")


LEDGER_COLUMNS = (*("step", "size", "smaller", "parameters", "fewer", "FLOPs", "fewer", "latency", "faster"),)


def print_ledger(ledger: Mapping[str, Any]) -> None:
    title = f"ledger: {ledger['engine']}, batch {ledger['batch_size']}, {ledger['threads']} thread"
    print_table(LEDGER_COLUMNS, ledger_rows(ledger), title=title)


def ledger_rows(ledger: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each step of a ledger in its JSON form, each factor beside its number, and their product."""
    rows: list[tuple[str, ...]] = []
    for entry in ledger["entries"]:
        first = not rows
        rows.append(
            (
                entry["step"],
                human_bytes(entry["size_bytes"]),
                "" if first else f"{entry['bytes_factor']:.2f}x",
                f"{entry['parameters']:,}",
                "" if first else f"{entry['parameters_factor']:.2f}x",
                human_count(entry["flops"]),
                "" if first else f"{entry['flops_factor']:.2f}x",
                f"{entry['latency_ms']:.3g} ms",
                "" if first else f"{entry['speed_factor']:.2f}x",
            )
        )
    product = ledger["product"]
    factors = ("bytes_factor", "parameters_factor", "flops_factor", "speed_factor")
    cells = [cell for name in factors for cell in ("", f"{product[name]:.1f}x")]
    rows.append(("product", *cells))
    return rows


def print_compression(report: CompressReport) -> None:
    record = report.json()
    print_line(
        f"{report.artifact.path}  {human_bytes(onnx_model.model_bytes(report.artifact.path))}, "
        f"{report.artifact.precision} ({report.duration_s:.1f} s; record: {report.record})"
    )
    if report.search is not None:
        print_search(report.search)
    print_table(CANDIDATE_COLUMNS, candidate_rows(record))
    print_ledger(report.chain.ledger.json())
    if report.gate is not None:
        print_line(f"{report.gate.metric}: {report.gate.reason}")
    print_line("nothing was judged: there is no evaluation data" if report.passed is None
               else "passed" if report.passed else "FAILED")  # fmt: skip


def print_search(result: SearchResult) -> None:
    """The candidates with the Pareto front marked, what was skipped, and where none passes what to do."""
    from tritonsmith.compress.search.outcome import ROW_COLUMNS, trial_rows

    print_table(
        ROW_COLUMNS, trial_rows(result.json()), title=f"search for {result.goal.text()} ({result.ended})"
    )
    for skip in result.skipped:
        print_line(f"{'failed' if skip.failed else 'skipped'}: {skip.name}: {skip.reason}")
    if result.passed:
        return
    for line in result.missed:
        print_line(f"missed {line}")
    for blame in result.blame:
        print_line(f"blame: {blame.step} adds {blame.drop:+.4f} to the drop")
    for step in result.next_steps:
        print_line(f"to do: {step}")


def candidate_rows(build: Mapping[str, Any], *, kept: str = "chosen") -> list[tuple[str, ...]]:
    """A row for each candidate of a build in its JSON form; `kept` marks those that were chosen."""
    rows: list[tuple[str, ...]] = []
    for candidate in build["candidates"]:
        gate, speed, size = candidate["gate"], candidate["speed"], candidate["bytes"]
        judged = gate is not None and gate["candidate"] is not None
        interval = judged and gate["ci95_low"] is not None
        reasons = ([candidate["refusal"]] if candidate["refusal"] else []) + list(candidate["notes"])
        rows.append(
            (
                kept if candidate["chosen"] else "",
                candidate["name"],
                human_bytes(size) if size is not None else "-",
                f"{gate['metric']} {gate['candidate']:.4f}" if judged else "-",
                f"{gate['drop']:+.4f}" if judged else "-",
                f"{gate['ci95_low']:+.4f} to {gate['ci95_high']:+.4f}" if interval else "-",
                f"{speed['ratio']:.2f}x" if speed is not None else "-",
                "; ".join(reasons),
            )
        )
    return rows
