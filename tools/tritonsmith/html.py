"""One HTML page that loads nothing from elsewhere: its style, its head, and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from tritonsmith.artifact import Json

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #d9dee4; }
:root { --good: #0b6e4f; --bad: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); }
body { max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, td, th { overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; flex: 1 1 9rem; }
.tile b { display: block; font-size: 1.35rem; }
.tile span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th { text-align: left; border-bottom: 2px solid var(--line); padding: .3rem .6rem; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; vertical-align: top; }
.total tbody tr:last-child td { border-bottom: 0; border-top: 2px solid var(--line); font-weight: 600; }
td.ok, td.failed, td.short { white-space: nowrap; }
.ok { color: var(--good); font-weight: 600; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.failed { color: var(--bad); font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots { margin-top: 1rem; }
.plots svg { flex: 1 1 440px; max-width: min(100%, 530px); height: auto; }
"""
OK, FAILED = ("ok", "chosen"), ("FAILED",)
SHORT = 12  # characters of a cell that is not worth breaking


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page; `parts` are HTML, `title` is text."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def tiles(summary: Iterable[tuple[str, str]]) -> str:
    """(what, value) in boxes beside each other."""
    boxes = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in summary)
    return f'<div class="tiles">{boxes}</div>'


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], *, total: bool = False) -> str:
    """Cells of text; those that are a verdict get its colour. `total`: the last row adds up the others."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td{_class(cell)}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    kind = ' class="total"' if total else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plots(svgs: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(svgs)}</div>'


def soft(text: str) -> str:
    """A line of small print."""
    return f'<p class="soft">{escape(text)}</p>'


def number(value: Json) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else "-"


def _class(cell: str) -> str:
    if cell in OK:
        return ' class="ok"'
    if cell in FAILED:
        return ' class="failed"'
    return ' class="short"' if len(cell) <= SHORT else ""
