"""What the builder measured, kept for the next build: one file for a TensorRT version and a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritonsmith.engines.tensorrt.facts import Device
from tritonsmith.engines.tensorrt.fit import sm_name
from tritonsmith.files import locked, write_bytes_atomically


def timing_cache_name(version: str, device: Device) -> str:
    """The file for this version and GPU: measurements of one GPU mislead another."""
    gpu = re.sub(r"[^a-z0-9]+", "-", device.gpu.lower()).strip("-")
    return f"timing-{version}-{sm_name(device.compute_capability)}-{gpu}.cache"


@contextmanager
def timing_cache_kept(
    config: Any, folder: Path | None, *, version: str, device: Device, say: Callable[[str], None]
) -> Iterator[None]:
    """Give a builder configuration what earlier builds measured, and keep what this one adds.

    The file is locked while it is read and written, not while TensorRT builds; what another build added
    meanwhile is merged. A build that fails leaves the file as it was.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / timing_cache_name(version, device)
    lock = file.with_suffix(".lock")
    with locked(lock, say=say):
        before = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(before)
    if cache is None or not config.set_timing_cache(cache, False):
        say(f"TensorRT refuses the timing cache {file.name}; it begins a new one")
        cache, before = config.create_timing_cache(b""), b""
        config.set_timing_cache(cache, False)
    yield
    with locked(lock, say=say):
        meanwhile = file.read_bytes() if file.is_file() else b""
        if meanwhile not in (b"", before) and (other := config.create_timing_cache(meanwhile)) is not None:
            cache.combine(other, False)
        write_bytes_atomically(file, memoryview(cache.serialize()))
