"""What may be replaced, and that it is replaced whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tritonsmith.deploy.folder import MARK, write_folder
from tritonsmith.errors import UsageError


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    write_folder(tmp_path / "out", {"base/one.yaml": "1", "two": "2"}, force=False)
    return tmp_path / "out"


def test_mark_lists_what_was_written(rendered: Path) -> None:
    assert (rendered / MARK).read_text() == "base/one.yaml\ntwo\n"


def test_a_rendered_folder_is_replaced_whole(rendered: Path) -> None:
    (rendered / "base" / "one.yaml").write_text("changed")
    write_folder(rendered, {"three": "3"}, force=True)
    assert sorted(path.name for path in rendered.rglob("*")) == [MARK, "three"]
    assert [path.name for path in rendered.parent.iterdir()] == ["out"]  # nothing is left beside it


def test_a_folder_that_is_replaced_is_never_gone(rendered: Path) -> None:
    missed, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            if not rendered.exists():
                missed.append(True)

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(100):
        write_folder(rendered, {"three": str(number)}, force=True)
    done.set()
    thread.join()
    assert (rendered / "three").read_text() == "99"
    assert not missed


@pytest.mark.parametrize("own", ["thesis.txt", "base/notes/thesis.txt"])
def test_a_folder_with_something_else_is_kept(rendered: Path, own: str) -> None:
    (rendered / own).parent.mkdir(exist_ok=True)
    (rendered / own).write_text("years of work")
    with pytest.raises(UsageError, match="holds what was not rendered") as caught:
        write_folder(rendered, {"three": "3"}, force=True)
    assert caught.value.found == own
    assert (rendered / own).read_text() == "years of work"
    assert (rendered / "two").exists()


def test_a_link_is_something_else(rendered: Path, tmp_path: Path) -> None:
    (rendered / "mine").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="holds what was not rendered"):
        write_folder(rendered, {"three": "3"}, force=True)


def test_measurements_alone_mark_nothing(tmp_path: Path) -> None:
    """A folder with the output of `deploy measure` is anybody's."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "measurements.json").write_text("{}")
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="was not rendered by tritonsmith"):
        write_folder(tmp_path / "own", {"three": "3"}, force=True)
    assert (tmp_path / "own" / "thesis.txt").exists()


def test_an_empty_folder_is_filled_and_a_file_or_link_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", {"three": "3"}, force=True)
    assert (tmp_path / "empty" / "three").read_text() == "3"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write_folder(tmp_path / "file", {"three": "3"}, force=True)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UsageError, match="is a link"):
        write_folder(tmp_path / "link", {"four": "4"}, force=True)
