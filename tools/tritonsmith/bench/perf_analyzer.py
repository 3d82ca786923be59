"""Triton's perf_analyzer: found on PATH or installed from the package index, run, its files read.

The package `perf-analyzer` is an empty placeholder where glibc is older than 2.38, so the binary comes
from the last `tritonclient` wheel that runs there. It needs libb64 and libcudart by their plain names;
the server's own libraries are lent to it.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.console import Say
from tritonsmith.errors import BenchError, ProvisionError
from tritonsmith.files import locked

WHEEL = "tritonclient==2.50.0"
FLAG = "--profile-export-file"  # a real perf_analyzer knows it
LENT_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d*", "libcudart.so.12": "libcudart-*.so.12*"}
# It writes every input and output of every request into the profile; past this the file is not asked for.
PROFILE_VALUES_PER_REQUEST = 20_000
WINDOWS = 3  # what perf_analyzer measures before it looks at stability
MOST_WINDOWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfAnalyzer:
    """A binary that was seen to run."""

    path: Path
    library_path: Path | None  # for LD_LIBRARY_PATH
    origin: str  # "PATH", or the wheel that it came from

    def environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self.library_path:
            environment["LD_LIBRARY_PATH"] = str(self.library_path)
        return environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one run sends: to which model, how, and how long."""

    model: str
    url: str  # host:port
    protocol: str  # "grpc" or "http"
    concurrency: int
    batch_size: int
    interval_ms: int  # of one of WINDOWS windows
    input_data: Path  # as write_input_data makes it
    keep_samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One line of perf_analyzer's latency report, in its own units, and the raw latencies if asked for."""

    throughput_per_s: float  # inferences: requests times batch size
    client_send_us: float
    network_us: float
    queue_us: float
    compute_input_us: float
    compute_infer_us: float
    compute_output_us: float
    client_receive_us: float
    p50_us: float
    p90_us: float
    p95_us: float
    p99_us: float
    latencies_us: tuple[float, ...]


COLUMNS = {
    "throughput_per_s": "Inferences/Second",
    "client_send_us": "Client Send",
    "network_us": "Network+Server Send/Recv",
    "queue_us": "Server Queue",
    "compute_input_us": "Server Compute Input",
    "compute_infer_us": "Server Compute Infer",
    "compute_output_us": "Server Compute Output",
    "client_receive_us": "Client Recv",
    "p50_us": "p50 latency",
    "p90_us": "p90 latency",
    "p95_us": "p95 latency",
    "p99_us": "p99 latency",
}


def find_perf_analyzer() -> PerfAnalyzer | None:
    """The perf_analyzer on PATH, if it is the real one and runs; else the one installed before."""
    on_path = shutil.which("perf_analyzer")
    if on_path:
        found = PerfAnalyzer(path=Path(on_path), library_path=None, origin="PATH")
        if _runs(found):
            return found
    installed = _installed()
    return installed if installed.path.is_file() and _runs(installed) else None


def ensure_perf_analyzer(*, say: Say = lambda _: None) -> PerfAnalyzer:
    """Find perf_analyzer, or install it into the cache folder.

    Raises:
        ProvisionError: the wheel cannot be had, or its binary does not run here.
    """
    found = find_perf_analyzer()
    if found:
        return found
    from tritonsmith.server.environment import ensure_environment
    from tritonsmith.server.provision import cache_folder, unpack_wheel

    libraries = ensure_environment(say=say).library_folder
    with locked(cache_folder() / "perf_analyzer.lock", say=say):
        wheel, lent = _install_folders()
        unpack_wheel(WHEEL, wheel, say=say)
        _lend_libraries(libraries, lent)
        installed = _installed()
        installed.path.chmod(0o755)
        if not _runs(installed):
            raise ProvisionError(
                f"the perf_analyzer of {WHEEL} does not run here",
                fix=f"remove {wheel} and try again, or put a perf_analyzer that runs on PATH",
            )
    return installed


def write_input_data(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write samples as perf_analyzer's input data: one entry a sample, the first axis left out.

    Every tensor is its raw bytes in base64, as the wire has them: perf_analyzer's JSON numbers know no
    FP16, and strings there cannot hold bytes such as an image's.
    """
    count = len(next(iter(arrays.values())))
    entries = []
    for index in range(count):
        entry = {}
        for name, array in arrays.items():
            sample = np.asarray(array[index])
            content = base64.b64encode(_wire_bytes(sample)).decode()
            entry[name] = {"content": {"b64": content}, "shape": list(sample.shape)}
        entries.append(entry)
    path.write_text(json.dumps({"data": entries}), encoding="utf-8")


def run(perf_analyzer: PerfAnalyzer, load: Load) -> Run:
    """Run perf_analyzer once at one concurrency and read its export files.

    Raises:
        BenchError: it failed (its own reason is in the message) or measured nothing.
    """
    with tempfile.TemporaryDirectory(prefix="tritonsmith-bench-") as folder:
        report, profile = Path(folder) / "latency.csv", Path(folder) / "profile.json"
        command = [
            str(perf_analyzer.path), "-m", load.model, "-i", load.protocol, "-u", load.url,
            "--concurrency-range", str(load.concurrency), "-b", str(load.batch_size),
            "--measurement-interval", str(load.interval_ms),
            # Stability is judged over rounds, in measure.py: WINDOWS windows in a row that hold a
            # request each are enough here.
            "--stability-percentage", "999", "--max-trials", str(MOST_WINDOWS), "-f", str(report),
            "--input-data", str(load.input_data),
        ]  # fmt: skip
        if load.keep_samples:
            command += [FLAG, str(profile)]
        code, output = _run_to_end(command, perf_analyzer.environment())
        if code != 0:
            reason = _reason(output)
            raise BenchError(
                f"perf_analyzer failed with exit code {code} at concurrency {load.concurrency}",
                found=reason,
                fix=_fix(reason),
            )
        text = report.read_text(encoding="utf-8") if report.is_file() else ""
        rows = list(csv.DictReader(text.splitlines()))
        if not rows or float(rows[0]["Inferences/Second"]) <= 0:
            raise BenchError(f"perf_analyzer measured nothing of {load.model!r}", found=_reason(output))
        latencies = _latencies_us(profile) if load.keep_samples else ()
        values = {name: float(rows[0][column] or 0) for name, column in COLUMNS.items()}
        return Run(**values, latencies_us=latencies)


def _run_to_end(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Its exit code, and all that it printed."""
    # A session of its own: on Ctrl-C it is ended here, once, not by the terminal at the same time.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, output


def _fix(reason: str) -> str | None:
    if any(text in reason for text in ("time window", "time interval", "stable measurement")):
        return "give it more time: --interval-ms"
    return None


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if line.lower().startswith(("error", "failed", "thread ["))]
    return "; ".join((told or lines[-3:])[:3]) or "it said nothing"


def _latencies_us(profile: Path) -> tuple[float, ...]:
    """Latency of every request that began inside a measurement window, in microseconds."""
    # The bytes of string tensors stand in it as they are, so it is not always UTF-8; they are not read.
    experiment = json.loads(profile.read_text(encoding="latin-1"))["experiments"][0]
    windows = experiment["window_boundaries"]
    first, last = windows[0], windows[-1]
    return tuple(
        (request["response_timestamps"][-1] - request["timestamp"]) / 1000.0
        for request in experiment["requests"]
        if request["response_timestamps"] and first <= request["timestamp"] < last
    )


def _wire_bytes(sample: NDArray[Any]) -> bytes:
    if sample.dtype.kind in "OSU":
        parts = []
        for item in sample.reshape(-1):
            data = item.encode() if isinstance(item, str) else bytes(item)
            parts.append(len(data).to_bytes(4, "little") + data)
        return b"".join(parts)
    return np.ascontiguousarray(sample).tobytes()


def _runs(candidate: PerfAnalyzer) -> bool:
    """Whether it is the real one: the placeholder package and a missing library both fail here."""
    try:
        done = subprocess.run(
            [str(candidate.path), "--help"],
            env=candidate.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return FLAG in done.stdout + done.stderr


def _install_folders() -> tuple[Path, Path]:
    """Where the wheel is unpacked, and where the libraries lie that are lent to its binary."""
    from tritonsmith.server.provision import cache_folder

    version = WHEEL.partition("==")[2]
    return cache_folder() / f"perf_analyzer-{version}", cache_folder() / f"perf_analyzer-{version}-lib"


def _installed() -> PerfAnalyzer:
    wheel, lent = _install_folders()
    data = WHEEL.replace("==", "-") + ".data"
    return PerfAnalyzer(path=wheel / data / "data" / "bin" / "perf_analyzer", library_path=lent, origin=WHEEL)


def _lend_libraries(source: Path, folder: Path) -> None:
    """Copies under plain names, so that perf_analyzer outlives the environment that lent them."""
    folder.mkdir(exist_ok=True)
    for name, pattern in LENT_LIBRARIES.items():
        matches = sorted(source.glob(pattern))
        if not matches:
            raise ProvisionError(f"perf_analyzer needs {name}", found=f"no {pattern} in {source}")
        partial = folder / f".{name}.partial"
        shutil.copyfile(matches[0], partial)
        partial.replace(folder / name)
