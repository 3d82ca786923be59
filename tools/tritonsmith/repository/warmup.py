"""Warm-up requests from real samples: `model_warmup` and the raw files that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupRequest:
    """Which samples a model instance answers before Triton calls it ready."""

    samples: Path  # .npz, one array per input name, samples on the first axis
    batch_size: int = 1  # samples in one warm-up request
    count: int = 1  # times that the request is repeated
