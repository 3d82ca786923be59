"""Parts for a GPU machine: cut, carried over in any order, verified, joined."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpu import parts
from gpu.parts import PackError, add_parts, missing_parts, pack_bundle, read_index, unpack_bundle, write_index

ROOT = Path(__file__).resolve().parents[1]
LIMIT, CHUNK = 4096, 10_000


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """A folder with a program, a link, an empty file, and bytes that do not compress."""
    folder = tmp_path / "payload"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "program").write_bytes(b"#!/bin/sh\n")
    (folder / "bin" / "program").chmod(0o755)
    (folder / "bin" / "link").symlink_to("program")
    (folder / "empty").write_bytes(b"")
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(50_001))
    return folder


def pack_payload(payload: Path, out: Path) -> parts.Bundle:
    out.mkdir(exist_ok=True)
    bundle = pack_bundle("models", payload, out, part_bytes=LIMIT, chunk_bytes=CHUNK, preset=0)
    write_index(out, (bundle,))
    return bundle


def content_of(folder: Path) -> dict[str, tuple[bool, bytes]]:
    return {
        str(path.relative_to(folder)): (os.access(path, os.X_OK), path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_packed_comes_out_the_same(payload: Path, tmp_path: Path) -> None:
    bundle = pack_payload(payload, tmp_path / "out")
    sizes = [(tmp_path / "out" / part.file).stat().st_size for part in bundle.parts]
    assert len(sizes) > 10
    assert max(sizes) == LIMIT
    assert not list((tmp_path / "out" / ".work").iterdir())
    state = tmp_path / "state"
    assert add_parts(tmp_path / "out", state) == ()
    folder = unpack_bundle(read_index(state)[0], state)
    assert content_of(folder) == content_of(payload)
    assert (folder / "bin" / "link").readlink() == Path("program")


def test_parts_arrive_in_rounds(payload: Path, tmp_path: Path) -> None:
    bundle = pack_payload(payload, tmp_path / "out")
    first, second, state = tmp_path / "first", tmp_path / "second", tmp_path / "state"
    first.mkdir()
    second.mkdir()
    (first / "pack.json").write_bytes((tmp_path / "out" / "pack.json").read_bytes())
    for number, part in enumerate(bundle.parts):
        (tmp_path / "out" / part.file).rename((first, second)[number % 2] / part.file)
    assert add_parts(first, state) == tuple(part.file for part in bundle.parts[1::2])
    with pytest.raises(PackError, match=r"bundle models lacks models\.001\.part"):
        unpack_bundle(bundle, state)
    assert add_parts(second, state) == ()
    assert content_of(unpack_bundle(bundle, state)) == content_of(payload)


def test_a_damaged_part_is_refused_and_the_others_are_added(payload: Path, tmp_path: Path) -> None:
    bundle = pack_payload(payload, tmp_path / "out")
    damaged = tmp_path / "out" / bundle.parts[3].file
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(PackError, match=r"models\.003\.part is damaged"):
        add_parts(tmp_path / "out", tmp_path / "state")
    assert missing_parts(tmp_path / "state", (bundle,)) == (damaged.name,)


def test_parts_without_an_index_are_refused(payload: Path, tmp_path: Path) -> None:
    pack_payload(payload, tmp_path / "out")
    (tmp_path / "out" / "pack.json").unlink()
    with pytest.raises(PackError, match=r"has no pack\.json, and none was added before"):
        add_parts(tmp_path / "out", tmp_path / "state")


def test_a_pack_that_was_cut_off_goes_on(
    payload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack_payload(payload, tmp_path / "whole")
    out = tmp_path / "out"
    work = out / ".work" / f"models-{whole.key[:16]}"
    work.mkdir(parents=True)
    packed = b"".join((tmp_path / "whole" / part.file).read_bytes() for part in whole.parts)
    (work / "0000.xz").write_bytes(packed[: whole.chunk_bytes[0]])
    compressed = []
    compress = parts.lzma.compress

    def compress_and_count(raw: bytes, *, preset: int) -> bytes:
        compressed.append(len(raw))
        return compress(raw, preset=preset)

    monkeypatch.setattr(parts.lzma, "compress", compress_and_count)
    assert pack_payload(payload, out) == whole
    assert len(compressed) == len(whole.chunk_bytes) - 1
    again = pack_bundle("models", payload, out, before=whole, part_bytes=LIMIT, chunk_bytes=CHUNK, preset=0)
    assert again == whole
    assert len(compressed) == len(whole.chunk_bytes) - 1  # nothing was packed twice


def test_a_changed_payload_replaces_what_was_added(payload: Path, tmp_path: Path) -> None:
    old = pack_payload(payload, tmp_path / "out")
    state = tmp_path / "state"
    add_parts(tmp_path / "out", state)
    stale = unpack_bundle(old, state)
    (payload / "noise").write_bytes(b"short now")
    new = pack_payload(payload, tmp_path / "out")
    assert new.key != old.key
    assert add_parts(tmp_path / "out", state) == ()
    assert not stale.exists()
    assert content_of(unpack_bundle(new, state))["noise"] == (False, b"short now")
    assert len(list(state.glob("*.part"))) == len(new.parts)


def test_run_sh_adds_and_refuses(payload: Path, tmp_path: Path) -> None:
    bundle = pack_payload(payload, tmp_path / "out")
    (tmp_path / "out" / bundle.parts[0].file).unlink()

    def run_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ROOT / "tests" / "gpu" / "run.sh"), *arguments],
            env=os.environ | {"GPU_STATE": str(tmp_path / "state")},
            capture_output=True,
            text=True,
        )

    added = run_sh("add", str(tmp_path / "out"))
    assert (added.returncode, added.stdout.splitlines()[-1]) == (0, "missing: models.000.part")
    refused = run_sh("run", "--out", str(tmp_path / "results"))
    assert refused.returncode == 1
    assert "models.000.part" in refused.stderr
    assert "Traceback" not in refused.stderr
    wrong = run_sh("unpack")
    assert wrong.returncode == 2
    assert "run.sh pack FOLDER" in wrong.stderr
