"""Holding a TOML table against the keys that it may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from tritonsmith.errors import RecipeError
from tritonsmith.repository.table import describe, nearest

# A key and the type of its value; `list` is an array of tables under those in _TABLE_ARRAYS.
Keys: TypeAlias = Mapping[str, type]

_KINDS = {
    bool: "true or false",
    str: "a string",
    int: "an integer",
    float: "a number",
    dict: "a table",
    list: "an array",
}
_TABLE_ARRAYS = ("step", "ensemble", "compress", "profile")


def check_keys(
    table: Any, keys: Keys, *, place: str, known: Mapping[str, Keys], required: tuple[str, ...] = ()
) -> None:
    """Raise RecipeError for a key that is unknown, missing or of another type.

    `place` leads the key's name in the error; `known` are the keys of all tables, among which a
    misplaced one is looked for.
    """
    if not isinstance(table, Mapping):
        raise RecipeError(f"{place} has the wrong type", found=describe(table), expected="a table")
    for key, value in table.items():
        here = f"{place}.{key}" if place else key
        if key not in keys:
            raise RecipeError(f"{here} is no key of a recipe", fix=_advice(key, keys, known))
        _check_type(value, keys[key], here, tables=key in _TABLE_ARRAYS)
    for key in required:
        if key not in table:
            raise RecipeError(f"{place}.{key} is missing", expected=_KINDS[keys[key]])


def _check_type(value: object, kind: type, here: str, *, tables: bool) -> None:
    if kind is object:
        return  # its reader says what it takes
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted):
        fix = f"write [[{here}]]" if tables and isinstance(value, Mapping) else None
        raise RecipeError(f"{here} has the wrong type", found=describe(value), expected=_KINDS[kind], fix=fix)
    if tables and isinstance(value, list) and not all(isinstance(item, Mapping) for item in value):
        raise RecipeError(f"{here} has the wrong type", found="an array", expected="an array of tables")
    if isinstance(value, float) and not value == value:
        raise RecipeError(f"{here} is not a number", found="nan", expected="a number")


def _advice(key: str, keys: Keys, known: Mapping[str, Keys]) -> str:
    """The table to which the key belongs, or the nearest key of this one."""
    elsewhere = next((table for table, names in known.items() if key in names and names is not keys), None)
    guess = nearest(key, list(keys))
    if elsewhere is not None:
        return f"did you mean {elsewhere}.{key}?"
    return f"did you mean {guess!r}?" if guess else f"the keys here are {', '.join(keys)}"
