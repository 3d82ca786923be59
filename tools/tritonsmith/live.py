"""A search as it runs: on a terminal a table that grows, elsewhere the lines that `progress` prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tritonsmith.console import Say, human_bytes, progress

if TYPE_CHECKING:
    from tritonsmith.compress.search.goal import Progress

Show = Callable[["Progress"], None]

ROWS = 12  # the last ones: a live table must fit the screen
REFRESHES_PER_S = 4


@contextmanager
def search_progress() -> Iterator[tuple[Say, Show]]:
    """Two functions: one says what is being done now, the other shows where a search stands."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        with progress() as say:
            yield say, lambda _: None
        return
    began_s = time.monotonic()
    shown: list[Progress] = []
    said = Text()

    def render() -> Group:
        spinner = Spinner("dots", Text.assemble(said, f"  {time.monotonic() - began_s:.0f} s"))
        return Group(*([trial_table(shown[-1])] if shown else []), spinner)

    with Live(console=console, get_renderable=render, refresh_per_second=REFRESHES_PER_S, transient=True):

        def say(message: str) -> None:
            said.plain = message

        yield say, shown.append


def trial_table(progress: Progress) -> Table:
    """The candidates so far, the best marked."""
    state = "passes so far" if progress.passes else "nearest so far"
    title = (
        f"candidate {progress.number} of at most {progress.at_most}, {progress.state}: {progress.candidate}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", title=Text(title), title_justify="left")
    table.add_column("")
    table.add_column("candidate", overflow="fold")
    for column in ("size", "speed", "drop"):
        table.add_column(column, justify="right")
    best = progress.best.specs if progress.best is not None else None
    for trial in progress.trials[-ROWS:]:
        table.add_row(
            state if trial.specs == best else "",
            Text(trial.name),
            human_bytes(trial.size_bytes),
            f"{trial.speed.ratio:.2f}x",
            f"{trial.drop:+.4f}",
        )
    return table
