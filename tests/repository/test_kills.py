"""SIGKILL before every change that a publish makes to the file system.

The repository then holds the old or the new, whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import publishing
from publishing import publish_payload, state_of

OLD = {"m": {"config": "old", "labels": "old", "warmup": "old", "versions": {"1": "old"}}}


def new_state(versions: dict[str, str]) -> dict[str, Any]:
    return {"m": {"config": "new", "labels": "new", "warmup": "new", "versions": versions}}


def kill_everywhere(
    tmp_path: Path, template: Path, options: dict[str, Any], how: str = "exchange"
) -> list[dict[str, Any]]:
    memory = Path("/dev/shm")  # noqa: S108 - a place where hundreds of publishes do not wait for a disk
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, publishing.__file__, template, f"{folder}/work", how, json.dumps(options)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    publish_payload(tmp_path / "template", "old")
    assert state_of(tmp_path / "template") == OLD
    return tmp_path / "template"


def check(reports: list[dict[str, Any]], old: dict[str, Any], new: dict[str, Any]) -> None:
    *killed, last = reports
    assert all(report["killed"] for report in killed)
    assert not last["killed"]
    assert last["found"] == new
    assert len(killed) > 20
    for report in killed:
        assert report["found"] in (old, new), f"killed before event {report['event']}"
    # Both outcomes were seen: the kills lie on both sides of the rename.
    assert any(report["found"] == old for report in killed)
    assert any(report["found"] == new for report in killed)
    for report in reports:
        assert report["after"]["m"]["config"] == "after"
        assert report["left"] == [], f"left beside the repository after a kill before event {report['event']}"
        assert set(report["after"]) == {"m"}


def test_first_version(tmp_path: Path) -> None:
    check(kill_everywhere(tmp_path, tmp_path / "none", {}), {}, new_state({"1": "new"}))


def test_second_version(tmp_path: Path, template: Path) -> None:
    check(kill_everywhere(tmp_path, template, {}), OLD, new_state({"1": "old", "2": "new"}))


def test_replaced_version(tmp_path: Path, template: Path) -> None:
    check(kill_everywhere(tmp_path, template, {"force": True}), OLD, new_state({"1": "new"}))


def test_without_exchange_the_next_publish_repairs(tmp_path: Path, template: Path) -> None:
    """Two renames leave one moment without the model; what was there comes back with the next publish."""
    reports = kill_everywhere(tmp_path, template, {}, "two renames")
    absent = [report for report in reports if report["found"] == {}]
    assert len(absent) == 1
    for report in reports:
        assert report["found"] in (OLD, new_state({"1": "old", "2": "new"}), {})
        assert report["after"]["m"]["versions"]["1"] == "old"
        assert report["left"] == []


def test_staged_in_another_models_folder(tmp_path: Path, template: Path) -> None:
    publish_payload(template, "other", name="other")
    other = {key: value for key, value in state_of(template).items() if key == "other"}
    reports = kill_everywhere(tmp_path, template, {}, "inside")
    new = new_state({"1": "old", "2": "new"})
    for report in reports:
        assert report["found"] in ({**OLD, **other}, {**new, **other})
        assert sorted(report["after"]) == ["m", "other"]
        assert report["after"]["m"]["config"] == "after"
    assert reports[-1]["found"] == {**new, **other}


def test_staged_in_its_own_folder(tmp_path: Path, template: Path) -> None:
    """For the time of two renames the other one stands beside it: whole, and gone after the next publish."""
    reports = kill_everywhere(tmp_path, template, {}, "inside")
    new = new_state({"1": "old", "2": "new"})
    beside = 0
    for report in reports:
        extra = report["found"].pop(".m.tritonsmith", None)
        beside += extra is not None
        assert report["found"] in (OLD, new)
        assert extra in (None, OLD["m"], new["m"])
        assert sorted(report["after"]) == ["m"]
    assert 1 <= beside <= 12
    assert reports[-1]["found"] == new
