"""The metrics against values worked out by hand or by scikit-learn, and what the gate makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from digits_models import mlp_model, split_digits, write_artifact, write_samples
from tritonsmith.engines import open_session
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.gate import GateReport, judge, predict
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import load_samples

Array = NDArray[Any]


def probabilities(predicted: list[int], classes: int = 3) -> dict[str, Array]:
    return {"p": np.eye(classes, dtype=np.float32)[predicted]}


def gate(
    metric: str,
    baseline: dict[str, Array],
    candidate: dict[str, Array],
    target: object = None,
    max_drop: float | None = 0.1,
) -> GateReport:
    labels = None if target is None else np.asarray(target)
    return judge(
        parse_metric(metric), baseline=baseline, candidate=candidate, target=labels, max_drop=max_drop
    )


def test_accuracy_and_its_worst_class() -> None:
    report = gate(
        "accuracy",
        probabilities([0, 0, 1, 1, 2, 2, 2, 2]),
        probabilities([0, 0, 1, 0, 2, 2, 2, 1]),
        [0, 0, 1, 1, 2, 2, 2, 2],
        max_drop=0.3,
    )
    assert (report.baseline, report.candidate, report.drop) == (1.0, 0.75, 0.25)
    assert report.passed
    worst = report.worst_class
    assert worst is not None
    assert (worst.label, worst.samples, worst.baseline, worst.candidate) == ("1", 2, 1.0, 0.5)


def test_one_hot_labels_and_columns_are_labels_too() -> None:
    outputs = probabilities([0, 1, 2, 1])
    for target in ([0, 1, 2, 2], [[0], [1], [2], [2]], np.eye(3)[[0, 1, 2, 2]], [0.0, 1.0, 2.0, 2.0]):
        assert gate("accuracy", outputs, outputs, target).candidate == 0.75


def test_top5_counts_the_five_most_likely() -> None:
    scores = np.tile(np.arange(7, dtype=np.float32), (3, 1))  # class 6 first, then 5, 4, 3, 2
    report = gate("top5", {"p": scores}, {"p": scores}, [6, 2, 1])
    assert report.candidate == pytest.approx(2 / 3)


def test_f1_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, 200)
    before = np.where(rng.uniform(size=200) < 0.9, target, rng.integers(0, 4, 200))
    after = np.where(rng.uniform(size=200) < 0.7, target, rng.integers(0, 4, 200))
    report = gate("f1", probabilities(list(before), 4), probabilities(list(after), 4), target)
    assert report.baseline == pytest.approx(f1_score(target, before, average="macro"))
    assert report.candidate == pytest.approx(f1_score(target, after, average="macro"))
    assert report.ci95_low is not None
    assert report.ci95_high is not None
    assert report.ci95_low < report.drop < report.ci95_high


def test_lower_is_better_for_errors() -> None:
    target = np.zeros((4, 2))
    before, after = {"y": np.full((4, 2), 0.1)}, {"y": np.full((4, 2), 0.3)}
    report = gate("mae", before, after, target)
    assert (report.baseline, report.candidate) == (pytest.approx(0.1), pytest.approx(0.3))
    assert report.drop == pytest.approx(0.2)
    assert not report.passed
    assert gate("mae", after, before, target).drop == pytest.approx(-0.2)
    assert gate("mse", before, after, target).drop == pytest.approx(0.08)


def test_a_column_of_outputs_is_scored_against_a_row_of_targets() -> None:
    outputs = {"y": np.array([[1.0], [2.0]])}
    assert gate("mae", outputs, outputs, [1.5, 2.5]).candidate == 0.5


def test_cosine_and_largest_error_need_no_labels_and_take_the_worst_output() -> None:
    before = {"a": np.array([[1.0, 0.0], [1.0, 0.0]]), "b": np.array([[1.0, 1.0], [1.0, 1.0]])}
    after = {"a": np.array([[2.0, 0.0], [1.0, 1.0]]), "b": np.array([[1.0, 1.0], [1.0, 1.5]])}
    cosine = gate("cosine", before, after, max_drop=0.5)
    assert cosine.baseline == 1.0
    assert cosine.candidate == pytest.approx((1 + math.sqrt(0.5)) / 2)
    largest = gate("max-abs-error", before, after, max_drop=2)
    assert (largest.baseline, largest.candidate, largest.drop) == (0.0, 1.0, 1.0)
    assert gate("max-abs-error@b", before, after, max_drop=2).candidate == 0.5


def test_the_interval_is_that_of_a_paired_difference() -> None:
    """1,000 samples, 20 lost: drop 0.02, standard error sqrt(0.02 * 0.98 / 1000) = 0.00443."""
    target = np.zeros(1000, np.int64)
    after = np.zeros(1000, np.int64)
    after[:20] = 1
    report = gate("accuracy", probabilities([0] * 1000), probabilities(list(after)), target, max_drop=0.025)
    assert report.drop == pytest.approx(0.02)
    assert report.ci95_low == pytest.approx(0.02 - 1.96 * 0.00443, abs=0.0012)
    assert report.ci95_high == pytest.approx(0.02 + 1.96 * 0.00443, abs=0.0012)
    again = gate("accuracy", probabilities([0] * 1000), probabilities(list(after)), target, max_drop=0.025)
    assert again == report


def test_samples_stay_paired() -> None:
    """Errors that differ a lot between samples, each 0.1 larger: the drop is 0.1 without any doubt."""
    before = {"y": np.random.default_rng(0).uniform(0, 100, size=(200, 1)).round(1)}
    after = {"y": before["y"] + 0.1}
    report = gate("mae", before, after, np.zeros((200, 1)))
    assert (report.ci95_low, report.ci95_high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_drop_within_the_budget_passes_but_may_not_be_certain() -> None:
    target = np.zeros(100, np.int64)
    after = np.zeros(100, np.int64)
    after[0] = 1
    report = gate("accuracy", probabilities([0] * 100), probabilities(list(after)), target, max_drop=0.01)
    assert report.passed
    assert not report.certain
    assert "not certain with 100 samples" in report.reason
    wide = gate("accuracy", probabilities([0] * 100), probabilities(list(after)), target, max_drop=0.1)
    assert wide.certain


def test_nan_never_passes_and_the_report_is_still_json() -> None:
    before, after = probabilities([0, 1, 2]), probabilities([0, 1, 2])
    after["p"][1, 0] = np.nan
    report = gate("accuracy", before, after, [0, 1, 2])
    assert not report.passed
    assert report.reason == "output 'p' is NaN or infinite for 1 of 3 samples"
    assert json.loads(json.dumps(report.json(), allow_nan=False))["candidate"] is None


def test_a_baseline_of_nan_is_no_baseline() -> None:
    broken = {"p": np.full((2, 3), np.nan, np.float32)}
    report = gate("accuracy", broken, probabilities([0, 1]), [0, 1])
    assert not report.passed
    assert "in the baseline, output 'p' is NaN" in report.reason


def test_without_a_budget_the_metric_is_recorded() -> None:
    outputs = probabilities([0, 1])
    report = gate("accuracy", outputs, outputs, [0, 0], max_drop=None)
    assert report.passed
    assert (report.candidate, report.certain, report.reason) == (0.5, False, "recorded without a budget")


def test_the_scored_output_is_the_one_that_fits_the_labels() -> None:
    outputs = {"embedding": np.zeros((2, 2, 4), np.float32), **probabilities([0, 1])}
    assert gate("accuracy", outputs, outputs, [0, 1]).candidate == 1.0
    outputs["other"] = outputs["p"][:, ::-1]
    with pytest.raises(UsageError, match="which output does accuracy score") as caught:
        gate("accuracy", outputs, outputs, [0, 1])
    assert "--metric accuracy@" in str(caught.value)
    assert gate("accuracy@other", outputs, outputs, [0, 1]).candidate == 0.5
    with pytest.raises(UsageError, match="no output 'nowhere'"):
        gate("accuracy@nowhere", outputs, outputs, [0, 1])


@pytest.mark.parametrize(("output", "correct"), [([0.2, 0.7, 0.5], [0, 1, 1]), ([-2.0, 3.0, 0.1], [0, 1, 1])])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_number_per_sample_is_a_threshold(
    output: list[float], correct: list[int], shape: tuple[int, ...]
) -> None:
    outputs = {"p": np.array(output, np.float32).reshape(shape)}
    assert gate("accuracy", outputs, outputs, correct).candidate == 1.0


def test_tokens_are_scored_one_by_one_and_counted_by_sample() -> None:
    outputs = {"p": np.eye(3, dtype=np.float32)[[[0, 1], [2, 2]]]}  # [2, 2, 3]
    report = gate("accuracy", outputs, outputs, [[0, 1], [2, 0]])
    assert report.candidate == 0.75
    assert report.samples == 2


def test_two_classes_in_every_pixel_are_scored_by_pixel() -> None:
    outputs = {"mask": np.array([[[0.2], [0.9]], [[0.7], [0.1]]], np.float32)}
    assert gate("accuracy", outputs, outputs, [[0, 1], [1, 1]]).candidate == 0.75


def test_a_column_of_strings_is_scored_against_a_column() -> None:
    outputs = {"label": np.array([[b"cat"], [b"dog"], [b"dog"]], dtype=object)}
    for target in (["cat", "dog", "cat"], [["cat"], ["dog"], ["cat"]]):
        assert gate("accuracy", outputs, outputs, target).candidate == pytest.approx(2 / 3)
    rows = {"label": np.array([[b"a", b"b"], [b"c", b"d"]], dtype=object)}
    assert gate("accuracy", rows, rows, [["a", "b"], ["c", "x"]]).candidate == 0.75


def test_classes_named_by_strings() -> None:
    outputs = {"label": np.array([b"cat", b"dog", b"dog"], dtype=object)}
    assert gate("accuracy", outputs, outputs, ["cat", "dog", "cat"]).candidate == pytest.approx(2 / 3)
    assert gate("f1", outputs, outputs, ["cat", "dog", "cat"]).candidate == pytest.approx(
        f1_score(["cat", "dog", "cat"], ["cat", "dog", "dog"], average="macro")
    )


@pytest.mark.parametrize(
    ("metric", "target", "what"),
    [
        ("accuracy", [[0, 1], [1, 0]], "the labels do not fit output 'p'"),
        ("accuracy", [0.5, 1.0], "the labels are not classes"),
        ("accuracy", [0, 3], "a label is no class of output 'p'"),
        ("accuracy", [-1, 0], "a label is no class of output 'p'"),
        ("accuracy", ["a", "b"], "the labels do not fit output 'p'"),
        ("mae", [1.0, 2.0], "the labels do not fit output 'p'"),
        ("top5", [0, 1], "top5 needs more than 5 classes"),
        ("accuracy", None, "the metric accuracy needs labels"),
    ],
)
def test_labels_that_do_not_fit_are_named(metric: str, target: object, what: str) -> None:
    outputs = probabilities([0, 1])
    with pytest.raises(SamplesError, match=what):
        gate(metric, outputs, outputs, target)


@pytest.mark.parametrize(
    ("metric", "max_drop", "what"),
    [
        ("accuracy", 1.0, "would let everything pass"),
        ("accuracy", -0.1, "is no budget"),
        ("accuracy", math.nan, "is no budget"),
        ("cosine", 5.0, "would let everything pass"),
    ],
)
def test_a_budget_that_is_none_is_wrong_usage(metric: str, max_drop: float, what: str) -> None:
    outputs = probabilities([0, 1])
    with pytest.raises(UsageError, match=what):
        gate(metric, outputs, outputs, [0, 1], max_drop=max_drop)


FUNCTIONS = """
import numpy as np

def per_sample(outputs, target):
    return -np.abs(outputs["y"][:, 0] - target)

def cost(outputs, target):
    return float(np.abs(outputs["y"][:, 0] - target).sum())

cost.higher_is_better = False

def wrong(outputs, target):
    return np.zeros(7)

def broken(outputs, target):
    raise KeyError("no such thing")
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_metrics_for_the_gate.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    return "my_metrics_for_the_gate"


def test_a_function_of_the_user_scores_samples_or_everything(functions: str) -> None:
    before, after = {"y": np.zeros((3, 1))}, {"y": np.full((3, 1), 0.5)}
    scored = gate(f"{functions}:per_sample", before, after, [0.0, 0.0, 0.0])
    assert (scored.drop, scored.passed) == (0.5, False)
    assert scored.ci95_high == 0.5
    whole = gate(f"{functions}:cost", before, after, [0.0, 0.0, 0.0], max_drop=2)
    assert (whole.drop, whole.higher_is_better, whole.passed) == (1.5, False, True)
    assert whole.ci95_high is None


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("wrong", "gave an array of another length"),
        ("broken", "failed"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_function_that_does_not_work_is_named(functions: str, name: str, what: str) -> None:
    outputs = {"y": np.zeros((3, 1))}
    with pytest.raises(UsageError, match=what):
        gate(f"{functions}:{name}", outputs, outputs, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("text", ["recall", "no.such.module:f", "not a module:f", ""])
def test_an_unknown_metric_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError):
        parse_metric(text)


def test_predictions_in_batches_are_those_of_one_batch(tmp_path: Path) -> None:
    digits = split_digits()
    artifact = write_artifact(mlp_model(), tmp_path / "mlp.onnx")
    images = digits.test_images[:20].reshape(-1, 64)
    samples = load_samples(
        write_samples(tmp_path / "samples.npz", images, digits.test_labels[:20]), artifact.inputs
    )
    session = open_session(artifact.path)
    found = predict(session, samples, batched=True, batch_size=8)["probabilities"]
    np.testing.assert_allclose(found, session.run({"image": images})["probabilities"], rtol=1e-5, atol=1e-7)


def test_the_mean_of_many_different_samples_has_the_interval_of_the_normal_law() -> None:
    rng = np.random.default_rng(0)
    before = {"y": np.zeros((5_000, 1))}
    after = {"y": rng.exponential(0.1, size=(5_000, 1))}
    report = gate("mae", before, after, before["y"])
    assert report.ci95_low is not None
    assert report.ci95_high is not None
    half_width = 1.96 * after["y"].std() / math.sqrt(5_000)
    assert report.ci95_high - report.ci95_low == pytest.approx(2 * half_width, rel=0.1)


def test_recall10_counts_the_neighbours_that_are_kept() -> None:
    random = np.random.default_rng(3)
    before = random.normal(size=(1100, 16))  # more than one block of queries
    after = before + 0.1 * random.normal(size=before.shape)

    def nearest(rows: Array) -> list[set[int]]:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        order = np.argsort(-(unit @ unit.T), axis=1, kind="stable")
        return [set(line[line != index][:10].tolist()) for index, line in enumerate(order)]

    expected = np.mean([len(a & b) / 10 for a, b in zip(nearest(before), nearest(after), strict=True)])
    report = judge(
        parse_metric("recall10"),
        baseline={"embedding": before},
        candidate={"embedding": after},
        target=None,
        max_drop=0.5,
    )
    assert report.baseline == 1.0
    assert report.candidate == pytest.approx(expected, abs=1e-12)
    assert 0.5 < report.candidate < 0.99
    assert report.ci95_low is not None
    assert report.ci95_low < report.drop < (report.ci95_high or 0)


def test_recall10_needs_more_than_ten_samples() -> None:
    outputs = {"embedding": np.eye(10)}
    with pytest.raises(SamplesError, match="more than 10"):
        judge(parse_metric("recall10"), baseline=outputs, candidate=outputs, target=None, max_drop=None)
