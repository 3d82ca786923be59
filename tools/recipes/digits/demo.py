"""The main job on real input: a Keras .h5 file to a validated, benchmarked Triton service.

Trains a small classifier on scikit-learn's scanned digits, saves it as .h5, and from that file alone builds
a pruned model inside an accuracy budget and the ensemble from image file to label, serves them on a real
Triton, proves the answers, and measures them. Leaves build/demo/report.html and report.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tritonsmith.bench.measure import BenchOptions, BenchResult, bench
from tritonsmith.bench.report import bench_summary, write_report
from tritonsmith.build import BuildReport, build_recipe
from tritonsmith.console import Say, human_bytes, print_error, print_line, print_table, progress
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import write_text_atomically
from tritonsmith.render import print_build
from tritonsmith.server import ServerOptions, serve
from tritonsmith.validate import ValidationReport, validate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import make_models as recipes

ROOT = recipes.ROOT
DATA = ROOT / "build" / "digits"
DEMO = ROOT / "build" / "demo"
RECIPE = Path(__file__).parent / "recipe.toml"
# Free ports, so that a server that is already running is no obstacle.
PORTS = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
BENCH = {
    "digits": BenchOptions(samples=DATA / "evaluation.npz", concurrency=(1, 4, 16), interval_ms=500),
    "digits_image": BenchOptions(samples=DATA / "samples.npz", concurrency=(1, 8), interval_ms=500),
}


def run_demo(say: Say) -> int:
    """All of it; the exit code."""
    began_s = time.monotonic()
    repository = DEMO / "repository"
    recipes.prepare("digits", say)
    recipes.lay_stages("digits", repository)
    builds = build_recipe(RECIPE, repository=repository, say=say)
    with serve(repository, PORTS, say=say) as server:
        say("validating through the served endpoint")
        urls = {"http_url": server.http_url, "grpc_url": f"grpc://{server.grpc_url}"}
        validations = [
            validate(
                repository,
                "digits",
                DATA / "evaluation.npz",
                against=str(DATA / "digits.h5"),
                say=say,
                **urls,
            ),
            validate(repository, "digits_image", DATA / "samples.npz", say=say, **urls),
        ]
        results = [bench(name, server.grpc_url, options, say=say) for name, options in BENCH.items()]
        say("stopping the server")
    write_reports(builds, validations, results)
    print_summary(builds, validations, results, time.monotonic() - began_s)
    return 0 if all(validation.passed for validation in validations) else 1


def write_reports(
    builds: tuple[BuildReport, ...], validations: list[ValidationReport], results: list[BenchResult]
) -> None:
    write_report(
        DEMO / "report.html",
        title="digits: from a Keras .h5 to a Triton service",
        summary=summary_of(builds[0], validations[0], results[0]),
        builds=[build.json() for build in builds],
        validations=[validation.json() for validation in validations],
        benches=results,
    )
    record = {
        "builds": [build.json() for build in builds],
        "validations": [validation.json() for validation in validations],
        "benches": [result.json(raw=True) for result in results],
    }
    write_text_atomically(DEMO / "report.json", json.dumps(record, indent=1) + "\n")


def summary_of(
    build: BuildReport, validation: ValidationReport, result: BenchResult
) -> list[tuple[str, str]]:
    """What was gained and what it cost, in a handful of numbers."""
    ledger = build.manifest.ledger
    assert ledger is not None  # noqa: S101 - the recipe has steps
    first, last, product = ledger["entries"][0], ledger["entries"][-1], ledger["product"]  # type: ignore[index,call-overload]
    metric = validation.metric
    lines = [
        ("FP32 ONNX", human_bytes(first["size_bytes"])),
        ("served model", f"{human_bytes(last['size_bytes'])} ({product['bytes_factor']:.1f}x smaller)"),
        ("in process", f"{product['speed_factor']:.1f}x as fast, {product['flops_factor']:.1f}x fewer FLOPs"),
    ]
    if metric is not None:
        lines.append(("accuracy of the .h5", f"{metric.baseline:.4f}"))
        lines.append(("accuracy as served", f"{metric.candidate:.4f}"))
    return lines + bench_summary(result)


def print_summary(
    builds: tuple[BuildReport, ...],
    validations: list[ValidationReport],
    results: list[BenchResult],
    duration_s: float,
) -> None:
    print_build(builds[0])
    print_table(("digits, from .h5 to Triton", ""), summary_of(builds[0], validations[0], results[0]))
    for validation in validations:
        values = sum(check.values_count for check in validation.checks)
        verdict = "passed" if validation.passed else "FAILED"
        print_line(f"validation of {validation.model}: {verdict}, {values:,} values compared")
    for result in results:
        for level in result.levels:
            if level.unstable:
                print_line(f"unstable: {result.model} at concurrency {level.concurrency}: {level.unstable}")
    print_line(f"report: {(DEMO / 'report.html').relative_to(ROOT)} and report.json ({duration_s:.0f} s)")


def main() -> int:
    try:
        with progress() as say:
            return run_demo(say)
    except TritonsmithError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
