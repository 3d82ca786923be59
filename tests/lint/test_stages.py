"""requirements.txt of Python stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from linted import add_double, findings_of, only


def spoil(repository: Path, text: str | bytes) -> None:
    path = add_double(repository) / "requirements.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    "line", ["pillow==11.0.0", "pillow>=11", "numpy<2", "numpy", "numpy>=1.24,<3", "# none"]
)
def test_requirements_that_are_right(tmp_path: Path, line: str) -> None:
    spoil(tmp_path, line)
    errors = [finding for finding in findings_of(tmp_path, container="26.07") if finding.severity == "error"]
    assert errors == []


@pytest.mark.parametrize(
    ("text", "severity", "words"),
    [
        ("-r other.txt", "error", "only packages can be named"),
        (b"\xff\xfe", "error", "cannot be read"),
        ("pillow >> 11", "error", "no requirement"),
        ("pillow", "warning", "no version"),
    ],
)
def test_requirements_that_are_wrong(tmp_path: Path, text: str | bytes, severity: str, words: str) -> None:
    spoil(tmp_path, text)
    finding = only(findings_of(tmp_path))
    assert (finding.severity, finding.place) == (severity, "requirements.txt")
    assert words in finding.what


@pytest.mark.parametrize(
    ("line", "container", "severity"),
    [
        ("numpy>=2", "24.10", "error"),
        ("numpy==2.1.0", "24.12", "error"),
        ("NumPy~=2.0", "24.10", "error"),
        ("numpy>=2", None, "warning"),  # the embedded server
        ("numpy>=2", "25.01", None),
        ("numpy>=1.26,<3", "24.10", None),
        ("numpy==1.26.3", "24.10", None),
        ("numpy==1.21.0", "24.10", None),
        ("numpy~=1.24.1", "24.10", None),
        ("numpy!=1.26.4,>=1.26.2", "24.10", None),
        ("numpy>=1.26.5,<3", "24.10", "error"),  # there is no such 1.26
    ],
)
def test_numpy_2_under_a_stub_that_answers_nothing(
    tmp_path: Path, line: str, container: str | None, severity: str | None
) -> None:
    spoil(tmp_path, line)
    about = [finding for finding in findings_of(tmp_path, container=container) if finding.model]
    assert [finding.severity for finding in about] == ([] if severity is None else [severity])
