"""Optimization profiles: the range of every free axis, and the length that kernels are chosen for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tritonsmith.artifact import BATCH_AXIS, Json, TensorSpec
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import PlanError

Shape = tuple[int, ...]

MODE_SHARE = 0.2


def free_axes(inputs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """The names of the free axes of these inputs, the batch axis first, each once."""
    names = {axis: None for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    return tuple(sorted(names, key=lambda axis: axis != BATCH_AXIS))


def default_profile(
    inputs: Sequence[TensorSpec], max_batch_size: int, *, ranges: Mapping[str, AxisRange] | None = None
) -> Profile:
    """One profile: batches from 1 to the largest, tuned for the largest; `ranges` for every other free axis.

    Raises:
        PlanError: a free axis without a range, by its name.
    """
    axes = dict(ranges or {})
    if max_batch_size > 0 and BATCH_AXIS in free_axes(inputs):
        axes.setdefault(BATCH_AXIS, AxisRange(minimum=1, best=max_batch_size, maximum=max_batch_size))
    profile = Profile(axes={axis: axes[axis] for axis in free_axes(inputs) if axis in axes})
    check_profiles((profile,), inputs, max_batch_size)
    return profile


def filled_profiles(options: PlanOptions, inputs: Sequence[TensorSpec], max_batch_size: int) -> PlanOptions:
    """`options` with every profile complete: the default one where none is, the batch axis where left out.

    Raises:
        PlanError: as `check_profiles`.
    """
    if options.profiles:
        unknown = {axis for profile in options.profiles for axis in profile.axes} - set(free_axes(inputs))
        if unknown:
            raise PlanError(
                f"a profile has a range for {', '.join(map(repr, sorted(unknown)))}",
                expected=f"the model's free axes: {', '.join(free_axes(inputs)) or 'it has none'}",
            )
        profiles = tuple(
            default_profile(inputs, max_batch_size, ranges=profile.axes) for profile in options.profiles
        )
    elif free_axes(inputs):
        profiles = (default_profile(inputs, max_batch_size),)
    else:
        profiles = ()
    check_profiles(profiles, inputs, max_batch_size)
    return replace(options, profiles=profiles)


def check_profiles(profiles: Sequence[Profile], inputs: Sequence[TensorSpec], max_batch_size: int) -> None:
    """Every free axis has a range in every profile, minimum <= best <= maximum, and Triton's batches fit.

    Triton sends batches of 1 to `max_batch_size`, and to an instance of any profile: each takes all of them.

    Raises:
        PlanError: the first thing that is wrong, with the axis.
    """
    axes = free_axes(inputs)
    if axes and not profiles:
        raise PlanError("the model has free axes but no optimization profile", found=", ".join(axes))
    for number, profile in enumerate(profiles):
        for axis in axes:
            if axis not in profile.axes:
                raise PlanError(
                    f"profile {number} has no range for the free axis {axis!r}",
                    fix=f"write [[target.<name>.profile]] into the recipe, with {axis} = [smallest, usual, "
                    f"largest] (the axis is one of {_users(axis, inputs)})",
                )
        for axis, lengths in profile.axes.items():
            if axis not in axes:
                raise PlanError(
                    f"profile {number} has a range for {axis!r}",
                    expected=f"the model's free axes: {', '.join(axes) or 'it has none'}",
                )
            if not 0 < lengths.minimum <= lengths.best <= lengths.maximum:
                raise PlanError(
                    f"profile {number} has an impossible range for the axis {axis!r}",
                    found=f"minimum {lengths.minimum}, best {lengths.best}, maximum {lengths.maximum}",
                    expected="1 <= minimum <= best <= maximum",
                )
        if BATCH_AXIS in axes and max_batch_size > 0:
            _check_batch(number, profile.axes[BATCH_AXIS], max_batch_size)


def shapes_from_profile(profile: Profile, spec: TensorSpec) -> tuple[Shape, Shape, Shape]:
    """The smallest, best and largest shape of an input, batch axis included."""
    smallest = tuple(profile.axes[axis].minimum if isinstance(axis, str) else axis for axis in spec.shape)
    best = tuple(profile.axes[axis].best if isinstance(axis, str) else axis for axis in spec.shape)
    largest = tuple(profile.axes[axis].maximum if isinstance(axis, str) else axis for axis in spec.shape)
    return smallest, best, largest


def _check_batch(number: int, batch: AxisRange, max_batch_size: int) -> None:
    if batch.minimum != 1:
        raise PlanError(
            f"profile {number} does not take a batch of 1",
            found=f"minimum {batch.minimum}",
            expected="minimum 1: Triton sends single requests",
        )
    if batch.maximum < max_batch_size:
        raise PlanError(
            f"profile {number} does not take the largest batch",
            found=f"maximum {batch.maximum}",
            expected=f"max_batch_size {max_batch_size} or more",
        )


def _users(axis: str, inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in inputs if axis in spec.shape)


def profiles_from_traffic(
    statistics: Json,
    inputs: Sequence[TensorSpec],
    max_batch_size: int,
    *,
    model: str | None = None,
    ranges: Mapping[str, AxisRange] | None = None,
) -> tuple[Profile, ...]:
    """Profiles for what a model was really sent: one for each batch size that its traffic gathers around.

    `statistics` is Triton's answer to `GET /v2/models/<model>/stats`. A profile takes every batch from 1 to
    the largest and is tuned for the size that carries the most samples; there are several where traffic
    has several modes (`batch_modes`), the busiest first, which is the one that Triton takes by default.
    `ranges` are those of the other free axes, from the recipe.

    Raises:
        PlanError: no statistics of this model, no execution in them, or an axis without a range.
    """
    if max_batch_size < 1 or BATCH_AXIS not in free_axes(inputs):
        raise PlanError("traffic shapes batches, and this model has no batch axis")
    samples: Counter[int] = Counter()
    for size, count in executions_from_statistics(statistics, model).items():
        samples[min(size, max_batch_size)] += size * count  # larger ones will come in several batches
    profiles = tuple(
        default_profile(
            inputs,
            max_batch_size,
            ranges={**(ranges or {}), BATCH_AXIS: AxisRange(minimum=1, best=best, maximum=max_batch_size)},
        )
        for best in batch_modes(samples)
    )
    check_profiles(profiles, inputs, max_batch_size)
    return profiles


def executions_from_statistics(statistics: Json, model: str | None = None) -> dict[int, int]:
    """Batch size -> how many executions had it, over all versions of a model, from Triton's `batch_stats`.

    Raises:
        PlanError: no statistics of this model, or no execution in them.
    """
    entries = statistics.get("model_stats") if isinstance(statistics, Mapping) else None
    if not isinstance(entries, list):
        raise PlanError(
            "not Triton's statistics of a model",
            expected="the answer to GET /v2/models/<model>/stats, with the key model_stats",
        )
    named = [entry for entry in entries if model is None or entry.get("name") == model]
    if len({entry.get("name") for entry in named}) != 1:
        raise PlanError(
            f"no statistics of the model {model!r}"
            if model
            else "statistics of more than one model, or of none",
            found=", ".join(sorted({str(entry.get("name")) for entry in entries})) or "no model",
        )
    executions: Counter[int] = Counter()
    for batch in (batch for entry in named for batch in entry.get("batch_stats", ())):
        executions[int(batch["batch_size"])] += int(batch["compute_infer"]["count"])  # gRPC gives texts
    if not (seen := {size: count for size, count in executions.items() if size > 0 and count > 0}):
        raise PlanError(
            f"the statistics of {named[0].get('name')!r} hold no execution",
            fix="save them from a server that has served for a while",
        )
    return seen


def batch_modes(samples: Mapping[int, int]) -> tuple[int, ...]:
    """The batch sizes that traffic gathers around, the busiest first, from batch size -> samples.

    Sizes are binned by powers of two (1, 2, 3-4, 5-8, ...). A mode is a bin that no neighbour exceeds and
    that holds at least 20 % of all samples; of two, the smaller counts only where a bin between them holds
    less than half of it. Its size is the one in the bin that carries the most samples.
    """
    bins: Counter[int] = Counter()
    for size, count in samples.items():
        bins[(size - 1).bit_length()] += count
    peaks = [
        place
        for place, count in sorted(bins.items(), key=lambda item: (-item[1], -item[0]))
        if count >= max(MODE_SHARE * bins.total(), bins[place - 1], bins[place + 1])
    ]
    kept: list[int] = []
    for place in peaks or [max(bins, key=lambda place: bins[place])]:
        between = [range(min(place, other) + 1, max(place, other)) for other in kept]
        if all(any(2 * bins[gap] < bins[place] for gap in gaps) for gaps in between):
            kept.append(place)
    return tuple(
        max(
            (size for size in samples if (size - 1).bit_length() == place),
            key=lambda size: (samples[size], size),
        )
        for place in kept
    )
