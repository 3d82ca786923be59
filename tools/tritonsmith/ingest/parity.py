"""Proof that a converted model computes what its source computes, on seeded inputs.

Batched models are compared on batches of 1, 2, 3 and 7, others on four draws; free axes take another
length in each. Every output is compared. Floating-point outputs may differ by

    TOLERANCES[dtype] * (scale of the output + |expected value|)

where the scale is the largest finite |expected value| below SENTINEL (masks of -1e9 and the like say
nothing about the scale). NaN equals NaN, and infinity equals infinity of its sign. Everything else
must be equal exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, Json, TensorSpec
from tritonsmith.engines import Session, open_session
from tritonsmith.errors import EngineError, ParityError, SourceError
from tritonsmith.ingest.seeds import Range, draw_inputs
from tritonsmith.ingest.source import Exported, Reference

BATCHES = (1, 2, 3, 7)
TOLERANCES = {"float64": 1e-7, "float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
SENTINEL = 1e8
TINY = float(np.finfo(np.float32).tiny)
# Lengths of free axes, one for each draw. The first that the source takes are used: short sequences,
# then sizes that survive five halvings, then images, then waveforms, then models with few positions.
LENGTHS = ((5, 8, 11, 6), (32, 64, 96, 32), (224, 256, 224, 288), (1600, 2000, 1700, 3200), (3, 4, 2, 3))

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One draw of inputs and what the source answers; `axes` holds the length of each free axis."""

    axes: Mapping[str, int]
    inputs: Arrays
    expected: Arrays

    def __str__(self) -> str:
        return ", ".join(f"{axis} {length}" for axis, length in self.axes.items()) or "fixed shapes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The largest differences of one output over all cases; `relative` is to the output's scale."""

    absolute: float
    relative: float
    values_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What was compared and how far apart it was, by output; every output is within tolerance."""

    cases: tuple[Case, ...]
    outputs: Mapping[str, Difference]
    rows_independent: bool | None  # None: no batch axis

    def to_json(self) -> dict[str, Json]:
        return {
            "compared": [dict(case.axes) for case in self.cases],
            "largest_absolute_error": max(item.absolute for item in self.outputs.values()),
            "largest_relative_error": max(item.relative for item in self.outputs.values()),
            "outputs": {
                name: {"absolute": item.absolute, "relative": item.relative, "values": item.values_count}
                for name, item in self.outputs.items()
            },
            "rows_independent": self.rows_independent,
        }


def draw_cases(
    exported: Exported, *, ranges: Mapping[str, Range] = MappingProxyType({}), seed: int = 0
) -> tuple[Case, ...]:
    """Seeded inputs and the source's answers to them; `ranges` are those of `index_ranges`.

    Raises:
        SourceError: the source fails on every kind of seeded input; its own reason is in the message.
    """
    if not exported.outputs:
        raise ParityError("the source has no outputs, so nothing can be compared")
    failure: Exception | None = None
    for lengths in _length_plans(exported):
        cases = []
        for index, batch in enumerate(BATCHES):
            axes = {axis: values[index % len(values)] for axis, values in lengths.items()}
            if exported.batched:
                axes = {BATCH_AXIS: batch, **axes}
            bounds = {**ranges, **exported.ranges}
            inputs = draw_inputs(exported.inputs, axes, bounds, frozenset(ranges), seed + index)
            try:
                answer = exported.reference(inputs)
            except Exception as error:  # noqa: BLE001 - any framework may raise anything; told below
                failure = error
                break
            cases.append(Case(axes=axes, inputs=inputs, expected=_expected(exported, answer)))
        else:
            return tuple(cases)
    raise SourceError(
        f"the source itself fails on seeded inputs: {', '.join(map(str, exported.inputs))}",
        found=f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}",
        fix="check that the source runs on inputs of these types and shapes",
    ) from failure


def compare_cases(path: Path, exported: Exported, cases: tuple[Case, ...]) -> Parity:
    """Run a converted model on every case and hold its outputs against the source's.

    Raises:
        ParityError: an output is missing, misshapen or too far off, naming the worst place; or the
            model cannot run a case; or nothing was compared.
        EngineError: ONNX Runtime cannot load the model.
    """
    session = open_session(path)
    differences: dict[str, list[Difference]] = {spec.name: [] for spec in exported.outputs}
    for case in cases:
        answer = _run(session, case)
        for spec in exported.outputs:
            found, expected = answer[spec.name], case.expected[spec.name]
            _check_shape(spec, found, expected, case)
            differences[spec.name].append(_compare(spec, found, expected, case))
    if not any(differences.values()):
        raise ParityError("nothing was compared", expected="at least one case and one output")
    for spec in exported.outputs:
        sizes = [case.expected[spec.name].size for case in cases]
        if any(sizes) and not sum(item.values_count for item in differences[spec.name]):
            raise ParityError(
                f"output {spec.name!r} is NaN or infinite everywhere, so nothing could be compared",
                fix="check the source; if it needs inputs of another range, give them",
            )
    return Parity(
        cases=cases,
        outputs={name: _largest(items) for name, items in differences.items()},
        rows_independent=rows_independent(session.run, exported.outputs, cases) if exported.batched else None,
    )


def rows_independent(run: Reference, outputs: tuple[TensorSpec, ...], cases: tuple[Case, ...]) -> bool:
    """Whether each row of a batch of 3 gets the answer that it gets alone; joining requests needs that."""
    case = next(case for case in cases if case.axes[BATCH_AXIS] == 3)
    together = run(case.inputs)
    for row in range(3):
        part = slice(row, row + 1)
        try:
            alone = run({name: array[part] for name, array in case.inputs.items()})
            for spec in outputs:
                if alone[spec.name].shape != together[spec.name][part].shape:
                    return False
                _compare(spec, alone[spec.name], together[spec.name][part], case)
        except (EngineError, ParityError):
            return False
    return True


def _length_plans(exported: Exported) -> Iterator[dict[str, tuple[int, ...]]]:
    """Lengths for every free axis; axes of different names first differ in length, then agree."""
    axes = [axis for spec in exported.inputs for axis in spec.shape if isinstance(axis, str)]
    names = [axis for axis in dict.fromkeys(axes) if not (exported.batched and axis == BATCH_AXIS)]
    given = {name: exported.lengths[name] for name in names if name in exported.lengths}
    free = [name for name in names if name not in given]
    if not free:
        yield given
        return
    for lengths in LENGTHS:
        if len(free) > 1:
            turned = {name: lengths[turn % 4 :] + lengths[: turn % 4] for turn, name in enumerate(free)}
            yield {**given, **turned}
        yield {**given, **dict.fromkeys(free, lengths)}


def _expected(exported: Exported, answer: Arrays) -> dict[str, NDArray[Any]]:
    names = {spec.name for spec in exported.outputs}
    if missing := sorted(names - set(answer)):
        raise SourceError(f"the source gives no output {missing[0]!r}", found=sorted(answer))
    return {name: np.asarray(answer[name]) for name in sorted(names)}


def _run(session: Session, case: Case) -> Arrays:
    try:
        return session.run(case.inputs)
    except EngineError as error:
        raise ParityError(f"the converted model fails at {case}", found=error.found) from error


def _check_shape(spec: TensorSpec, found: NDArray[Any], expected: NDArray[Any], case: Case) -> None:
    declared = [case.axes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape]
    fits = len(declared) == found.ndim and all(
        isinstance(want, str) or want == have for want, have in zip(declared, found.shape, strict=True)
    )
    if found.shape != expected.shape or not fits:
        raise ParityError(
            f"output {spec.name!r} has another shape at {case}",
            found=list(found.shape),
            expected=f"{list(expected.shape)} from the source, declared as {spec}",
        )
    wanted = dtypes.BY_NAME[spec.dtype].numpy
    if found.dtype != wanted or _kind(expected) != _kind(found):
        raise ParityError(
            f"output {spec.name!r} has another data type",
            found=found.dtype,
            expected=f"{spec.dtype} (the source gives {expected.dtype})",
        )


def _compare(spec: TensorSpec, found: NDArray[Any], expected: NDArray[Any], case: Case) -> Difference:
    """The difference of one output in one case, if it is within tolerance."""
    if spec.dtype not in TOLERANCES:
        wrong = np.asarray(_plain(found) != _plain(expected))
        if wrong.any():
            raise _mismatch(spec, found, expected, case, np.unravel_index(int(wrong.argmax()), wrong.shape))
        return Difference(absolute=0.0, relative=0.0, values_count=found.size)
    have, want = found.astype(np.float64), expected.astype(np.float64)
    both = np.isfinite(have) & np.isfinite(want)
    same = both | (np.isnan(have) & np.isnan(want)) | (have == want)
    if not same.all():
        raise _mismatch(spec, found, expected, case, np.unravel_index(int((~same).argmax()), same.shape))
    error = np.abs(np.where(both, have, 0.0) - np.where(both, want, 0.0))
    size = np.abs(np.where(both, want, 0.0))
    scale = float(size[size < SENTINEL].max(initial=0.0))
    excess = error - TOLERANCES[spec.dtype] * np.maximum(scale + size, TINY)
    if (excess > 0).any():
        raise _mismatch(spec, found, expected, case, np.unravel_index(int(excess.argmax()), error.shape))
    absolute = float(error.max(initial=0.0))
    relative = float((error / np.maximum(np.maximum(scale, size), TINY)).max(initial=0.0))
    return Difference(absolute=absolute, relative=relative, values_count=int(both.sum()))


def _mismatch(
    spec: TensorSpec,
    found: NDArray[Any],
    expected: NDArray[Any],
    case: Case,
    place: tuple[Any, ...],
) -> ParityError:
    index = [int(axis) for axis in place]
    return ParityError(
        f"output {spec.name!r} differs from the source at {case}, worst at index {index}",
        found=found[place],
        expected=f"{expected[place]} (within {TOLERANCES.get(spec.dtype, 0)} of the output's scale)",
    )


def _largest(items: list[Difference]) -> Difference:
    return Difference(
        absolute=max(item.absolute for item in items),
        relative=max(item.relative for item in items),
        values_count=sum(item.values_count for item in items),
    )


def _kind(array: NDArray[Any]) -> str:
    """Whether an array holds floats, integers, booleans or strings."""
    name = dtypes.name_from_numpy(array.dtype)
    if name in TOLERANCES:
        return "float"
    return {"i": "integer", "u": "integer", "b": "bool"}.get(array.dtype.kind, "string")


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Strings as UTF-8 bytes, everything else as it is."""
    if array.dtype.kind not in "OSU":
        return array
    texts = [item.encode() if isinstance(item, str) else bytes(item) for item in array.ravel().tolist()]
    plain = np.empty(len(texts), dtype=object)
    plain[:] = texts
    return plain.reshape(array.shape)
