"""Which opset and IR version each Triton release reads, by `containers.py`.

The embedded server (24.10) runs the onnxruntime package of its own environment, which reads more than
its row says. The row still counts, so that the same repository loads in NVIDIA's container.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from tritonsmith.containers import CONTAINERS
from tritonsmith.errors import SourceError, UsageError
from tritonsmith.onnx_model import opset_of

OLDEST_OPSET = 13  # the first with per-channel QuantizeLinear; anything older is raised to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A Triton release: its ONNX Runtime and the newest opset and IR version that it reads."""

    release: str
    onnxruntime: str
    opset: int
    ir_version: int


SERVERS: Mapping[str, Server] = {
    row.release: Server(
        release=row.release, onnxruntime=row.onnxruntime, opset=row.opset, ir_version=row.ir_version
    )
    for row in CONTAINERS.values()
    if row.onnxruntime is not None and row.opset is not None and row.ir_version is not None
}


def find_server(release: str) -> Server:
    """The row of a Triton release such as "24.10".

    Raises:
        UsageError: the release is not in the table.
    """
    server = SERVERS.get(release)
    if server is None:
        raise UsageError(
            f"no Triton release {release!r} is known",
            expected=f"one of {', '.join(SERVERS)}",
            fix="name the newest release that is not newer than your server",
        )
    return server


def newest_opset(release: str, asked: int | None = None) -> int:
    """The opset to export with: the one asked for, else the newest that the release reads.

    Raises:
        UsageError: an unknown release, or an opset that it does not read.
    """
    server = find_server(release)
    if asked is None:
        return server.opset
    if not OLDEST_OPSET <= asked <= server.opset:
        raise UsageError(
            f"opset {asked} does not suit Triton {release} (ONNX Runtime {server.onnxruntime})",
            expected=f"{OLDEST_OPSET} to {server.opset}",
            fix="leave the opset out, or name a newer server",
        )
    return asked


def check_target(model: onnx.ModelProto, release: str) -> None:
    """Raise SourceError where a model's opset or IR version is newer than a Triton release reads."""
    server = find_server(release)
    for what, found, newest in (
        ("opset", opset_of(model), server.opset),
        ("IR version", int(model.ir_version), server.ir_version),
    ):
        if found > newest:
            raise SourceError(
                f"the model's {what} is newer than Triton {release} reads",
                found=f"{what} {found}",
                expected=f"at most {newest} (ONNX Runtime {server.onnxruntime})",
                fix="convert it again for this server, or name a newer server",
            )
