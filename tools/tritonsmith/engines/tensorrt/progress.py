"""A build that says how far it is and that Ctrl-C ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, ModuleType
from typing import Any

SECONDS_BETWEEN = 2.0
NOTED = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether a signal asked the build to end; it may be asked from every thread.

    Python runs its handlers in the main thread alone, which is inside of TensorRT. What Python's own part
    of the handler writes to `signal.set_wakeup_fd` is there at once.
    """

    def __init__(self, arrivals: int | None = None) -> None:
        self._arrivals = arrivals  # the reading end; None: signals are not noted
        self.signal: int | None = None

    def requested(self) -> bool:
        if self.signal is None and self._arrivals is not None:
            with suppress(BlockingIOError):
                arrived = os.read(self._arrivals, 64)
                self.signal = next((number for number in arrived if number in NOTED), None)
        return self.signal is not None


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
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        pass  # its number arrives by the pipe

    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    interruption = Interruption(reading)
    handlers = {number: signal.signal(number, note) for number in NOTED}
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield interruption
        interruption.requested()
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
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
            return not interruption.requested()

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                phases.finish(phase_name)

    return Monitor()
