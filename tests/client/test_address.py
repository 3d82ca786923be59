import pytest

from tritonsmith.client.address import read_address
from tritonsmith.errors import ClientError


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        ("localhost", None, ("http", "localhost:8000")),
        ("localhost", "grpc", ("grpc", "localhost:8001")),
        ("localhost:9", "grpc", ("grpc", "localhost:9")),
        ("http://localhost:9/", None, ("http", "localhost:9")),
        ("http://gateway/triton/", None, ("http", "gateway:8000/triton")),
        ("grpc://10.0.0.1:9", None, ("grpc", "10.0.0.1:9")),
        ("grpc://[::1]:9", "grpc", ("grpc", "[::1]:9")),
    ],
)
def test_addresses(url: str, protocol: str | None, expected: tuple[str, str]) -> None:
    assert read_address(url, protocol, 1.0) == expected


@pytest.mark.parametrize(
    ("url", "protocol", "word"),
    [
        ("https://localhost", None, "https://localhost"),
        ("", None, "no address"),
        ("http://localhost:port", None, "Port could not be cast"),
        ("http://localhost:70000", None, "Port out of range"),
        ("grpc://localhost/path", None, "has a path"),
        ("http://me:secret@localhost", None, "no address"),
        ("http://localhost", "grpc", "not of protocol 'grpc'"),
        ("localhost", "tcp", "http or grpc"),
    ],
)
def test_what_is_no_address(url: str, protocol: str | None, word: str) -> None:
    with pytest.raises(ClientError) as error:
        read_address(url, protocol, 1.0)
    assert word in str(error.value)


def test_timeout_must_be_above_zero() -> None:
    with pytest.raises(ClientError, match="timeout_s"):
        read_address("localhost", None, 0)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ClientError, match="no address") as caught:
        read_address("http://user:secret@127.0.0.1:8000", None, 1.0)
    assert "secret" not in str(caught.value)
