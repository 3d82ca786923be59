"""recipe.toml -> records, every mistake named by its key and place.

A recipe holds a [model], any number of [[ensemble]], or both; paths start from the recipe's folder:

    [model]
    name = "digits"                  # the model's folder in the repository
    source = "digits.h5"             # what `tritonsmith convert` reads
    backend = "onnxruntime"          # or "openvino"
    precision = "auto"               # "fp32", "fp16", "int8" or "auto"; none beside [[compress]] or [search]
    max_batch_size = 32              # 0: no batching
    version = 1                      # left out: the next one

    [convert]
    server = "24.10"                 # Triton release that must load the model
    opset = 17
    custom_objects = "package.module"

    [accuracy]
    calibration = "calibration.npz"  # INT8 ranges
    training = "training.npz"        # for steps that train, with labels under `target` if there are any
    tuning = "tuning.npz"            # other samples, for choices made on the way
    evaluation = "evaluation.npz"    # other samples again, with labels under `target`, to judge with
    metric = "accuracy"
    max_drop = 0.01

    [labels]
    probabilities = "labels.txt"     # output = file, a line for each value

    [warmup]
    samples = "evaluation.npz"
    count = 2                        # the first two samples, each in a request of its own
    batch_size = 1

    [config]                         # fields of Triton's model_config.proto, by their own names
    instance_group = [{kind = "KIND_CPU", count = 2}]
    parameters = {intra_op_thread_count = 1}

    [config.dynamic_batching]
    preferred_batch_size = [8, 16]
    max_queue_delay_microseconds = 500

    [[ensemble]]
    name = "digits_pipeline"
    inputs = ["IMAGE"]               # left out: the tensors that no step writes
    outputs = ["label", "confidence"]  # left out: the tensors that no step reads

    [[ensemble.step]]
    model = "digits_decode"
    version = 1                      # left out: the newest
    inputs = {encoded = "IMAGE"}     # the step's tensor = the ensemble's tensor
    outputs = {pixels = "pixels"}

    [ensemble.config]                # as [config]; [ensemble.labels] as [labels]
    response_cache = {enable = true}

    [target.gpu]                     # a further target: configs/gpu.pbtxt; targets/table.py has all its keys
    backend = "tensorrt"
    without_plan = "defer"

Instead of a precision, a recipe can name compression steps in their order (compress/steps.py has each with
its options), or bounds for a search over them:

    [[compress]]
    step = "prune"
    flops = 0.25                     # share of the FLOPs that is left
    epochs = 8

    [[compress]]
    step = "quantize"

    [search]
    size_at_most = "30 kB"           # or a number of bytes
    speed_at_least = 3.0             # times the speed of FP32
    max_candidates = 16
    seconds = 1200                   # no candidate is begun after this
    epochs = 20                      # of each training

A file cannot ask for code to be run: what names a Python module (`custom_objects`, a metric or a source
such as "package.module:function") needs the caller's `allow_code`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tritonsmith.artifact import Json
from tritonsmith.compress.search.goal import SearchGoal, check_goal
from tritonsmith.compress.step_text import bytes_from, spec_from_table
from tritonsmith.compress.steps import Distill, StepSpec
from tritonsmith.errors import RecipeError, RepositoryError, UsageError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.metrics import metric_module
from tritonsmith.recipe_table import Keys, check_keys
from tritonsmith.repository.config import ENSEMBLE_FIELDS, check_config_table
from tritonsmith.repository.ensemble import EnsembleRequest, EnsembleStep
from tritonsmith.repository.names import check_name, check_version
from tritonsmith.repository.warmup import WarmupRequest
from tritonsmith.targets.request import TargetRequest
from tritonsmith.targets.table import PLAN_KEYS, TARGET_KEYS, targets_from_tables

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("fp32", "fp16", "int8", "auto")
BACKENDS = ("onnxruntime", "openvino")

TABLES: Keys = {
    "model": dict,
    "convert": dict,
    "accuracy": dict,
    "compress": list,
    "config": dict,
    "labels": dict,
    "search": dict,
    "target": dict,
    "warmup": dict,
    "ensemble": list,
}
KEYS: Mapping[str, Keys] = {
    "model": {
        "name": str,
        "source": str,
        "backend": str,
        "precision": str,
        "max_batch_size": int,
        "version": int,
    },
    "convert": {"server": str, "opset": int, "custom_objects": str, "seed": int},
    "accuracy": {
        "calibration": str,
        "training": str,
        "tuning": str,
        "evaluation": str,
        "metric": str,
        "max_drop": float,
    },
    "search": {
        "size_at_most": object,
        "speed_at_least": float,
        "max_candidates": int,
        "seconds": float,
        "epochs": int,
    },
    "target": TARGET_KEYS,
    "target.plan": PLAN_KEYS,
    "warmup": {"samples": str, "count": int, "batch_size": int},
    "ensemble": {
        "name": str,
        "version": int,
        "inputs": list,
        "outputs": list,
        "step": list,
        "config": dict,
        "labels": dict,
    },
    "ensemble.step": {"model": str, "version": int, "inputs": dict, "outputs": dict},
}

_MODULE_SOURCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A trained model to convert, compress, judge and publish into `repository` as `name`."""

    name: str
    source: str
    repository: Path
    precision: str = "fp32"  # one of PRECISIONS
    backend: str = "onnxruntime"  # one of BACKENDS
    calibration: Path | None = None
    training: Path | None = None
    tuning: Path | None = None
    evaluation: Path | None = None
    metric: str | None = None
    max_drop: float | None = None
    steps: tuple[StepSpec, ...] = ()  # in their order, instead of a precision
    search: SearchGoal | None = None  # instead of either
    max_batch_size: int | None = None  # None: chosen by repository.config
    version: int | None = None  # None: the next one
    force: bool = False
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    config: Mapping[str, Json] = field(default_factory=dict)  # fields of model_config.proto
    labels: Mapping[str, Path] = field(default_factory=dict)  # output -> label file
    warmup: WarmupRequest | None = None
    targets: tuple[TargetRequest, ...] = ()  # further ones, beside the default
    defer: bool = False  # leave the building of plans to the GPU machine, whatever there is here

    @property
    def chained(self) -> bool:
        """Whether compression steps make the model, named or searched for."""
        return bool(self.steps) or self.search is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that one recipe file asks for, in the order in which to build it."""

    path: Path
    builds: tuple[BuildRequest, ...]
    ensembles: tuple[EnsembleRequest, ...]


def load_recipe(path: Path, *, repository: Path, force: bool = False, allow_code: bool = False) -> Recipe:
    """Read a recipe; relative paths in it start from its own folder.

    Raises:
        RecipeError: a mistake in the file, named by its key and place.
    """
    document = _read_toml(path)
    try:
        check_keys(document, TABLES, place="", known=KEYS)
        builds: tuple[BuildRequest, ...] = ()
        if "model" in document:
            builds = (_build_from(document, path.parent, repository, force=force, allow_code=allow_code),)
        elif others := [key for key in document if key != "ensemble"]:
            raise RecipeError(f"[{others[0]}] belongs to a [model], and there is none", fix="add [model]")
        ensembles = tuple(
            _ensemble_from(table, f"ensemble[{index}]", path.parent, repository, force=force)
            for index, table in enumerate(document.get("ensemble", ()))
        )
        if not builds and not ensembles:
            raise RecipeError("nothing to build", expected="[model] or [[ensemble]]")
    except (RecipeError, RepositoryError) as error:
        raise RecipeError(
            f"{path}: {error.what}", found=error.found, expected=error.expected, fix=error.fix
        ) from error
    return Recipe(path=path, builds=builds, ensembles=ensembles)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is no valid TOML", found=error) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no valid TOML", found=error, expected="text in UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read", found=error.strerror or error) from error
    return document


def _build_from(
    document: Mapping[str, Any], base: Path, repository: Path, *, force: bool, allow_code: bool
) -> BuildRequest:
    model = document["model"]
    accuracy = document.get("accuracy", {})
    check_keys(model, KEYS["model"], place="model", known=KEYS, required=("name", "source"))
    check_keys(accuracy, KEYS["accuracy"], place="accuracy", known=KEYS)
    _check_choice(model, "precision", PRECISIONS)
    _check_choice(model, "backend", BACKENDS)
    wishes = [name for name in ("compress", "search") if name in document]
    wishes += ["model.precision"] if "precision" in model else []
    if len(wishes) > 1:
        raise RecipeError(
            f"{wishes[1]} beside {wishes[0]}", expected="one of precision, [[compress]], [search]"
        )
    _check_least(model, "model", "max_batch_size", 0)
    _check_least(accuracy, "accuracy", "max_drop", 0)
    _check_entry(model, "model", "name")
    config = document.get("config", {})
    check_config_table(config)
    source, metric = model["source"], accuracy.get("metric")
    if metric is not None:
        names_code = metric_module(metric) is not None
        _check_code("accuracy.metric", metric, names_code=names_code, allow_code=allow_code)
    return BuildRequest(
        name=model["name"],
        source=_source(source, base, "model.source", allow_code=allow_code),
        repository=repository,
        precision=model.get("precision", "fp32"),
        backend=model.get("backend", "onnxruntime"),
        calibration=_path(accuracy, "calibration", base),
        training=_path(accuracy, "training", base),
        tuning=_path(accuracy, "tuning", base),
        evaluation=_path(accuracy, "evaluation", base),
        metric=metric,
        max_drop=None if "max_drop" not in accuracy else float(accuracy["max_drop"]),
        steps=_steps_from(document.get("compress", ()), base, allow_code=allow_code),
        search=_search_from(document.get("search"), accuracy),
        max_batch_size=model.get("max_batch_size"),
        version=model.get("version"),
        force=force,
        convert=_convert_from(document.get("convert", {}), allow_code=allow_code),
        config=config,
        labels=_labels_from(document.get("labels", {}), "labels", base),
        warmup=_warmup_from(document.get("warmup"), base),
        targets=targets_from_tables(document.get("target", {}), base, KEYS),
    )


def _steps_from(tables: Sequence[Mapping[str, Any]], base: Path, *, allow_code: bool) -> tuple[StepSpec, ...]:
    specs = [spec_from_table(table, place=f"compress[{index}]") for index, table in enumerate(tables)]
    return tuple(
        replace(
            spec, student=_source(spec.student, base, f"compress[{index}].student", allow_code=allow_code)
        )
        if isinstance(spec, Distill) and spec.student is not None
        else spec
        for index, spec in enumerate(specs)
    )


def _search_from(table: Mapping[str, Any] | None, accuracy: Mapping[str, Any]) -> SearchGoal | None:
    if table is None:
        return None
    check_keys(table, KEYS["search"], place="search", known=KEYS)
    if "max_drop" not in accuracy:
        raise RecipeError("[search] needs accuracy.max_drop", expected="how much worse the metric may become")
    size = table.get("size_at_most")
    goal = SearchGoal(max_drop=float(accuracy["max_drop"]))
    goal = replace(
        goal,
        size_at_most_bytes=None if size is None else bytes_from(size, "search.size_at_most"),
        speed_at_least=table.get("speed_at_least"),
        max_candidates=table.get("max_candidates", goal.max_candidates),
        budget_s=table.get("seconds"),
        epochs=table.get("epochs"),
    )
    try:
        check_goal(goal)
    except UsageError as error:
        raise RecipeError(f"[search]: {error.what}", expected=error.expected) from error
    return goal


def _convert_from(table: Mapping[str, Any], *, allow_code: bool) -> ConvertOptions:
    if "allow_code" in table:
        raise RecipeError(
            "convert.allow_code cannot be set in a file", fix="--allow-code on the command line"
        )
    check_keys(table, KEYS["convert"], place="convert", known=KEYS)
    _check_least(table, "convert", "opset", 1)
    _check_least(table, "convert", "seed", 0)
    custom = table.get("custom_objects")
    if custom is not None:
        _check_code("convert.custom_objects", custom, names_code=True, allow_code=allow_code)
    default = ConvertOptions()
    return ConvertOptions(
        server=table.get("server", default.server),
        opset=table.get("opset", default.opset),
        allow_code=allow_code,
        custom_objects=custom,
        seed=table.get("seed", default.seed),
    )


def _warmup_from(table: Mapping[str, Any] | None, base: Path) -> WarmupRequest | None:
    if table is None:
        return None
    check_keys(table, KEYS["warmup"], place="warmup", known=KEYS, required=("samples",))
    _check_least(table, "warmup", "count", 1)
    _check_least(table, "warmup", "batch_size", 1)
    return WarmupRequest(
        samples=_located(base, table["samples"]),
        count=table.get("count", 1),
        batch_size=table.get("batch_size", 1),
    )


def _ensemble_from(
    table: Mapping[str, Any], place: str, base: Path, repository: Path, *, force: bool
) -> EnsembleRequest:
    check_keys(table, KEYS["ensemble"], place=place, known=KEYS, required=("name", "step"))
    _check_entry(table, place, "name")
    config = table.get("config", {})
    check_config_table(config, refused=ENSEMBLE_FIELDS, place=f"{place}.config")
    if not table["step"]:
        raise RecipeError(f"{place}.step is empty", expected="at least one step")
    return EnsembleRequest(
        name=table["name"],
        repository=repository,
        steps=tuple(
            _step_from(step, f"{place}.step[{index}]", base) for index, step in enumerate(table["step"])
        ),
        inputs=_strings(table, "inputs", place),
        outputs=_strings(table, "outputs", place),
        version=table.get("version"),
        force=force,
        config=config,
        labels=_labels_from(table.get("labels", {}), f"{place}.labels", base),
    )


def _step_from(table: Mapping[str, Any], place: str, base: Path) -> EnsembleStep:
    check_keys(table, KEYS["ensemble.step"], place=place, known=KEYS, required=("model", "inputs", "outputs"))
    _check_entry(table, place, "model")
    for key in ("inputs", "outputs"):
        check_keys(table[key], dict.fromkeys(table[key], str), place=f"{place}.{key}", known={})
    return EnsembleStep(
        model=table["model"],
        inputs=table["inputs"],
        outputs=table["outputs"],
        version=table.get("version"),
    )


def _labels_from(table: Mapping[str, Any], place: str, base: Path) -> dict[str, Path]:
    check_keys(table, dict.fromkeys(table, str), place=place, known={})
    return {output: _located(base, file) for output, file in table.items()}


def _source(source: str, base: Path, place: str, *, allow_code: bool) -> str:
    """A path from the recipe's folder, or `package.module:factory` as it is."""
    if _MODULE_SOURCE.fullmatch(source) and not (base / source).exists():
        _check_code(place, source, names_code=True, allow_code=allow_code)
        return source
    path = _located(base, source)
    # Without its detours, a path such as "./module:factory" reads as a factory to `convert`.
    names_code = _MODULE_SOURCE.fullmatch(str(path)) is not None and not path.exists()
    _check_code(place, source, names_code=names_code, allow_code=allow_code)
    return str(path)


def _check_code(place: str, value: str, *, names_code: bool, allow_code: bool) -> None:
    if names_code and not allow_code:
        raise RecipeError(
            f"{place} names Python code, and a recipe may not run code by itself",
            found=value,
            fix="add --allow-code if you trust this recipe",
        )


def _check_entry(table: Mapping[str, Any], place: str, key: str) -> None:
    """The model's name under `key`, and its version."""
    at = f"{place}.{key}"
    try:
        check_name(table[key])
        at = f"{place}.version"
        check_version(table.get("version"))
    except RepositoryError as error:
        raise RecipeError(f"{at}: {error.what}", found=error.found, expected=error.expected) from error


def _check_choice(table: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> None:
    if key in table and table[key] not in choices:
        raise RecipeError(f"model.{key} has no value {table[key]!r}", expected=f"one of {', '.join(choices)}")


def _check_least(table: Mapping[str, Any], place: str, key: str, least: int) -> None:
    if key in table and not table[key] >= least:
        raise RecipeError(f"{place}.{key} is out of range", found=table[key], expected=f"{least} or more")


def _path(table: Mapping[str, Any], key: str, base: Path) -> Path | None:
    return _located(base, table[key]) if key in table else None


def _located(base: Path, file: str) -> Path:
    """The file from the recipe's folder, without the detours of `..`."""
    path = base / file
    if ".." not in path.parts:
        return path
    return path.resolve() if path.is_absolute() else Path(os.path.relpath(path.resolve()))


def _strings(table: Mapping[str, Any], key: str, place: str) -> tuple[str, ...] | None:
    if key not in table:
        return None
    values = table[key]
    if not values or not all(isinstance(value, str) for value in values):
        raise RecipeError(f"{place}.{key} has the wrong type", found=values, expected="an array of names")
    return tuple(values)
