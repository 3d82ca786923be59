"""The small process between the caller and tritonserver. Run by path, standard library only.

It reads one JSON line (the order) on standard input, then commands: `stop`, `kill`, `clean`. It writes
events, one JSON object a line: `started` with a pid, `exited` with a return code. When its input ends (its
parent is gone, however that happened) it stops the server. It reaps the server's orphans, so that no stub
outlives it, and it removes the server's shared memory and its run folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_TICK_S = 0.05

_libc = ctypes.CDLL(None, use_errno=True)
_input = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - unbuffered, for select


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # the parent decides; its end is seen on the pipe
    parent = os.getppid()
    order = json.loads(_input.readline() or b"{}")
    if not order:
        return
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    server = _start(order)
    _tell({"event": "started", "pid": server.pid})
    _watch(server, parent, order["exit_timeout_s"])
    _end_children()
    _remove_shared_memory(order["shm_prefix"])
    _tell({"event": "exited", "code": server.returncode})
    while os.getppid() == parent and _read_command(1.0) not in ("", "clean"):
        pass  # the parent reads the log first
    shutil.rmtree(order["folder"], ignore_errors=True)


def _start(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    with Path(order["log"]).open("ab") as log:
        return subprocess.Popen(
            order["command"],
            env=order["environment"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_bind_to_supervisor,
        )


def _bind_to_supervisor() -> None:
    """In the child: its own process group, default signals, an orderly end if this process is killed."""
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _watch(server: subprocess.Popen[bytes], parent: int, exit_timeout_s: float) -> None:
    """Wait for the server's end, and bring it about when told or when the parent is gone."""
    deadline = None
    orphaned = False
    while server.poll() is None:
        command = None if orphaned else _read_command(_TICK_S)
        if orphaned:
            time.sleep(_TICK_S)
        if not orphaned and (command == "" or os.getppid() != parent):
            orphaned, command = True, "stop"
        if command == "stop" and deadline is None:
            deadline = time.monotonic() + exit_timeout_s
            server.send_signal(signal.SIGTERM)
        if command == "kill" or (deadline is not None and time.monotonic() > deadline):
            server.kill()


def _read_command(timeout_s: float | None) -> str | None:
    """One command; "" where the parent is gone, None where nothing was said in time."""
    ready, _, _ = select.select([0], [], [], timeout_s)
    if not ready:
        return None
    return _input.readline().decode().strip()


def _end_children() -> None:
    """Kill and reap everything that the server left; its orphans are children of this process."""
    while True:
        for pid in _children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Direct children, by asking every process for its parent (`/proc/self/.../children` is optional)."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
            found.append(int(entry.name))
    return found


def _remove_shared_memory(prefix: str) -> None:
    for segment in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108 - where Triton's stub keeps its segments
        segment.unlink(missing_ok=True)


def _tell(event: dict[str, Any]) -> None:
    try:
        os.write(1, (json.dumps(event) + "\n").encode())
    except OSError:
        return  # the parent is gone


if __name__ == "__main__":
    main()
