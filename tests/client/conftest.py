from __future__ import annotations

from collections.abc import Iterator

import pytest

from served_models import Addresses, serve_models


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    with serve_models(tmp_path_factory.mktemp("client")) as addresses:
        yield addresses
