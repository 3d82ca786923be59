"""Settings of containers and clusters, derived from what was measured; the margins in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tritonsmith.artifact import Json
from tritonsmith.deploy.flags import HTTP_MAX_INPUT_BYTES
from tritonsmith.deploy.measurements import Measurements

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """A number that no measurement gives, and why it is what it is."""

    name: str
    value: float
    unit: str
    why: str


SHM_INSTANCE = Margin(
    name="shared memory of an instance",
    value=1,
    unit="MiB",
    why="what an instance of a Python-based backend takes of /dev/shm before its first request",
)
SHM = Margin(
    name="shared memory",
    value=1.25,
    unit="x",
    why="a segment grows in steps; where it is full, requests fail while the server stays ready",
)
MEMORY = Margin(
    name="memory",
    value=1.25,
    unit="x",
    why="allocators keep what they once had, and traffic mixes sizes that the measurement did not",
)
TMP = Margin(
    name="scratch", value=16, unit="MiB", why="Triton writes below 1 MiB into /tmp, and fails where it cannot"
)
STARTUP = Margin(
    name="start",
    value=4,
    unit="x",
    why="a first start reads the models from a cold disk or a network, on a machine that starts other pods",
)
STOP = Margin(name="stop", value=1.5, unit="x", why="unloading takes longer on a busy machine")
IN_FLIGHT = Margin(
    name="requests in flight at the end",
    value=4,
    unit="x",
    why="the longest execution, once under way and some more in the queue before it",
)
DRAIN = Margin(
    name="drain",
    value=15,
    unit="s",
    why="no new connection comes once every proxy has removed the address (seconds); open gRPC connections "
    "leave at the age that the server gives them",
)
CONNECTION_AGE = Margin(
    name="age of a gRPC connection",
    value=10,
    unit="s",
    why="clients then resolve the service again: new replicas get their share, old ones drain",
)
GRACE = Margin(
    name="grace",
    value=5,
    unit="s",
    why="between the last time-out and SIGKILL, for the kernel and the runtime",
)
PLAN_BUILD = Margin(
    name="first build of plans",
    value=3600,
    unit="s",
    why="NOT MEASURED: TensorRT builds plans at the first start on a GPU, for minutes; later ones are cached",
)
GPU_HOST = Margin(
    name="host memory beside a GPU",
    value=4096,
    unit="MiB",
    why="NOT MEASURED: CUDA, TensorRT's builder and pinned memory need host memory that no CPU server needs",
)
QUEUE_OVER_COMPUTE = Margin(
    name="queue over compute",
    value=1.0,
    unit="x",
    why="above it a request waits longer than it is worked on; utilisation says nothing of that. Where "
    "batches are waited for (max_queue_delay_microseconds), that wait over the measured execution is added",
)
HTTP_INPUT = Margin(
    name="largest HTTP request",
    value=1.25,
    unit="x",
    why="headers around the measured tensors; tensors as JSON take more still. At least 64 MiB",
)
MARGINS = (
    *(SHM_INSTANCE, SHM, MEMORY, TMP, STARTUP, STOP, IN_FLIGHT),
    *(DRAIN, CONNECTION_AGE, GRACE, PLAN_BUILD, GPU_HOST, QUEUE_OVER_COMPUTE, HTTP_INPUT),
)

_SHM_STEP = 16 * MIB
_LEAST_SHM = 64 * MIB  # Docker's own default
_MEMORY_STEP = 64 * MIB
_LEAST_CPU_MILLI = 100
_LEAST_EXIT_S = 10
_LEAST_STARTUP_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A probe of Kubernetes or a health check of Compose."""

    period_s: int
    timeout_s: int
    failure_threshold: int

    @property
    def patience_s(self) -> int:
        return self.period_s * self.failure_threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """All that is derived from measurements."""

    shm_bytes: int
    memory_bytes: int
    cpu_request_milli: int
    cpu_limit_milli: int
    startup: Probe
    readiness: Probe
    liveness: Probe
    drain_s: int
    connection_age_s: int
    exit_timeout_s: int
    grace_s: int
    http_max_input_bytes: int | None  # None: what an image sets is enough

    @property
    def gpu_memory_bytes(self) -> int:
        """Host memory of a server with GPUs: what the CPU's takes, and GPU_HOST, which was not measured."""
        return self.memory_bytes + int(GPU_HOST.value) * MIB


def sizes_from_measurements(measurements: Measurements) -> Sizes:
    return Sizes(
        shm_bytes=shm_bytes_for(measurements),
        memory_bytes=memory_bytes_for(measurements),
        cpu_request_milli=cpu_request_for(measurements),
        cpu_limit_milli=cpu_limit_for(measurements),
        startup=startup_probe_for(measurements.ready_s),
        readiness=readiness_probe(),
        liveness=liveness_probe_for(measurements),
        drain_s=int(DRAIN.value),
        connection_age_s=int(CONNECTION_AGE.value),
        exit_timeout_s=exit_timeout_for(measurements),
        grace_s=grace_for(measurements),
        http_max_input_bytes=http_max_input_for(measurements),
    )


def shm_bytes_for(measurements: Measurements) -> int:
    """Size of /dev/shm: an instance's own share, and one largest request and answer in each instance.

    Never less than what was measured. Backends that are no Python-based ones (TensorRT, the native ONNX
    Runtime) need none, so that for an image with those it is more than enough.
    """
    derived = sum(
        model.instances * (int(SHM_INSTANCE.value) * MIB + model.request_bytes + model.response_bytes)
        for model in measurements.models
    )
    wanted = SHM.value * max(derived, measurements.shm_bytes)
    return max(_LEAST_SHM, _round_up(wanted, _SHM_STEP))


def memory_bytes_for(measurements: Measurements) -> int:
    """Limit of memory: the peak with its margin, and what /dev/shm and /tmp may take beyond the measured.

    Both are charged to the container, and the peak holds what of /dev/shm was in use.
    """
    room = shm_bytes_for(measurements) - measurements.shm_bytes + int(TMP.value) * MIB
    return _round_up(MEMORY.value * measurements.peak_bytes + room, _MEMORY_STEP)


def cpu_request_for(measurements: Measurements) -> int:
    """Thousandths of a core: what was in use while all models answered at once."""
    return max(_LEAST_CPU_MILLI, _round_up(1000 * measurements.cpu_s_per_s, 100))


def cpu_limit_for(measurements: Measurements) -> int:
    """Thousandths of a core: all that the measured machine had; what more would give was not measured."""
    return max(cpu_request_for(measurements), 1000 * cores_of(measurements))


def cores_of(measurements: Measurements) -> int:
    cores: Json = measurements.machine.get("cpu_count", 1)
    return cores if isinstance(cores, int) else 1


def startup_probe_for(ready_s: float) -> Probe:
    """Patient for STARTUP times the measured start, and asking about ten times within the measured one."""
    period_s = max(1, math.ceil(ready_s / 10))
    patience_s = max(_LEAST_STARTUP_S, STARTUP.value * ready_s)
    return Probe(
        period_s=period_s, timeout_s=max(1, period_s), failure_threshold=math.ceil(patience_s / period_s)
    )


def readiness_probe() -> Probe:
    """Out of the endpoints within ten seconds of the first failure."""
    return Probe(period_s=5, timeout_s=3, failure_threshold=2)


def liveness_probe_for(measurements: Measurements) -> Probe:
    """Restarts only what stays silent for longer than the longest execution, three times in a row."""
    timeout_s = max(5, math.ceil(largest_compute_s(measurements)))
    return Probe(period_s=max(10, 2 * timeout_s), timeout_s=timeout_s, failure_threshold=3)


def exit_timeout_for(measurements: Measurements) -> int:
    """--exit-timeout-secs: what is in flight is answered, then the models are unloaded."""
    wanted = IN_FLIGHT.value * largest_compute_s(measurements) + STOP.value * measurements.stop_s
    return max(_LEAST_EXIT_S, math.ceil(wanted))


def grace_for(measurements: Measurements) -> int:
    """terminationGracePeriodSeconds: the drain, the exit time-out, and a rest. The drain counts into it."""
    return int(DRAIN.value) + exit_timeout_for(measurements) + int(GRACE.value)


def http_max_input_for(measurements: Measurements) -> int | None:
    """--http-max-input-size, where the largest request is above what the images set for it; else None."""
    largest = max((model.request_bytes for model in measurements.models), default=0)
    wanted = _round_up(HTTP_INPUT.value * largest, MIB)
    return wanted if wanted > HTTP_MAX_INPUT_BYTES else None


def queue_threshold_for(measurements: Measurements, delays_s: Mapping[str, float]) -> float:
    """Time in the queue over time of work at which there are too few replicas.

    `delays_s` are waits for a batch, by model: up to that long a request waits on an idle server too. The
    ratio of all models together is at most the largest of any, so that the largest is what is added. A model
    without a time of execution adds nothing.
    """
    waits = [
        delays_s[model.name] / model.compute_s
        for model in measurements.models
        if model.name in delays_s and model.compute_s
    ]
    return math.ceil(100 * (QUEUE_OVER_COMPUTE.value + max(waits, default=0.0))) / 100


def explain_queue_threshold(measurements: Measurements, delays_s: Mapping[str, float]) -> str:
    """The threshold, and in brackets the waits that it comes from."""
    text = f"{queue_threshold_for(measurements, delays_s):g}"
    waits = [
        f"{model.name} waits {delays_s[model.name]:g} s for a batch that takes {model.compute_s:g} s"
        for model in measurements.models
        if model.name in delays_s and model.compute_s
    ]
    if not waits:
        return f"{text} (no model waits for batches)"
    return f"{text} ({QUEUE_OVER_COMPUTE.value:g}, and the longest wait over work: {'; '.join(waits)})"


def largest_compute_s(measurements: Measurements) -> float:
    """Of the slowest model at its largest batch; 0.0 where Triton told of none."""
    return max((model.compute_s or 0.0 for model in measurements.models), default=0.0)


def explain_sizes(measurements: Measurements, sizes: Sizes) -> dict[str, str]:
    """For each derived value, the measurement that it comes from, in a sentence for an annotation."""
    longest = largest_compute_s(measurements)
    instances = sum(model.instances for model in measurements.models)
    cpu = measurements.cpu_s_per_s
    return {
        "shm": f"{_mib(sizes.shm_bytes)}: {_mib(measurements.shm_bytes)} seen with {instances} instances, "
        f"or 1 MiB and the largest request and answer of each, whichever is more, x {SHM.value:g}",
        "memory": f"{_mib(sizes.memory_bytes)}: peak of {_mib(measurements.peak_bytes)} x {MEMORY.value:g}, "
        "and the room of /dev/shm and /tmp",
        "cpu": f"request {sizes.cpu_request_milli}m: {cpu:g} cores in use under load; limit "
        f"{sizes.cpu_limit_milli}m: the cores of the measured machine",
        "startup-probe": f"{sizes.startup.patience_s} s (at least {_LEAST_STARTUP_S} s): ready after "
        f"{measurements.ready_s:g} s x {STARTUP.value:g}",
        "liveness-probe": f"time-out {sizes.liveness.timeout_s} s: longest execution {longest:g} s",
        "exit-timeout": f"{sizes.exit_timeout_s} s: execution of {longest:g} s x {IN_FLIGHT.value:g} and "
        f"stop in {measurements.stop_s:g} s x {STOP.value:g}",
        "grace": f"{sizes.grace_s} s: drain {sizes.drain_s} s, exit time-out {sizes.exit_timeout_s} s, "
        f"{GRACE.value:g} s",
    }


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def _mib(count: int) -> str:
    return f"{math.ceil(count / MIB)}Mi"
