"""The verb `plans`: on a GPU machine, what a repository's orders ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritonsmith.cli_options import add_json

if TYPE_CHECKING:
    from tritonsmith.targets.placing import PlanReport


def add_plans(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "plans",
        help="build, on a GPU machine, the TensorRT plans that a repository asks for",
        description="Build every TensorRT plan that was deferred, exactly for this TensorRT and GPU: each is "
        "compared with its ONNX file, timed, and kept in a cache. Plans are published into DIR, or, with "
        "--view, DIR stays as it is and VIEW is a repository of links that Triton serves.",
    )
    verb.add_argument("repository", type=Path, metavar="DIR", help="Triton model repository")
    verb.add_argument("--target", metavar="NAME", help="of this target alone (default: all)")
    verb.add_argument("--cache", type=Path, metavar="FOLDER", help="where plans are kept for the next start")
    verb.add_argument(
        "--view", type=Path, metavar="VIEW", help="folder to lay the links in; fallbacks are served there"
    )
    verb.add_argument("--force", action="store_true", help="build again what is cached or published")
    add_json(verb)
    verb.set_defaults(verb=run_plans)


def run_plans(options: argparse.Namespace) -> int:
    """Build them; 0 where every order has its plan or its fallback."""
    from tritonsmith.console import print_json, progress
    from tritonsmith.server.provision import plan_cache
    from tritonsmith.targets.plans import PlanRequest, build_plans

    request = PlanRequest(
        repository=options.repository,
        cache=options.cache or plan_cache(),
        target=options.target,
        view=options.view,
        force=options.force,
    )
    with progress() as say:
        reports = build_plans(request, say=say)
    if options.json:
        view = None if options.view is None else str(options.view.absolute())
        print_json({"view": view, "plans": [report.json() for report in reports]})
    else:
        _print_reports(reports)
    return 0


def _print_reports(reports: Sequence[PlanReport]) -> None:
    from tritonsmith.console import human_bytes, print_line, print_table

    if not reports:
        print_line("no plan is asked for")
        return
    rows = []
    for report in reports:
        found, facts = report.found, report.facts
        served = report.path.name if facts is None else f"{facts.precision}, {human_bytes(facts.size_bytes)}"
        gpu = "" if facts is None else f"{facts.device.gpu}, TensorRT {facts.tensorrt}"
        rows.append((found.model, found.version, found.target, report.outcome, served, gpu))
    print_table(("model", "version", "target", "plan", "served", "built for"), rows)
