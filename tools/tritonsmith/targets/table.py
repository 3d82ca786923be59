"""[target.<name>] of a recipe -> TargetRequest, every mistake named by its key and place.

    [target.gpu]                     # served under `--model-config-name=gpu`, by configs/gpu.pbtxt
    backend = "tensorrt"             # or "onnxruntime", "openvino"
    max_batch_size = 64              # left out: the model's; never more than that

    # What follows is for TensorRT alone.
    precision = "auto"               # "fp32", "fp16", "bf16", "int8"; auto: the fastest of FP16 and INT8 that
                                     # passes the gate (INT8 where there is calibration data); without
                                     # evaluation data nothing is judged, and auto is FP32
    without_plan = "fallback"        # where no plan can be built here: "fail"; "defer", as --defer does;
                                     # "fallback": defer, and serve the ONNX file by ONNX Runtime, with
                                     # TensorRT's execution provider on a GPU, where there is no plan yet
    allow_slow_int8 = false          # publish INT8 that is no faster than FP16
    [target.gpu.plan]
    optimization_level = 3           # 0 to 5
    workspace = "4 GiB"              # or a number of bytes
    tf32 = true
    sparse_weights = false           # 2:4 kernels where the weights have that pattern
    version_compatible = false
    hardware_compatibility = "none"  # "ampere_plus", "same_compute_capability"
    strip_weights = false            # refitted from the ONNX file when the plan is loaded

    [[target.gpu.profile]]           # an optimization profile: a range for each free axis, by its name
    batch = [1, 8, 64]               # smallest, usual, largest; left out: 1 to max_batch_size
    sequence = [8, 64, 256]          # or one number, where there is one length

    [target.gpu.config]              # fields of Triton's model_config.proto, as [config] has them
    dynamic_batching = {preferred_batch_size = [32, 64], max_queue_delay_microseconds = 200}

    [[target.gpu.config.instance_group]]
    count = 2
    gpus = [0, 1]

Instead of the batches of a profile, `traffic = "stats.json"` names Triton's answer to
`GET /v2/models/<model>/stats`, and there is a profile for each batch size that it gathers around; beside it
one profile may have the ranges of the other axes.

A target begins with the model's own configuration: tensors, labels, warm-up, batching and everything else of
[config], less what belongs to an engine or a machine: `instance_group`, `optimization`, `parameters`,
`model_operations` and `runtime`. A field of [target.<name>.config] takes the place of the inherited one, all
of it. So with `[config] dynamic_batching = {max_queue_delay_microseconds = 500}`, the target above waits
200 microseconds, and a target without a `dynamic_batching` of its own waits 500.

TensorRT gets, where the target does not say otherwise, one instance on each GPU, with all profiles, and CUDA
graphs for the batches of the profiles and the preferred ones. Pinned memory stays as Triton has it: on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritonsmith.artifact import BATCH_AXIS
from tritonsmith.compress.step_text import bytes_from
from tritonsmith.engines.tensorrt.flags import HARDWARE_MEMBERS, LEVELS
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import RecipeError, RepositoryError, UsageError
from tritonsmith.recipe_table import Keys, check_keys
from tritonsmith.repository.config import DERIVED_FIELDS, check_config_table
from tritonsmith.repository.names import check_name
from tritonsmith.repository.table import describe
from tritonsmith.targets.request import TARGET_BACKENDS, TARGET_PRECISIONS, TargetRequest

TARGET_KEYS: Keys = {
    "backend": str,
    "max_batch_size": int,
    "precision": str,
    "without_plan": str,
    "allow_slow_int8": bool,
    "traffic": str,
    "plan": dict,
    "profile": list,
    "config": dict,
}
PLAN_KEYS: Keys = {
    "optimization_level": int,
    "workspace": object,
    "tf32": bool,
    "sparse_weights": bool,
    "version_compatible": bool,
    "hardware_compatibility": str,
    "strip_weights": bool,
}
PLAN_ONLY = ("precision", "without_plan", "allow_slow_int8", "traffic", "plan", "profile")
WITHOUT_PLAN = ("fail", "defer", "fallback")
TARGET_DERIVED: Mapping[str, str] = {
    **DERIVED_FIELDS,
    "platform": "it follows from the target's backend",
    "backend": "it is the target's backend",
    "max_batch_size": "it is the target's max_batch_size",
    "default_model_filename": "it is the file that the target is given",
    "cc_model_filenames": "it names the plans that were built",
}


def targets_from_tables(
    tables: Mapping[str, Any], base: Path, known: Mapping[str, Keys]
) -> tuple[TargetRequest, ...]:
    """The targets of a recipe in their order; relative paths start from `base`.

    `known` are the keys of the recipe's other tables, among which a misplaced key is looked for.

    Raises:
        RecipeError: a mistake, named by its key and place.
    """
    return tuple(_target_from(name, table, base, known) for name, table in tables.items())


def targets_by_name(names: tuple[str, ...]) -> tuple[TargetRequest, ...]:
    """Targets without a recipe: each is the backend that it is named after, with defaults.

    Raises:
        UsageError: another name.
    """
    for name in names:
        if name not in TARGET_BACKENDS:
            raise UsageError(
                f"--target {name} needs a recipe that says what it is",
                expected=f"without a recipe, one of {', '.join(TARGET_BACKENDS)}",
                fix=f"write a recipe.toml with a [target.{name}] table",
            )
    return tuple(TargetRequest(name=name, backend=name) for name in dict.fromkeys(names))


def pick_targets(
    targets: tuple[TargetRequest, ...], names: tuple[str, ...], *, place: str
) -> tuple[TargetRequest, ...]:
    """Those of a recipe's targets that `names` name; all of them where there are no names.

    Raises:
        UsageError: a name that the recipe does not have; `place` names it.
    """
    own = tuple(target.name for target in targets)
    if unknown := [name for name in names if name not in own]:
        raise UsageError(
            f"{place} has no [target.{unknown[0]}]", expected=f"one of {', '.join(own) or '(it has none)'}"
        )
    return tuple(target for target in targets if not names or target.name in names)


def _target_from(name: str, table: Any, base: Path, known: Mapping[str, Keys]) -> TargetRequest:
    place = f"target.{name}"
    try:
        check_name(name)
    except RepositoryError as error:
        raise RecipeError(f"[{place}] cannot name a target", found=name, expected=error.expected) from error
    check_keys(table, TARGET_KEYS, place=place, known=known, required=("backend",))
    _check_choice(table, place, "backend", TARGET_BACKENDS)
    _check_choice(table, place, "precision", TARGET_PRECISIONS)
    _check_choice(table, place, "without_plan", WITHOUT_PLAN)
    backend = table["backend"]
    if backend != "tensorrt" and (others := [key for key in PLAN_ONLY if key in table]):
        raise RecipeError(
            f"{place}.{others[0]} is for TensorRT alone", found=f'backend = "{backend}"', fix="leave it out"
        )
    if table.get("max_batch_size", 0) < 0:
        raise RecipeError(
            f"{place}.max_batch_size is negative", found=table["max_batch_size"], expected="0 or more"
        )
    config = table.get("config", {})
    check_config_table(config, refused=TARGET_DERIVED, place=f"{place}.config")
    traffic = table.get("traffic")
    plan = _plan_from(table.get("plan", {}), table.get("profile", ()), place)
    if traffic is not None and (len(plan.profiles) > 1 or any(BATCH_AXIS in p.axes for p in plan.profiles)):
        raise RecipeError(
            f"{place}.traffic and {place}.profile both say the batches",
            expected="beside traffic, one profile at most, with the ranges of the other free axes",
        )
    return TargetRequest(
        name=name,
        backend=backend,
        precision=table.get("precision", "auto"),
        max_batch_size=table.get("max_batch_size"),
        config=config,
        plan=plan,
        traffic=None if traffic is None else base / traffic,
        without_plan=table.get("without_plan", "fail"),
        allow_slow_int8=table.get("allow_slow_int8", False),
    )


def _plan_from(table: Mapping[str, Any], profiles: Any, place: str) -> PlanOptions:
    at = f"{place}.plan"
    check_keys(table, PLAN_KEYS, place=at, known={place: TARGET_KEYS})
    _check_choice(table, at, "hardware_compatibility", ("none", *HARDWARE_MEMBERS))
    level = table.get("optimization_level", PlanOptions().optimization_level)
    if level not in LEVELS:
        raise RecipeError(
            f"{at}.optimization_level is out of range", found=level, expected=f"{LEVELS[0]} to {LEVELS[-1]}"
        )
    workspace = table.get("workspace")
    workspace_bytes = None if workspace is None else bytes_from(workspace, f"{at}.workspace")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise RecipeError(f"{at}.workspace is out of range", found=workspace, expected="1 byte or more")
    given = {key: value for key, value in table.items() if key != "workspace"}
    return replace(
        PlanOptions(
            profiles=tuple(
                _profile_from(profile, f"{place}.profile[{index}]") for index, profile in enumerate(profiles)
            ),
            workspace_bytes=workspace_bytes,
        ),
        **given,
    )


def _profile_from(table: Mapping[str, Any], place: str) -> Profile:
    if not table:
        raise RecipeError(
            f"{place} is empty", expected="a range for each free axis of the model, by its name"
        )
    return Profile(axes={axis: _range_from(value, f"{place}.{axis}") for axis, value in table.items()})


def _range_from(value: Any, place: str) -> AxisRange:
    lengths = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(lengths) != 3 or not all(type(length) is int and length > 0 for length in lengths):
        raise RecipeError(
            f"{place} is no range",
            found=value if isinstance(value, list | tuple) else describe(value),
            expected="[smallest, usual, largest], or one number, each 1 or more",
        )
    smallest, usual, largest = lengths
    if not smallest <= usual <= largest:
        raise RecipeError(f"{place} is out of order", found=lengths, expected="smallest <= usual <= largest")
    return AxisRange(minimum=smallest, best=usual, maximum=largest)


def _check_choice(table: Mapping[str, Any], place: str, key: str, choices: tuple[str, ...]) -> None:
    if key in table and table[key] not in choices:
        raise RecipeError(
            f"{place}.{key} has no value {table[key]!r}", expected=f"one of {', '.join(choices)}"
        )
