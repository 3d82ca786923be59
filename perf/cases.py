"""A model of the compression benchmark: what it is made of, what is done to it, and what it should reach."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tritonsmith.compress.steps import StepSpec
from tritonsmith.console import Say
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import staging_folder
from tritonsmith.ingest.source import ConvertOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of `results/compression.json`."""

    model: str
    variant: str
    source: str
    steps: tuple[StepSpec, ...]
    calibration: Path | None
    evaluation: Path
    metric: str
    max_drop: float  # that the served model is validated with
    training: Path | None = None
    tuning: Path | None = None
    allow_code: bool = False  # a factory of ours
    headline_batch: int = 8  # of `speedup`
    batches: tuple[int, ...] = (1, 8)
    # Lowest values, but for `drop` and `drop_ci95_high`, which are highest ones.
    targets: Mapping[str, float] = field(default_factory=dict)
    tried: str = ""  # what else was tried, and what limits the result

    @property
    def name(self) -> str:
        return f"{self.model}_{self.variant}".replace("-", "_")

    def convert_options(self) -> ConvertOptions:
        return ConvertOptions(allow_code=self.allow_code)


def make_folder(script: Path, folder: Path, say: Say) -> Path:
    """The folder that `script FOLDER` fills, made once and whole, in a process of its own.

    Raises:
        TritonsmithError: the script failed, with what it said.
    """
    if folder.exists():
        return folder
    say(f"running {script.parent.name}/{script.name}")
    with staging_folder(folder) as staging:
        made = staging / folder.name
        done = subprocess.run([sys.executable, script, made], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TritonsmithError(f"{script} failed", found=done.stderr[-2000:].strip())
        made.replace(folder)
    for line in done.stdout.splitlines():
        say(line)
    return folder
