"""A build that says how far it is and that Ctrl-C ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

SECONDS_BETWEEN = 2.0


class Interruption:
    """Whether a signal asked the build to end."""

    def __init__(self) -> None:
        self.signal: int | None = None


class Phases:
    """TensorRT's phases as lines of progress: each time at most every `seconds_between` seconds."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        seconds_between: float = SECONDS_BETWEEN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._seconds_between = seconds_between
        self._clock = clock
        self._steps: dict[str, int] = {}
        self._said_at: float | None = None

    def start(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps

    def step(self, phase: str, step: int) -> None:
        """A step, counted from 0, is done."""
        now = self._clock()
        if self._said_at is not None and now - self._said_at < self._seconds_between:
            return
        self._said_at = now
        self._say(f"TensorRT: {phase} {step + 1} of {self._steps.get(phase, step + 1)}")

    def finish(self, phase: str) -> None:
        self._steps.pop(phase, None)


@contextmanager
def interruptible(*, enabled: bool) -> Iterator[Interruption]:
    """SIGINT and SIGTERM are noted while the block runs, and delivered when it has ended.

    Python must not raise inside TensorRT's callbacks. Where no callback will look (`enabled` is false) or
    this is no main thread, signals are left as they are.
    """
    interruption = Interruption()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, _frame: FrameType | None) -> None:
        interruption.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interruption.signal is not None:
        signal.raise_signal(interruption.signal)


def monitor_of(trt: ModuleType, say: Callable[[str], None], interruption: Interruption) -> Any:
    """TensorRT's IProgressMonitor over `say`; the build ends at the next step after an interruption."""
    phases = Phases(say)
    lock = threading.Lock()  # TensorRT calls from several threads

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                phases.step(phase_name, step)
            return interruption.signal is None

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                phases.finish(phase_name)

    return Monitor()
