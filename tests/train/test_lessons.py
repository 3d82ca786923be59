"""Losses against their formulas in numpy, and padded rows: what lies behind the mask must count nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from digits_models import write_artifact
from onnx_models import model_from_text
from tritonsmith.compress.chain import Material
from tritonsmith.compress.steps import Trained
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.metrics import parse_metric
from tritonsmith.samples import Samples, load_samples
from tritonsmith.train.answers import Questions, collect_answers, pooled_name
from tritonsmith.train.data import find_padding, read_batch
from tritonsmith.train.lessons import pair_states, plan_lessons
from tritonsmith.train.loop import train
from tritonsmith.train.losses import (
    embedding_loss,
    hidden_loss,
    label_loss,
    logits_loss,
    masked_mean,
    pool,
    value_loss,
)
from tritonsmith.train.module import OnnxModule

Array = NDArray[Any]

RANDOM = np.random.default_rng(11)
ROWS = 5


def tensor(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.normal(size=shape).astype(np.float32))


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def test_label_losses_are_cross_entropies() -> None:
    logits, labels = tensor(ROWS, 3), torch.tensor([0, 2, 1, 1, 0])
    chances = softmax(logits.numpy())
    expected = -np.log(chances[range(ROWS), labels]).mean()

    from_logits = label_loss(logits, labels, probabilities=False, mask=None)
    from_chances = label_loss(torch.from_numpy(chances), labels, probabilities=True, mask=None)

    assert from_logits.item() == pytest.approx(expected, rel=1e-5)
    assert from_chances.item() == pytest.approx(expected, rel=1e-5)


def test_one_number_a_row_is_two_classes() -> None:
    logit, labels = tensor(ROWS, 1), torch.tensor([0, 1, 1, 0, 1])
    chance = 1 / (1 + np.exp(-logit.numpy()[:, 0]))
    expected = -np.where(labels, np.log(chance), np.log(1 - chance)).mean()

    assert label_loss(logit, labels, probabilities=False, mask=None).item() == pytest.approx(
        expected, rel=1e-5
    )
    sigmoid = torch.sigmoid(logit)
    assert label_loss(sigmoid, labels, probabilities=True, mask=None).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_probabilities_are_compared_by_kl_at_a_temperature() -> None:
    ours, theirs = tensor(ROWS, 4).numpy(), tensor(ROWS, 4).numpy()
    p, q = softmax(theirs / 3.0), softmax(ours / 3.0)
    expected = 9.0 * (p * np.log(p / q)).sum(-1).mean()

    found = logits_loss(
        torch.from_numpy(softmax(ours)),
        torch.from_numpy(softmax(theirs)),
        probabilities=True,
        temperature=3.0,
        mask=None,
    )

    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_probability_of_zero_is_no_infinity() -> None:
    output = torch.tensor([[1.0, 0.0]], requires_grad=True)
    answer = torch.tensor([[0.0, 1.0]])

    loss = logits_loss(output, answer, probabilities=True, temperature=2.0, mask=None)
    loss.backward()  # type: ignore[no-untyped-call]

    assert torch.isfinite(loss)
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


def test_other_losses_are_means_of_squares_and_cosines() -> None:
    ours, theirs = tensor(ROWS, 4), tensor(ROWS, 4)
    a, b = ours.numpy(), theirs.numpy()
    squares = ((a - b) ** 2).mean()
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    logits = logits_loss(ours, theirs, probabilities=False, temperature=2.0, mask=None)
    assert logits.item() == pytest.approx(squares, rel=1e-5)
    assert value_loss(ours, theirs).item() == pytest.approx(squares, rel=1e-5)
    assert hidden_loss(ours, theirs, mask=None).item() == pytest.approx(squares / b.var(ddof=1), rel=1e-5)
    assert embedding_loss(ours, theirs).item() == pytest.approx((1 - cosines).mean(), rel=1e-5)


def test_padding_counts_nothing() -> None:
    states, mask = tensor(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens = [states[0, 0], states[0, 1], states[1, 0]]
    spoiled = states.clone()
    spoiled[0, 2:], spoiled[1, 1:] = 1e6, -1e6

    expected = torch.stack([states[0, :2].mean(0), states[1, 0]])
    torch.testing.assert_close(pool(spoiled, (1,), mask), expected)
    found = logits_loss(spoiled, torch.zeros(2, 3, 4), probabilities=False, temperature=1.0, mask=mask)
    assert found.item() == pytest.approx(torch.stack(tokens).square().mean().item(), rel=1e-5)
    assert masked_mean(torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]]), mask).item() == pytest.approx(3.0)


def sentence_model(*, seed: int = 1) -> onnx.ModelProto:
    """states = tanh(table[ids] @ w), and best = their maximum over tokens that the mask shows."""
    random = np.random.default_rng(seed)
    return model_from_text(
        "sentences (int64[batch, words] input_ids, int64[batch, words] attention_mask)"
        " => (float[batch, words, 6] states, float[batch, 6] best) {"
        " found = Gather(table, input_ids)  product = MatMul(found, w)  states = Tanh(product)"
        " shown = Cast<to: int = 1>(attention_mask)  column = Unsqueeze(shown, two)"
        " seen = Mul(states, column)  best = ReduceMax<keepdims: int = 0>(seen, one) }",
        {
            "table": random.normal(size=(20, 6)).astype(np.float32),
            "w": random.normal(0, 0.5, (6, 6)).astype(np.float32),
            "one": np.array([1]),
            "two": np.array([2]),
        },
    )


def sentences(folder: Path) -> tuple[Material, Samples]:
    teacher = write_artifact(sentence_model(), folder / "teacher.onnx")
    lengths = np.array([2, 7, 3, 9, 1] * 8)
    mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
    ids = RANDOM.integers(1, 20, mask.shape) * mask
    np.savez(folder / "rows.npz", input_ids=ids, attention_mask=mask)
    rows = load_samples(folder / "rows.npz", teacher.inputs)
    return Material(teacher=teacher, training=rows), rows


def test_the_teacher_answers_rows_cut_to_their_length_once(tmp_path: Path) -> None:
    material, rows = sentences(tmp_path)
    padding = find_padding(rows, material.teacher)
    assert padding is not None
    assert padding.lengths.tolist()[:5] == [2, 7, 3, 9, 1]
    asked = Questions(whole=("states", "best", "product"), pooled={"states": (1,)})
    said: list[str] = []

    for _ in range(2):
        answers = collect_answers(material.teacher, rows, asked, padding, tmp_path, say=said.append)

    assert said == ["asking the teacher about 40 samples"]
    batch = read_batch(rows, np.array([2, 0]), padding)
    assert batch.length == 3
    expected = open_session(material.teacher.path).run(
        {name: array[[2, 0], :3] for name, array in rows.arrays.items()}
    )
    np.testing.assert_allclose(answers.of("states", batch)[0], expected["states"][0], atol=1e-6)
    np.testing.assert_allclose(answers.of("states", batch)[1, :2], expected["states"][1, :2], atol=1e-6)
    np.testing.assert_allclose(answers.of("best", batch), expected["best"], atol=1e-6)
    product = np.arctanh(expected["states"][0].astype(np.float64))
    np.testing.assert_allclose(answers.of("product", batch)[0], product, rtol=1e-3, atol=1e-3)
    means = np.stack([expected["states"][0].mean(0), expected["states"][1, :2].mean(0)])
    np.testing.assert_allclose(answers.of(pooled_name("states"), batch), means, atol=1e-6)


def test_embeddings_of_padded_sentences_are_learnt(tmp_path: Path) -> None:
    material, rows = sentences(tmp_path)
    material = replace(material, tuning=rows, metric=parse_metric("cosine@best"))
    module = OnnxModule(sentence_model(seed=2))
    spec = Trained(epochs=10, batch_size=8, learning_rate=0.05, logits=0.0, embedding=1.0, hidden=1.0)

    report = train(
        module,
        material,
        spec,
        teacher=material.teacher,
        checkpoint=tmp_path,
        hidden=[("product", "product")],
    )

    assert report.metric_before is not None
    assert report.metric_after is not None
    assert report.metric_before < 0.8
    assert report.metric_after > 0.9


class NotOnnx(nn.Module):
    """Any module will do that takes and gives tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states = torch.tanh(self.table(inputs["input_ids"]))
        seen = states * inputs["attention_mask"].unsqueeze(2)
        return {"states": states, "best": seen.amax(1)}


def test_any_module_by_names_can_be_trained(tmp_path: Path) -> None:
    material, _ = sentences(tmp_path)
    torch.manual_seed(0)
    spec = Trained(epochs=10, batch_size=8, learning_rate=0.05)

    report = train(NotOnnx(), material, spec, teacher=material.teacher, checkpoint=tmp_path)

    assert report.last_loss < 0.5 * report.first_loss


def test_labels_of_a_regression_are_numbers(tmp_path: Path) -> None:
    material, rows = sentences(tmp_path)
    probe = {"states": np.zeros((4, 12, 6), np.float32), "best": np.zeros((4, 6), np.float32)}
    target = RANDOM.normal(size=(40, 6))

    lessons = plan_lessons(
        Trained(),
        material.teacher,
        replace(rows, target=target),
        label_weight=1.0,
        metric=parse_metric("mse"),
        probe=probe,
    )

    assert lessons.labels is not None
    assert (lessons.labels.output, lessons.labels.are_classes) == ("best", False)
    with pytest.raises(SamplesError, match="labels"):
        plan_lessons(
            Trained(),
            material.teacher,
            replace(rows, target=target[:, :5]),
            label_weight=1.0,
            metric=parse_metric("mse@best"),
            probe=probe,
        )


def test_states_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(CompressionError, match="cannot be compared"):
        pair_states([("a", "b")], {"a": np.zeros((2, 3, 4))}, {"b": np.zeros((2, 5, 6))})
