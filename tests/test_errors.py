"""Errors: what they print, and their reason as a part of another message."""

from __future__ import annotations

import pytest

from tritonsmith.errors import PlanError, TritonsmithError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PlanError("no driver", fix="install one"), "no driver"),
        (
            PlanError("no driver", found="libcuda.so.1 is missing", expected="a GPU"),
            "no driver: libcuda.so.1 is missing",
        ),
        (TritonsmithError("a number", found=0), "a number: 0"),
    ],
)
def test_the_reason_is_one_line(error: TritonsmithError, reason: str) -> None:
    assert error.reason == reason
