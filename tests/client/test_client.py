"""The client against a real server: every test runs over HTTP and gRPC, blocking and under asyncio."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from served_models import TYPES
from tritonsmith.client import AsyncClient, Client, ClientError, Signature, Tensor

# model name, arguments of the call -> outputs
Ask = Callable[..., dict[str, Any]]


class Blocking:
    """Asks with `Client`."""

    def __init__(self, url: str, timeout_s: float = 20) -> None:
        self.url, self.timeout_s = url, timeout_s

    def __call__(self, model: str, /, *arguments: Any, version: int | None = None, **named: Any) -> Any:
        with Client(self.url, timeout_s=self.timeout_s) as client:
            return client.model(model, version)(*arguments, **named)

    def signature(self, model: str) -> Signature:
        with Client(self.url) as client:
            return client.model(model).signature

    def statistics(self, model: str) -> dict[str, Any]:
        with Client(self.url) as client:
            return client.statistics(model)


class Asyncio(Blocking):
    """Asks with `AsyncClient`."""

    def __call__(self, model: str, /, *arguments: Any, version: int | None = None, **named: Any) -> Any:
        async def ask() -> Any:
            async with AsyncClient(self.url, timeout_s=self.timeout_s) as client:
                return await (await client.model(model, version))(*arguments, **named)

        return asyncio.run(ask())

    def signature(self, model: str) -> Signature:
        async def ask() -> Signature:
            async with AsyncClient(self.url) as client:
                return (await client.model(model)).signature

        return asyncio.run(ask())

    def statistics(self, model: str) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            async with AsyncClient(self.url) as client:
                return await client.statistics(model)

        return asyncio.run(ask())


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, served_models: Any) -> str:
    return str(getattr(served_models, request.param))


@pytest.fixture(params=[Blocking, Asyncio])
def asking(request: pytest.FixtureRequest) -> type[Blocking]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def ask(asking: type[Blocking], url: str) -> Blocking:
    return asking(url)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def message(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value)


def test_signature_comes_from_the_server(ask: Blocking) -> None:
    signature = ask.signature("pair")
    assert signature.max_batch_size == 4
    assert signature.inputs == (
        Tensor(name="a", datatype="FP32", shape=(-1, 2)),
        Tensor(name="b", datatype="FP32", shape=(-1, 2), optional=True),
    )
    assert [(t.name, t.datatype, t.shape) for t in signature.outputs] == [
        ("sum", "FP32", (-1, 2)),
        ("b_given", "BOOL", (-1, 1)),
    ]
    assert str(signature).splitlines()[0] == "pair (max_batch_size 4)"
    assert "b: FP32[?, 2] (optional)" in str(signature)


def test_one_sample_by_keyword_or_mapping(ask: Blocking) -> None:
    x = np.array([[1, 2, 3]], np.float32)
    for result in (ask("affine", x=x), ask("affine", {"x": x}), ask("affine", x=[[1, 2, 3]])):
        np.testing.assert_array_equal(result["y"], np.array([[3, 5, 7]], np.float32))
        assert result["y"].dtype == np.float32
        assert result["y"].flags.writeable


def test_batches_past_the_limit_are_split_and_joined(ask: Blocking) -> None:
    x = np.arange(33, dtype=np.float32).reshape(11, 3)
    before = ask.statistics("affine")["inference_count"]
    np.testing.assert_array_equal(ask("affine", x=x)["y"], 2 * x + 1)
    assert int(ask.statistics("affine")["inference_count"]) - int(before) == 11


def test_a_split_makes_no_more_requests_than_it_needs(ask: Blocking) -> None:
    def counts() -> tuple[int, int]:
        statistics = ask.statistics("pair")  # whose requests the server does not merge
        return int(statistics["inference_count"]), int(statistics["execution_count"])

    inferences, executions = counts()
    ask("pair", a=np.ones((9, 2), np.float32))
    after = counts()
    assert after[0] - inferences == 9
    assert after[1] - executions == 3  # 4 + 4 + 1


def test_parts_of_a_split_batch_run_together(ask: Blocking) -> None:
    start = time.monotonic()
    assert ask("sleepy", seconds=[[0.4]] * 3)["done"].tolist() == [[True]] * 3
    assert time.monotonic() - start < 1.1  # one after the other would be 1.2


def test_parts_that_cannot_be_joined_are_an_error(ask: Blocking) -> None:
    with pytest.raises(ClientError, match="cannot be joined") as error:
        ask("ragged", n=[[1], [1], [2], [2]])
    assert "at most max_batch_size" in message(error)


def test_ensemble(ask: Blocking) -> None:
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    np.testing.assert_array_equal(ask("twice", x=x)["z"], 4 * x + 3)


def test_model_without_batch_axis(ask: Blocking) -> None:
    assert ask("columns", x=[[1, 2, 3], [10, 20, 30]])["sum"].tolist() == [11, 22, 33]
    assert ask("columns", x=np.zeros((0, 3), np.int64))["sum"].tolist() == [0, 0, 0]


def test_optional_input_may_stay_away(ask: Blocking) -> None:
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    without, given = ask("pair", a=a), ask("pair", {"a": a}, b=b)
    assert without["sum"].tolist() == [[1, 2]]
    assert without["b_given"].tolist() == [[False]]
    assert given["sum"].tolist() == [[11, 22]]
    assert given["b_given"].tolist() == [[True]]


def test_a_subset_of_outputs(ask: Blocking) -> None:
    assert list(ask("pair", a=[[1, 2]], outputs=["b_given"])) == ["b_given"]


EXTREMES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "FP16": [65504.0, -(2.0**-24), np.inf],
    "FP32": [3.4028235e38, np.nan, -0.0],
    "FP64": [1e308, -1e-308, np.nan],
    "BYTES": ["ä", b"\x89PNG\x00\x00", "", b"a\x00"],
}
for kind in ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"):
    limits = np.iinfo(kind.lower())
    EXTREMES[kind] = [int(limits.min), int(limits.max), 7]


@pytest.mark.parametrize("wire", TYPES.values())
def test_every_data_type_goes_and_comes_back(ask: Blocking, wire: str) -> None:
    values = EXTREMES[wire]
    result = ask("types", {wire: [values]}, outputs=[f"{wire}_out"])[f"{wire}_out"]
    if wire == "BYTES":
        expected = [value.encode() if isinstance(value, str) else value for value in values]
        assert result.tolist() == [expected]
        return
    assert result.dtype.name == {"FP16": "float16", "FP32": "float32", "FP64": "float64"}.get(
        wire, wire.lower()
    )
    np.testing.assert_array_equal(result, np.array([values], result.dtype))


@pytest.mark.parametrize("wire", ["FP32", "INT64", "BYTES", "BOOL"])
def test_empty_tensors(ask: Blocking, wire: str) -> None:
    result = ask(
        "types", {wire: np.empty((2, 0), object if wire == "BYTES" else None)}, outputs=[f"{wire}_out"]
    )
    assert result[f"{wire}_out"].shape == (2, 0)


def test_numpy_strings_of_either_kind(ask: Blocking) -> None:
    for array in (
        np.array([["ä", "bc"]]),
        np.array([[b"\xc3\xa4", b"bc"]]),
        np.array([["ä", b"bc"]], object),
    ):
        assert ask("types", BYTES=array, outputs=["BYTES_out"])["BYTES_out"].tolist() == [
            [b"\xc3\xa4", b"bc"]
        ]


def test_classes_with_their_labels(ask: Blocking) -> None:
    result = ask("scores", x=[[0.25, 0.5, 0.125]], classes={"p": 2})
    assert [item.decode() for item in result["p"][0]] == ["0.500000:1:one", "0.250000:0:zero"]
    assert ask.signature("scores").outputs[0].labelled
    assert not ask.signature("affine").outputs[0].labelled


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        ("affine", {}, ["needs input 'x'", "expected: x: FP32[?, 3]"]),
        ("affine", {"x": [[1, 2, 3]], "w": 1}, ["has no input 'w'", "x: FP32[?, 3]"]),
        ("affine", {"x": [1.0, 2.0, 3.0]}, ["found: [3]", "FP32[?, 3]", "pass x[None]"]),
        ("affine", {"x": [[1.0, 2.0]]}, ["found: [1, 2]", "FP32[?, 3]"]),
        ("affine", {"x": [[1.0, 2.0], [3.0]]}, ["cannot be made an array"]),
        (
            "affine",
            {"x": np.array([[0.1, 0.2, 0.3]])},
            ["found: float64 array with 0.1", "x.astype('float32')"],
        ),
        ("affine", {"x": [[1e39, 0, 0]]}, ["float32 cannot hold"]),
        ("affine", {"x": [[2**24 + 1, 0, 0]]}, ["float32 cannot hold", "16777217"]),
        ("affine", {"x": [["1", "2", "3"]]}, ["another data type", "<U1"]),
        ("affine", {"x": [[True, False, True]]}, ["another data type", "bool"]),
        ("affine", {"x": np.zeros((0, 3), np.float32)}, ["a batch of no samples"]),
        ("columns", {"x": [[0.5, 1, 2]]}, ["another data type", "float64", "INT64[?, 3]"]),
        ("types", {"UINT8": [[256]]}, ["uint8 cannot hold", "256"]),
        ("types", {"UINT64": [[-1]]}, ["uint64 cannot hold", "-1"]),
        ("types", {"BOOL": [[1]]}, ["another data type", "int64"]),
        ("types", {"BYTES": [[1]]}, ["is not text", "found: 1"]),
        ("types", {"BYTES": np.zeros((1, 1))}, ["is not text", "float64"]),
        ("pair", {"a": [[1, 2]], "b": [[1, 2], [3, 4]]}, ["unequal batch", "{'a': 1, 'b': 2}"]),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_sent(
    ask: Blocking, model: str, inputs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ClientError) as error:
        ask(model, inputs)
    assert model in message(error)
    for word in words:
        assert word in message(error)


def test_values_that_fit_are_converted(ask: Blocking) -> None:
    for array in (
        np.array([[1, 2, 3]], np.uint8),
        np.array([[1.0, 2.0, 3.0]]),
        np.array([[1, 2, 3]], np.float16),
    ):
        assert ask("affine", x=array)["y"].tolist() == [[3, 5, 7]]
    rounded = np.float32(0.1)
    assert ask("affine", x=[[0.1, 0, 0]])["y"][0, 0] == 2 * rounded + 1


def test_unknown_output_and_wrong_outputs(ask: Blocking) -> None:
    with pytest.raises(ClientError, match="has no output 'q'") as error:
        ask("affine", x=[[1, 2, 3]], outputs=["q"])
    assert "y: FP32[?, 3]" in message(error)
    with pytest.raises(ClientError, match="outputs is a string"):
        ask("affine", x=[[1, 2, 3]], outputs="y")
    with pytest.raises(ClientError, match="no output is asked for"):
        ask("affine", x=[[1, 2, 3]], outputs=[])
    with pytest.raises(ClientError, match="'x' is given twice"):
        ask("affine", {"x": [[1, 2, 3]]}, x=[[1, 2, 3]])


def test_unknown_model_and_version(ask: Blocking) -> None:
    with pytest.raises(ClientError, match="'nothing' is not found"):
        ask("nothing", x=1)
    with pytest.raises(ClientError, match=r"affine.*version 9"):
        ask("affine", x=[[1, 2, 3]], version=9)
    assert ask("affine", x=[[1, 2, 3]], version=1)["y"].tolist() == [[3, 5, 7]]


def test_the_models_own_error_is_passed_on(ask: Blocking) -> None:
    with pytest.raises(ClientError, match=r"below zero: -3\.0"):
        ask("picky", x=[[1], [-3]])


def test_one_failing_part_fails_the_call(ask: Blocking) -> None:
    with pytest.raises(ClientError, match=r"below zero: -1\.0"):
        ask("picky", x=np.array([[1]] * 8 + [[-1]] + [[1]] * 20, np.float32))


def test_streaming_models_are_refused(ask: Blocking) -> None:
    with pytest.raises(ClientError, match="answers with a stream"):
        ask("stream", x=[1])


def test_a_slow_model_times_out(asking: type[Blocking], url: str) -> None:
    start = time.monotonic()
    with pytest.raises(ClientError, match=r"'slow'.*did not answer in time") as error:
        asking(url, timeout_s=0.5)("slow", seconds=[1.5])
    assert time.monotonic() - start < 1.4
    assert "after 0.5 s" in message(error)
    assert asking(url)("slow", seconds=[0])["done"].tolist() == [True]  # behind the one given up


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_port_that_never_answers(asking: type[Blocking], protocol: str, silent_port: int) -> None:
    with pytest.raises(ClientError) as error:
        asking(f"{protocol}://127.0.0.1:{silent_port}", timeout_s=0.5)("affine", x=1)
    assert "did not answer in time" in message(error) or "no server can be reached" in message(error)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_server(asking: type[Blocking], protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        ClientError, match=f"no server can be reached at {protocol}://127.0.0.1:{port}"
    ) as error:
        asking(f"{protocol}://127.0.0.1:{port}", timeout_s=5)("affine", x=1)
    assert "refused" in message(error) or "Connect call failed" in message(error)


def test_many_threads_share_one_client(url: str) -> None:
    with Client(url) as client, ThreadPoolExecutor(16) as threads:
        affine = client.model("affine")

        def ask(index: int) -> bool:
            x = np.full((1 + index % 6, 3), index, np.float32)
            return np.array_equal(affine(x=x)["y"], 2 * x + 1)

        assert all(threads.map(ask, range(200)))


def test_many_tasks_share_one_client(url: str) -> None:
    async def run() -> list[bool]:
        async with AsyncClient(url) as client:
            affine = await client.model("affine")

            async def ask(index: int) -> bool:
                x = np.full((1 + index % 6, 3), index, np.float32)
                return np.array_equal((await affine(x=x))["y"], 2 * x + 1)

            return await asyncio.gather(*(ask(index) for index in range(200)))

    assert all(asyncio.run(run()))


def test_a_closed_client_leaves_no_thread(url: str) -> None:
    with Client(url) as client:
        client.model("affine")(x=np.ones((20, 3), np.float32))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tritonsmith-client")]
