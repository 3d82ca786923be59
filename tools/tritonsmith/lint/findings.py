"""What lint has to say: one record for each thing that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from tritonsmith.artifact import Json
from tritonsmith.errors import TritonsmithError

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`place` is a file below the model's folder, or below the repository where `model` is empty."""

    severity: Severity
    model: str
    place: str
    what: str
    found: str | None = None
    expected: str | None = None
    fix: str | None = None

    def json(self) -> dict[str, Json]:
        return asdict(self)

    def __str__(self) -> str:
        where = "/".join(part for part in (self.model, self.place) if part)
        lines = [": ".join(part for part in (self.severity, where, self.what) if part)]
        for label, value in (("found", self.found), ("expected", self.expected), ("to do", self.fix)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)


def error_at(
    model: str,
    place: str,
    what: str,
    *,
    found: str | None = None,
    expected: str | None = None,
    fix: str | None = None,
) -> Finding:
    return Finding(
        severity="error", model=model, place=place, what=what, found=found, expected=expected, fix=fix
    )


def leads_out(model: str, place: str, name: str) -> Finding:
    """A name that `files.path_inside` refuses; nothing of it was opened."""
    return error_at(
        model,
        place,
        "a file name leads out of the folder that it belongs in",
        found=repr(name),
        expected="a relative name without '..', and no link to elsewhere",
        fix="put the file into the model's folder",
    )


def finding_from_error(
    error: TritonsmithError, *, model: str, place: str, severity: Severity = "error"
) -> Finding:
    """An error that the library raises for the same mistake elsewhere."""
    return Finding(
        severity=severity,
        model=model,
        place=place,
        what=error.what,
        found=None if error.found is None else str(error.found),
        expected=None if error.expected is None else str(error.expected),
        fix=error.fix,
    )


def error_count(findings: Sequence[Finding]) -> int:
    return sum(finding.severity == "error" for finding in findings)
