"""config.pbtxt against the model's own signature: completed where it is silent, refused where it is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FREE = -1
DEFAULT_MAX_BATCH_SIZE = 4  # Triton's own default for `--backend-config=default-max-batch-size`


class ConfigError(Exception):
    """config.pbtxt asks for what the model or this backend cannot do."""


@dataclass(frozen=True)
class Port:
    """An input or output of the model, in Triton's terms."""

    name: str
    data_type: str  # TYPE_*, or the engine's own name for a type that Triton lacks
    dims: tuple[int, ...] | None  # batch axis included, free axes -1; None where the rank is unknown
    optional: bool = False

    def __str__(self) -> str:
        shape = "of unknown rank" if self.dims is None else list(self.dims)
        return f"{self.name!r} {self.data_type} {shape}"


def model_file(config: Mapping[str, Any], folder: Path, default: str) -> Path:
    """The file, or folder, that holds the model in a version's folder."""
    path = folder / (config.get("default_model_filename") or default)
    if not path.exists():
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"{path} is missing; {folder} holds {found}. Name the file with default_model_filename."
        )
    if path.is_dir() and (path / default).is_file():
        return path / default  # a folder that keeps the weights beside the graph
    return path


def version_folder(config: Mapping[str, Any], model_dir: str) -> Path:
    """The version's folder, from that of the model file, which Triton's stub names while completing."""
    folder = Path(model_dir)
    for _ in Path(config.get("default_model_filename") or "").parts[1:]:
        folder = folder.parent
    return folder


def parameters_of(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: value["string_value"] for key, value in (config.get("parameters") or {}).items()}


def whole_number(parameters: Mapping[str, str], key: str) -> int:
    """A parameter that counts something; 0, and absence, leave the choice to the engine."""
    text = parameters.get(key, "0")
    if not text.strip().isdecimal():
        raise ConfigError(f"parameter {key} is {text!r}; expected a whole number from 0")
    return int(text)


def one_of(parameters: Mapping[str, str], key: str, values: Iterable[str]) -> str | None:
    """A parameter that has few values, compared without case; None where it is absent."""
    values = tuple(values)
    text = parameters.get(key)
    if text is not None and text.upper() not in values:
        raise ConfigError(f"parameter {key} is {text!r}; expected {' or '.join(values)}")
    return None if text is None else text.upper()


def flag(parameters: Mapping[str, str], key: str) -> bool | None:
    """A parameter that is on or off, in the spellings that Triton takes; None where it is absent."""
    text = one_of(parameters, key, ("1", "0", "TRUE", "FALSE"))
    return None if text is None else text in ("1", "TRUE")


def accelerators(config: Mapping[str, Any]) -> list[str]:
    """The execution accelerators that a configuration asks for, such as "tensorrt" on a GPU.

    The native backends have them; here the model runs on the CPU as it is, with the same answers.
    """
    asked = (config.get("optimization") or {}).get("execution_accelerators") or {}
    kinds = ("gpu_execution_accelerator", "cpu_execution_accelerator")
    return [str(entry["name"]) for kind in kinds for entry in asked.get(kind) or ()]


def complete(
    config: dict[str, Any], inputs: tuple[Port, ...], outputs: tuple[Port, ...], *, batchable: bool
) -> None:
    """Fill in what `config` leaves out, by the rules of the native backends."""
    given = bool(config["input"]) or bool(config.get("batch_input"))
    if given and config["output"]:
        return
    if batchable:
        if config["max_batch_size"] == 0:
            config["max_batch_size"] = DEFAULT_MAX_BATCH_SIZE
        scheduled = "dynamic_batching" in config or "sequence_batching" in config
        if config["max_batch_size"] > 1 and not scheduled:
            config["dynamic_batching"] = {}
    elif config["max_batch_size"] > 0:
        raise ConfigError(
            f"max_batch_size is {config['max_batch_size']}, but the model has no free batch axis on each of "
            f"{_listed((*inputs, *outputs))}; expected max_batch_size: 0"
        )
    fed_otherwise = set(sequence_inputs(config))
    if not given:
        config["input"] = [_completed(port, config) for port in inputs if port.name not in fed_otherwise]
    if not config["output"]:
        config["output"] = [_completed(port, config) for port in outputs]


def is_batchable(ports: Iterable[Port]) -> bool:
    """Whether the first axis of every input and output is free."""
    return all(port.dims is not None and port.dims[:1] == (FREE,) for port in ports)


def check(config: Mapping[str, Any], inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Raise ConfigError where `config` and the model disagree, or where this backend cannot follow."""
    if config.get("model_transaction_policy", {}).get("decoupled"):
        raise ConfigError("decoupled is set; a model file answers each request once")
    for key in ("batch_input", "batch_output"):
        if config.get(key):
            raise ConfigError(f"{key} is not supported by the embedded backend")
    max_batch_size = config["max_batch_size"]
    for entry in config["input"]:
        if entry.get("allow_ragged_batch"):
            raise ConfigError(
                f"input {entry['name']!r} sets allow_ragged_batch: not supported by the embedded backend"
            )
        if entry.get("optional") and max_batch_size > 0:
            raise ConfigError(f"input {entry['name']!r} is optional, which needs max_batch_size: 0")
        _check_entry("input", entry, inputs, max_batch_size)
    for entry in config["output"]:
        _check_entry("output", entry, outputs, max_batch_size)
    given = {entry["name"] for entry in config["input"]} | set(sequence_inputs(config))
    model_inputs = {port.name for port in inputs}
    for name in sequence_inputs(config):
        if name not in model_inputs:
            raise ConfigError(f"sequence_batching feeds input {name!r}; the model has {_listed(inputs)}")
    for port in inputs:
        if port.name not in given and not port.optional:
            raise ConfigError(f"the model needs input {port}, which config.pbtxt does not give")


def sequence_inputs(config: Mapping[str, Any]) -> list[str]:
    """Inputs that the sequence scheduler feeds: controls and implicit state."""
    sequence = config.get("sequence_batching") or {}
    controls = [control["name"] for control in sequence.get("control_input") or []]
    return controls + [state["input_name"] for state in sequence.get("state") or []]


def _check_entry(kind: str, entry: Mapping[str, Any], ports: tuple[Port, ...], max_batch_size: int) -> None:
    name = entry["name"]
    port = next((port for port in ports if port.name == name), None)
    if port is None:
        raise ConfigError(f"config.pbtxt has {kind} {name!r}; the model's {kind}s are {_listed(ports)}")
    if entry["data_type"] != port.data_type:
        raise ConfigError(
            f"{kind} {name!r}: config.pbtxt says {entry['data_type']}, the model says {port.data_type}"
        )
    if port.dims is None:
        return
    dims = [
        int(dim) for dim in (entry["reshape"].get("shape") or [] if "reshape" in entry else entry["dims"])
    ]
    if not port.dims and max_batch_size == 0:
        if any(dim != 1 for dim in dims):
            raise ConfigError(
                f"{kind} {name!r}: config.pbtxt says dims {dims}, the model says a scalar; expected dims: [1]"
            )
        return
    if max_batch_size > 0:
        if port.dims[:1] != (FREE,):
            raise ConfigError(
                f"{kind} {name!r}: max_batch_size is {max_batch_size}, but the model says {list(port.dims)}, "
                "whose first axis is not free"
            )
        dims = [FREE, *dims]
    if len(dims) != len(port.dims) or not all(
        _fits(kind, wanted, own) for wanted, own in zip(dims, port.dims, strict=True)
    ):
        batch = " (the first axis is the batch, which dims leave out)" if max_batch_size > 0 else ""
        raise ConfigError(
            f"{kind} {name!r}: config.pbtxt says dims {dims[1:] if max_batch_size > 0 else dims}, "
            f"the model says {list(port.dims)}{batch}"
        )


def _fits(kind: str, wanted: int, own: int) -> bool:
    # A free axis in config.pbtxt over a fixed one of the model only promises too much for an input; for an
    # output Triton would refuse what the model gives.
    return own in (FREE, wanted) or (wanted == FREE and kind == "input")


def _completed(port: Port, config: Mapping[str, Any]) -> dict[str, Any]:
    if not port.data_type.startswith("TYPE_"):
        raise ConfigError(f"{port} has a data type that Triton cannot serve")
    if port.dims is None:
        raise ConfigError(f"{port}: config.pbtxt must say its dims, because the model does not")
    batched = config["max_batch_size"] > 0
    dims = list(port.dims[1:] if batched else port.dims)
    entry: dict[str, Any] = {"name": port.name, "data_type": port.data_type, "dims": dims or [1]}
    if not dims and batched:
        entry["reshape"] = {"shape": []}
    if port.optional:
        entry["optional"] = True
    return entry


def _listed(ports: Iterable[Port]) -> str:
    return ", ".join(map(str, ports)) or "none"
