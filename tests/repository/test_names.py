"""Which folders are models, and which of their versions are served."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tritonsmith.errors import RepositoryError
from tritonsmith.lint.run import lint
from tritonsmith.repository.config import config_from_text
from tritonsmith.repository.names import is_model, served_versions
from tritonsmith.targets.found import find_orders


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", (3,)),
        ("version_policy { latest { num_versions: 2 } }", (2, 3)),
        ("version_policy { latest {} }", (3,)),
        ("version_policy { all {} }", (1, 2, 3)),
        ("version_policy { specific { versions: [3, 1, 9] } }", (1, 3)),
    ],
)
def test_the_version_policy_decides_what_is_served(policy: str, expected: tuple[int, ...]) -> None:
    assert served_versions(config_from_text(policy), (2, 3, 1)) == expected


def test_a_model_is_a_folder_with_a_configuration(tmp_path: Path) -> None:
    for name in ("model", "plain"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.pbtxt").touch()
    (tmp_path / "file").touch()
    assert [name for name in ("model", "plain", "file", "absent") if is_model(tmp_path / name)] == ["model"]


@contextmanager
def another_user() -> Iterator[None]:
    """Not root, whom no mode keeps out."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_entered_is_no_model() -> None:
    """The lost+found of a block volume is root's alone."""
    with tempfile.TemporaryDirectory() as root:
        repository, closed = Path(root), Path(root) / "lost+found"
        repository.chmod(0o755)
        closed.mkdir(mode=0o000)
        with another_user():
            assert not is_model(closed)
            with pytest.raises(RepositoryError, match="holds no model"):
                find_orders(repository)
            (finding,) = lint(repository)
        assert (finding.model, finding.what) == ("lost+found", "the folder cannot be read")
