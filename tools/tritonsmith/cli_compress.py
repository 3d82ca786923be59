"""The verb `compress`, and the options of compression that `build` shares with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonsmith.cli_options import add_conversion, add_json, add_source, conversion_from
from tritonsmith.errors import UsageError

if TYPE_CHECKING:
    from tritonsmith.compress.search.goal import SearchGoal
    from tritonsmith.compress.steps import StepSpec
    from tritonsmith.compression import CompressRequest

SEARCH = ("size_at_most", "speed_at_least", "max_candidates", "search_seconds", "epochs")
# What a recipe says itself; `build` has more of its own.
RECIPE_KEEPS = (
    *("backend", "calibration", "training", "tuning", "evaluation", "metric", "max_drop"),
    *("step", "search", *SEARCH),
)


def add_compress(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "compress",
        help="a trained model to a smaller ONNX file",
        description="Compress by steps, or search for steps that keep bounds of size, speed and accuracy. "
        "The model is written whether it passes or not, with a record of every step beside it.",
    )
    add_source(verb, recipe=True)
    verb.add_argument("--out", type=Path, required=True, metavar="MODEL.onnx", help="file to write")
    add_data(verb)
    add_steps(verb)
    verb.add_argument("--report", type=Path, metavar="X.html", help="write a report with its plots, too")
    add_conversion(verb)
    verb.add_argument("--force", action="store_true", help="replace an existing file")
    add_json(verb)
    verb.set_defaults(verb=run_compress)


def add_data(verb: argparse.ArgumentParser) -> None:
    """The data by role, the metric and its budget, and the engine."""
    verb.add_argument("--backend", choices=("onnxruntime", "openvino"), help="default: onnxruntime")
    verb.add_argument("--calibration", type=Path, metavar="X.npz", help="samples to find INT8 ranges with")
    verb.add_argument("--training", type=Path, metavar="X.npz", help="samples for steps that train")
    verb.add_argument("--tuning", type=Path, metavar="X.npz", help="other samples, for choices on the way")
    verb.add_argument("--evaluation", type=Path, metavar="X.npz", help="other samples again, to judge with")
    verb.add_argument(
        "--metric",
        help="accuracy, top5, f1, mae, mse, cosine, recall10, max-abs-error or package.module:function",
    )
    verb.add_argument("--max-drop", type=float, metavar="D", help="how much worse the metric may become")


def add_steps(verb: argparse.ArgumentParser) -> None:
    """What to do: steps by name, or bounds for a search."""
    verb.add_argument(
        "--step",
        action="append",
        metavar="'STEP KEY=VALUE ...'",
        help="a compression step, as often as there are steps: prune, prune-torch, sparsify, distill, "
        "quantize, quantize-weights, share-rows, cast",
    )
    verb.add_argument(
        "--search", action="store_true", default=None, help="search for the smallest inside --max-drop"
    )
    verb.add_argument("--size-at-most", metavar="SIZE", help="search for a model of such a size (30kB, 9MB)")
    verb.add_argument("--speed-at-least", type=float, metavar="X", help="search for X times FP32's speed")
    verb.add_argument("--max-candidates", type=int, metavar="N", help="candidates that a search measures")
    verb.add_argument("--search-seconds", type=float, metavar="S", help="begin no candidate after S seconds")
    verb.add_argument("--epochs", type=int, metavar="N", help="epochs of each training in a search")


def steps_from(options: argparse.Namespace) -> tuple[StepSpec, ...]:
    from tritonsmith.compress.step_text import spec_from_text

    return tuple(spec_from_text(text) for text in options.step or ())


def search_from(options: argparse.Namespace) -> SearchGoal | None:
    """The bounds of a search, or None where none is asked for.

    Raises:
        UsageError: bounds without a budget, or options of a search without one.
    """
    from tritonsmith.compress.search.goal import SearchGoal, check_goal
    from tritonsmith.compress.step_text import bytes_from

    given = [f"--{name.replace('_', '-')}" for name in SEARCH if getattr(options, name) is not None]
    if not (options.search or options.size_at_most or options.speed_at_least):
        if given:
            raise UsageError(f"{' '.join(given)} without a search", fix="add --search or a bound")
        return None
    if options.max_drop is None:
        raise UsageError("a search needs --max-drop", expected="how much worse the metric may become")
    size = options.size_at_most
    goal = SearchGoal(
        max_drop=options.max_drop,
        size_at_most_bytes=None if size is None else bytes_from(size, "--size-at-most"),
        speed_at_least=options.speed_at_least,
        budget_s=options.search_seconds,
        epochs=options.epochs,
        **({} if options.max_candidates is None else {"max_candidates": options.max_candidates}),
    )
    check_goal(goal)
    return goal


def run_compress(options: argparse.Namespace) -> int:
    """Compress as the command line or a recipe says; 0 where the gate passed or nothing was judged."""
    from tritonsmith import render
    from tritonsmith.compression import compress
    from tritonsmith.console import print_json, progress
    from tritonsmith.live import search_progress

    request = _request(options)
    if request.search is None:
        with progress() as say:
            report = compress(request, say=say)
    else:
        with search_progress() as (say, show):
            report = compress(request, say=say, show=show)
    if options.report is not None:
        from tritonsmith.compress.report import write_compress_report

        write_compress_report(options.report, report.json(), title=f"{request.out.stem}, compressed")
    if options.json:
        print_json(report.json())
    else:
        render.print_compression(report)
    return 1 if report.passed is False else 0


def _request(options: argparse.Namespace) -> CompressRequest:
    from tritonsmith.compression import CompressRequest, request_from_build

    if options.source.endswith(".toml"):
        from tritonsmith.recipe import load_recipe

        refuse_beside_recipe(options, RECIPE_KEEPS)
        recipe = load_recipe(
            Path(options.source), repository=Path(), allow_code=options.allow_code, force=options.force
        )
        if not recipe.builds:
            raise UsageError(f"{options.source} has no [model] to compress")
        return request_from_build(recipe.builds[0], options.out, force=options.force)
    return CompressRequest(
        source=options.source,
        out=options.out,
        steps=steps_from(options),
        search=search_from(options),
        backend=options.backend or "onnxruntime",
        calibration=options.calibration,
        training=options.training,
        tuning=options.tuning,
        evaluation=options.evaluation,
        metric=options.metric,
        max_drop=options.max_drop,
        convert=conversion_from(options),
        force=options.force,
    )


def refuse_beside_recipe(options: argparse.Namespace, names: tuple[str, ...]) -> None:
    given: list[Any] = [name for name in names if getattr(options, name) is not None]
    if given:
        raise UsageError(
            f"{' '.join(f'--{name.replace(chr(95), chr(45))}' for name in given)} beside a recipe",
            fix=f"write it into {options.source}",
        )
