"""Sharing rows: kept ids give what they gave, the others their nearest kept row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from block_models import (
    ROWS,
    WIDTH,
    Array,
    artifact_of,
    reader_ids,
    reader_model,
    reader_scores,
    reader_weights,
    samples_of,
)
from onnx_models import linear_model, model_from_text
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material
from tritonsmith.compress.steps import QuantizeWeights, ShareRows
from tritonsmith.compress.weight_only.quantize import apply_weights
from tritonsmith.compress.weight_only.share_rows import apply_share_rows
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, SamplesError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.samples import Samples

USED = np.array([5, 9, 77, 120, 121, 199])


def used_ids(count: int, seed: int = 0) -> Array:
    """Rows of ids that are all in USED; 9 is the most frequent by far."""
    random = np.random.default_rng(seed)
    return random.choice(USED, (count, 9), p=[0.1, 0.5, 0.1, 0.1, 0.1, 0.1])


def shared(
    tmp_path: Path, rows: int, calibration: Samples | None, model: onnx.ModelProto | None = None
) -> Artifact:
    artifact = artifact_of(model or reader_model(), tmp_path / "fp32.onnx")
    material = Material(teacher=artifact, calibration=calibration)
    return apply_share_rows(ShareRows(rows=rows), artifact, material, tmp_path / "shared.onnx")


def test_used_and_lowest_ids_keep_their_rows(tmp_path: Path) -> None:
    artifact = shared(tmp_path, 40, samples_of(ids=used_ids(50)))
    tensors = {t.name: t for t in onnx.load(str(artifact.path)).graph.initializer}
    kept = sorted({*USED, *[i for i in range(ROWS) if i not in USED][:34]})
    table = reader_weights()["table"]
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["table"]), table[kept])
    row_of = numpy_helper.to_array(tensors["table_row_of_id"])
    assert tensors["table_row_of_id"].data_type == TensorProto.UINT16
    for token in range(ROWS):
        cosines = table[kept] @ table[token] / np.linalg.norm(table[kept], axis=1)
        assert row_of[token] == np.argmax(cosines)

    session = open_session(artifact.path)
    for count in (1, 2, 3, 7):
        ids = np.random.default_rng(count).choice(kept, (count, 9))
        np.testing.assert_allclose(
            session.run({"ids": ids})["scores"], reader_scores(ids, reader_weights()), atol=1e-5
        )
    ids = reader_ids(5)
    replaced = np.array(kept)[row_of[ids]]
    np.testing.assert_allclose(
        session.run({"ids": ids})["scores"], reader_scores(replaced, reader_weights()), atol=1e-5
    )


def test_what_is_measured(tmp_path: Path) -> None:
    ids = used_ids(50)
    artifact = shared(tmp_path, 3, samples_of(ids=ids))
    measured = artifact.steps[-1].measured
    counts = np.sort([(ids == token).sum() for token in USED])
    assert measured["coverage"] == pytest.approx(counts[-3:].sum() / ids.size)
    assert (measured["rows_before"], measured["rows_after"], measured["ids_used"]) == (ROWS, 3, len(USED))
    saved = artifact.steps[-1].bytes_before - artifact.steps[-1].bytes_after
    assert saved == pytest.approx((ROWS - 3) * WIDTH * 4 - 2 * ROWS, abs=300)
    assert artifact.precision == "fp32"


def test_padding_counts_nothing(tmp_path: Path) -> None:
    model = model_from_text(
        "masked (int64[batch, length] ids, int64[batch, length] attention_mask)"
        f" => (float[batch, length, {WIDTH}] y) {{"
        " rows = Gather(table, ids)  flags = Cast <to: int = 1> (attention_mask)"
        " shown = Unsqueeze(flags, last)  y = Mul(rows, shown) }",
        {"table": reader_weights()["table"], "last": np.array([-1])},
    )
    ids = used_ids(50)
    mask = np.ones_like(ids)
    ids[:, 3:], mask[:, 3:] = 150, 0
    artifact = shared(tmp_path, 6, samples_of(ids=ids, attention_mask=mask), model)
    assert artifact.steps[-1].measured["ids_used"] == len(USED)
    assert artifact.steps[-1].measured["coverage"] == 1.0


def test_the_largest_table_is_taken_and_ids_may_be_cast(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tables = {
        "words": random.normal(size=(100, 8)).astype(np.float32),
        "kinds": random.normal(size=(3, 8)).astype(np.float32),
    }
    model = model_from_text(
        "two (int32[batch, length] ids, int32[batch, length] kind) => (float[batch, length, 8] y) {"
        " wide = Cast <to: int = 7> (ids)  a = Gather(words, wide)  b = Gather(kinds, kind)  y = Add(a, b) }",
        tables,
    )
    ids = random.integers(0, 20, (30, 4)).astype(np.int32)
    kind = random.integers(0, 3, (30, 4)).astype(np.int32)
    artifact = shared(tmp_path, 20, samples_of(ids=ids, kind=kind), model)
    assert artifact.steps[-1].measured["table"] == "words"
    found = open_session(artifact.path).run({"ids": ids, "kind": kind})["y"]
    np.testing.assert_allclose(found, tables["words"][ids] + tables["kinds"][kind], atol=1e-6)


def test_shared_rows_can_be_stored_in_blocks_and_trained(tmp_path: Path) -> None:
    calibration = samples_of(ids=used_ids(60))
    artifact = shared(tmp_path, 40, calibration)
    teacher = artifact_of(reader_model(), tmp_path / "teacher.onnx")
    material = Material(teacher=teacher, calibration=calibration, convert=ConvertOptions(server="26.08"))
    spec = QuantizeWeights(arithmetic="int8", epochs=1)
    final = apply_weights(spec, artifact, material, tmp_path / "final.onnx", checkpoint=tmp_path / "work")
    kinds = {t.name: t.data_type for t in onnx.load(str(final.path)).graph.initializer}
    assert kinds["table_int4"] == TensorProto.INT4
    assert kinds["table_row_of_id"] == TensorProto.UINT16
    ids = used_ids(20, seed=9)
    found = open_session(final.path).run({"ids": ids})["scores"]
    expected = reader_scores(ids, reader_weights())
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("rows", [0, ROWS, ROWS + 1])
def test_as_many_rows_as_there_are_is_refused(tmp_path: Path, rows: int) -> None:
    with pytest.raises(CompressionError, match=f"cannot keep {rows} rows") as caught:
        shared(tmp_path, rows, samples_of(ids=used_ids(20)))
    assert f"a table of {ROWS} rows" in str(caught.value)
    assert not (tmp_path / "shared.onnx").exists()


def test_without_calibration_data_nothing_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="sharing rows needs calibration or training data"):
        shared(tmp_path, 10, None)


def test_ids_beyond_the_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="holds ids that the table 'table' lacks"):
        shared(tmp_path, 10, samples_of(ids=np.full((5, 9), ROWS)))


def test_a_model_without_such_a_table_is_refused(tmp_path: Path) -> None:
    features = np.zeros((4, 4), np.float32)
    with pytest.raises(CompressionError, match="no embedding table whose rows could be shared"):
        shared(tmp_path, 2, samples_of(features=features), linear_model())


def test_a_table_that_is_multiplied_with_too_is_refused(tmp_path: Path) -> None:
    model = model_from_text(
        f"tied (int64[batch, length] ids) => (float[batch, length, {ROWS}] y) {{"
        " rows = Gather(table, ids)  turned = Transpose <perm: ints = [1, 0]> (table)"
        " y = MatMul(rows, turned) }",
        {"table": reader_weights()["table"]},
    )
    with pytest.raises(CompressionError, match="no embedding table") as caught:
        shared(tmp_path, 10, samples_of(ids=used_ids(20)), model)
    assert "table is read by more than look-ups of rows" in str(caught.value)
