import json
import subprocess
import sys

import pytest

from tritonsmith import console
from tritonsmith.errors import TritonsmithError


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90_868_376, "90.9 MB"), (2_500_000_000, "2.50 GB")],
)
def test_bytes_are_decimal(count: int, text: str) -> None:
    assert console.human_bytes(count) == text


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as say:
        say("first [bold]")
        say("second")
    captured = capsys.readouterr()
    assert captured.err == "first [bold]\nsecond\n"
    assert captured.out == ""


def test_json_keeps_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"name": "größe"})
    out = capsys.readouterr().out
    assert "größe" in out
    assert json.loads(out) == {"name": "größe"}


def test_table_is_not_folded_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(["a", "b"], [["x" * 70, "y" * 70]])
    assert ("x" * 70 + "  " + "y" * 70) in capsys.readouterr().out


def test_table_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(["a"], [["[red]x[/red]"]], title="of samples[bold].npz")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["of samples[bold].npz", "a", "[red]x[/red]"]


def test_error_shows_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(TritonsmithError("bad [x]", found="[1, 2]", expected="one", fix="do this"))
    assert capsys.readouterr().err == "error: bad [x]\n  found: [1, 2]\n  expected: one\n  to do: do this\n"


def test_no_color_is_honoured() -> None:
    code = "from tritonsmith.console import print_error; print_error('x')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"NO_COLOR": "1", "FORCE_COLOR": "", "TERM": "xterm"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "error: x\n"
