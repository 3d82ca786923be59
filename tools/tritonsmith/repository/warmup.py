"""Warm-up requests from real samples: `model_warmup` and the raw files that it names."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from tritonsmith import dtypes
from tritonsmith.artifact import Artifact
from tritonsmith.errors import RecipeError
from tritonsmith.samples import load_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupRequest:
    """Which samples a model instance answers before Triton calls it ready."""

    samples: Path  # .npz, one array per input name, samples on the first axis
    count: int = 1  # samples to take, from the first on; each is a warm-up request of its own
    batch_size: int = 1  # times that each sample stands in its request's batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmup:
    """What goes into config.pbtxt and what goes into `<model>/warmup/`."""

    entries: tuple[model_config_pb2.ModelWarmup, ...]
    files: Mapping[str, bytes]


def warmup_from_samples(request: WarmupRequest, artifact: Artifact) -> Warmup:
    """The first `request.count` samples, as Triton reads them.

    Raises:
        SamplesError: a file that does not fit the model's inputs.
        RecipeError: more samples asked for than the file has; a batch for a model that takes none.
    """
    samples = load_samples(request.samples, artifact.inputs, batched=artifact.batched)
    if not 1 <= request.count <= samples.count:
        raise RecipeError(
            f"warmup.count does not fit {request.samples}",
            found=request.count,
            expected=f"1 to {samples.count}, the samples in the file",
        )
    if request.batch_size < 1 or (request.batch_size > 1 and not artifact.batched):
        raise RecipeError(
            "warmup.batch_size does not fit the model",
            found=request.batch_size,
            expected="1 or more" if artifact.batched else "1, for a model without a batch axis",
        )
    entries = []
    files: dict[str, bytes] = {}
    for index in range(request.count):
        entry = model_config_pb2.ModelWarmup(name=f"sample {index}", batch_size=request.batch_size)
        for position, spec in enumerate(artifact.inputs):
            array = samples.arrays[spec.name][index]
            filename = f"sample{index}-input{position}-{re.sub(r'[^A-Za-z0-9_-]', '_', spec.name)}.bin"
            files[filename] = raw_from_array(array, spec.dtype)
            tensor = entry.inputs[spec.name]
            tensor.data_type = model_config_pb2.DataType.Value(dtypes.BY_NAME[spec.dtype].config)
            tensor.dims.extend(_shape(array) or [1])
            tensor.input_data_file = filename
        entries.append(entry)
    return Warmup(entries=tuple(entries), files=files)


def raw_from_array(array: Any, dtype: str) -> bytes:
    """A tensor's bytes as the KServe v2 binary extension lays them out.

    Numbers are little-endian in row-major order; each string is led by its length as a uint32.
    """
    if dtype != "string":
        return bytes(array.astype(dtypes.BY_NAME[dtype].numpy).tobytes())
    items = [array] if isinstance(array, bytes) else array.ravel().tolist()
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def _shape(array: NDArray[Any] | bytes) -> list[int]:
    return [] if isinstance(array, bytes) else list(array.shape)
