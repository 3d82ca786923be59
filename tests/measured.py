"""Measurements as a test wants them: round numbers, of no machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tritonsmith.deploy.measurements import Measurements, ModelMeasurements
from tritonsmith.deploy.measurements_file import fingerprint_of_repository

MIB = 1 << 20
MEASURED = Measurements(
    repository="two",
    fingerprint="",
    target=None,
    models=(
        ModelMeasurements(
            name="big",
            backend="onnxruntime",
            instances=2,
            load_s=3.0,
            request_bytes=10 * MIB,
            response_bytes=20 * MIB,
            compute_s=2.5,
        ),
        ModelMeasurements(
            name="both",
            backend="ensemble",
            instances=0,
            load_s=None,
            request_bytes=MIB,
            response_bytes=MIB,
            compute_s=None,
        ),
        ModelMeasurements(
            name="small",
            backend="python",
            instances=1,
            load_s=1.0,
            request_bytes=MIB,
            response_bytes=MIB,
            compute_s=0.1,
        ),
    ),
    ready_s=20.0,
    stop_s=4.2,
    idle_bytes=300 * MIB,
    peak_bytes=1000 * MIB,
    shm_bytes=50 * MIB,
    cpu_s_per_s=1.234,
    runs=3,
    machine={"cpu": "made up", "cpu_count": 2, "memory_bytes": 8 << 30, "system": "none"},
    versions={"triton": "2.51.0"},
)


def write_measured_repository(folder: Path) -> tuple[Path, Measurements]:
    """A repository with those models' names, of configurations and a MiB each, and fitting measurements."""
    for model in MEASURED.models:
        (folder / model.name / "1").mkdir(parents=True)
        (folder / model.name / "config.pbtxt").write_text(
            f'name: "{model.name}"\nbackend: "{model.backend}"\n'
        )
        (folder / model.name / "1" / "model").write_bytes(b"w" * MIB)
    return folder, replace(MEASURED, fingerprint=fingerprint_of_repository(folder, None))
