"""Imports point one way: down the table of rooms in tools/README.md, or within one of its rows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tools" / "tritonsmith"
# What runs in the server's own environment imports nothing of the package.
ELSEWHERE = PACKAGE / "server" / "backends"


def rank_by_room() -> dict[str, int]:
    """The row of each module and folder, the topmost 0."""
    rooms = (ROOT / "tools" / "README.md").read_text(encoding="utf-8").split("## Rooms")[1].split("###")[0]
    rows = [line.split("|")[1] for line in rooms.splitlines() if line.startswith("| `")]
    names = [re.findall(r"`(\w+)(?:\.py|/)`", row) for row in rows]
    return {name: rank for rank, row in enumerate(names) for name in row}


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the package, but those for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing or node.module is None:
            continue
        package, _, rest = node.module.partition(".")
        if package == "tritonsmith":
            rooms = [rest.split(".")[0]] if rest else [name.name for name in node.names]
            yield from ((node.lineno, room) for room in rooms if not room.startswith("__"))


def test_every_module_has_its_row() -> None:
    there = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" and not path.stem.startswith("__")
    }
    there |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(rank_by_room()) == there


def test_imports_point_down() -> None:
    ranks = rank_by_room()
    upward = [
        f"{file.relative_to(PACKAGE)}:{line} imports {room}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if ELSEWHERE not in file.parents and file.parent.name != "__pycache__"
        for own in [file.relative_to(PACKAGE).parts[0].removesuffix(".py")]
        if not own.startswith("__")
        for line, room in imported(file)
        if ranks[room] < ranks[own]
    ]
    assert not upward, upward
