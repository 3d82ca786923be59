"""Samples in .npz files: one array per input name, samples on the first axis, labels under `target`."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, TensorSpec, sha256_of
from tritonsmith.errors import SamplesError

if TYPE_CHECKING:
    from tritonsmith.client import Signature

TARGET = "target"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Arrays by input name, each `[samples, ...]`, and the labels `[samples, ...]` if there are any."""

    path: Path
    sha256: str
    arrays: Mapping[str, NDArray[Any]]
    target: NDArray[Any] | None

    @property
    def count(self) -> int:
        return len(next(iter(self.arrays.values())))


def load_samples(
    path: Path, inputs: tuple[TensorSpec, ...], *, batched: bool = True, need_target: bool = False
) -> Samples:
    """Read an .npz and hold it against a signature.

    Where the model has no batch axis (`batched` False), the first axis still counts samples and the
    rest is the whole input. Strings are `S` or `U` arrays: nothing is unpickled.

    Raises:
        SamplesError: for a file that is no .npz, a missing, extra or misshapen array, another kind
            of number, NaN or infinity, no samples, unequal counts, or labels that are needed and absent.
    """
    return _hold(path, _read_npz(path), inputs, batched=batched, need_target=need_target)


def _hold(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    inputs: tuple[TensorSpec, ...],
    *,
    batched: bool,
    need_target: bool,
) -> Samples:
    target = arrays.pop(TARGET, None) if TARGET not in {spec.name for spec in inputs} else None
    names = [spec.name for spec in inputs]
    if missing := [name for name in names if name not in arrays]:
        raise SamplesError(
            f"{path} lacks an array for {_quoted(missing)}", found=sorted(arrays), expected=names
        )
    if extra := [name for name in arrays if name not in names]:
        raise SamplesError(f"{path} has an array that no input takes: {_quoted(extra)}", expected=names)
    fitted = {spec.name: _fit(path, spec, arrays[spec.name], batched=batched) for spec in inputs}
    counts = {name: len(array) for name, array in fitted.items()}
    if target is not None:
        counts[TARGET] = len(target) if target.ndim else 0
    if len(set(counts.values())) > 1:
        raise SamplesError(
            f"{path} has arrays of unequal length", found=counts, expected="one row per sample"
        )
    if need_target and target is None:
        raise SamplesError(f"{path} has no labels", expected=f"an array named {TARGET!r}")
    return Samples(path=path, sha256=sha256_of(path), arrays=fitted, target=target)


def load_served_samples(path: Path, signature: Signature) -> Samples:
    """As `load_samples`, for a served model: arrays as the model's own file takes them fit as well.

    Triton has no rank 0 and serves such a tensor as `[1]`; an array without that axis gets it here. An
    optional input may be left out.
    """
    batched = signature.max_batch_size > 0
    arrays = _read_npz(path)
    specs = []
    for tensor in signature.inputs:
        if tensor.optional and tensor.name not in arrays:
            continue
        axes = [f"{tensor.name}_{index}" if axis < 0 else axis for index, axis in enumerate(tensor.shape)]
        if batched:
            axes[0] = BATCH_AXIS
        spec = TensorSpec(name=tensor.name, dtype=dtypes.BY_WIRE[tensor.datatype].name, shape=tuple(axes))
        specs.append(spec)
        if spec.name in arrays:
            arrays[spec.name] = _with_unit_axis(arrays[spec.name], spec, batched=batched)
    return _hold(path, arrays, tuple(specs), batched=batched, need_target=False)


def _with_unit_axis(array: NDArray[Any], spec: TensorSpec, *, batched: bool) -> NDArray[Any]:
    sample = spec.shape[1:] if batched else spec.shape
    return array[:, None] if sample == (1,) and array.ndim == 1 else array


def check_npz(path: Path) -> None:
    """Raise SamplesError for what is no .npz at all, at a glance and before any long work."""
    if not path.is_file():
        raise SamplesError(f"{path} is no file", expected="an .npz of samples")
    if not zipfile.is_zipfile(path):
        raise SamplesError(
            f"{path} cannot be read as .npz",
            found="a single array" if path.suffix == ".npy" else "another kind of file, or one cut off",
            expected="what numpy.savez writes: arrays of numbers or of S/U strings",
        )


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    check_npz(path)
    try:
        # Opened here: numpy leaves its own stream open where the zip is damaged.
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError) as error:
        pickled = "pickle" in str(error)
        raise SamplesError(
            f"{path} cannot be read as .npz",
            found="pickled objects, which are never loaded" if pickled else error,
            expected="arrays of numbers or of S/U strings",
        ) from error


def _fit(path: Path, spec: TensorSpec, array: NDArray[Any], *, batched: bool) -> NDArray[Any]:
    """The array in the data type of `spec`, if its shape and kind of number fit."""
    expected = spec.shape if batched else (BATCH_AXIS, *spec.shape)
    shape_fits = array.ndim == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, array.shape, strict=True)
    )
    if not shape_fits:
        raise SamplesError(
            f"{path}: array {spec.name!r} does not fit the model's input",
            found=f"{array.dtype} of shape {list(array.shape)}",
            expected=f"{spec.dtype} of shape [{', '.join(map(str, expected))}]",
        )
    if len(array) == 0:
        raise SamplesError(f"{path}: array {spec.name!r} has no samples", expected="at least one")
    if spec.dtype == "string":
        if array.dtype.kind not in "SU":
            raise SamplesError(f"{path}: array {spec.name!r} is {array.dtype}", expected="strings (S or U)")
        return (
            np.char.encode(array, "utf-8").astype(object) if array.dtype.kind == "U" else array.astype(object)
        )
    wanted = dtypes.BY_NAME[spec.dtype].numpy
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise SamplesError(f"{path}: array {spec.name!r} holds NaN or infinity", expected="finite numbers")
    if array.dtype == wanted:
        return array
    exact = array.dtype.kind in "iub" and wanted.kind in "iu" and np.array_equal(array.astype(wanted), array)
    floats = wanted.kind in "fV" and array.dtype.kind in "f"
    if not (exact or floats):
        raise SamplesError(f"{path}: array {spec.name!r} is {array.dtype}", expected=spec.dtype)
    with np.errstate(over="ignore"):  # told in the next line
        narrow = array.astype(wanted)
    if floats and not np.isfinite(narrow).all():
        raise SamplesError(
            f"{path}: array {spec.name!r} holds a number beyond {spec.dtype}",
            found=f"{array.dtype} from {array.min():.4g} to {array.max():.4g}",
            expected=f"numbers that {spec.dtype} can hold",
        )
    return narrow


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
