"""Which opset and IR version each Triton release reads.

A release's ONNX Runtime version stands in the server repository, docs/introduction/compatibility.md,
"ONNX Runtime Versions". What an ONNX Runtime version reads was probed on its PyPI wheels (1.19.2, 1.20.1,
1.21.0, 1.22.0, 1.23.2, 1.24.4, 1.27.0, 1.28.0): the newest opset and the newest IR version of a one-node
model that loads without leave for unreleased opsets.

The embedded server (24.10) runs the onnxruntime package of its own environment, which reads more than
its row says. The row still counts, so that the same repository loads in NVIDIA's container.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

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


# ONNX Runtime minor version -> newest opset, newest IR version
RUNTIMES = {
    "1.19": (21, 10),
    "1.20": (21, 10),
    "1.21": (22, 10),
    "1.22": (22, 10),
    "1.23": (23, 11),
    "1.24": (25, 13),
    "1.27": (26, 13),
    "1.28": (26, 13),
}

# 25.08 has a commit on the way to 1.23.0 (1.23.0+1d1712fdaf): the release before is what it surely reads.
RELEASES = {
    "24.10": "1.19.2",
    "24.11": "1.19.2",
    "24.12": "1.20.1",
    "25.01": "1.20.1",
    "25.02": "1.20.1",
    "25.03": "1.21.0",
    "25.04": "1.21.0",
    "25.05": "1.22.0",
    "25.06": "1.22.0",
    "25.07": "1.22.0",
    "25.08": "1.22.0",
    "25.09": "1.23.0",
    "25.10": "1.23.1",
    "25.11": "1.23.2",
    "25.12": "1.23.2",
    "26.01": "1.23.2",
    "26.02": "1.24.1",
    "26.03": "1.24.2",
    "26.04": "1.24.4",
    "26.05": "1.24.4",
    "26.06": "1.24.4",
    "26.07": "1.27.0",
    "26.08": "1.28.0",
}

SERVERS: Mapping[str, Server] = {
    release: Server(release=release, onnxruntime=runtime, opset=opset, ir_version=ir_version)
    for release, runtime in RELEASES.items()
    for opset, ir_version in [RUNTIMES[runtime.rpartition(".")[0]]]
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
