"""The table of servers, and what it refuses."""

from __future__ import annotations

import onnxruntime
import pytest

from onnx_models import linear_model
from tritonsmith.errors import SourceError, UsageError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.targets import OLDEST_OPSET, SERVERS, check_target, find_server, newest_opset


# Triton's compatibility.md names the runtime; the newest opset and IR version were read off its wheel.
@pytest.mark.parametrize(
    ("release", "runtime", "opset", "ir_version"),
    [("24.10", "1.19.2", 21, 10), ("25.06", "1.22.0", 22, 10), ("26.07", "1.27.0", 26, 13)],
)
def test_the_table_holds_what_was_probed(release: str, runtime: str, opset: int, ir_version: int) -> None:
    server = find_server(release)
    assert (server.onnxruntime, server.opset, server.ir_version) == (runtime, opset, ir_version)


def test_no_later_release_reads_less() -> None:
    rows = [(server.opset, server.ir_version) for _, server in sorted(SERVERS.items())]
    assert rows == sorted(rows)
    assert len(rows) == 23  # every month from 24.10 to 26.08


def test_the_default_server_is_the_embedded_one_which_is_the_oldest() -> None:
    assert ConvertOptions().server == "24.10" == min(SERVERS)


@pytest.mark.parametrize("opset", sorted({server.opset for server in SERVERS.values()}))
def test_the_installed_runtime_loads_every_opset_of_the_table(opset: int) -> None:
    model = linear_model(opset=opset, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "features"


def test_an_unknown_release_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError) as caught:
        find_server("23.01")
    assert "24.10" in str(caught.value)


@pytest.mark.parametrize("opset", [OLDEST_OPSET - 1, 22])
def test_an_opset_outside_of_what_the_server_reads_is_wrong_usage(opset: int) -> None:
    with pytest.raises(UsageError, match=f"opset {opset}") as caught:
        newest_opset("24.10", opset)
    assert "13 to 21" in str(caught.value)


def test_an_opset_is_asked_for_or_the_newest() -> None:
    assert newest_opset("24.10") == 21
    assert newest_opset("24.10", 17) == 17


@pytest.mark.parametrize(
    ("opset", "ir_version", "words"),
    [(22, 10, "opset 22"), (21, 11, "IR version 11")],
)
def test_a_model_newer_than_the_server_is_refused(opset: int, ir_version: int, words: str) -> None:
    with pytest.raises(SourceError) as caught:
        check_target(linear_model(opset=opset, ir_version=ir_version), "24.10")
    assert caught.value.found == words


def test_a_model_that_the_server_reads_passes() -> None:
    check_target(linear_model(opset=21, ir_version=10), "24.10")
