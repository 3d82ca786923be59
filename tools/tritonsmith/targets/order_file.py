"""A plan order and the facts of a plan as JSON: out and in, refusing what is unknown.

The order's file is the `PlanOrder` record, field by field, led by `schema`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tritonsmith.artifact import Json
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import RepositoryError
from tritonsmith.manifest import json_from_tensor, spec_from_json
from tritonsmith.targets.order import ORDER_SCHEMA, PlanCandidate, PlanOrder

SUFFIX = ".order.json"


def order_name(target: str) -> str:
    """The file name of a target's order, in the version's folder."""
    return f"{target}{SUFFIX}"


def json_from_order(order: PlanOrder) -> dict[str, Json]:
    """The order as its file holds it."""
    return {
        "schema": ORDER_SCHEMA,
        **asdict(order),
        "inputs": [json_from_tensor(spec) for spec in order.inputs],
        "outputs": [json_from_tensor(spec) for spec in order.outputs],
    }


def order_from_json(record: Mapping[str, Any]) -> PlanOrder:
    """The order of its JSON.

    Raises:
        RepositoryError: an unknown schema, a field that is missing, unknown or of another type.
    """
    if record.get("schema") != ORDER_SCHEMA:
        raise RepositoryError(
            "the plan order has another schema",
            found=record.get("schema"),
            expected=ORDER_SCHEMA,
            fix="build the model again with this version of tritonsmith",
        )
    try:
        return _order_from({key: value for key, value in record.items() if key != "schema"})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RepositoryError(
            "the plan order is damaged", found=f"{type(error).__name__}: {error}", fix="build the model again"
        ) from error


def read_order(path: Path) -> PlanOrder:
    """Read `<target>.order.json`.

    Raises:
        RepositoryError: a file that cannot be read, and as `order_from_json`, with the file's name.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{path} cannot be read", found=error, expected="a plan order") from error
    if not isinstance(record, dict):
        raise RepositoryError(f"{path} is damaged", found=type(record).__name__, expected="an object")
    try:
        return order_from_json(record)
    except RepositoryError as error:
        raise RepositoryError(
            f"{path}: {error.what}", found=error.found, expected=error.expected, fix=error.fix
        ) from error


def text_from_order(order: PlanOrder) -> str:
    """The text of `<target>.order.json`."""
    return json.dumps(json_from_order(order), indent=2, ensure_ascii=False) + "\n"


def signed(order: PlanOrder) -> PlanOrder:
    """The order with its fingerprint: a SHA-256 of all of it, and of nothing of the machine."""
    parts = json_from_order(replace(order, fingerprint=""))
    text = json.dumps(parts, sort_keys=True)
    return replace(order, fingerprint=hashlib.sha256(text.encode()).hexdigest())


def json_from_facts(facts: PlanFacts) -> dict[str, Json]:
    """A plan's facts as manifest.json and the cache of plans hold them."""
    return asdict(facts)


def facts_from_json(record: Mapping[str, Any]) -> PlanFacts:
    """A plan's facts of their JSON.

    Raises:
        RepositoryError: a field that is missing, unknown or of another type.
    """
    try:
        _check(PlanFacts, record)
        _check(Device, record["device"])
        return PlanFacts(**{**record, "device": Device(**record["device"])})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RepositoryError(
            "the facts of a plan are damaged", found=f"{type(error).__name__}: {error}"
        ) from error


def _order_from(record: Mapping[str, Any]) -> PlanOrder:
    _check(PlanOrder, record)
    plan = record["plan"]
    _check(PlanOptions, plan)
    profiles = tuple(_profile_from(profile) for profile in _array(plan["profiles"]))
    for candidate in _array(record["candidates"]):
        _check(PlanCandidate, candidate)
    return PlanOrder(
        **{
            **record,
            "candidates": tuple(PlanCandidate(**candidate) for candidate in record["candidates"]),
            "inputs": tuple(spec_from_json(spec) for spec in _array(record["inputs"])),
            "outputs": tuple(spec_from_json(spec) for spec in _array(record["outputs"])),
            "plan": PlanOptions(**{**plan, "profiles": profiles}),
        }
    )


def _profile_from(record: Mapping[str, Any]) -> Profile:
    _check(Profile, record)
    for lengths in record["axes"].values():
        _check(AxisRange, lengths)
    return Profile(axes={axis: AxisRange(**lengths) for axis, lengths in record["axes"].items()})


def _array(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{type(value).__name__} where an array belongs")
    return value


def _check(kind: type[Any], record: Mapping[str, Any]) -> None:
    """The record's fields by name, and by type where that is a plain one."""
    expected = {field.name: field for field in fields(kind)}
    if missing := expected.keys() - record.keys():
        raise KeyError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    if unknown := record.keys() - expected.keys():
        raise ValueError(f"{kind.__name__} has unknown {', '.join(sorted(unknown))}")
    for name, field in expected.items():
        plain = _PLAIN.get(str(field.type))
        if plain is not None and (
            not isinstance(record[name], plain) or (bool not in plain and isinstance(record[name], bool))
        ):
            raise TypeError(f"{kind.__name__}.{name} is {record[name]!r}, which is no {field.type}")


_PLAIN: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
}
