"""Results as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json, Target, bytes_of
from tritonsmith.console import human_bytes, print_line, print_table
from tritonsmith.rows import CANDIDATE_COLUMNS, LEDGER_COLUMNS, candidate_rows, ledger_rows

if TYPE_CHECKING:
    from tritonsmith.bench.measure import BenchResult
    from tritonsmith.build import BuildReport
    from tritonsmith.compress.search.outcome import SearchResult
    from tritonsmith.compression import CompressReport
    from tritonsmith.deploy.measurements import Measurements
    from tritonsmith.doctor import Finding
    from tritonsmith.repository.entry import Entry
    from tritonsmith.server import Server
    from tritonsmith.validate import ValidationReport


SERVER_SPLIT = ("queue_us", "compute_input_us", "compute_infer_us", "compute_output_us")
PERCENTILES = (50, 90, 95, 99)


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


def print_ledger(ledger: Mapping[str, Any]) -> None:
    title = f"ledger: {ledger['engine']}, batch {ledger['batch_size']}, {ledger['threads']} thread"
    print_table(LEDGER_COLUMNS, ledger_rows(ledger), title=title)


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


def print_measurements(measurements: Measurements) -> None:
    """The whole server, then model by model."""
    one = measurements
    print_line(
        f"{one.repository}: ready in {one.ready_s:.1f} s, stopped in {one.stop_s:.1f} s, memory "
        f"{human_bytes(one.idle_bytes)} idle and {human_bytes(one.peak_bytes)} at most, /dev/shm "
        f"{human_bytes(one.shm_bytes)}, {one.cpu_s_per_s:.1f} cores under load ({one.runs} runs)"
    )
    print_table(
        ("model", "backend", "instances", "load s", "request", "response", "compute ms"),
        [
            (
                model.name,
                model.backend,
                model.instances,
                "-" if model.load_s is None else f"{model.load_s:.2f}",
                human_bytes(model.request_bytes),
                human_bytes(model.response_bytes),
                "-" if model.compute_s is None else f"{model.compute_s * 1e3:.2f}",
            )
            for model in one.models
        ],
    )
