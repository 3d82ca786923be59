"""Triton's releases and what each container holds; GPUs by name.

Columns, and where each was found (November 2026). What was not found is None, and never guessed.

- server, ONNX Runtime: `TRITON_VERSION`, `build.py` and docs/introduction/compatibility.md ("ONNX Runtime
  Versions") on the branches r24.10 to r26.08 of the server repository. 25.08 has a commit on the way to
  1.23.0 (1.23.0+1d1712fdaf): the release before is what it surely reads. 26.09 is named by the default
  branch ("track 2.73.0 / 26.09"); its ONNX Runtime was not published there yet.
- opset, IR version: probed on the wheels of ONNX Runtime 1.19.2, 1.20.1, 1.21.0, 1.22.0, 1.23.2, 1.24.4,
  1.27.0, 1.28.0: the newest of a one-node model that loads without leave for unreleased opsets.
- CUDA, oldest compute capability: NVIDIA's release notes, rel-24-10 to rel-26-10, and for 24.10, 24.12 and
  25.01 also docs/introduction/release_notes.md in the server repository's history. 24.10 and 24.12 name
  6.0; 25.01 and the later ones that were read name 7.5; a release between two that agree is taken to agree.
  25.07 is "built out of the 25.06 release".
- TensorRT of the plain `-py3` image: those notes for 24.10, 24.12 and 25.01, the last that print it; for
  25.03, 26.06 (11.0, no further digits) and 26.07 what users of these images recorded in public
  repositories. NVIDIA's support matrix, which has them all, could not be read. compatibility.md names the
  TensorRT of the `-trtllm-python-py3` images, which is another one.
- security fixes: NVIDIA's bulletins on Triton of 2025 and 2026, by the release that has them.
- numpy 2: "not supported for Python Backend models, may return empty tensors" is a known issue of 24.10 and
  24.12, and no longer of 25.01.
- compute capabilities of products: NVIDIA's list "CUDA GPUs".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tritonsmith.errors import UsageError

# ONNX Runtime minor version -> newest opset, newest IR version
RUNTIMES = {
    "1.19": (21, 10),
    "1.20": (21, 10),
    "1.21": (22, 10),
    "1.22": (22, 10),
    "1.23": (23, 11),
    "1.24": (25, 13),
    "1.27": (26, 13),
    "1.28": (26, 13),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """nvcr.io/nvidia/tritonserver:<release>-py3."""

    release: str  # "26.07"; releases compare as strings
    server: str  # "2.71.0"
    onnxruntime: str | None
    tensorrt: str | None  # "11.1.0.106"; the last numbers may be left out
    cuda: str | None
    oldest_gpu: str  # compute capability

    @property
    def opset(self) -> int | None:
        """The newest opset that its ONNX Runtime reads."""
        return self._reads()[0]

    @property
    def ir_version(self) -> int | None:
        """The newest IR version that its ONNX Runtime reads."""
        return self._reads()[1]

    def _reads(self) -> tuple[int, int] | tuple[None, None]:
        return (None, None) if self.onnxruntime is None else RUNTIMES[self.onnxruntime.rpartition(".")[0]]


_ROWS: tuple[tuple[str, str, str | None, str | None, str | None], ...] = (
    ("24.10", "2.51.0", "1.19.2", "10.5.0.18", "12.6.2"),
    ("24.11", "2.52.0", "1.19.2", None, None),
    ("24.12", "2.53.0", "1.20.1", "10.7.0.23", "12.6.3"),
    ("25.01", "2.54.0", "1.20.1", "10.8.0.43", "12.8.0.038"),
    ("25.02", "2.55.0", "1.20.1", None, None),
    ("25.03", "2.56.0", "1.21.0", "10.9.0.34", "12.8.1.012"),
    ("25.04", "2.57.0", "1.21.0", None, "12.9.0"),
    ("25.05", "2.58.0", "1.22.0", None, None),
    ("25.06", "2.59.0", "1.22.0", None, "12.9.1.010"),
    ("25.07", "2.59.1", "1.22.0", None, "12.9.1.010"),
    ("25.08", "2.60.0", "1.22.0", None, "13.0.0.044"),
    ("25.09", "2.61.0", "1.23.0", None, None),
    ("25.10", "2.62.0", "1.23.1", None, "13.0.2.006"),
    ("25.11", "2.63.0", "1.23.2", None, None),
    ("25.12", "2.64.0", "1.23.2", None, None),
    ("26.01", "2.65.0", "1.23.2", None, None),
    ("26.02", "2.66.0", "1.24.1", None, "13.1.1"),
    ("26.03", "2.67.0", "1.24.2", None, None),
    ("26.04", "2.68.0", "1.24.4", None, "13.2.1"),
    ("26.05", "2.69.0", "1.24.4", None, None),
    ("26.06", "2.70.0", "1.24.4", "11.0", "13.3.0"),
    ("26.07", "2.71.0", "1.27.0", "11.1.0.106", "13.3.1"),
    ("26.08", "2.72.0", "1.28.0", None, "13.4.1"),
    ("26.09", "2.73.0", None, None, "13.4.1"),
)
NO_PASCAL_SINCE = "25.01"

CONTAINERS: Mapping[str, Container] = {
    release: Container(
        release=release,
        server=server,
        onnxruntime=onnxruntime,
        tensorrt=tensorrt,
        cuda=cuda,
        oldest_gpu="7.5" if release >= NO_PASCAL_SINCE else "6.0",
    )
    for release, server, onnxruntime, tensorrt, cuda in _ROWS
}

SECURITY_FIXES = ("25.07", "25.08", "26.03", "26.06", "26.07")
SAFE_SINCE = SECURITY_FIXES[-1]
NUMPY2_SINCE = "25.01"
NO_TENSORFLOW_SINCE = "25.03"

GPUS: Mapping[str, str] = {
    **dict.fromkeys(("p100",), "6.0"),
    **dict.fromkeys(("p4", "p40", "gtx1080", "gtx1080ti"), "6.1"),
    **dict.fromkeys(("v100", "titanv"), "7.0"),
    **dict.fromkeys(("xavier",), "7.2"),
    **dict.fromkeys(("t4", "rtx2080", "rtx2080ti"), "7.5"),
    **dict.fromkeys(("a100", "a30"), "8.0"),
    **dict.fromkeys(("a2", "a10", "a10g", "a16", "a40", "rtxa6000", "rtx3080", "rtx3090"), "8.6"),
    **dict.fromkeys(("orin",), "8.7"),
    **dict.fromkeys(("l4", "l40", "l40s", "rtx6000ada", "rtx4080", "rtx4090"), "8.9"),
    **dict.fromkeys(("h100", "h200", "h20", "gh200"), "9.0"),
    **dict.fromkeys(("b200", "gb200"), "10.0"),
    **dict.fromkeys(("b300", "gb300"), "10.3"),
    **dict.fromkeys(("thor",), "11.0"),
    **dict.fromkeys(("rtx5080", "rtx5090", "rtxpro6000"), "12.0"),
    **dict.fromkeys(("gb10", "spark"), "12.1"),
}
OLDEST_CUDA_GPU = (5, 0)
_CAPABILITY = re.compile(r"(?:sm)?(\d{1,2})(\d)[af]?")
_BRANDS = ("nvidia", "geforce", "tesla", "jetson", "agx")


def find_container(release: str) -> Container:
    """The container of a release such as "26.07".

    Raises:
        UsageError: the release is not in the table.
    """
    container = CONTAINERS.get(release)
    if container is None:
        raise UsageError(
            f"no Triton container {release!r} is known",
            expected=f"one of {', '.join(CONTAINERS)}",
            fix="name the newest release that is not newer than your container",
        )
    return container


def find_gpu(name: str) -> str:
    """The compute capability ("9.0") of "sm90", "9.0", "90" or a product such as "H100" or "RTX 4090".

    Raises:
        UsageError: a name that is in no list.
    """
    plain = re.sub(r"[\s_.-]", "", name.lower())
    match = _CAPABILITY.fullmatch(plain)
    if match and (int(match[1]), int(match[2])) >= OLDEST_CUDA_GPU:
        return f"{int(match[1])}.{match[2]}"
    for brand in _BRANDS:
        plain = plain.removeprefix(brand)
    if plain in GPUS:
        return GPUS[plain]
    raise UsageError(
        f"no GPU {name!r} is known",
        expected=f"a compute capability (sm90, 9.0) or one of {', '.join(GPUS)}",
        fix="`nvidia-smi --query-gpu=compute_cap --format=csv` says it on the machine",
    )
