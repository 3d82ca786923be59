"""A search on real digits: bounds that hold on the file, early stops, always a result, nothing made twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from digits_models import mlp_model, run, split_digits, write_artifact, write_samples
from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress import chain
from tritonsmith.compress.chain import Material
from tritonsmith.compress.search.goal import Progress, SearchGoal, check_goal
from tritonsmith.compress.search.outcome import SearchResult, trial_rows
from tritonsmith.compress.search.search import search
from tritonsmith.compress.steps import Cast, Quantize
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that a search is given."""

    material: Material
    evaluation: Samples
    store: Path

    def search(self, goal: SearchGoal, **changes: Any) -> SearchResult:
        return search(
            self.material.teacher, goal, self.material, self.evaluation, store=self.store, **changes
        )


def make_case(folder: Path) -> Case:
    digits = split_digits()
    teacher = write_artifact(mlp_model(), folder / "mlp.onnx")

    def samples(name: str, images: Any, labels: Any) -> Samples:
        return load_samples(write_samples(folder / name, images.reshape(-1, 64), labels), teacher.inputs)

    material = Material(
        teacher=teacher,
        calibration=samples("calibration.npz", digits.train_images[:300], None),
        tuning=samples("tuning.npz", digits.train_images[900:], digits.train_labels[900:]),
        metric=parse_metric("accuracy"),
    )
    evaluation = samples("evaluation.npz", digits.test_images, digits.test_labels)
    return Case(material=material, evaluation=evaluation, store=folder / "store")


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonsmith.measure.ROUNDS", 9)
    monkeypatch.setattr("tritonsmith.measure.ROUND_S", 0.001)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were really made, in order."""
    steps: list[str] = []
    apply = chain.apply_step

    def count(spec: Any, *arguments: Any, **options: Any) -> Artifact:
        steps.append(spec.kind)
        return apply(spec, *arguments, **options)

    monkeypatch.setattr(chain, "apply_step", count)
    return steps


def accuracy(path: Path) -> float:
    digits = split_digits()
    answers = run(onnx_model.load_model(path), digits.test_images.reshape(-1, 64))[0]
    return float((answers.argmax(axis=1) == digits.test_labels).mean())


def test_what_is_found_keeps_all_bounds_on_the_file(case: Case) -> None:
    whole = onnx_model.model_bytes(case.material.teacher.path)
    found = case.search(SearchGoal(max_drop=0.02, size_at_most_bytes=whole // 2))

    assert found.passed
    assert found.ended == "complete"
    assert found.best.artifact.path.stat().st_size <= whole // 2
    assert accuracy(case.material.teacher.path) - accuracy(found.best.artifact.path) <= 0.02
    report = found.best.evaluation
    assert report is not None
    assert report.samples == 597
    assert report.candidate == pytest.approx(accuracy(found.best.artifact.path), abs=0.002)
    assert found.artifacts[-1].path == found.best.artifact.path
    assert (found.missed, found.next_steps) == ((), ())
    rows = trial_rows(found.json())
    assert [row[1] for row in rows].count("chosen") == 1
    json.dumps(found.json())


def test_the_front_is_what_no_trial_beats(case: Case) -> None:
    found = case.search(SearchGoal(max_drop=0.02, max_candidates=3))
    axes = {
        trial.name: (trial.size_bytes, 1 / float(f"{trial.speed.ratio:.2g}"), trial.drop)
        for trial in found.trials
    }
    expected = {
        name
        for name, one in axes.items()
        if not any(other != one and all(a <= b for a, b in zip(other, one, strict=True))
                   for other in axes.values())
    }  # fmt: skip
    assert {trial.name for trial in found.front} == expected
    assert found.trials[0].name == "fp32"
    assert (found.trials[0].drop, found.trials[0].speed.ratio) == (0.0, 1.0)


def test_a_wider_budget_makes_only_what_is_new(case: Case, made: list[str]) -> None:
    narrow = case.search(SearchGoal(max_drop=0.01, max_candidates=2))
    assert narrow.ended.startswith("the 2 candidates allowed are used up")
    first = list(made)
    assert len(first) == 2

    wide = case.search(SearchGoal(max_drop=0.03, max_candidates=3))
    assert len(made) == 3
    assert [trial.name for trial in wide.trials[:3]] == [trial.name for trial in narrow.trials]
    assert wide.trials[1].speed == narrow.trials[1].speed  # measured once, too
    case.search(SearchGoal(max_drop=0.03, max_candidates=3))
    assert len(made) == 3


def test_where_nothing_passes_there_is_a_model_with_blame_and_a_next_step(case: Case) -> None:
    found = case.search(SearchGoal(max_drop=0.02, size_at_most_bytes=1500, epochs=1, max_candidates=5))

    assert not found.passed
    assert found.best.artifact.path.is_file()
    assert found.best.evaluation is not None
    assert found.looks == 1
    assert found.missed[0].startswith("size: ")
    assert sum(line.drop for line in found.blame) == pytest.approx(found.best.drop)
    assert [line.bytes_after for line in found.blame][-1] == found.best.size_bytes
    inside = [trial for trial in found.trials[1:] if trial.drop <= 0.02]
    smallest = min(trial.size_bytes for trial in inside)
    assert any(step.startswith(f"--size-at-most {smallest} ") for step in found.next_steps)
    assert any("5 candidates allowed are used up" in step for step in found.next_steps)
    assert any(step.startswith("training data (--training)") for step in found.next_steps)


def test_what_each_step_adds_makes_the_whole_drop(case: Case) -> None:
    found = case.search(SearchGoal(max_drop=0.9, size_at_most_bytes=2500, epochs=1))
    assert found.passed
    assert len(found.best.specs) == len(found.blame) == 2
    assert all(line.drop != 0 for line in found.blame)
    assert sum(line.drop for line in found.blame) == pytest.approx(found.best.drop)
    assert found.blame[0].bytes_after == found.blame[1].bytes_before
    assert [path.path for path in found.artifacts][-1] == found.best.artifact.path


def test_a_branch_ends_where_its_first_part_is_beyond_the_budget(case: Case, made: list[str]) -> None:
    found = case.search(SearchGoal(max_drop=0.005, size_at_most_bytes=1500, epochs=1))
    lossy = [
        trial
        for trial in found.trials
        if [spec.kind for spec in trial.specs] == ["prune"] and (trial.tuning.ci95_low or 0.0) > 0.005
    ]
    assert lossy
    ended = {skip.name for skip in found.skipped if "beyond the budget for certain" in skip.reason}
    for trial in lossy:
        assert any(name.startswith(f"{trial.name} | quantize") for name in ended)
    tried = {trial.name for trial in found.trials}
    assert not ended & tried


def test_a_step_that_fails_is_listed_and_the_search_goes_on(case: Case) -> None:
    assert case.material.calibration is not None
    same = {"image": np.repeat(case.material.calibration.arrays["image"][:1], 50, axis=0)}
    broken = replace(case.material.calibration, arrays=same, sha256="same")
    worse = replace(case, material=replace(case.material, calibration=broken))
    found = worse.search(SearchGoal(max_drop=0.02, max_candidates=3))

    failed = {skip.name: skip.reason for skip in found.skipped if skip.failed}
    assert "all the same" in failed["quantize method=static"]
    assert found.passed
    assert {trial.specs for trial in found.trials} >= {(Cast(),)}


def test_ctrl_c_judges_what_was_found_and_the_next_call_goes_on(case: Case, made: list[str]) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.state == "measured":
            raise KeyboardInterrupt

    found = case.search(SearchGoal(max_drop=0.02), show=interrupt)
    assert found.ended == "interrupted"
    assert [trial.specs for trial in found.trials] == [(), (Quantize(method="static"),)]
    assert found.passed
    assert found.best.evaluation is not None

    made.clear()
    more = case.search(SearchGoal(max_drop=0.02, max_candidates=2))
    assert made == [more.trials[2].specs[0].kind]


def test_a_search_that_was_killed_goes_on_from_its_store(tmp_path: Path, made: list[str]) -> None:
    script = (
        "import sys; from pathlib import Path; import tritonsmith.measure as measure;"
        "measure.ROUNDS, measure.ROUND_S = 9, 0.001;"
        "from test_search import make_case, SearchGoal;"
        "case = make_case(Path(sys.argv[1]));"
        "case.search(SearchGoal(max_drop=0.02), say=lambda line: print(line, flush=True))"
    )
    here = Path(__file__).parent
    helpers = here.parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, helpers)))},
    )
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            if line.startswith("candidate 2 of"):
                child.send_signal(signal.SIGKILL)
                break
    assert child.wait() == -signal.SIGKILL

    case = make_case(tmp_path)
    found = case.search(SearchGoal(max_drop=0.02, max_candidates=2))
    assert made == [found.trials[2].specs[0].kind]  # of the second alone
    assert found.trials[1].specs == (Quantize(method="static"),)


def test_choices_do_not_depend_on_the_evaluation_data(case: Case) -> None:
    goal = SearchGoal(max_drop=0.02, max_candidates=2)
    found = case.search(goal)
    labels = case.evaluation.target
    assert labels is not None
    shifted = replace(case.evaluation, target=(labels + 1) % 10, sha256="shifted")
    again = replace(case, evaluation=shifted).search(goal)
    assert [trial.tuning for trial in again.trials] == [trial.tuning for trial in found.trials]
    assert again.best.specs == found.best.specs
    assert again.best.evaluation is not None
    assert again.best.evaluation.baseline < 0.2  # the shifted labels were really used, to judge


def test_the_next_best_is_judged_where_the_evaluation_data_refuse_the_best(case: Case) -> None:
    goal = SearchGoal(max_drop=0.02, max_candidates=3)
    found = case.search(goal)
    teacher, best = case.material.teacher.path, found.best.artifact.path
    noise = np.random.default_rng(0).normal(0, 0.15, (4000, 64)).astype(np.float32)
    images = np.resize(split_digits().test_images.reshape(-1, 64), noise.shape) + noise
    answers = [run(onnx_model.load_model(path), images)[0].argmax(axis=1) for path in (teacher, best)]
    differ = answers[0] != answers[1]
    assert differ.sum() >= 5
    hard = replace(
        case.evaluation, arrays={"image": images[differ]}, target=answers[0][differ], sha256="hard"
    )

    again = replace(case, evaluation=hard).search(goal)
    assert again.looks > 1
    assert again.best.specs != found.best.specs
    refused = next(trial for trial in again.trials if trial.specs == found.best.specs)
    assert refused.evaluation is not None
    assert refused.evaluation.drop == 1.0
    assert next(row for row in trial_rows(again.json()) if row[2] == refused.name)[-1] == "drop"


def test_no_candidate_is_begun_after_the_time_allowed(case: Case, made: list[str]) -> None:
    found = case.search(SearchGoal(max_drop=0.02, budget_s=1e-6))
    assert found.ended.startswith("the 1e-06 seconds allowed are used up")
    assert made == []
    assert (found.best.name, found.passed) == ("fp32", True)


def test_data_in_two_roles_are_refused(case: Case) -> None:
    tuning = case.material.tuning
    assert tuning is not None
    with pytest.raises(SamplesError, match=r"the tuning file .* shares samples with the evaluation data"):
        replace(case, evaluation=replace(tuning, sha256="again")).search(SearchGoal(max_drop=0.02))


def test_progress_tells_where_the_search_stands(case: Case) -> None:
    shown: list[Progress] = []
    case.search(SearchGoal(max_drop=0.02, max_candidates=2), show=shown.append)
    assert [(one.number, one.state) for one in shown if one.state in ("making", "measured")] == [
        (1, "making"), (1, "measured"), (2, "making"), (2, "measured"),
    ]  # fmt: skip
    assert shown[-1].state == "judging"
    assert {one.at_most for one in shown} == {2}
    assert [len(one.trials) for one in shown] == sorted(len(one.trials) for one in shown)
    assert shown[-1].passes
    assert shown[-1].best is not None


@pytest.mark.parametrize("change", [
    {"max_drop": -0.1}, {"max_drop": float("nan")}, {"size_at_most_bytes": 0}, {"speed_at_least": -1.0},
    {"max_candidates": 0}, {"budget_s": 0.0}, {"epochs": 0},
])  # fmt: skip
def test_bounds_that_make_no_sense_are_wrong_usage(change: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        check_goal(replace(SearchGoal(max_drop=0.01), **change))


def test_a_search_without_a_metric_is_wrong_usage(case: Case) -> None:
    without = replace(case, material=replace(case.material, metric=None))
    with pytest.raises(UsageError, match="needs a metric"):
        without.search(SearchGoal(max_drop=0.02))
