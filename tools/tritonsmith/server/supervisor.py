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
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SYS_PIDFD_OPEN = 434  # not every build of Python has os.pidfd_open
SYS_PIDFD_GETFD = 438
TCP_ESTABLISHED = "01"  # in /proc/net/tcp
TCPI_LAST_DATA_RECV = 52  # offset in struct tcp_info, in ms
_QUIET_MS = 300
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
    try:
        server = _start(order)
    except OSError as error:
        sys.exit(f"cannot run {error.filename}: {error.strerror}")  # into the log
    _tell({"event": "started", "pid": server.pid})
    _watch(server, parent, order)
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


def _watch(server: subprocess.Popen[bytes], parent: int, order: dict[str, Any]) -> None:
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
            deadline = time.monotonic() + order["exit_timeout_s"]
            server.send_signal(signal.SIGTERM)
        if command == "kill" or (deadline is not None and time.monotonic() > deadline):
            server.kill()
        if deadline is not None:
            _close_idle_connections(server.pid, order["http_port"])


def _close_idle_connections(pid: int, port: int) -> None:
    """Let the server see the end of every HTTP connection on which nothing arrives any more.

    Triton waits for its HTTP connections to close before it stops anything else, and a client's idle
    keep-alive connection makes it wait for the whole time-out. Shutting the reading side of the server's own
    socket ends an idle connection; one with a request in flight is read again only after its answer is sent.
    Where the kernel does not lend descriptors (pidfd_getfd), the time-out stays the bound.
    """
    wanted = _established(pid, port)
    if not wanted:
        return
    process = _libc.syscall(SYS_PIDFD_OPEN, pid, 0)
    if process < 0:
        return
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if str(entry.readlink()) in wanted:
                _shut_if_quiet(process, int(entry.name))
    except OSError:
        return  # the server has ended, or closed one meanwhile: the next tick looks again
    finally:
        os.close(process)


def _shut_if_quiet(process: int, descriptor: int) -> None:
    lent = _libc.syscall(SYS_PIDFD_GETFD, process, descriptor, 0)
    if lent < 0:
        return
    with socket.socket(fileno=lent) as connection:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        if struct.unpack_from("I", info, TCPI_LAST_DATA_RECV)[0] > _QUIET_MS:  # else a body is arriving
            connection.shutdown(socket.SHUT_RD)


def _established(pid: int, port: int) -> set[str]:
    try:
        rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return set()
    fields = [row.split() for row in rows]
    return {
        f"socket:[{row[9]}]"
        for row in fields
        if row[3] == TCP_ESTABLISHED and int(row[1].rpartition(":")[2], 16) == port
    }


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
