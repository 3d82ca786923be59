"""What people see: progress on stderr, results on stdout, errors in one message."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Say = Callable[[str], None]

# Without a terminal there is no width to fit; rich would fold tables at 80 columns.
PLAIN_WIDTH = 160


@contextmanager
def progress() -> Iterator[Say]:
    """A function that says what is being done now: a live line on a terminal, else a line each.

    Each message stands until the next; then it is left behind with the seconds that it took.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda message: print(message, file=sys.stderr, flush=True)
        return
    current: list[tuple[str, float]] = []

    def leave() -> None:
        if current:
            message, since = current.pop()
            console.print(f"  {escape(message)} [dim]({time.monotonic() - since:.1f} s)[/dim]")

    with console.status("") as status:

        def say(message: str) -> None:
            leave()
            current.append((message, time.monotonic()))
            status.update(escape(message))

        yield say
        leave()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_line(text: str) -> None:
    print(text)


def print_table(
    columns: Iterable[str], rows: Iterable[Iterable[object]], *, title: str | None = None
) -> None:
    """A table on stdout; a column whose every cell starts like a number is set to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    if title:
        print_line(title)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_numeric(row[index]) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(table)


def print_error(message: object) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/bold red] {escape(str(message))}"
    )


def human_bytes(count: int) -> str:
    """Bytes in the decimal units that disks are sold in: 1.2 kB, 90.9 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def human_count(count: int) -> str:
    """A count in thousands, millions or billions: 22.7 M."""
    size = float(count)
    for unit in ("", " k", " M"):
        if size < 1000:
            return f"{size:.0f}" if not unit else f"{size:.1f}{unit}"
        size /= 1000
    return f"{size:.2f} G"


def _numeric(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-<>=~").replace(",", "")[:1].isdigit()
