"""Tuning data: what a search chooses on, so that the evaluation data judge what was chosen without bias.

Where none are given, part of what the model would be fitted to is held back: of the training data, else of
the calibration data. A sample goes to one side or the other by its content, so equal samples stay together
and a second search holds back the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tritonsmith.compress.calibration import row_hashes
from tritonsmith.compress.chain import Material
from tritonsmith.errors import SamplesError
from tritonsmith.metrics import Metric
from tritonsmith.samples import Samples

SHARE = 0.2
MOST_SAMPLES = 2000
FEWEST_SAMPLES = 32

Say = Callable[[str], None]


def with_tuning(material: Material, metric: Metric, *, say: Say = lambda _: None) -> Material:
    """The material with tuning data: those given, or a fifth held back of the rest, at most 2,000 samples.

    Samples that are held back leave the training and the calibration data.

    Raises:
        SamplesError: nothing fits, or too little, with what to give.
    """
    if material.tuning is not None:
        _refuse_unlabelled(material.tuning, metric)
        return material
    role, given = _source_of(material, metric)
    hashes = np.array(row_hashes(given), dtype="S16")
    order = sorted(set(hashes.tolist()))
    wanted = set(order[: min(MOST_SAMPLES, round(SHARE * len(order)))])
    held = np.array([row in wanted for row in hashes.tolist()])
    if int(held.sum()) < FEWEST_SAMPLES:
        raise SamplesError(
            f"{given.path} has too few samples to hold some back to choose on",
            found=f"{given.count} samples, of which {SHARE:.0%} would be held back",
            expected=f"tuning data, or at least {round(FEWEST_SAMPLES / SHARE)} different samples",
            fix="give tuning data with --tuning, apart from the evaluation data",
        )
    say(f"choosing on {int(held.sum())} of the {given.count} samples of {given.path.name}, held back")
    return replace(
        material,
        tuning=_rows(given, held, "tuning"),
        training=_rows(given, ~held, "rest") if role == "training" else _without(material.training, wanted),
        calibration=_rows(given, ~held, "rest")
        if role == "calibration"
        else _without(material.calibration, wanted),
    )


def _source_of(material: Material, metric: Metric) -> tuple[str, Samples]:
    for role, samples in (("training", material.training), ("calibration", material.calibration)):
        if samples is not None and (samples.target is not None or not metric.needs_target):
            return role, samples
    given = [
        f"{role} data without labels"
        for role, samples in (("training", material.training), ("calibration", material.calibration))
        if samples is not None
    ]
    labels = " with labels" if metric.needs_target else ""
    fix = f"give --tuning, or --training{labels}, of which a part is held back"
    if metric.needs_target:
        fix += "; or choose by a metric that needs no labels, such as cosine"
    raise SamplesError(
        f"a search has nothing to choose on by {metric.text}",
        found=" and ".join(given) or "neither tuning, training nor calibration data",
        expected=f"samples{labels} apart from the evaluation data, which judge what was chosen",
        fix=fix,
    )


def _refuse_unlabelled(tuning: Samples, metric: Metric) -> None:
    if metric.needs_target and tuning.target is None:
        raise SamplesError(
            f"{tuning.path} has no labels, and {metric.text} needs them",
            expected="an array named 'target'",
            fix="or choose by a metric that needs no labels, such as cosine",
        )


def _without(samples: Samples | None, rows: set[bytes]) -> Samples | None:
    if samples is None:
        return None
    stays = np.array([row not in rows for row in row_hashes(samples)])
    if stays.all():
        return samples
    return _rows(samples, stays, "rest") if stays.any() else None


def _rows(samples: Samples, mask: NDArray[np.bool_], part: str) -> Samples:
    """These rows; their hash names the file, the part and the rows."""
    digest = hashlib.sha256(f"{samples.sha256} {part} ".encode() + np.packbits(mask).tobytes())
    return Samples(
        path=samples.path,
        sha256=digest.hexdigest(),
        arrays={name: array[mask] for name, array in samples.arrays.items()},
        target=None if samples.target is None else samples.target[mask],
    )
