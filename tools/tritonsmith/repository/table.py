"""A recipe's [config] table -> fields of Triton's model_config.proto, by walking its descriptor.

The table's keys are the protobuf's own field names; a message is a table, an enum a name, a map a
table, a repeated message an array of tables. Nothing is known here of any single field but
`parameters`, whose values are messages of one string and are written as that string.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Json
from tritonsmith.errors import RecipeError

_FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
_KINDS = {
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_INT32: "an integer",
    FieldDescriptor.CPPTYPE_INT64: "an integer",
    FieldDescriptor.CPPTYPE_UINT32: "an integer of 0 or more",
    FieldDescriptor.CPPTYPE_UINT64: "an integer of 0 or more",
    FieldDescriptor.CPPTYPE_MESSAGE: "a table",
}


def fill_message(message: Message, table: Mapping[str, Json], *, place: str = "config") -> None:
    """Set the fields of `message` that `table` names; `place` leads their names in errors.

    Raises:
        RecipeError: an unknown key, a wrong type, an unknown enum name, two choices of a oneof.
    """
    fields = message.DESCRIPTOR.fields_by_name
    for key, value in table.items():
        if key not in fields:
            raise RecipeError(
                f"{place}.{key} is no field of Triton's configuration", fix=_advice(key, fields)
            )
        field = fields[key]
        group = field.containing_oneof
        if group is not None and (other := message.WhichOneof(group.name)) not in (None, key):
            raise RecipeError(
                f"{place}.{key} and {place}.{other} exclude each other", fix="keep one of the two"
            )
        _set_field(message, field, value, f"{place}.{key}")


def nearest(key: str, names: Sequence[str]) -> str | None:
    """The name that `key` was probably meant to be."""
    return next(iter(difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)), None)


def _set_field(message: Message, field: FieldDescriptor, value: Json, place: str) -> None:
    current = getattr(message, field.name)
    if isinstance(current, MutableMapping):
        _set_map(current, field, value, place)
    elif isinstance(current, MutableSequence):
        if not isinstance(value, list | tuple):
            raise _wrong_type(place, value, f"an array, each item {_kind(field)}")
        for index, item in enumerate(value):
            item_place = f"{place}[{index}]"
            if field.message_type is not None:
                fill_message(current.add(), _table(item, item_place), place=item_place)  # type: ignore[attr-defined]
            else:
                current.append(_scalar(field, item, item_place))
    elif field.message_type is not None:
        current.SetInParent()
        fill_message(current, _table(value, place), place=place)
    else:
        setattr(message, field.name, _scalar(field, value, place))


def _set_map(current: MutableMapping[Any, Any], field: FieldDescriptor, value: Json, place: str) -> None:
    key_field = field.message_type.fields_by_name["key"]
    value_field = field.message_type.fields_by_name["value"]
    for key, item in _table(value, place).items():
        item_place = f"{place}.{key}"
        map_key = _scalar(key_field, _map_key(key_field, key), item_place)
        if value_field.message_type is None:
            current[map_key] = _scalar(value_field, item, item_place)
        elif value_field.message_type is model_config_pb2.ModelParameter.DESCRIPTOR:
            current[map_key].string_value = _parameter(item, item_place)
        else:
            current[map_key].SetInParent()
            fill_message(current[map_key], _table(item, item_place), place=item_place)


def _map_key(field: FieldDescriptor, key: str) -> Json:
    """TOML's keys are strings; a map of the protobuf may count."""
    if field.cpp_type != FieldDescriptor.CPPTYPE_STRING and key.isdecimal():
        return int(key)
    return key


def _parameter(value: Json, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong_type(place, value, "a string or a number; Triton hands it to the backend as a string")
    return str(value)


def _scalar(field: FieldDescriptor, value: Json, place: str) -> bool | int | float | str:
    if field.enum_type is not None:
        names = list(field.enum_type.values_by_name)
        if not isinstance(value, str):
            raise _wrong_type(place, value, f"one of {', '.join(names)}")
        if value not in names:
            guess = _nearest_enum(value, names)
            raise RecipeError(
                f"{place} has no value {value!r}",
                expected=f"one of {', '.join(names)}",
                fix=f"did you mean {guess}?" if guess else None,
            )
        return int(field.enum_type.values_by_name[value].number)
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL and isinstance(value, bool):
        return value
    if kind == FieldDescriptor.CPPTYPE_STRING and isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(place, value, _kind(field))
    if kind in _FLOATS:
        return float(value)
    if isinstance(value, int) and kind not in (FieldDescriptor.CPPTYPE_BOOL, FieldDescriptor.CPPTYPE_STRING):
        low, high = _bounds(kind)
        if low <= value <= high:
            return value
        raise RecipeError(f"{place} is out of range", found=value, expected=f"{low} to {high}")
    raise _wrong_type(place, value, _kind(field))


def _nearest_enum(value: str, names: Sequence[str]) -> str | None:
    ending = next((name for name in names if name.endswith("_" + value.upper())), None)
    guess = nearest(value, [name.lower() for name in names])
    return ending or (guess.upper() if guess else None)


def _bounds(kind: int) -> tuple[int, int]:
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _kind(field: FieldDescriptor) -> str:
    if field.enum_type is not None:
        return f"one of {', '.join(field.enum_type.values_by_name)}"
    return _KINDS[field.cpp_type]


def _table(value: Json, place: str) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise _wrong_type(place, value, "a table")
    return value


def _wrong_type(place: str, value: Json, expected: str) -> RecipeError:
    return RecipeError(f"{place} has the wrong type", found=describe(value), expected=expected)


def describe(value: object) -> str:
    """A TOML value as a person would name it."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array"
    kind = {bool: "boolean", int: "integer", float: "number", str: "string"}.get(type(value))
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"the {kind} {shown}" if kind else f"{type(value).__name__} {value}"


def _advice(key: str, fields: Mapping[str, FieldDescriptor]) -> str:
    """Where else in the configuration a field of this name lives, or the nearest name here."""
    elsewhere = sorted(_places(model_config_pb2.ModelConfig.DESCRIPTOR, key, "config"), key=len)
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    if guess := nearest(key, list(fields)):
        return f"did you mean {guess!r}?"
    return f"the fields here are {', '.join(fields)}"


def _places(
    descriptor: Descriptor, key: str, place: str, above: tuple[Descriptor, ...] = ()
) -> Iterator[str]:
    for field in descriptor.fields:
        here = f"{place}.{field.name}"
        if field.name == key and above:
            yield here
        below = field.message_type
        if below is not None and not below.GetOptions().map_entry and below not in (*above, descriptor):
            yield from _places(below, key, here, (*above, descriptor))
