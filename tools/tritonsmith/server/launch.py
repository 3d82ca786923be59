"""One tritonserver process with everything that belongs to it, from its start to its last trace."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tritonsmith.errors import ProvisionError, ServerError
from tritonsmith.server.environment import ServerEnvironment
from tritonsmith.server.provision import CACHE_VARIABLE, cache_folder, clean_environment

BACKENDS = Path(__file__).with_name("backends")
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_SHM = Path("/dev/shm")  # noqa: S108 - where Triton's stub keeps its segments
_STALE_AFTER_S = 60.0


# Triton joins the stub's arguments into a string for bash, and the stub's file system encoding is ASCII.
_PLAIN = re.compile(r"/[A-Za-z0-9/._+=@%-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """What a run keeps on disk, under a plain path: links to all that has a path of its own, tmp/, the log,
    and a lock that says that the run is alive."""

    path: Path
    lock: int  # file descriptor

    @property
    def repository(self) -> Path:
        return self.path / "repository"

    @property
    def environment(self) -> Path:
        return self.path / "environment"

    @property
    def backends(self) -> Path:
        return self.path / "backends"

    @property
    def log(self) -> Path:
        return self.path / "tritonserver.log"

    @property
    def shm_prefix(self) -> str:
        return shm_prefix(self.path)


def shm_prefix(folder: Path) -> str:
    return f"{folder.name}-"


class Launch:
    """A running tritonserver under its supervisor. Use as a context manager: leaving it leaves nothing."""

    def __init__(
        self,
        environment: ServerEnvironment,
        repository: Path,
        arguments: Sequence[str],
        *,
        http_port: int,
        exit_timeout_s: float,
    ) -> None:
        self._exit_timeout_s = exit_timeout_s
        self._repository = repository.absolute()
        self._folder = _make_run_folder(environment, self._repository)
        self._pid: int | None = None
        self._code: int | None = None
        self._started = threading.Event()
        self._exited = threading.Event()
        self._log = ""
        self._closed = False
        self.asked_to_end = False
        order = {
            "command": [
                str(environment.tritonserver),
                *arguments,
                *_common_arguments(environment, self._folder),
                f"--exit-timeout-secs={max(1, int(exit_timeout_s))}",
            ],
            "environment": _server_variables(environment, self._folder),
            "folder": str(self._folder.path),
            "log": str(self._folder.log),
            "shm_prefix": self._folder.shm_prefix,
            "http_port": http_port,
            "exit_timeout_s": exit_timeout_s,
        }
        with self._folder.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                pass_fds=(self._folder.lock,),
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone, which then stops it
            )
        os.close(self._folder.lock)  # the supervisor holds it from here on
        self._say(json.dumps(order))
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._started.wait()

    def __enter__(self) -> Launch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of tritonserver itself."""
        if self._pid is None:
            raise ServerError("tritonserver could not be started", found=self.read_log() or "no output")
        return self._pid

    @property
    def shm_prefix(self) -> str:
        """What the names of its segments in /dev/shm begin with."""
        return self._folder.shm_prefix

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._code if self._exited.is_set() else None

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the end; the exit code, or None where it still runs after `timeout_s`."""
        self._exited.wait(timeout_s)
        return self.exit_code

    def read_log(self) -> str:
        """Everything that the server and its models printed so far; also after the end."""
        if not self._closed:
            try:
                log = self._folder.log.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                return self._log
            self._log = log.replace(str(self._folder.repository), str(self._repository))
        return self._log

    def stop(self) -> int | None:
        """Let it finish what it answers, then end it; killed past its time-out. Returns the exit code."""
        self.asked_to_end = True
        self._say("stop")
        if self.wait(self._exit_timeout_s + 5) is None:
            self._say("kill")
            self.wait(5)
        return self.exit_code

    def kill(self) -> None:
        """End it at once."""
        self.asked_to_end = True
        self._say("kill")
        self.wait(5)

    def close(self) -> None:
        """Stop if it still runs, keep the log in memory, and remove every trace on disk."""
        if self._closed:
            return
        self.asked_to_end = True
        try:
            if self.exit_code is None:
                self.stop()
        except KeyboardInterrupt:
            self.kill()  # a second Ctrl-C: no more patience
            raise
        finally:
            self.read_log()
            self._closed = True
            self._say("clean")
            self._end_supervisor()

    def _end_supervisor(self) -> None:
        if self._supervisor.stdin is not None:
            with contextlib.suppress(OSError):  # it went first
                self._supervisor.stdin.close()
        try:
            self._supervisor.wait(10)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self._listener.join(10)
        if self._folder.path.exists():  # the supervisor itself was killed
            self._clear_after_supervisor()

    def _clear_after_supervisor(self) -> None:
        if self._pid is not None:
            deadline = time.monotonic() + self._exit_timeout_s + 5
            while Path(f"/proc/{self._pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        _remove_run(self._folder.path)

    def _say(self, line: str) -> None:
        if self._supervisor.stdin is None or self._supervisor.stdin.closed:
            return
        try:
            self._supervisor.stdin.write(f"{line}\n".encode())
            self._supervisor.stdin.flush()
        except BrokenPipeError:
            return  # it has ended; the listener knows

    def _listen(self) -> None:
        if self._supervisor.stdout is None:
            return
        with self._supervisor.stdout as events:
            for line in events:
                event = json.loads(line)
                if event["event"] == "started":
                    self._pid = event["pid"]
                    self._started.set()
                else:
                    self._code = event["code"]
                    self._exited.set()
        if self._code is None:
            self._code = -9  # the supervisor was killed: the server is ended with it
        self._started.set()
        self._exited.set()


def clear_stale_runs() -> None:
    """Remove what runs left whose supervisor was killed: nobody holds the lock of their folder."""
    for folder in _runs_folder().glob("tritonsmith-*"):
        try:
            with (folder / "lock").open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - folder.stat().st_mtime > _STALE_AFTER_S:
                    _remove_run(folder)
        except OSError:  # alive, going, or not ours: the folder may be /tmp
            continue


def _remove_run(folder: Path) -> None:
    for segment in _SHM.glob(f"{shm_prefix(folder)}*"):
        segment.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _runs_folder() -> Path:
    """In the cache, else in the first writable place with a plain path."""
    runs = cache_folder() / "runs"
    if _PLAIN.fullmatch(str(runs)):
        runs.mkdir(exist_ok=True)
        return runs
    for place in (os.environ.get("TMPDIR", "/tmp"), "/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108
        if _PLAIN.fullmatch(place) and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise ProvisionError(
        "Triton needs a folder whose absolute path is of letters, digits and / . _ + = @ % - alone",
        found=runs,
        fix=f"set {CACHE_VARIABLE} to such a folder",
    )


def _make_run_folder(environment: ServerEnvironment, repository: Path) -> RunFolder:
    """A fresh folder of links, so that an edit in this package's backends is served at the next start."""
    path = Path(tempfile.mkdtemp(prefix="tritonsmith-", dir=_runs_folder()))
    lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = RunFolder(path=path, lock=lock)
    (path / "tmp").mkdir()
    folder.repository.symlink_to(repository)
    folder.environment.symlink_to(environment.folder)
    folder.backends.mkdir()
    (folder.backends / "python").symlink_to(environment.backends / "python")
    for backend in BACKENDS.iterdir():
        if (backend / "model.py").is_file():
            (folder.backends / backend.name).symlink_to(backend)
    return folder


def _common_arguments(environment: ServerEnvironment, folder: RunFolder) -> list[str]:
    prefixes = [
        f"--backend-config={backend.name},shm-region-prefix-name={folder.shm_prefix}"
        for backend in sorted(folder.backends.iterdir())
    ]
    return [
        f"--model-repository={folder.repository}",
        f"--backend-directory={folder.backends}",
        f"--cache-directory={environment.caches}",
        *prefixes,
    ]


def _server_variables(environment: ServerEnvironment, folder: RunFolder) -> dict[str, str]:
    """The stub's Python is the first python3 on PATH; it reads no PYTHON variables."""
    variables = clean_environment()
    libraries = [str(environment.python_library_folder), str(environment.library_folder)]
    if inherited := variables.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    return variables | {
        "PATH": os.pathsep.join([str(folder.environment / "bin"), variables.get("PATH", os.defpath)]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "VIRTUAL_ENV": str(folder.environment),
        "LC_ALL": "C.UTF-8",
        "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime reports its use, models' names among it, to its maker
        "TMPDIR": str(folder.path / "tmp"),
    }
