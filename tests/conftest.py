"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from served_models import Addresses, serve_models
from tritonsmith.server.environment import ServerEnvironment, ensure_environment


@pytest.fixture(scope="session")
def server_environment() -> ServerEnvironment:
    """The embedded server's environment, built once where it is missing (a minute, from the index)."""
    return ensure_environment(say=lambda line: print(line, file=sys.stderr))


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """A running server with the models of served_models.py."""
    with serve_models(tmp_path_factory.mktemp("served")) as addresses:
        yield addresses
