"""Plan orders and the facts of plans as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plan_orders import H100, write_order
from tritonsmith.engines.tensorrt.facts import PlanFacts
from tritonsmith.errors import RepositoryError
from tritonsmith.targets.order_file import (
    facts_from_json,
    json_from_facts,
    json_from_order,
    order_from_json,
    read_order,
    signed,
)

FACTS = PlanFacts(
    file="gpu.sm90.plan",
    sha256="a",
    size_bytes=1,
    source="gpu.fp16.onnx",
    source_sha256="b",
    precision="fp16",
    tensorrt="10.16.1",
    device=H100,
    version_compatible=False,
    hardware_compatibility="none",
    stripped=False,
    duration_s=1.5,
    measured={"layers": [1, 2]},
)


def test_an_order_out_and_in(tmp_path: Path) -> None:
    order = write_order(tmp_path, ("fp16", "int8"))
    assert read_order(tmp_path / "gpu.order.json") == order
    assert json.loads((tmp_path / "gpu.order.json").read_text())["schema"] == 1


def test_the_fingerprint_covers_everything_but_itself(tmp_path: Path) -> None:
    order = write_order(tmp_path, ("fp16",))
    assert signed(replace(order, fingerprint="other")) == order
    for change in (
        {"max_batch_size": 4},
        {"plan": replace(order.plan, tf32=not order.plan.tf32)},
        {"candidates": (replace(order.candidates[0], sha256="c"),)},
        {"fallback": "gpu.fp16.onnx"},
    ):
        changed: dict[str, Any] = change
        assert signed(replace(order, **changed)).fingerprint != order.fingerprint


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": 2}, "another schema"),
        ({"max_batch_size": "8"}, "max_batch_size is '8'"),
        ({"max_batch_size": True}, "max_batch_size is True"),
        ({"surprise": 1}, "unknown surprise"),
        ({"candidates": [{"file": "x"}]}, "PlanCandidate lacks"),
        ({"plan": {"tf32": True}}, "PlanOptions lacks"),
        ({"inputs": "features"}, "str where an array belongs"),
    ],
)
def test_what_it_does_not_know_it_refuses(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    record = {**json_from_order(write_order(tmp_path)), **change}
    with pytest.raises(RepositoryError) as error:
        order_from_json(json.loads(json.dumps(record)))
    assert match in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.order.json"
    path.write_text(content)
    with pytest.raises(RepositoryError, match=r"gpu\.order\.json"):
        read_order(path)


def test_facts_out_and_in() -> None:
    record = json.loads(json.dumps(json_from_facts(FACTS)))
    assert facts_from_json(record) == FACTS
    with pytest.raises(RepositoryError, match="damaged"):
        facts_from_json({**record, "device": {"gpu": "H100"}})
    with pytest.raises(RepositoryError, match="damaged"):
        facts_from_json({**record, "stripped": "no"})
