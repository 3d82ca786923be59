"""What was measured of a repository: the numbers that every rendered file is derived from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritonsmith.artifact import Json

MEASUREMENTS_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMeasurements:
    """One served model."""

    name: str
    backend: str
    instances: int
    load_s: float | None  # None: Triton does not say (ensembles)
    request_bytes: int  # of the largest request: max_batch_size samples, free axes as in the samples
    response_bytes: int
    compute_s: float | None  # of one execution at the largest batch, by Triton's own statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """A repository, served once on the machine that `machine` names."""

    repository: str  # its name
    fingerprint: str  # of its configurations and manifests: other ones need other measurements
    target: str | None  # the --model-config-name that was measured
    models: tuple[ModelMeasurements, ...]
    ready_s: float  # from the start of tritonserver to ready, the slowest of the runs
    stop_s: float  # from SIGTERM to the end
    idle_bytes: int  # memory of all processes of the server, ready
    peak_bytes: int  # the most while every model answered its largest request
    shm_bytes: int  # most of /dev/shm in use at any moment
    cpu_s_per_s: float  # cores in use under the load that was given
    runs: int
    machine: Mapping[str, Json]
    versions: Mapping[str, str]
