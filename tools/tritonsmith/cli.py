"""The command line: one thin verb per function. Parse, build a record, call, print.

Results go to stdout, progress and errors to stderr. Exit code 0: done; 1: the work failed or a gate
refused; 2: wrong usage; 130: Ctrl-C; 143: SIGTERM. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritonsmith import __version__
from tritonsmith.cli_compress import (
    RECIPE_KEEPS,
    add_compress,
    add_data,
    add_steps,
    refuse_beside_recipe,
    search_from,
    steps_from,
)
from tritonsmith.cli_deploy import add_deploy
from tritonsmith.cli_lint import add_lint
from tritonsmith.cli_options import add_code, add_conversion, add_json, add_source, conversion_from
from tritonsmith.cli_plans import add_plans
from tritonsmith.errors import TritonsmithError, UsageError
from tritonsmith.signals import ending_on_sigterm

if TYPE_CHECKING:
    from tritonsmith.recipe import BuildRequest

Verb = Callable[[argparse.Namespace], int]
DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
BENCH_URL = "grpc://127.0.0.1:8001"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    before, after = _split_at_dashes(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(before, argparse.Namespace(flags=after))
    verb: Verb = options.verb
    try:
        with ending_on_sigterm():
            code = verb(options)
        sys.stdout.flush()
        return code
    except TritonsmithError as error:
        from tritonsmith.console import print_error

        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) went away; nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        # A full disk or a lost permission can meet any step; the system says which file and why.
        from tritonsmith.console import print_error

        print_error(f"{error.filename or 'a file'}: {error.strerror or error}")
        return FAILED


def _split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of `serve`, what stands before `--` and what after: argparse takes it only right after DIR."""
    before = list(arguments)
    if before[:1] != ["serve"] or "--" not in before:
        return before, []
    dashes = before.index("--")
    return before[:dashes], before[dashes + 1 :]


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="tritonsmith", description="From a trained model to a verified, tuned Triton deployment."
    )
    root.add_argument("--version", action="version", version=f"tritonsmith {__version__}")
    verbs = root.add_subparsers(metavar="VERB", required=True)
    for add in (
        *(_add_convert, add_compress, _add_build, add_plans, add_lint, _add_serve),
        *(_add_validate, _add_bench, _add_infer, add_deploy, _add_doctor),
    ):
        add(verbs)
    return root


# --- convert ------------------------------------------------------------------------------------------


def _add_convert(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "convert",
        help="a trained model to a clean FP32 ONNX file",
        description="Convert a trained model to a clean FP32 ONNX file and prove that both compute the same.",
    )
    add_source(verb)
    verb.add_argument("--out", type=Path, required=True, metavar="MODEL.onnx", help="file to write")
    add_conversion(verb)
    verb.add_argument("--force", action="store_true", help="replace an existing file")
    add_json(verb)
    verb.set_defaults(verb=run_convert)


def run_convert(options: argparse.Namespace) -> int:
    from tritonsmith import render
    from tritonsmith.console import print_json, progress
    from tritonsmith.ingest import convert

    with progress() as say:
        artifact = convert(
            options.source, options.out, conversion_from(options), force=options.force, say=say
        )
    if options.json:
        print_json(render.json_from_artifact(artifact))
    else:
        render.print_artifact(artifact)
    return DONE


# --- build --------------------------------------------------------------------------------------------


def _add_build(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "build",
        help="a trained model to a version in a Triton repository",
        description="Convert, compress inside an accuracy budget, and publish into a Triton repository. "
        "A recipe.toml holds the same options and the whole of Triton's model configuration.",
    )
    add_source(verb, recipe=True)
    verb.add_argument("--name", help="model name in the repository (a recipe names its own)")
    verb.add_argument("--repository", type=Path, required=True, metavar="DIR", help="Triton model repository")
    verb.add_argument("--precision", choices=("fp32", "fp16", "int8", "auto"), help="default: fp32")
    add_data(verb)
    add_steps(verb)
    verb.add_argument("--max-batch-size", type=int, metavar="N", help="largest batch that Triton may form")
    verb.add_argument("--version", type=int, metavar="N", help="version to publish (default: the next one)")
    verb.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="serve by another engine too: tensorrt, openvino or onnxruntime; beside a recipe, those of its "
        "targets to build (default: all)",
    )
    verb.add_argument("--defer", action="store_true", help="leave TensorRT plans to the GPU machine")
    add_conversion(verb)
    verb.add_argument("--force", action="store_true", help="replace the version if it is already published")
    add_json(verb)
    verb.set_defaults(verb=run_build)


def run_build(options: argparse.Namespace) -> int:
    from tritonsmith import render
    from tritonsmith.build import build, build_recipe
    from tritonsmith.console import print_json, progress

    if options.source.endswith(".toml"):
        refuse_beside_recipe(options, (*BUILD_KEEPS, *RECIPE_KEEPS))
        with progress() as say:
            reports = build_recipe(
                Path(options.source),
                repository=options.repository,
                force=options.force,
                allow_code=options.allow_code,
                targets=tuple(options.target),
                defer=options.defer,
                say=say,
            )
    else:
        request = _build_request(options)
        with progress() as say:
            reports = (build(request, say=say),)
    if options.json:
        values = [report.json() for report in reports]
        print_json(values[0] if len(values) == 1 else values)
    else:
        for report in reports:
            render.print_build(report)
    return DONE


# A recipe says these itself, and those of compression.
BUILD_KEEPS = ("name", "precision", "max_batch_size", "version", "opset", "server", "custom_objects")


def _build_request(options: argparse.Namespace) -> BuildRequest:
    from tritonsmith.recipe import BuildRequest
    from tritonsmith.targets.table import targets_by_name

    if options.name is None:
        raise UsageError("build needs --name", expected="the model's name in the repository")
    return BuildRequest(
        name=options.name,
        source=options.source,
        repository=options.repository,
        precision=options.precision or "fp32",
        backend=options.backend or "onnxruntime",
        calibration=options.calibration,
        training=options.training,
        tuning=options.tuning,
        evaluation=options.evaluation,
        metric=options.metric,
        max_drop=options.max_drop,
        steps=steps_from(options),
        search=search_from(options),
        max_batch_size=options.max_batch_size,
        version=options.version,
        force=options.force,
        convert=conversion_from(options),
        targets=targets_by_name(tuple(options.target)),
        defer=options.defer,
    )


# --- serve --------------------------------------------------------------------------------------------


def _add_serve(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "serve",
        help="serve a repository on a real Triton, on this machine",
        description="Serve a repository on the embedded Triton until Ctrl-C. It answers on 127.0.0.1 alone: "
        "it is for development and tests, production runs NVIDIA's container.",
        usage="%(prog)s [options] DIR [-- FLAG ...]",
        epilog="What follows -- goes to tritonserver as it is.",
    )
    verb.add_argument("repository", type=Path, metavar="DIR", help="Triton model repository")
    verb.add_argument("--http-port", type=int, default=8000, metavar="P", help="default: 8000; 0: any free")
    verb.add_argument("--grpc-port", type=int, default=8001, metavar="P", help="default: 8001; 0: any free")
    verb.add_argument("--metrics-port", type=int, default=8002, metavar="P", help="default: 8002")
    verb.add_argument("--model-control", choices=("none", "poll", "explicit"), default="none")
    verb.add_argument("--load-model", action="append", default=[], metavar="NAME", help="if explicit")
    verb.add_argument("--target", metavar="NAME", help="serve the models' further target of this name")
    verb.add_argument("--exit-timeout", type=float, default=30.0, metavar="S", help="seconds to stop in")
    add_json(verb)
    verb.set_defaults(verb=run_serve)


def run_serve(options: argparse.Namespace) -> int:
    from tritonsmith import render
    from tritonsmith.console import print_json, progress
    from tritonsmith.server import Server, ServerOptions, serve_forever

    def announce(server: Server) -> None:
        if options.json:
            print_json(render.json_from_server(server))
        else:
            render.print_server(server)
        sys.stdout.flush()

    server_options = ServerOptions(
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        model_control=options.model_control,
        load_models=tuple(options.load_model),
        exit_timeout_s=options.exit_timeout,
        target=options.target,
        flags=tuple(options.flags),
    )
    with progress() as say:
        serve_forever(options.repository, server_options, on_ready=announce, say=say)
    return DONE


# --- validate -----------------------------------------------------------------------------------------


def _add_validate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "validate",
        help="prove that what is served is what was trained",
        description="Compare served answers with the source or the published file: over HTTP and gRPC, "
        "single, batched and concurrent; an ensemble with its steps run one by one.",
    )
    verb.add_argument("repository", type=Path, metavar="DIR", help="Triton model repository")
    verb.add_argument("name", metavar="NAME", help="model to validate")
    verb.add_argument(
        "--samples", type=Path, required=True, metavar="X.npz", help="inputs, with labels if any"
    )
    verb.add_argument("--against", metavar="SOURCE", help="trained model to compare with")
    verb.add_argument("--target", metavar="NAME", help="serve and validate its further target of this name")
    verb.add_argument("--metric", help="metric through the endpoint (default: the gate's, or accuracy)")
    verb.add_argument("--max-drop", type=float, metavar="D", help="how much worse the metric may be")
    verb.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="URL",
        help="of a running server: http://host:port, grpc://host:port, or one of each (default: start one)",
    )
    add_code(verb)
    add_json(verb)
    verb.set_defaults(verb=run_validate)


def run_validate(options: argparse.Namespace) -> int:
    from tritonsmith import render
    from tritonsmith.console import print_json, progress
    from tritonsmith.validate import validate

    urls = _urls_by_protocol(options.url)
    with progress() as say:
        report = validate(
            options.repository,
            options.name,
            options.samples,
            against=options.against,
            http_url=urls.get("http"),
            grpc_url=urls.get("grpc"),
            target=options.target,
            metric=options.metric,
            max_drop=options.max_drop,
            options=conversion_from(options),
            say=say,
        )
    if options.json:
        print_json(report.json())
    else:
        render.print_validation(report)
    return DONE if report.passed else FAILED


def _urls_by_protocol(urls: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for url in urls:
        protocol, _, address = url.partition("://")
        if protocol not in ("http", "grpc") or not address:
            raise UsageError(f"--url {url}", expected="http://host:port or grpc://host:port")
        if protocol in found:
            raise UsageError(f"--url gives two {protocol} addresses", found=list(urls))
        found[protocol] = url
    return found


# --- bench --------------------------------------------------------------------------------------------


def _add_bench(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "bench",
        help="measure a served model with perf_analyzer",
        description="Measure a served model with Triton's perf_analyzer: throughput, latency percentiles, "
        "and where the time goes. The levels are measured in rounds, back and forth.",
    )
    verb.add_argument("name", metavar="NAME", help="model to measure")
    verb.add_argument(
        "--url", metavar="URL", help=f"http://host:port or grpc://host:port (default: {BENCH_URL})"
    )
    verb.add_argument("--repository", type=Path, metavar="DIR", help="start a server for it instead of --url")
    verb.add_argument("--samples", type=Path, metavar="X.npz", help="real inputs (default: random ones)")
    verb.add_argument(
        "--concurrency", default="1:16", metavar="N|A:B|A:B:STEP", help="default: 1:16, which doubles"
    )
    verb.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples in a request")
    verb.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    verb.add_argument("--interval-ms", type=int, default=1000, metavar="MS", help="a window; three a round")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="for bench.json and report.html")
    verb.add_argument("--force", action="store_true", help="replace those that are there")
    add_json(verb)
    verb.set_defaults(verb=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from tritonsmith import render
    from tritonsmith.bench.measure import BenchOptions, bench, parse_concurrency
    from tritonsmith.bench.report import REPORT, RESULTS, write_bench
    from tritonsmith.console import print_json, progress
    from tritonsmith.files import existing_parent, refuse_overwrite

    if options.url and options.repository:
        raise UsageError("--url and --repository exclude each other", expected="one of them")
    bench_options = BenchOptions(
        concurrency=parse_concurrency(options.concurrency),
        batch_size=options.batch_size,
        interval_ms=options.interval_ms,
        rounds=options.rounds,
        samples=options.samples,
    )
    if options.out:
        for name in (REPORT, RESULTS):
            refuse_overwrite(options.out / name, force=options.force)
            existing_parent(options.out / name)
    with progress() as say, ExitStack() as stack:
        url = options.url or BENCH_URL
        if options.repository:
            from tritonsmith.server import ServerOptions, serve

            free_ports = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
            url = f"grpc://{stack.enter_context(serve(options.repository, free_ports, say=say)).grpc_url}"
        result = bench(options.name, url, bench_options, say=say)
    if options.out:
        write_bench(result, options.out)
    if options.json:
        print_json(result.json())
    else:
        render.print_bench(result)
    return DONE


# --- infer --------------------------------------------------------------------------------------------


def _add_infer(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "infer",
        help="send one request and show the answer",
        description="Send one request to a served model and show the answer in readable form.",
    )
    verb.add_argument("name", metavar="NAME", help="model to ask")
    verb.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="NAME=VALUE",
        help="image=@photo.png (a file's bytes), text=hello, x=[1,2,3], x=@array.npy",
    )
    verb.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="http://host:port or grpc://host:port (default: http://127.0.0.1:8000)",
    )
    add_json(verb)
    verb.set_defaults(verb=run_infer)


def run_infer(options: argparse.Namespace) -> int:
    from tritonsmith.console import print_json, print_line
    from tritonsmith.infer import infer

    answer = infer(options.name, options.input, url=options.url)
    if options.json:
        print_json(answer.json())
    else:
        print_line(str(answer))
    return DONE


# --- doctor -------------------------------------------------------------------------------------------


def _add_doctor(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "doctor",
        help="what works on this machine and what is missing",
        description="Say what works on this machine, what does not, and what to install.",
    )
    add_json(verb)
    verb.set_defaults(verb=run_doctor)


def run_doctor(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from tritonsmith import render
    from tritonsmith.console import print_json
    from tritonsmith.doctor import diagnose

    findings = diagnose()
    if options.json:
        print_json([asdict(finding) for finding in findings])
    else:
        render.print_findings(findings)
    return FAILED if any(finding.status == "fail" for finding in findings) else DONE
