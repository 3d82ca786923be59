"""Compress, judge, time and serve the models of the benchmark, from nothing but what is in this repository.

    python perf/compression.py [CASE ...] [--out perf/results/compression.json]

Each model is made, compressed by the steps of its case, judged against its FP32 form on held-out data, timed
beside it in alternating rounds (one thread, ONNX Runtime), published, and validated through a real Triton.
With names of cases only those are measured anew; the other rows of the file stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import digits
import minilm
import resnet50
import shapes
from cases import Case

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Manifest, tool_versions
from tritonsmith.compress.step_text import text_from_spec
from tritonsmith.compress.steps import Trained
from tritonsmith.compression import CompressReport, CompressRequest, compress
from tritonsmith.console import Say, human_bytes, print_error, print_line, print_table, progress
from tritonsmith.engines import open_session
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import write_text_atomically
from tritonsmith.machine import describe_machine
from tritonsmith.measure import THREADS, compare_speeds
from tritonsmith.repository.config import config_from_artifact
from tritonsmith.repository.entry import publish
from tritonsmith.samples import load_samples
from tritonsmith.server import ServerOptions, serve
from tritonsmith.validate import validate

ROOT = Path(__file__).resolve().parents[1]
WORKSPACE = ROOT / "build" / "compression"
TOOLS = ("keras", "numpy", "onnx", "onnxruntime", "tensorflow-cpu", "torch", "torch-pruning")
MAKERS: Mapping[str, Callable[[Path, Say], Sequence[Case]]] = {
    "digits": digits.cases,
    "minilm": minilm.cases,
    "resnet50": resnet50.cases,
    "shapes": shapes.cases,
}
HIGHEST = ("drop", "drop_ci95_high")  # of these, a target is the most; of all others the least
COLUMNS = ("model", "variant", "smaller", "metric", "drop", "at most", "speed", "served", "targets")


def measure_case(case: Case, say: Say) -> tuple[dict[str, Any], CompressReport]:
    """A row without what the server answers, and what was made."""
    say(f"case {case.name}")
    report = compress(
        CompressRequest(
            source=case.source,
            out=WORKSPACE / "models" / f"{case.name}.onnx",
            steps=case.steps,
            calibration=case.calibration,
            training=case.training,
            tuning=case.tuning,
            evaluation=case.evaluation,
            metric=case.metric,
            convert=case.convert_options(),
            force=True,
        ),
        say=say,
    )
    gate, ledger = report.gate, report.chain.ledger
    assert gate is not None  # noqa: S101 - every case has evaluation data
    speeds = time_case(case, report, say)
    headline = speeds[str(case.headline_batch)]
    measured = report.artifact.steps[-1].measured
    row = {
        "model": case.model,
        "variant": case.variant,
        "source": Path(case.source).name if Path(case.source).exists() else case.source,
        "size_ratio": ledger.bytes_factor,
        "bytes": onnx_model.model_bytes(report.artifact.path),
        "flops_ratio": ledger.flops_factor,
        "metric": gate.metric,
        "baseline": gate.baseline,
        "value": gate.candidate,
        "drop": gate.drop,
        "drop_ci95_high": gate.ci95_high,
        "samples": gate.samples,
        "worst_class": None if gate.worst_class is None else asdict(gate.worst_class),
        "speedup": headline["ratio"],
        "speedup_low": headline["low"],
        "speedup_high": headline["high"],
        "speedup_batch": case.headline_batch,
        "speeds": speeds,
        "int8_ops": measured.get("int8_ops"),
        "ops": measured.get("ops"),
        "int8_convolutions": int8_convolutions(measured.get("ops_by_type")),
        "ledger": ledger.json(),
        "steps": [
            {"step": text_from_spec(spec), "seconds": step.duration_s}
            for spec, step in zip(case.steps, report.artifact.steps[-len(case.steps) :], strict=True)
        ],
        "trained_epochs": sum(spec.epochs for spec in case.steps if isinstance(spec, Trained)),
        "served_metric": None,
        "validation": None,
        "tried": case.tried,
    }
    return row, report


def time_case(case: Case, report: CompressReport, say: Say) -> dict[str, Any]:
    """FP32 beside the compressed model at each batch size of the case."""
    fp32, last = report.chain.artifacts[0], report.chain.artifacts[-1]
    samples = load_samples(case.evaluation, fp32.inputs)
    pair = [open_session(artifact.path, threads=THREADS) for artifact in (fp32, last)]
    speeds = {}
    for batch in case.batches:
        say(f"timing {case.name} at batch {batch}")
        inputs = {name: array[:batch] for name, array in samples.arrays.items()}
        speeds[str(batch)] = compare_speeds(pair[0], pair[1:], inputs, batch_size=batch)[0].json()
    return speeds


def int8_convolutions(kinds: Any) -> float | None:
    """Of the convolutions that ONNX Runtime runs, the share in INT8."""
    counts = {kind: count for kind, count in (kinds or {}).items() if "Conv" in kind}
    total = sum(counts.values())
    return (
        sum(count for kind, count in counts.items() if kind.startswith("QLinear")) / total if total else None
    )


def publish_case(case: Case, report: CompressReport, repository: Path) -> None:
    """Put what was made into a repository, with its gate, as `tritonsmith build` does."""
    artifact: Artifact = report.artifact
    with tempfile.TemporaryDirectory(prefix="tritonsmith-publish-") as folder:
        alone = Path(folder) / "model.onnx"
        onnx_model.copy_model(artifact.path, alone)
        config = config_from_artifact(artifact, name=case.name, backend="onnxruntime")
        manifest = Manifest(
            name=case.name,
            version=0,
            fingerprint=onnx_model.model_sha256(alone),
            source=case.source,
            source_sha256=artifact.steps[0].input_sha256,
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            batched=artifact.batched,
            precision=artifact.precision,
            backend="onnxruntime",
            files={},
            steps=artifact.steps,
            gate=None if report.gate is None else report.gate.json(),
            candidates=tuple(candidate.json() for candidate in report.chain.candidates),
            ledger=report.chain.ledger.json(),
        )
        publish(Path(folder), config, repository, manifest=manifest)


def serve_cases(made: Sequence[tuple[Case, dict[str, Any], CompressReport]], say: Say) -> None:
    """Serve all models at once, validate each through the endpoint, and complete their rows."""
    with tempfile.TemporaryDirectory(prefix="tritonsmith-repository-") as folder:
        repository = Path(folder)
        for case, _, report in made:
            publish_case(case, report, repository)
        ports = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
        with serve(repository, ports, say=say) as server:
            for case, row, report in made:
                say(f"validating {case.name} through the served endpoint")
                validation = validate(
                    repository,
                    case.name,
                    case.evaluation,
                    grpc_url=f"grpc://{server.grpc_url}",
                    against=str(report.chain.artifacts[0].path),
                    metric=case.metric,
                    max_drop=case.max_drop,
                    say=say,
                )
                row["validation"] = "passed" if validation.passed else "FAILED"
                row["served_metric"] = None if validation.metric is None else validation.metric.candidate


def missed(row: Mapping[str, Any], targets: Mapping[str, float]) -> list[str]:
    """The targets that a row does not reach, each with what was reached."""
    lines = []
    for name, target in targets.items():
        value = row[name]
        reached = value is not None and (value <= target if name in HIGHEST else value >= target)
        if not reached:
            shown = "nothing" if value is None else f"{value:.4g}"
            lines.append(f"{name} {shown}, not {target:g}")
    return lines


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [
        (
            row["model"],
            row["variant"],
            f"{row['size_ratio']:.2f}x ({human_bytes(row['bytes'])})",
            f"{row['metric']} {row['value']:.4f}",
            f"{row['drop']:+.4f}",
            "-" if row["drop_ci95_high"] is None else f"{row['drop_ci95_high']:+.4f}",
            f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})",
            "-" if row["served_metric"] is None else f"{row['served_metric']:.4f}",
            "; ".join(row["missed"]) or "reached",
        )
        for row in rows
    ]
    print_table(COLUMNS, cells)


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The file with these rows in place of older ones of their name; rows of other cases stay."""
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    new = {(row["model"], row["variant"]) for row in rows}
    together = [row for row in old if (row["model"], row["variant"]) not in new] + list(rows)
    together.sort(key=lambda row: (row["model"], row["variant"]))
    record = {
        "machine": describe_machine(),
        "versions": tool_versions(*TOOLS),
        "engine": "onnxruntime",
        "threads": THREADS,
        "rows": together,
    }
    write_text_atomically(path, json.dumps(record, indent=1) + "\n")
    return together


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MAKERS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "compression.json")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(MAKERS):
        parser.error(f"no model is named {', '.join(sorted(unknown))}")
    try:
        with progress() as say:
            made = []
            for name in options.models or MAKERS:
                for case in MAKERS[name](WORKSPACE / name, say):
                    row, report = measure_case(case, say)
                    made.append((case, row, report))
            serve_cases(made, say)
    except TritonsmithError as error:
        print_error(error)
        return error.exit_code
    for case, row, _ in made:
        row["targets"], row["missed"] = dict(case.targets), missed(row, case.targets)
    write_results(options.out, [row for _, row, _ in made])
    print_rows([row for _, row, _ in made])
    print_line(f"written to {options.out}")
    # A case without targets is there to be compared with, such as pruning without training.
    return 0 if all(row["validation"] == "passed" for case, row, _ in made if case.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
