"""What the processes of a running server use: memory, processor time, shared memory. Linux, by /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108 - where Triton's stubs keep their segments
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own block is
_MAPPING = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ \S+ (?P<offset>\S+) (?P<device>\S+) (?P<inode>\d+).*?"
    r"^Rss: +(?P<rss>\d+) kB.*?^Anonymous: +(?P<anonymous>\d+) kB",
    re.MULTILINE | re.DOTALL,
)


def process_tree(root: int) -> tuple[int, ...]:
    """`root` and all processes below it, alive now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _read(entry / "stat")):
            children.setdefault(int(_after_name(stat)[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return tuple(found)


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory of the processes together: the anonymous pages of each, and the pages of each file once.

    Unlike PSS it does not depend on who else on the machine maps the same libraries. Pages of one file that
    only one process touched are counted in the process that touched most of that part of the file.
    """
    anonymous = 0
    files: dict[tuple[str, str, str], int] = {}
    for pid in pids:
        for mapping in _MAPPING.finditer(_read(Path(f"/proc/{pid}/smaps"))):
            own = int(mapping["anonymous"])
            anonymous += own
            if mapping["inode"] != "0":
                key = (mapping["device"], mapping["inode"], mapping["offset"])
                files[key] = max(files.get(key, 0), int(mapping["rss"]) - own)
    return (anonymous + sum(files.values())) * 1024


def held_and_most_bytes(pid: int) -> tuple[int, int]:
    """What the process holds now and the most that it ever held, as the kernel counts (VmRSS, VmHWM)."""
    status = _read(Path(f"/proc/{pid}/status"))
    held, most = (re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    return int(held[1]) * 1024 if held else 0, int(most[1]) * 1024 if most else 0


def processor_s(pids: Iterable[int]) -> float:
    """Seconds of processor time that the processes have used, in user and in kernel mode."""
    stats = [_after_name(stat) for pid in pids if (stat := _read(Path(f"/proc/{pid}/stat")))]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICKS_PER_S


def started_s(pid: int) -> float:
    """When the process began, in seconds since the machine did (CLOCK_BOOTTIME)."""
    return int(_after_name(_read(Path(f"/proc/{pid}/stat")))[19]) / _TICKS_PER_S


def shared_bytes(prefix: str) -> int:
    """What the segments with names that start with `prefix` take of /dev/shm."""
    total = 0
    for segment in SHM.glob(f"{prefix}*"):
        try:
            total += segment.stat().st_blocks * _BLOCK_BYTES
        except FileNotFoundError:  # removed between the listing and the question
            continue
    return total


def _after_name(stat: str) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before it may hold anything."""
    return stat.rpartition(")")[2].split()


def _read(path: Path) -> str:
    """The text of a file in /proc, empty where its process has ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
