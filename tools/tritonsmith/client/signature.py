"""A model's signature as its server tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritonsmith.errors import ClientError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input or output: its KServe v2 data type, and its shape with the batch axis; -1 is a free axis."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    labelled: bool = False  # an output whose classes have names on the server

    def __str__(self) -> str:
        axes = ", ".join("?" if axis < 0 else str(axis) for axis in self.shape)
        return f"{self.name}: {self.datatype}[{axes}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model takes and gives. `max_batch_size` 0 means that there is no batch axis."""

    model: str
    version: str  # as it was asked for; "" leaves the choice to the server
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    config: Mapping[str, Any]  # the whole model configuration, by Triton's own field names

    def __str__(self) -> str:
        lines = [f"{self.model} (max_batch_size {self.max_batch_size})"]
        lines += [f"  takes {tensor}{' (optional)' if tensor.optional else ''}" for tensor in self.inputs]
        lines += [f"  gives {tensor}" for tensor in self.outputs]
        return "\n".join(lines)


def signature_from_server(
    model: str, version: str, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> Signature:
    """Join a model's metadata and configuration, both as JSON.

    Raises:
        ClientError: the model answers with a stream, which this client does not read.
    """
    if config.get("model_transaction_policy", {}).get("decoupled"):
        raise ClientError(
            f"model {model!r} answers with a stream (it is decoupled)", expected="one answer per request"
        )
    optional = {entry["name"] for entry in config.get("input", ()) if entry.get("optional")}
    labelled = {entry["name"] for entry in config.get("output", ()) if entry.get("label_filename")}
    return Signature(
        model=model,
        version=version,
        max_batch_size=int(config.get("max_batch_size", 0)),
        inputs=tuple(_tensor(entry, optional, labelled) for entry in metadata.get("inputs", ())),
        outputs=tuple(_tensor(entry, optional, labelled) for entry in metadata.get("outputs", ())),
        config=config,
    )


def _tensor(entry: Mapping[str, Any], optional: set[str], labelled: set[str]) -> Tensor:
    # gRPC leaves out an empty shape and writes its 64-bit numbers as strings.
    return Tensor(
        name=entry["name"],
        datatype=entry["datatype"],
        shape=tuple(int(axis) for axis in entry.get("shape", ())),
        optional=entry["name"] in optional,
        labelled=entry["name"] in labelled,
    )
