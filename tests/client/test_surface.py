"""What the client promises to programs that use it: its names, and a light import."""

import inspect
import subprocess
import sys

import tritonsmith.client
from tritonsmith.client import AsyncClient, AsyncModel, Client, Model


def test_public_names() -> None:
    assert sorted(tritonsmith.client.__all__) == [
        "AsyncClient",
        "AsyncModel",
        "Client",
        "ClientError",
        "Model",
        "Signature",
        "Tensor",
    ]


def test_both_clients_have_one_surface() -> None:
    expected = {
        "__init__": "(self, url: 'str', *, protocol: 'str | None' = None, timeout_s: 'float' = 60.0)",
        "model": "(self, name: 'str', version: 'int | str | None' = None)",
        "statistics": "(self, name: 'str', version: 'int | str | None' = None) -> 'dict[str, Any]'",
        "close": "(self) -> 'None'",
    }
    for kind in (Client, AsyncClient):
        public = {name for name in vars(kind) if not name.startswith("_")}
        assert public == {"model", "statistics", "close"}
        for name, text in expected.items():
            assert str(inspect.signature(getattr(kind, name))).startswith(text)
    assert inspect.signature(Model.__call__) == inspect.signature(AsyncModel.__call__)
    assert str(inspect.signature(Model.__call__)) == (
        "(self, inputs: 'Mapping[str, Any] | None' = None, /, *, outputs: 'Sequence[str] | None' = None, "
        "classes: 'Mapping[str, int] | None' = None, **named: 'Any') -> 'dict[str, NDArray[Any]]'"
    )


def test_import_needs_numpy_and_tritonclient_alone() -> None:
    code = """
import sys
import tritonsmith.client, tritonsmith.client.http, tritonsmith.client.grpc
own = sorted(name for name in sys.modules if name.startswith("tritonsmith"))
foreign = {name.partition(".")[0] for name in sys.modules}
heavy = foreign & {"onnx", "onnxruntime", "onnxslim", "openvino", "torch", "tensorflow", "keras", "rich"}
print(own)
print(sorted(heavy))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own, heavy = run.stdout.splitlines()
    assert heavy == "[]"
    parts = ("address", "calls", "clients", "failures", "grpc", "http", "signature", "tensors")
    names = ["tritonsmith", "tritonsmith.errors", "tritonsmith.client"]
    assert own == str(sorted([*names, *(f"tritonsmith.client.{part}" for part in parts)]))


def test_import_leaves_the_protocols_until_one_is_used() -> None:
    code = "import sys, tritonsmith.client; print({'grpc', 'aiohttp', 'gevent'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
