"""Implicit state of sequences: what a model gives out in one step and takes in at the next.

Triton's Python stub cannot hand a new state back to the scheduler. But the scheduler sends every request of
a sequence to one instance, so the instance keeps the states itself. The scheduler still feeds the initial
state into every request, which is used where a sequence starts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

DEFAULT_IDLE_US = 1_000_000  # model_config.proto, max_sequence_idle_microseconds


class States:
    """The states of the sequences that run on this instance, by correlation id."""

    def __init__(self, entries: list[Mapping[str, Any]], idle_s: float) -> None:
        self.output_names = [entry["output_name"] for entry in entries]
        self._inputs = {entry["output_name"]: entry["input_name"] for entry in entries}
        self._idle_s = idle_s
        self._kept: dict[int | str, tuple[float, dict[str, np.ndarray]]] = {}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> States | None:
        """The states that a configuration declares, or None where it declares none."""
        sequence = config.get("sequence_batching") or {}
        if not sequence.get("state"):
            return None
        idle_us = int(sequence.get("max_sequence_idle_microseconds") or DEFAULT_IDLE_US)
        return cls(sequence["state"], idle_us / 1e6)

    def entering(self, request: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The request's inputs, with the state that its sequence left behind."""
        if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self._kept.pop(request.correlation_id(), None)  # of an earlier sequence that never ended
            return arrays
        kept = self._kept.get(request.correlation_id())
        return arrays if kept is None else {**arrays, **kept[1]}

    def leaving(self, request: Any, outputs: Mapping[str, np.ndarray]) -> None:
        """Keep the state for the next request of the sequence; forget it where the sequence ends."""
        now = time.monotonic()
        for sequence in [key for key, (used, _) in self._kept.items() if now - used > 2 * self._idle_s]:
            del self._kept[sequence]  # the scheduler has given it up: its next request must be a start
        sequence = request.correlation_id()
        if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
            self._kept.pop(sequence, None)
        else:
            state = {taken: np.array(outputs[given]) for given, taken in self._inputs.items()}
            self._kept[sequence] = (now, state)
