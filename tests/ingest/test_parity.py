"""Parity finds what is wrong, says where, and is not fooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnx_models import (
    embedding_model,
    identity_model,
    linear_model,
    linear_weights,
    model_from_text,
    write_model,
)
from tritonsmith.artifact import TensorSpec
from tritonsmith.errors import EngineError, ParityError, SourceError
from tritonsmith.ingest.parity import TOLERANCES, compare_cases, draw_cases
from tritonsmith.ingest.seeds import index_ranges
from tritonsmith.ingest.source import Exported
from tritonsmith.onnx_model import signature_of

Arrays = Mapping[str, NDArray[Any]]


def linear_answer(arrays: Arrays) -> dict[str, NDArray[Any]]:
    weights = linear_weights()
    return {"scores": arrays["features"] @ weights["weight"] + weights["bias"]}


def exported(
    folder: Path, model: onnx.ModelProto, reference: Callable[[Arrays], Arrays], *, batched: bool = True
) -> Exported:
    inputs, outputs = signature_of(model)
    return Exported(
        kind="onnx",
        raw=write_model(folder / "model.onnx", model),
        inputs=inputs,
        outputs=outputs,
        batched=batched,
        reference=reference,
        tools={},
        options={},
    )


@pytest.fixture
def linear(tmp_path: Path) -> Exported:
    return exported(tmp_path, linear_model("batch"), linear_answer)


def prove(source: Exported) -> Any:
    return compare_cases(source.raw, source, draw_cases(source))


def test_an_equal_model_passes_on_batches_of_1_2_3_and_7(linear: Exported) -> None:
    parity = prove(linear)
    assert [dict(case.axes) for case in parity.cases] == [{"batch": n} for n in (1, 2, 3, 7)]
    assert parity.outputs["scores"].values_count == (1 + 2 + 3 + 7) * 3
    assert parity.outputs["scores"].absolute < 1e-6
    assert parity.rows_independent


def test_the_same_seed_draws_the_same_inputs(linear: Exported) -> None:
    first, again, other = (draw_cases(linear, seed=seed)[3].inputs["features"] for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_wrong_value_is_named_by_output_batch_and_place(linear: Exported) -> None:
    def wrong(arrays: Arrays) -> Arrays:
        scores = linear_answer(arrays)["scores"].copy()
        if len(scores) == 3:
            scores[2, 1] += 0.5
            scores[0, 0] += 0.1
        return {"scores": scores}

    with pytest.raises(ParityError) as caught:
        prove(replace(linear, reference=wrong))
    assert "output 'scores'" in caught.value.what
    assert "batch 3" in caught.value.what
    assert "worst at index [2, 1]" in caught.value.what
    expected, found = float(str(caught.value.expected).split()[0]), float(str(caught.value.found))
    assert expected - found == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(("factor", "passes"), [(0.5, True), (3.0, False)])
def test_the_tolerance_is_relative_to_the_output_scale(linear: Exported, factor: float, passes: bool) -> None:
    def shifted(arrays: Arrays) -> Arrays:
        scores = linear_answer(arrays)["scores"] * np.float32(1e-6)  # a small scale must not hide an error
        return {"scores": scores + np.float32(factor * TOLERANCES["float32"]) * np.abs(scores).max()}

    source = replace(linear, reference=shifted)
    small = {name: array * np.float32(1e-6) for name, array in linear_weights().items()}
    model = linear_model("batch")
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in small.items())
    write_model(source.raw, model)
    if passes:
        prove(source)
    else:
        with pytest.raises(ParityError, match="scores"):
            prove(source)


def test_a_sentinel_does_not_widen_the_tolerance(tmp_path: Path) -> None:
    text = "g (float[batch, 2] x) => (float[batch, 2] y) { y = Add(x, mask) }"
    mask = np.array([0.0, -1e9], dtype=np.float32)

    def nearly(arrays: Arrays) -> Arrays:
        return {"y": arrays["x"] + mask + np.array([0.01, 0.0], dtype=np.float32)}

    with pytest.raises(ParityError, match=r"\[\d, 0\]"):
        prove(exported(tmp_path, model_from_text(text, {"mask": mask}), nearly))


def test_nan_and_infinity_are_equal_to_themselves_alone(tmp_path: Path) -> None:
    model = model_from_text("g (float[batch, 4] x) => (float[batch, 4] y) { y = Sqrt(x) }")

    def root(arrays: Arrays) -> Arrays:
        with np.errstate(invalid="ignore"):
            return {"y": np.sqrt(arrays["x"])}

    source = exported(tmp_path, model, root)
    negative = sum(int((case.inputs["x"] < 0).sum()) for case in draw_cases(source))
    assert negative
    assert prove(source).outputs["y"].values_count == 13 * 4 - negative
    with pytest.raises(ParityError, match="'y' differs"):
        prove(replace(source, reference=lambda arrays: {"y": np.nan_to_num(root(arrays)["y"])}))


def test_infinity_of_the_other_sign_is_another_value(tmp_path: Path) -> None:
    model = model_from_text("g (float[batch, 2] x) => (float[batch, 2] y) { y = Mul(x, big) }")
    big = np.array([2.0, np.inf], dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(big, "big"))
    source = exported(tmp_path, model, lambda arrays: {"y": arrays["x"] * big})
    assert prove(source).outputs["y"].values_count == 13
    with pytest.raises(ParityError, match=r"'y' differs .* \[0, 1\]"):
        prove(
            replace(source, reference=lambda arrays: {"y": arrays["x"] * big * np.array([1, -1], np.float32)})
        )


def test_an_output_that_is_never_finite_proves_nothing(tmp_path: Path) -> None:
    model = model_from_text("g (float[batch, 4] x) => (float[batch, 4] y) { y = Mul(x, nan) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
    with pytest.raises(ParityError, match="'y' is NaN or infinite everywhere"):
        prove(exported(tmp_path, model, lambda arrays: {"y": arrays["x"] * np.float32(np.nan)}))


@pytest.mark.parametrize("data_type", ["int64", "uint8", "bool", "string"])
def test_whole_numbers_booleans_and_strings_must_be_equal(tmp_path: Path, data_type: str) -> None:
    model = identity_model(data_type, "batch, 2")
    prove(exported(tmp_path, model, lambda arrays: {"y": arrays["x"]}))

    def off_by_one(arrays: Arrays) -> Arrays:
        changed = arrays["x"].copy()
        if len(changed) == 7:
            value = changed[6, 1]
            changed[6, 1] = (
                b"other" if data_type == "string" else not value if data_type == "bool" else value ^ 1
            )
        return {"y": changed}

    with pytest.raises(ParityError, match=r"batch 7, worst at index \[6, 1\]"):
        prove(exported(tmp_path, model, off_by_one))


def test_another_shape_is_an_error(linear: Exported) -> None:
    with pytest.raises(ParityError, match="another shape at batch 1") as caught:
        prove(replace(linear, reference=lambda arrays: {"scores": linear_answer(arrays)["scores"][:, :2]}))
    assert caught.value.found == [1, 3]


def test_another_kind_of_number_is_an_error(linear: Exported) -> None:
    with pytest.raises(ParityError, match="another data type"):
        prove(
            replace(linear, reference=lambda arrays: {"scores": linear_answer(arrays)["scores"].astype(int)})
        )


def test_a_shape_that_the_signature_does_not_declare_is_an_error(linear: Exported) -> None:
    wrong = TensorSpec(name="scores", dtype="float32", shape=("batch", 4))
    with pytest.raises(ParityError, match="another shape") as caught:
        prove(replace(linear, outputs=(wrong,)))
    assert "declared as scores: float32[batch, 4]" in str(caught.value)


def test_zero_outputs_are_an_error(linear: Exported) -> None:
    with pytest.raises(ParityError, match="nothing can be compared"):
        draw_cases(replace(linear, outputs=()))
    with pytest.raises(ParityError, match="nothing was compared"):
        compare_cases(linear.raw, linear, ())


def test_an_output_that_the_source_lacks_is_named(linear: Exported) -> None:
    with pytest.raises(SourceError, match="no output 'scores'"):
        draw_cases(replace(linear, reference=lambda arrays: {"other": arrays["features"]}))


def test_a_source_that_fails_is_told_with_its_reason(linear: Exported) -> None:
    def fails(arrays: Arrays) -> Arrays:
        raise ZeroDivisionError("no weights today")

    with pytest.raises(SourceError, match="the source itself fails") as caught:
        draw_cases(replace(linear, reference=fails))
    assert "ZeroDivisionError: no weights today" in str(caught.value)


def test_a_model_with_a_frozen_batch_axis_fails_at_batch_2(linear: Exported) -> None:
    model = model_from_text(
        "g (float[batch, 4] features) => (float[batch, 3] scores) "
        "{ one = Reshape(features, shape)  product = MatMul(one, weight)  scores = Add(product, bias) }",
        {**linear_weights(), "shape": np.array([1, 4])},
    )
    write_model(linear.raw, model)
    with pytest.raises(ParityError, match="fails at batch 2"):
        prove(linear)


def test_a_file_that_is_no_model_is_an_engine_error(linear: Exported) -> None:
    linear.raw.write_bytes(b"nothing")
    with pytest.raises(EngineError):
        prove(linear)


def test_rows_that_depend_on_each_other_are_noticed(tmp_path: Path) -> None:
    model = model_from_text(
        "g (float[batch, 2] x) => (float[batch, 2] y) { y = Softmax <axis: int = 0> (x) }"
    )

    def softmax(arrays: Arrays) -> Arrays:
        powers = np.exp(arrays["x"])
        return {"y": powers / powers.sum(axis=0, keepdims=True)}

    assert prove(exported(tmp_path, model, softmax)).rows_independent is False


def test_a_model_without_a_batch_axis_is_drawn_four_times(tmp_path: Path) -> None:
    model = model_from_text("g (float x, float[3] v) => (float[3] y) { y = Mul(x, v) }")
    source = exported(tmp_path, model, lambda arrays: {"y": arrays["x"] * arrays["v"]}, batched=False)
    parity = prove(source)
    assert len({float(case.inputs["x"]) for case in parity.cases}) == 4
    assert parity.cases[0].inputs["x"].shape == ()
    assert parity.rows_independent is None


def test_free_axes_take_several_lengths_and_differ_from_each_other(tmp_path: Path) -> None:
    model = model_from_text("g (float[batch, rows, columns] x) => (float[batch, columns, rows] y)"
        " { y = Transpose <perm: ints = [0, 2, 1]> (x) }")  # fmt: skip
    cases = draw_cases(exported(tmp_path, model, lambda arrays: {"y": arrays["x"].transpose(0, 2, 1)}))
    assert len({case.axes["rows"] for case in cases}) == 4
    assert all(case.axes["rows"] != case.axes["columns"] for case in cases)


def test_lengths_are_raised_until_the_source_takes_them(tmp_path: Path) -> None:
    def at_least_20(arrays: Arrays) -> Arrays:
        if arrays["x"].shape[1] < 20:
            raise ValueError("the kernel is longer than the input")
        return {"y": arrays["x"]}

    source = exported(tmp_path, identity_model("float", "batch, time"), at_least_20)
    assert [case.axes["time"] for case in draw_cases(source)] == [32, 64, 96, 32]
    assert [case.axes["time"] for case in draw_cases(replace(source, lengths={"time": (21, 22)}))] == [
        21,
        22,
    ] * 2


def test_whole_numbers_stay_inside_of_the_table_that_they_index() -> None:
    model = embedding_model(rows=5)
    inputs, _ = signature_of(model)
    assert index_ranges(model, inputs) == {"ids": (0.0, 4.0)}


def test_an_index_is_followed_through_casts_and_reshapes() -> None:
    model = model_from_text(
        "g (float[N, 2] ids, int64[N, 1] other) => (float[N, 4] y) {"
        " whole = Cast <to: int = 7> (ids)  flat = Reshape(whole, shape)  rows = Gather(table, flat)"
        " both = Concat <axis: int = 1> (other, whole)  more = Gather <axis: int = 1> (wide, both)"
        " last = Gather(long, flat)  y = Identity(rows) }",
        {
            "table": np.zeros((6, 4), dtype=np.float32),
            "wide": np.zeros((2, 4), dtype=np.float32),
            "long": np.zeros((8, 4), dtype=np.float32),
            "shape": np.array([-1]),
        },
    )
    inputs, _ = signature_of(model)
    assert index_ranges(model, inputs) == {"ids": (0.0, 3.0), "other": (0.0, 3.0)}


def test_seeded_indices_are_whole_and_in_range(tmp_path: Path) -> None:
    model = model_from_text(
        "g (float[batch, 2] ids) => (float[batch, 2, 1] y)"
        " { whole = Cast <to: int = 7> (ids)  y = Gather(table, whole) }",
        {"table": np.arange(3, dtype=np.float32).reshape(3, 1)},
    )
    source = exported(tmp_path, model, lambda arrays: {"y": arrays["ids"][..., None]})
    cases = draw_cases(source, ranges=index_ranges(model, source.inputs))
    drawn = np.concatenate([case.inputs["ids"].ravel() for case in cases])
    assert set(drawn.tolist()) == {0.0, 1.0, 2.0}
    assert compare_cases(source.raw, source, cases).outputs["y"].absolute == 0


def test_a_range_of_the_reader_comes_first(tmp_path: Path) -> None:
    source = exported(tmp_path, identity_model("int32", "batch, 50"), lambda arrays: {"y": arrays["x"]})
    drawn = draw_cases(replace(source, ranges={"x": (100, 102)}))[3].inputs["x"]
    assert set(np.unique(drawn)) == {100, 101, 102}


def test_no_row_of_a_mask_is_masked_whole(tmp_path: Path) -> None:
    spec = TensorSpec(name="attention_mask", dtype="int64", shape=("batch", 6))
    source = exported(
        tmp_path, identity_model("int64", "batch, 6"), lambda arrays: {"y": arrays["attention_mask"]}
    )
    for case in draw_cases(replace(source, inputs=(spec,))):
        mask = case.inputs["attention_mask"]
        assert set(np.unique(mask)) <= {0, 1}
        assert mask.any(axis=1).all()
