"""A step's record from a recipe's table or a command line's text, and back; mistakes are named by key."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import types
import typing
from collections.abc import Mapping
from typing import Any

from tritonsmith.artifact import Json
from tritonsmith.compress.steps import SPECS, Distill, Prune, PruneTorch, StepSpec
from tritonsmith.errors import RecipeError
from tritonsmith.repository.table import nearest

CHOICES: Mapping[str, tuple[str, ...]] = {
    "importance": ("magnitude", "taylor"),
    "pattern": ("unstructured", "2:4"),
    "method": ("auto", "static", "dynamic"),
    "calibrator": ("minmax", "entropy", "percentile", "mse"),
    "dialect": ("onnxruntime", "openvino", "tensorrt"),
    "arithmetic": ("float", "int8"),
    "to": ("fp16", "bf16"),
}
# Lowest and highest value; a share of what may be left is never all and never nothing.
_SHARE = (0.0, 1.0)
OPEN_RANGES: Mapping[str, tuple[float, float]] = {
    "flops": _SHARE,
    "parameters": _SHARE,
    "ratio": _SHARE,
    "sparsity": _SHARE,
    "width": _SHARE,
    "depth": _SHARE,
    "learning_rate": (0.0, 10.0),
    "temperature": (0.0, 1000.0),
}
CLOSED_RANGES: Mapping[str, tuple[float, float]] = {
    "epochs": (0, math.inf),
    "batch_size": (1, math.inf),
    "seed": (0, 2**31),
    "labels": (0, math.inf),
    "logits": (0, math.inf),
    "hidden": (0, math.inf),
    "embedding": (0, math.inf),
    "round_to": (1, math.inf),
    "iterations": (1, math.inf),
    "percentile": (50.0, 100.0),
    "smooth": (0.0, 1.0),
    "block": (16, math.inf),
    "rows": (1, math.inf),
}
BITS = (4, 8)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|B|kB|KB|MB|GB|KiB|MiB|GiB)")
_DECIMAL = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS = _DECIMAL | {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def spec_from_table(table: Mapping[str, Any], *, place: str) -> StepSpec:
    """A step from a recipe's table; `place` leads the key's name in an error.

    Raises:
        RecipeError: an unknown step or key, a value of another type or out of its range.
    """
    kind = table.get("step")
    if not isinstance(kind, str) or kind not in SPECS:
        raise RecipeError(
            f"{place}.step names no step", found=kind if kind is not None else "nothing",
            expected=", ".join(SPECS), fix=_did_you_mean(str(kind), list(SPECS)),
        )  # fmt: skip
    record = SPECS[kind]
    hints = typing.get_type_hints(record)
    known = {field.name: hints[field.name] for field in dataclasses.fields(record)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "step":
            continue
        here = f"{place}.{key}"
        if key not in known:
            raise RecipeError(
                f"{here} is no option of {kind}",
                expected=", ".join(known),
                fix=_did_you_mean(key, list(known)),
            )
        values[key] = _checked(_typed(value, known[key], here), key, here)
    needed = [
        field.name
        for field in dataclasses.fields(record)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if needed:
        raise RecipeError(f"{place}.{needed[0]} is missing", expected=_kind_of(known[needed[0]]))
    spec: StepSpec = record(**values)
    _check_together(spec, place)
    return spec


def spec_from_text(text: str) -> StepSpec:
    """A step as a command line writes it: its name, then `key=value`; several names by commas.

    Raises:
        RecipeError: as `spec_from_table`.
    """
    words = shlex.split(text)
    place = f"--step {text!r}"
    if not words:
        raise RecipeError("--step is empty", expected=", ".join(SPECS))
    table: dict[str, Any] = {"step": words[0]}
    hints = typing.get_type_hints(SPECS[words[0]]) if words[0] in SPECS else {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"{place} {word!r} says nothing", expected="key=value")
        if key in table:
            raise RecipeError(f"{place} {key!r} stands twice")
        table[key] = _value_from_text(value, hints.get(key, str), f"{place} {key}")
    return spec_from_table(table, place=place)


def json_from_spec(spec: StepSpec) -> dict[str, Json]:
    """The step as a recipe would write it, defaults included."""
    return {"step": spec.kind, **dataclasses.asdict(spec)}


def text_from_spec(spec: StepSpec) -> str:
    """The shortest text of which `spec_from_text` makes this step."""
    words = [spec.kind]
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value != field.default:
            text = ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(
                value, bool) else f"{value:g}" if isinstance(value, float) else str(value)  # fmt: skip
            words.append(shlex.quote(f"{field.name}={text}"))
    return " ".join(words)


def bytes_from(size: object, place: str) -> int:
    """A number of bytes from `30000`, `"30 kB"` or `"9.1 MB"` (decimal), or `"4 GiB"` (binary).

    Raises:
        RecipeError: anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None:
        raise RecipeError(f"{place} is no size", found=repr(size), expected="such as 30000, 30 kB or 9.1 MB")
    number, unit = found.groups()
    return round(float(number) * _UNITS[unit.lower()])


def _plain(hint: Any) -> Any:
    """The type in `T | None`, or the type itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return tuple if typing.get_origin(hint) is tuple else hint


_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    tuple: "an array of names",
}


def _kind_of(hint: Any) -> str:
    return _KINDS[_plain(hint)]


def _typed(value: Any, hint: Any, here: str) -> Any:
    kind = _plain(hint)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{here} has the wrong type", found=repr(value), expected=_kind_of(hint))
    return value


def _value_from_text(text: str, hint: Any, here: str) -> Any:
    kind = _plain(hint)
    if kind is bool:
        if text not in ("true", "false"):
            raise RecipeError(f"{here} has the wrong type", found=text, expected="true or false")
        return text == "true"
    if kind is tuple:
        return tuple(part for part in text.split(",") if part)
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError as error:
        raise RecipeError(f"{here} has the wrong type", found=text, expected=_kind_of(hint)) from error


def _checked(value: Any, key: str, here: str) -> Any:
    if key in CHOICES and value not in CHOICES[key]:
        raise RecipeError(f"{here} has no value {value!r}", expected=f"one of {', '.join(CHOICES[key])}")
    if key == "bits" and value not in BITS:
        raise RecipeError(f"{here} is out of range", found=value, expected="4 or 8")
    if key in OPEN_RANGES:
        low, high = OPEN_RANGES[key]
        if not low < value < high:
            raise RecipeError(
                f"{here} is out of range", found=value, expected=f"between {low:g} and {high:g}"
            )
    if key in CLOSED_RANGES:
        low, high = CLOSED_RANGES[key]
        if not low <= value <= high:
            expected = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"
            raise RecipeError(f"{here} is out of range", found=value, expected=expected)
    return value


def _check_together(spec: StepSpec, place: str) -> None:
    if isinstance(spec, (Prune, PruneTorch)):
        given = [name for name in ("flops", "parameters", "ratio") if getattr(spec, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                f"{place} {spec.kind} needs to know how much to remove",
                found=" and ".join(given) or "nothing",
                expected="one of flops (share left), parameters (share left), ratio (share removed)",
            )
    if not isinstance(spec, Distill):
        return
    if spec.student is not None and (spec.width is not None or spec.depth is not None):
        raise RecipeError(f"{place} has a student, and cannot derive one by width or depth as well")
    if not spec.epochs:
        raise RecipeError(f"{place} trains nothing", found="epochs = 0", expected="epochs = 1 or more")


def _did_you_mean(word: str, names: list[str]) -> str | None:
    guess = nearest(word, names)
    return f"did you mean {guess!r}?" if guess else None
