"""What can go wrong between client and server, each as one ClientError."""

from __future__ import annotations

from tritonsmith.client.calls import Call, Infer
from tritonsmith.errors import ClientError


def timed_out(call: Call, url: str, timeout_s: float) -> ClientError:
    return ClientError(
        f"model {call.model!r} at {url} did not answer in time",
        found=f"no answer to {_name(call)} after {timeout_s:g} s",
        fix="give the client a longer timeout_s, or look for the reason in the server's statistics and log",
    )


def unreachable(call: Call, url: str, reason: object) -> ClientError:
    return ClientError(
        f"no server can be reached at {url}",
        found=f"{reason} (while asking {_name(call)} of model {call.model!r})",
        fix="check the address and port, and that the server runs",
    )


def refused(call: Call, url: str, message: str) -> ClientError:
    unknown = "unknown model" in message
    return ClientError(
        f"the server at {url} refused {_name(call)} of model {call.model!r}",
        found=message,
        fix="check the name and version; the server's log says which models it loaded" if unknown else None,
    )


def _name(call: Call) -> str:
    return "inference" if isinstance(call, Infer) else f"the {call.what}"
