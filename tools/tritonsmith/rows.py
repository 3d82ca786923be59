"""Results as rows of text, the same in a terminal and in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tritonsmith.console import human_bytes, human_count

CANDIDATE_COLUMNS = ("", "candidate", "size", "metric", "drop", "95 % interval", "speed", "note")
LEDGER_COLUMNS = (*("step", "size", "smaller", "parameters", "fewer", "FLOPs", "fewer", "latency", "faster"),)


def ledger_rows(ledger: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each step of a ledger in its JSON form, each factor beside its number, and their product."""
    rows: list[tuple[str, ...]] = []
    for entry in ledger["entries"]:
        first = not rows
        rows.append(
            (
                entry["step"],
                human_bytes(entry["size_bytes"]),
                "" if first else f"{entry['bytes_factor']:.2f}x",
                f"{entry['parameters']:,}",
                "" if first else f"{entry['parameters_factor']:.2f}x",
                human_count(entry["flops"]),
                "" if first else f"{entry['flops_factor']:.2f}x",
                f"{entry['latency_ms']:.3g} ms",
                "" if first else f"{entry['speed_factor']:.2f}x",
            )
        )
    product = ledger["product"]
    factors = ("bytes_factor", "parameters_factor", "flops_factor", "speed_factor")
    cells = [cell for name in factors for cell in ("", f"{product[name]:.1f}x")]
    rows.append(("product", *cells))
    return rows


def candidate_rows(build: Mapping[str, Any], *, kept: str = "chosen") -> list[tuple[str, ...]]:
    """A row for each candidate of a build in its JSON form; `kept` marks those that were chosen."""
    rows: list[tuple[str, ...]] = []
    for candidate in build["candidates"]:
        gate, speed, size = candidate["gate"], candidate["speed"], candidate["bytes"]
        judged = gate is not None and gate["candidate"] is not None
        interval = judged and gate["ci95_low"] is not None
        reasons = ([candidate["refusal"]] if candidate["refusal"] else []) + list(candidate["notes"])
        rows.append(
            (
                kept if candidate["chosen"] else "",
                candidate["name"],
                human_bytes(size) if size is not None else "-",
                f"{gate['metric']} {gate['candidate']:.4f}" if judged else "-",
                f"{gate['drop']:+.4f}" if judged else "-",
                f"{gate['ci95_low']:+.4f} to {gate['ci95_high']:+.4f}" if interval else "-",
                f"{speed['ratio']:.2f}x" if speed is not None else "-",
                "; ".join(reasons),
            )
        )
    return rows
