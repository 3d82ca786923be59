"""A server's address as a user writes it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from tritonsmith.errors import ClientError

DEFAULT_PORTS = {"http": 8000, "grpc": 8001}
EXPECTED = "http://host:port or grpc://host:port"


def read_address(url: str, protocol: str | None, timeout_s: float) -> tuple[str, str]:
    """The protocol ("http" or "grpc") and "host:port", with the path before /v2 if the URL has one."""
    shown = re.sub(r"//[^@/]*@", "//***@", url)  # a password in it is not for a log
    if not timeout_s > 0:
        raise ClientError("timeout_s must be above 0", found=timeout_s)
    if protocol not in (None, *DEFAULT_PORTS):
        raise ClientError("no such protocol", found=protocol, expected="http or grpc")
    try:
        parts = urlsplit(url if "://" in url else f"{protocol or 'http'}://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ClientError(f"{shown!r} is no address: {error}", expected=EXPECTED) from error
    if parts.scheme not in DEFAULT_PORTS or not host or parts.query or parts.fragment or parts.username:
        raise ClientError(f"{shown!r} is no address that this client can use", expected=EXPECTED)
    if protocol not in (None, parts.scheme):
        raise ClientError(f"{shown!r} is not of protocol {protocol!r}", fix="leave the protocol to the URL")
    path = parts.path.rstrip("/")
    if path and parts.scheme == "grpc":
        raise ClientError(f"{shown!r} has a path", expected="grpc://host:port")
    name = f"[{host}]" if ":" in host else host
    return parts.scheme, f"{name}:{port or DEFAULT_PORTS[parts.scheme]}{path}"
