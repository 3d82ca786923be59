"""Preparing the sources of the recipes: once, whole, and by one run at a time."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import pytest

from tritonsmith.errors import TritonsmithError

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "recipes" / "make_models.py"

PREPARING = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "data").write_text("new")
with Path(RUNS).open("a") as stream:
    stream.write("run\\n")
time.sleep(0.3)
(folder / "last").write_text("")
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with one recipe of its own."""
    spec = importlib.util.spec_from_file_location("make_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(module, "PREPARE", {"toy": ("prepare.py", "last")})
    write_script(tmp_path, PREPARING)
    return module


def write_script(root: Path, text: str) -> None:
    (root / "recipes" / "toy").mkdir(parents=True, exist_ok=True)
    script = text.replace("RUNS", repr(str(root / "runs")))
    (root / "recipes" / "toy" / "prepare.py").write_text(script)


def runs_of(root: Path) -> int:
    return len((root / "runs").read_text().splitlines())


def test_it_is_prepared_once(recipes: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        assert recipes.prepare("toy", said.append) == tmp_path / "build" / "toy"
    assert runs_of(tmp_path) == 1
    assert said == ["preparing the source of toy"]


def test_a_second_run_waits(recipes: ModuleType, tmp_path: Path) -> None:
    threads = [threading.Thread(target=recipes.prepare, args=("toy", print)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs_of(tmp_path) == 1


def test_what_was_cut_off_is_made_again(recipes: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "build" / "toy"
    folder.mkdir(parents=True)
    (folder / "data").write_text("ne")
    recipes.prepare("toy", print)
    assert (folder / "data").read_text() == "new"


def test_a_failure_leaves_what_was_there(recipes: ModuleType, tmp_path: Path) -> None:
    recipes.prepare("toy", print)
    (tmp_path / "build" / "toy" / "last").unlink()
    write_script(tmp_path, "import sys\nsys.exit('no package')")
    with pytest.raises(TritonsmithError, match=r"prepare\.py failed") as caught:
        recipes.prepare("toy", print)
    assert "no package" in str(caught.value)
    assert (tmp_path / "build" / "toy" / "data").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == [".toy.lock", "toy"]
