"""What a repository needs to be served, measured on the embedded Triton of this machine.

Each run starts a server, asks every model alone for its largest answer, then all models at once for some
seconds, and stops it. Of several runs the slowest and the largest count: limits are derived from them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tritonsmith.client import Client, Model
from tritonsmith.deploy.largest import bytes_of, largest_request
from tritonsmith.deploy.measurements import Measurements, ModelMeasurements
from tritonsmith.deploy.measurements_file import fingerprint_of_repository, model_folders
from tritonsmith.deploy.processes import (
    held_and_most_bytes,
    process_tree,
    processor_s,
    resident_bytes,
    shared_bytes,
    started_s,
)
from tritonsmith.deploy.targets import check_target
from tritonsmith.errors import ClientError, DeployError
from tritonsmith.machine import describe_machine
from tritonsmith.server import Server, ServerOptions, serve
from tritonsmith.server.ports import ask_http

RUNS = 3
ALONE_COUNT = 3  # requests to each model alone, one after the other
LOAD_S = 3.0  # all models at once
BUSY = 0.5  # load for each core, above which another process takes what is measured
_READY_TIMEOUT_S = 600.0
_LOG_TIME = r"^I(?P<time>\d{4} \d\d:\d\d:\d\d\.\d{6}) "
_LOADING = re.compile(_LOG_TIME + r".*\"loading: (?P<model>.+):\d+\"", re.MULTILINE)
_LOADED = re.compile(_LOG_TIME + r".*\"successfully loaded '(?P<model>[^']+)'\"", re.MULTILINE)
_LISTENING = re.compile(_LOG_TIME + r".*\"Started HTTPService at", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    models: tuple[ModelMeasurements, ...]
    ready_s: float
    stop_s: float
    idle_bytes: int
    peak_bytes: int
    shm_bytes: int
    cpu_s_per_s: float
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """What a server holds before it is asked anything."""

    total_bytes: int
    held_bytes: Mapping[int, int]  # by process


def measure_repository(
    repository: Path,
    *,
    target: str | None = None,
    samples: Mapping[str, Path] | None = None,
    axis_length: int | None = None,
    runs: int = RUNS,
    load_s: float = LOAD_S,
    say: Callable[[str], None],
) -> Measurements:
    """Serve `repository` `runs` times and measure what it needs.

    `target` is a --model-config-name. `samples` are .npz files by model name; a model without is asked with
    ones, its free axes `axis_length` long (see `largest_request`). All models at once are asked for `load_s`
    seconds. Memory is that of the server's processes: anonymous pages, and each mapped file once. The peak
    adds what each process once held beyond that, so it is never less than what was in use at one moment, and
    may be more.

    Raises:
        DeployError: no repository, a target that no model has, samples for no model of it, a model that
            needs samples, streams its answers or fails.
        SamplesError, ServerError, ProvisionError: as `load_samples` and `serve` raise them.
    """
    check_target(repository, target)
    samples = samples or {}
    names = {folder.name for folder in model_folders(repository)}
    if unknown := sorted(samples.keys() - names):
        raise DeployError(
            f"samples for {', '.join(map(repr, unknown))}, which {repository} does not hold",
            expected=f"one of {', '.join(sorted(names))}",
        )
    if runs < 1:
        raise DeployError("nothing is measured in no run", found=runs, expected="at least 1 run")
    load = os.getloadavg()[0]
    if load > BUSY * len(os.sched_getaffinity(0)):
        say(f"this machine is busy (load {load:.1f}): times will be longer than they would be")
    measured = []
    for number in range(1, runs + 1):
        say(f"run {number} of {runs}: {repository}")
        measured.append(_measure_once(repository, target, samples, axis_length, load_s, say))
    return Measurements(
        repository=repository.resolve().name,
        fingerprint=fingerprint_of_repository(repository, target),
        target=target,
        models=_join_models([run.models for run in measured]),
        ready_s=max(run.ready_s for run in measured),
        stop_s=max(run.stop_s for run in measured),
        idle_bytes=max(run.idle_bytes for run in measured),
        peak_bytes=max(run.peak_bytes for run in measured),
        shm_bytes=max(run.shm_bytes for run in measured),
        cpu_s_per_s=max(run.cpu_s_per_s for run in measured),
        runs=runs,
        machine={
            **{key: value for key, value in describe_machine().items() if key in _MACHINE},
            "load_before": round(load, 2),
        },
        versions=measured[0].versions,
    )


_MACHINE = ("cpu", "cpu_count", "memory_bytes", "system")


def _measure_once(
    repository: Path,
    target: str | None,
    samples: Mapping[str, Path],
    axis_length: int | None,
    load_s: float,
    say: Callable[[str], None],
) -> _Run:
    options = ServerOptions(
        http_port=0, grpc_port=0, metrics_port=0, ready_timeout_s=_READY_TIMEOUT_S, target=target
    )
    with serve(repository, options, say=say) as server:
        prefix = server.launch.shm_prefix
        before = _use_of(server.pid)
        with Client(f"grpc://{server.grpc_url}") as client:
            models = {name: _open(client, name) for name in _served_names(server)}
            requests = {
                name: largest_request(model.signature, samples.get(name), axis_length=axis_length)
                for name, model in models.items()
            }
            shm_bytes = shared_bytes(prefix)
            measured = []
            for name, model in models.items():
                say(f"the largest request of {name}, alone")
                measured.append(_ask_alone(client, model, requests[name]))
            say(f"all models at once, for {load_s:g} s")
            work = [(models[one.name], requests[one.name], one) for one in measured]
            cpu_s_per_s = _ask_all(server, work, load_s)
        shm_bytes = max(shm_bytes, shared_bytes(prefix))  # segments grow and never shrink
        peak_bytes = before.total_bytes + sum(
            max(0, held_and_most_bytes(pid)[1] - before.held_bytes.get(pid, 0))
            for pid in process_tree(server.pid)
        )
        log, started = server.read_log(), _wall_clock_of_start(server.pid)
        versions = _versions(server)
        stopping_s = time.monotonic()
        server.launch.stop()
        stop_s = time.monotonic() - stopping_s
    loads = load_times_s(log)
    return _Run(
        models=tuple(_with_load_time(one, loads) for one in measured),
        ready_s=_ready_time_s(log, started),
        stop_s=round(stop_s, 3),
        idle_bytes=before.total_bytes,
        peak_bytes=peak_bytes,
        shm_bytes=shm_bytes,
        cpu_s_per_s=round(cpu_s_per_s, 3),
        versions=versions,
    )


def _use_of(root: int) -> _Use:
    pids = process_tree(root)
    return _Use(
        total_bytes=resident_bytes(pids), held_bytes={pid: held_and_most_bytes(pid)[0] for pid in pids}
    )


def _served_names(server: Server) -> list[str]:
    _, body = ask_http(server.http_port, "POST", "/v2/repository/index", {"ready": True})
    return sorted(entry["name"] for entry in json.loads(body))


def _open(client: Client, name: str) -> Model:
    try:
        return client.model(name)
    except ClientError as error:
        raise DeployError(f"model {name!r} cannot be measured", found=error) from error


def _ask(model: Model, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return model(request)
    except ClientError as error:
        name = model.signature.model
        raise DeployError(
            f"model {name!r} does not answer its largest request",
            found=error,
            fix=f"give it samples that it takes: --samples {name}=X.npz",
        ) from error


def _ask_alone(client: Client, model: Model, request: Mapping[str, Any]) -> ModelMeasurements:
    answers = [_ask(model, request) for _ in range(ALONE_COUNT)]
    signature = model.signature
    return ModelMeasurements(
        name=signature.model,
        backend=str(signature.config.get("backend") or signature.config.get("platform") or ""),
        instances=instance_count(signature.config),
        load_s=None,
        request_bytes=bytes_of(request),
        response_bytes=max(bytes_of(answer) for answer in answers),
        compute_s=compute_time_s(client.statistics(signature.model)),
    )


def _ask_all(
    server: Server, work: Sequence[tuple[Model, Mapping[str, Any], ModelMeasurements]], load_s: float
) -> float:
    """Ask all models at once, as many requests in flight as there are instances; cores in use meanwhile."""
    deadline = time.monotonic() + load_s

    def repeat(model: Model, request: Mapping[str, Any]) -> None:
        while True:
            _ask(model, request)
            if time.monotonic() > deadline:
                return

    jobs = [(model, request) for model, request, one in work for _ in range(max(1, one.instances))]
    pids = process_tree(server.pid)
    used_s, began_s = processor_s(pids), time.monotonic()
    with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        for future in [pool.submit(repeat, model, request) for model, request in jobs]:
            future.result()
    return (processor_s(pids) - used_s) / (time.monotonic() - began_s)


def instance_count(config: Mapping[str, Any]) -> int:
    """Instances in a loaded configuration; 0 for an ensemble. A GPU group has `count` on each of its GPUs."""
    groups = config.get("instance_group", ())
    return sum(int(group.get("count", 1)) * max(1, len(group.get("gpus", ()))) for group in groups)


def compute_time_s(statistics: Mapping[str, Any]) -> float | None:
    """The mean time of an execution at the largest batch that was seen; None where there was none."""
    seen = [one for one in statistics.get("batch_stats", ()) if int(one["compute_infer"]["count"])]
    if not seen:
        return None
    largest = max(seen, key=lambda one: int(one["batch_size"]))
    parts = [largest[part] for part in ("compute_input", "compute_infer", "compute_output")]
    return sum(int(part["ns"]) for part in parts) / int(largest["compute_infer"]["count"]) / 1e9


def load_times_s(log: str) -> dict[str, float]:
    """From the line that a model is loading to the one that it is loaded, by Triton's own clock.

    Models load beside each other, and an ensemble after its steps: the times do not add up to the start.
    """
    begun = {found["model"]: _seconds(found["time"]) for found in reversed(list(_LOADING.finditer(log)))}
    return {
        found["model"]: _seconds(found["time"]) - begun[found["model"]]
        for found in _LOADED.finditer(log)
        if found["model"] in begun
    }


def _with_load_time(one: ModelMeasurements, loads: Mapping[str, float]) -> ModelMeasurements:
    is_ensemble = one.instances == 0
    return replace(one, load_s=None if is_ensemble or one.name not in loads else loads[one.name])


def _ready_time_s(log: str, started: float) -> float:
    """From the start of the process to its HTTP service, which comes after the last model."""
    listening = _LISTENING.search(log)
    if listening is None:
        raise DeployError("tritonserver's log does not say when it began to listen", found=log[-500:])
    return round(_seconds(listening["time"]) - started, 3)


def _wall_clock_of_start(pid: int) -> float:
    """When the process began, as `_seconds` counts."""
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = datetime.now(timezone.utc)
    return _seconds(now.strftime("%m%d %H:%M:%S.%f")) - (since_boot - started_s(pid))


def _seconds(text: str) -> float:
    """Seconds of a time in Triton's log (`1122 21:50:11.694512`, UTC, no year)."""
    return datetime.strptime(f"2000{text} +0000", "%Y%m%d %H:%M:%S.%f %z").timestamp()


def _join_models(runs: Sequence[tuple[ModelMeasurements, ...]]) -> tuple[ModelMeasurements, ...]:
    """Model by model, the largest of what the runs saw."""
    return tuple(_largest(same) for same in zip(*runs, strict=True))


def _largest(same: Sequence[ModelMeasurements]) -> ModelMeasurements:
    first = same[0]
    loads = [one.load_s for one in same if one.load_s is not None]
    computes = [one.compute_s for one in same if one.compute_s is not None]
    return ModelMeasurements(
        name=first.name,
        backend=first.backend,
        instances=first.instances,
        load_s=round(max(loads), 3) if loads else None,
        request_bytes=max(one.request_bytes for one in same),
        response_bytes=max(one.response_bytes for one in same),
        compute_s=round(max(computes), 6) if computes else None,
    )


def _versions(server: Server) -> dict[str, str]:
    _, body = ask_http(server.http_port, "GET", "/v2")
    own = ("tritonsmith", "numpy", "tritonclient")
    machine = describe_machine()
    return {
        "triton": str(json.loads(body)["version"]),
        "server_python": server.environment.python_version,
        **{name: str(machine[name]) for name in own if name in machine},
    }
