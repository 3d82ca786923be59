"""Folders to parts of at most 60 MiB, and back: the format in which things travel to a GPU machine.

    pack.json            every bundle: its chunks, its parts with their SHA-256
    <bundle>.000.part    a cut of the bundle's compressed stream

A bundle is a tar stream, compressed in chunks that are each a whole .xz file, so that all cores pack and
unpack; the chunks in a row are cut into parts. Only the standard library is used, because this runs on a
machine where nothing can be installed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 1 << 20
PART_BYTES = 60 * MIB
CHUNK_BYTES = 128 * MIB  # twice the dictionary of preset 9
PRESET = 9  # 30 % less than preset 6 in chunks of 24 MiB: the builder's kernels resemble each other
READ_BYTES = 4 * MIB
INDEX = "pack.json"
SCHEMA = 1

Say = Callable[[str], None]


class PackError(Exception):
    """Parts that are missing, damaged or of another pack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file to carry over."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A packed folder; `key` is a hash of its files, so that the same folder is not packed twice."""

    name: str
    key: str
    raw_bytes: int
    chunk_bytes: tuple[int, ...]  # of each compressed chunk, in order
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


def read_index(folder: Path) -> tuple[Bundle, ...]:
    """The bundles that `folder` is made of.

    Raises:
        PackError: no index, or one of another version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackError(f"{path} cannot be read: {error}") from error
    if index.get("schema") != SCHEMA:
        raise PackError(
            f"{path} has schema {index.get('schema')}, not {SCHEMA}: use the run.sh that packed it"
        )
    return tuple(
        Bundle(
            name=bundle["name"],
            key=bundle["key"],
            raw_bytes=bundle["raw_bytes"],
            chunk_bytes=tuple(bundle["chunk_bytes"]),
            parts=tuple(Part(**part) for part in bundle["parts"]),
        )
        for bundle in index["bundles"]
    )


def write_index(folder: Path, bundles: Iterable[Bundle]) -> None:
    """Write pack.json in one rename."""
    text = json.dumps({"schema": SCHEMA, "bundles": [asdict(bundle) for bundle in bundles]}, indent=1) + "\n"
    _write(folder / INDEX, text.encode())


def pack_bundle(
    name: str,
    source: Path,
    out: Path,
    *,
    before: Bundle | None = None,
    part_bytes: int = PART_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    threads: int = 2,
    preset: int = PRESET,
    say: Say = lambda _: None,
) -> Bundle:
    """Pack the folder `source` into parts in `out`; `before` is what an older index says of this bundle.

    A pack that was cut off goes on after the last chunk that it finished.
    """
    entries = tuple(sorted(path for path in source.rglob("*") if path.is_symlink() or path.is_file()))
    key = key_of(source, entries)
    if before is not None and before.key == key and all(_is_there(out, part) for part in before.parts):
        say(f"{name}: packed before, {before.size_bytes / MIB:.0f} MiB")
        return before
    work = out / ".work" / f"{name}-{key[:16]}"
    for stale in (out / ".work").glob(f"{name}-*"):
        if stale != work:
            shutil.rmtree(stale)
    work.mkdir(parents=True, exist_ok=True)
    raw_bytes, chunks = 0, []
    for number, chunk, size in _compress(tar_stream(source, entries), work, chunk_bytes, threads, preset):
        raw_bytes += size
        chunks.append(chunk)
        packed = sum(file.stat().st_size for file in chunks)
        say(f"{name}: chunk {number}, {raw_bytes / MIB:.0f} MiB packed into {packed / MIB:.0f}")
    for old in out.glob(f"{name}.*.part"):
        old.unlink()
    parts = tuple(_cut(name, chunks, out, part_bytes))
    sizes = tuple(chunk.stat().st_size for chunk in chunks)
    shutil.rmtree(work)
    return Bundle(name=name, key=key, raw_bytes=raw_bytes, chunk_bytes=sizes, parts=parts)


def key_of(source: Path, entries: Iterable[Path]) -> str:
    """A hash of the names, modes and content of the files in a folder."""
    digest = hashlib.sha256()
    for path in entries:
        content = str(path.readlink()) if path.is_symlink() else sha256_of(path)
        digest.update(f"{path.relative_to(source)}\0{_mode(path)}\0{content}\n".encode())
    return digest.hexdigest()


def tar_stream(source: Path, entries: Iterable[Path]) -> Iterator[bytes]:
    """A tar archive of `entries` without times and owners, so that equal folders give equal bytes."""
    for path in entries:
        info = tarfile.TarInfo(str(path.relative_to(source)))
        info.mode = _mode(path)
        if path.is_symlink():
            info.type, info.linkname = tarfile.SYMTYPE, str(path.readlink())
            yield info.tobuf(tarfile.PAX_FORMAT)
            continue
        info.size = path.stat().st_size
        yield info.tobuf(tarfile.PAX_FORMAT)
        with path.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                yield block
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def missing_parts(folder: Path, bundles: Iterable[Bundle]) -> tuple[str, ...]:
    """The parts that `folder` does not have whole; each was verified when it was added."""
    return tuple(part.file for bundle in bundles for part in bundle.parts if not _is_there(folder, part))


def add_parts(folder: Path, state: Path, say: Say = lambda _: None) -> tuple[str, ...]:
    """Copy what `folder` has into `state`, verified, and return what is still missing.

    Raises:
        PackError: a part is damaged or of another pack; the good ones are added first.
    """
    state.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).is_file():
        bundles, index = read_index(folder), (folder / INDEX).read_bytes()
        if not (state / INDEX).is_file() or (state / INDEX).read_bytes() != index:
            _forget_others(state, bundles)
            _write(state / INDEX, index)
    elif not (state / INDEX).is_file():
        raise PackError(f"{folder} has no {INDEX}, and none was added before: it goes with the first parts")
    bundles = read_index(state)
    known = {part.file: part for bundle in bundles for part in bundle.parts}
    refused = []
    for path in sorted(folder.glob("*.part")):
        part = known.get(path.name)
        if part is None:
            refused.append(f"{path.name} is of no bundle in {INDEX}")
        elif (found := sha256_of(path)) != part.sha256:
            refused.append(f"{path.name} is damaged: SHA-256 {found[:12]}, not {part.sha256[:12]}")
        elif not _is_there(state, part):
            partial = state / f".{part.file}.partial"
            shutil.copyfile(path, partial)
            partial.replace(state / part.file)
            say(f"added {part.file}, {part.size_bytes / MIB:.1f} MiB")
    if refused:
        raise PackError("; ".join(refused))
    return missing_parts(state, bundles)


def unpack_bundle(bundle: Bundle, state: Path, say: Say = lambda _: None) -> Path:
    """The folder of a bundle in `state`, unpacked once and named by its key.

    Raises:
        PackError: a part is missing, or what comes out is not what went in.
    """
    folder = state / "unpacked" / f"{bundle.name}-{bundle.key[:16]}"
    if folder.is_dir():
        return folder
    if missing := missing_parts(state, (bundle,)):
        raise PackError(f"bundle {bundle.name} lacks {', '.join(missing)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"unpacking {bundle.name}, {bundle.raw_bytes / MIB:.0f} MiB")
    staged = Path(tempfile.mkdtemp(prefix=f".{bundle.name}.", dir=folder.parent))
    try:
        with tarfile.open(fileobj=_Reader(_decompress(bundle, state)), mode="r|") as archive:
            # Where this Python has no filters, the hash below is what is relied on.
            archive.extraction_filter = getattr(tarfile, "tar_filter", None)
            archive.extractall(staged)  # noqa: S202 - every part was verified
        entries = tuple(sorted(path for path in staged.rglob("*") if path.is_symlink() or path.is_file()))
        if (found := key_of(staged, entries)) != bundle.key:
            raise PackError(f"bundle {bundle.name} came out different: {found[:12]}, not {bundle.key[:12]}")
        staged.chmod(0o755)
        staged.replace(folder)
    except (lzma.LZMAError, tarfile.TarError) as error:
        raise PackError(f"bundle {bundle.name} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _compress(
    stream: Iterator[bytes], work: Path, chunk_bytes: int, threads: int, preset: int
) -> Iterator[tuple[int, Path, int]]:
    """Number, file and raw size of each compressed chunk; files that are there are not made again."""
    waiting: deque[Future[tuple[int, Path, int]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number, raw in enumerate(_chunks(stream, chunk_bytes)):
            waiting.append(pool.submit(_compress_chunk, number, raw, work / f"{number:04d}.xz", preset))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _compress_chunk(number: int, raw: bytes, file: Path, preset: int) -> tuple[int, Path, int]:
    if not file.exists():
        _write(file, lzma.compress(raw, preset=preset))
    return number, file, len(raw)


def _chunks(stream: Iterator[bytes], size: int) -> Iterator[bytes]:
    buffer = bytearray()
    for block in stream:
        buffer += block
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)


def _cut(name: str, chunks: Iterable[Path], out: Path, part_bytes: int) -> Iterator[Part]:
    """The chunks in a row, cut into files of `part_bytes`."""

    def blocks() -> Iterator[bytes]:
        for chunk in chunks:
            yield chunk.read_bytes()

    for number, content in enumerate(_chunks(blocks(), part_bytes)):
        file = f"{name}.{number:03d}.part"
        _write(out / file, content)
        yield Part(file=file, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _decompress(bundle: Bundle, state: Path) -> Iterator[bytes]:
    """The bundle's tar stream, several chunks at once."""
    threads = max(1, min(4, os.cpu_count() or 1))
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for packed in _packed_chunks(bundle, state):
            waiting.append(pool.submit(lzma.decompress, packed))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _packed_chunks(bundle: Bundle, state: Path) -> Iterator[bytes]:
    buffer, sizes = bytearray(), deque(bundle.chunk_bytes)
    for part in bundle.parts:
        buffer += (state / part.file).read_bytes()
        while sizes and len(buffer) >= sizes[0]:
            size = sizes.popleft()
            yield bytes(buffer[:size])
            del buffer[:size]


class _Reader:
    """A stream of blocks as the file that tarfile reads from."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            if not self._rest:
                self._rest = memoryview(next(self._blocks, b""))
                if not self._rest:
                    break
            taken = self._rest[: size - len(found)]
            found += taken
            self._rest = self._rest[len(taken) :]
        return bytes(found)


def _forget_others(state: Path, bundles: Iterable[Bundle]) -> None:
    """Remove from `state` what is of no bundle in the new index, or of an older one of that name."""
    kept: Mapping[str, Part] = {part.file: part for bundle in bundles for part in bundle.parts}
    for path in state.glob("*.part"):
        if path.name not in kept or sha256_of(path) != kept[path.name].sha256:
            path.unlink()
    names = {f"{bundle.name}-{bundle.key[:16]}" for bundle in bundles}
    for path in (state / "unpacked").glob("*"):
        if path.name not in names:
            shutil.rmtree(path)


def _is_there(folder: Path, part: Part) -> bool:
    path = folder / part.file
    return path.is_file() and path.stat().st_size == part.size_bytes


def _mode(path: Path) -> int:
    if path.is_symlink():
        return 0o777
    return 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
