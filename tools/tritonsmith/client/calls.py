"""What a client asks of a server, apart from how it is sent.

A conversation is a generator: it yields the calls that may travel together, is sent their replies in the
same order, and returns its result. The blocking and the asyncio client drive the same conversations.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from numpy.typing import NDArray

from tritonsmith.client.signature import Signature, Tensor, signature_from_server
from tritonsmith.client.tensors import check_outputs, fit_inputs, join, split
from tritonsmith.errors import ClientError

Arrays: TypeAlias = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question about a model, answered in JSON."""

    what: Literal["metadata", "config", "statistics"]
    model: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Infer:
    """One inference request, answered by arrays."""

    model: str
    version: str
    inputs: tuple[tuple[Tensor, NDArray[Any]], ...]
    outputs: Mapping[str, int]  # name -> how many classes to answer in place of the numbers; 0 for numbers


Call: TypeAlias = "Ask | Infer"
Result = TypeVar("Result")
Conversation: TypeAlias = "Generator[tuple[Call, ...], list[Any], Result]"


def ask_signature(model: str, version: int | str | None) -> Conversation[Signature]:
    """What the model takes and gives."""
    version = _version(version)
    metadata, config = yield (
        Ask(what="metadata", model=model, version=version),
        Ask(what="config", model=model, version=version),
    )
    return signature_from_server(model, version, metadata, config)


def ask_statistics(model: str, version: int | str | None) -> Conversation[dict[str, Any]]:
    """The server's statistics of one version of the model (the first that it names)."""
    (reply,) = yield (Ask(what="statistics", model=model, version=_version(version)),)
    statistics: dict[str, Any] = reply["model_stats"][0]
    return statistics


def infer(
    signature: Signature,
    inputs: Mapping[str, Any] | None,
    named: Mapping[str, Any],
    outputs: Sequence[str] | None,
    classes: Mapping[str, int] | None,
) -> Conversation[Arrays]:
    """Check the arrays, send them in as many requests as their batch needs, and join the answers."""
    arrays = fit_inputs(signature, _merge(signature, inputs, named))
    wanted = check_outputs(signature, outputs, classes)
    tensors = {tensor.name: tensor for tensor in signature.inputs}
    replies = yield tuple(
        Infer(
            model=signature.model,
            version=signature.version,
            inputs=tuple((tensors[name], array) for name, array in part.items()),
            outputs=wanted,
        )
        for part in split(signature, arrays)
    )
    return join(replies)


def _merge(
    signature: Signature, inputs: Mapping[str, Any] | None, named: Mapping[str, Any]
) -> dict[str, Any]:
    merged = dict(inputs or {})
    if twice := [name for name in named if name in merged]:
        raise ClientError(f"model {signature.model!r}: input {twice[0]!r} is given twice")
    merged.update(named)
    return merged


def _version(version: int | str | None) -> str:
    return "" if version is None else str(version)
