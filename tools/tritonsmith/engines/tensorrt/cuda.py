"""The part of the CUDA driver API that running a plan takes, by ctypes on the driver's library alone.

Names and constants are those of CUDA's `cuda.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tritonsmith.engines.tensorrt.facts import Device
from tritonsmith.errors import PlanError

LIBRARY = "libcuda.so.1"
MANAGEMENT_LIBRARY = "libnvidia-ml.so.1"
DRIVER_FILES = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
STREAM_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
INDEX, HANDLE, ADDRESS, SIZE = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t


class Cuda:
    """The driver, with the primary context of one GPU current in this thread; from `open_cuda`."""

    def __init__(self, library: Any, index: int) -> None:
        self._library = library
        self.index = index

    def call(self, function: str, *arguments: Any) -> None:
        """Call a driver function; an error code is a PlanError with CUDA's own name and words for it."""
        code = getattr(self._library, function)(*arguments)
        if code != 0:
            raise PlanError(f"CUDA failed in {function}", found=_words(self._library, code))

    def allocate(self, size_bytes: int) -> int:
        """The address of new GPU memory; at least one byte, for an empty tensor needs an address too."""
        address = ADDRESS()
        self.call("cuMemAlloc_v2", ctypes.byref(address), SIZE(max(size_bytes, 1)))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ADDRESS(address))

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Queue a copy of a contiguous array to the GPU; it must live until the stream is done."""
        if array.nbytes:
            self.call(
                "cuMemcpyHtoDAsync_v2",
                ADDRESS(address),
                HANDLE(array.ctypes.data),
                SIZE(array.nbytes),
                HANDLE(stream),
            )

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Queue a copy from the GPU into a contiguous array."""
        if array.nbytes:
            self.call(
                "cuMemcpyDtoHAsync_v2",
                HANDLE(array.ctypes.data),
                ADDRESS(address),
                SIZE(array.nbytes),
                HANDLE(stream),
            )

    def make_stream(self) -> int:
        stream = HANDLE()
        self.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(STREAM_NON_BLOCKING))
        return int(stream.value or 0)

    def wait(self, stream: int) -> None:
        self.call("cuStreamSynchronize", HANDLE(stream))

    def end_stream(self, stream: int) -> None:
        self.call("cuStreamDestroy_v2", HANDLE(stream))

    @contextmanager
    def events(self, count: int) -> Iterator[tuple[int, ...]]:
        """Events that take times; gone when the block ends."""
        made: list[int] = []
        try:
            for _ in range(count):
                event = HANDLE()
                self.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
                made.append(int(event.value or 0))
            yield tuple(made)
        finally:
            for handle in made:
                self.call("cuEventDestroy_v2", HANDLE(handle))

    def record(self, event: int, stream: int) -> None:
        self.call("cuEventRecord", HANDLE(event), HANDLE(stream))

    def elapsed_ns(self, start: int, end: int) -> int:
        """The time between two events that have happened; CUDA resolves about half a microsecond."""
        milliseconds = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(milliseconds), HANDLE(start), HANDLE(end))
        return round(milliseconds.value * 1_000_000)

    @contextmanager
    def captured(self, stream: int, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """What `work` queues on `stream`, captured once as a CUDA graph: a function that launches it."""
        graph, executable = HANDLE(), HANDLE()
        self.call("cuStreamBeginCapture_v2", HANDLE(stream), INDEX(CAPTURE_THREAD_LOCAL))
        try:
            work()
        finally:
            self.call("cuStreamEndCapture", HANDLE(stream), ctypes.byref(graph))
        try:
            self.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
            try:
                yield lambda: self.call("cuGraphLaunch", executable, HANDLE(stream))
            finally:
                self.call("cuGraphExecDestroy", executable)
        finally:
            self.call("cuGraphDestroy", graph)


@contextmanager
def open_cuda(index: int = 0) -> Iterator[Cuda]:
    """The GPU with this index, its primary context current in this thread until the block ends.

    TensorRT works in the primary context, so that memory and streams made here are also its own.

    Raises:
        PlanError: no driver, or no such GPU.
    """
    library, handle = _open_device(index)
    cuda = Cuda(library, index)
    context = HANDLE()
    # Kept until the process ends: objects of TensorRT may be destroyed later than the caller's block, and the
    # last release would take their context away.
    cuda.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), INDEX(handle))
    cuda.call("cuCtxPushCurrent_v2", context)
    try:
        yield cuda
    finally:
        cuda.call("cuCtxPopCurrent_v2", ctypes.byref(HANDLE()))


def describe_device(index: int = 0) -> Device:
    """Name, compute capability, memory and driver of a GPU.

    Raises:
        PlanError: no driver, or no such GPU.
    """
    library, handle = _open_device(index)
    cuda = Cuda(library, index)
    name = ctypes.create_string_buffer(256)
    cuda.call("cuDeviceGetName", name, INDEX(256), INDEX(handle))
    memory_bytes = SIZE()
    cuda.call("cuDeviceTotalMem_v2", ctypes.byref(memory_bytes), INDEX(handle))
    numbers = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        number = INDEX()
        cuda.call("cuDeviceGetAttribute", ctypes.byref(number), INDEX(attribute), INDEX(handle))
        numbers.append(number.value)
    return Device(
        gpu=name.value.decode(errors="replace"),
        compute_capability=f"{numbers[0]}.{numbers[1]}",
        driver=driver_version(library),
        memory_bytes=memory_bytes.value,
    )


def driver_version(library: Any) -> str:
    """The driver's own version, or its CUDA version ("CUDA 13.0") where the system does not say more."""
    for file in DRIVER_FILES:
        if file.is_file() and (version := version_from_text(file.read_text(encoding="utf-8"))):
            return version
    try:
        management = ctypes.CDLL(MANAGEMENT_LIBRARY)
    except OSError:
        management = None
    text = ctypes.create_string_buffer(96)
    if (
        management is not None
        and management.nvmlInit_v2() == 0
        and management.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96)) == 0
    ):
        return text.value.decode()
    number = INDEX()
    Cuda(library, 0).call("cuDriverGetVersion", ctypes.byref(number))
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def version_from_text(text: str) -> str | None:
    """The first word of digits and dots: the file of the module is that alone, that of /proc a sentence."""
    for word in text.split():
        if word.count(".") and word.replace(".", "").isdigit():
            return word
    return None


def _open_device(index: int) -> tuple[Any, int]:
    """The driver's library, ready, and the handle of a GPU."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise PlanError("there is no NVIDIA driver", found=error) from error
    if code := library.cuInit(0):
        raise PlanError("CUDA finds no GPU that it can use", found=_words(library, code))
    count = INDEX()
    if (code := library.cuDeviceGetCount(ctypes.byref(count))) or not 0 <= index < count.value:
        raise PlanError(
            f"there is no GPU {index}", found=_words(library, code) if code else f"{count.value} GPUs"
        )
    handle = INDEX()
    if code := library.cuDeviceGet(ctypes.byref(handle), INDEX(index)):
        raise PlanError(f"GPU {index} cannot be used", found=_words(library, code))
    return library, handle.value


def _words(library: Any, code: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    if library.cuGetErrorName(code, ctypes.byref(name)) or library.cuGetErrorString(code, ctypes.byref(text)):
        return f"error {code}"
    return f"{(name.value or b'').decode()} ({code}): {(text.value or b'').decode()}"
