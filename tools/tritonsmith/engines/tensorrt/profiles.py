"""Optimization profiles: the range of every free axis, and the length that kernels are chosen for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tritonsmith.artifact import BATCH_AXIS, TensorSpec
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import PlanError

Shape = tuple[int, ...]


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
                    fix=f"give its smallest, usual and largest length in the recipe's target, "
                    f"or samples or traffic to take them from (axis {axis!r} is in {_users(axis, inputs)})",
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
