"""What matters in a log of tritonserver."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINES = 30
_ENTRY = re.compile(r"^(?P<level>[IWEF])\d{4} [\d:.]+ \d+ [\w.]+:\d+\] ?(?P<text>.*)$")
# Said on every machine without a GPU, and at every stop.
_HARMLESS = ("CudaDriverHelper", "Failed to initialize NVML", "Signal (15) received", "Cleaning up...")
_REFUSED = re.compile(
    r"failed to load '(?P<model>[^']+)' version (?P<version>-?\d+): (?P<reason>.*)", re.DOTALL
)
_UNREADABLE = re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)", re.DOTALL)
_PROTOBUF = re.compile(r"^\[libprotobuf ERROR .*?\] Error parsing text-format [\w.]+: ")
_LOADING = re.compile(r"loading: (?P<model>.+):(?P<version>-?\d+)$")
_LOADED = re.compile(r"successfully loaded '(?P<model>[^']+)'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A model that Triton did not load, and its reason."""

    model: str
    reason: str


def relevant_lines(log: str) -> str:
    """Errors, and what models, stubs and the loader printed beside Triton's own lines; the last ones."""
    lines: list[str] = []
    for level, text in _entries(log):
        if level in "EF" and not any(word in text for word in _HARMLESS) and text not in lines:
            lines.append(text)
    flat = [line for text in lines for line in text.splitlines() if line.strip()]
    return "\n    ".join(flat[-_LINES:]) or "its log says nothing of it"


def find_refusals(log: str) -> tuple[Refusal, ...]:
    """The models that Triton refused, each once, in order."""
    found: dict[str, Refusal] = {}
    said_by_parser = ""
    for level, text in _entries(log):
        if level not in "EF":
            continue
        if parsed := _PROTOBUF.match(text):
            said_by_parser = text[parsed.end() :]
        elif match := _REFUSED.search(text):
            found.setdefault(match["model"], Refusal(model=match["model"], reason=match["reason"].strip()))
        elif match := _UNREADABLE.search(text):
            reason = "\n".join(filter(None, (match["reason"].strip(), said_by_parser)))
            found.setdefault(match["model"], Refusal(model=match["model"], reason=reason))
            said_by_parser = ""
    return tuple(found.values())


def find_unfinished(log: str) -> tuple[str, ...]:
    """The models whose loading began and did not end."""
    texts = [text for _, text in _entries(log)]
    begun = [match["model"] for text in texts if (match := _LOADING.search(text))]
    ended = {match["model"] for text in texts if (match := _LOADED.search(text))}
    ended |= {refusal.model for refusal in find_refusals(log)}
    return tuple(dict.fromkeys(model for model in begun if model not in ended))


def _entries(log: str) -> Iterator[tuple[str, str]]:
    """Level and text of each entry. What stands outside of Triton's own lines is an `E`, save its tables."""
    in_table = False
    after_rule = False
    for line in log.splitlines():
        if entry := _ENTRY.match(line):
            in_table = False
            yield entry["level"], _unquote(entry["text"])
        elif line.startswith("+-"):
            in_table = True
        elif in_table and not line.strip() and after_rule:
            in_table = False
        elif not in_table and line.strip():
            yield "E", line
        after_rule = line.startswith("+-")


def _unquote(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return text.replace("\\n", "\n").replace('\\"', '"').replace("\\'", "'")
