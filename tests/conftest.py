"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import sys

import pytest

from tritonsmith.server.environment import ServerEnvironment, ensure_environment


@pytest.fixture(scope="session")
def server_environment() -> ServerEnvironment:
    """The embedded server's environment, built once where it is missing (a minute, from the index)."""
    return ensure_environment(say=lambda line: print(line, file=sys.stderr))
