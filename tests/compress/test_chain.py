"""Chains: what is kept is not made again, what is cut off leaves nothing, what makes no sense is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from digits_models import conv_model, split_digits, write_artifact, write_samples
from tritonsmith.artifact import Artifact
from tritonsmith.compress.chain import Material, check_order, check_roles, convert_once, run_chain
from tritonsmith.compress.ledger import measure_ledger
from tritonsmith.compress.steps import Cast, Prune, PruneTorch, Quantize, QuantizeWeights, Sparsify
from tritonsmith.compress.store import keep_artifact
from tritonsmith.errors import CompressionError, RepositoryError, SamplesError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.samples import Samples, load_samples

Load = Callable[..., Samples]


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    path = tmp_path / "conv.onnx"
    write_artifact(conv_model(), path)
    return convert_once(str(path), ConvertOptions(), store=tmp_path / "store", folder=tmp_path)


@pytest.fixture
def load(tmp_path: Path, teacher: Artifact) -> Load:
    def load_rows(name: str, rows: slice) -> Samples:
        images = split_digits().train_images[rows, None]
        return load_samples(write_samples(tmp_path / f"{name}.npz", images), teacher.inputs)

    return load_rows


@pytest.fixture
def material(teacher: Artifact, load: Load) -> Material:
    return Material(teacher=teacher, calibration=load("calibration", slice(0, 64)))


def results_in(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.glob("*/result/model.onnx")}


def test_what_is_kept_is_not_made_again(tmp_path: Path, material: Material) -> None:
    store = tmp_path / "store"
    first = run_chain((Quantize(),), material, store=store)
    before = results_in(store)
    said: list[str] = []
    second = run_chain((Quantize(),), material, store=store, say=said.append)
    assert results_in(store) == before
    assert second == first
    assert any("made before" in line for line in said)
    assert [step.name for step in second[-1].steps] == ["convert", "simplify", "quantize-static"]


def test_another_option_or_other_data_is_another_result(
    tmp_path: Path, material: Material, load: Load
) -> None:
    store = tmp_path / "store"
    run_chain((Quantize(),), material, store=store)
    before = len(results_in(store))
    run_chain((Quantize(calibrator="percentile"),), material, store=store)
    assert len(results_in(store)) == before + 1
    other = replace(material, calibration=load("other", slice(64, 128)))
    run_chain((Quantize(),), other, store=store)
    assert len(results_in(store)) == before + 2


def test_data_that_a_step_does_not_see_change_nothing(tmp_path: Path, material: Material, load: Load) -> None:
    store = tmp_path / "store"
    run_chain((Quantize(),), material, store=store)
    before = results_in(store)
    more = replace(material, training=load("training", slice(200, 300)), max_drop=0.3)
    run_chain((Quantize(),), more, store=store)
    assert results_in(store) == before


def test_a_step_that_fails_leaves_its_checkpoint_and_no_result(tmp_path: Path, teacher: Artifact) -> None:
    store = tmp_path / "own"

    def fail(out: Path, checkpoint: Path) -> Artifact:
        out.write_bytes(b"half")
        (checkpoint / "epoch").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_artifact(store, "x", fail)
    assert list(store.glob("*/result")) == []

    def finish(out: Path, checkpoint: Path) -> Artifact:
        assert (checkpoint / "epoch").read_text() == "1"
        assert not out.exists()
        out.write_bytes(teacher.path.read_bytes())
        return replace(teacher, path=out)

    artifact, kept = keep_artifact(store, "x", finish)
    assert not kept
    assert artifact.path.read_bytes() == teacher.path.read_bytes()
    assert list(store.glob("*/work")) == []
    assert keep_artifact(store, "x", fail) == (artifact, True)


def test_two_at_once_make_it_once(tmp_path: Path, teacher: Artifact) -> None:
    began, go_on, lines = threading.Event(), threading.Event(), list[str]()

    def make(out: Path, checkpoint: Path) -> Artifact:
        began.set()
        assert go_on.wait(20)
        out.write_bytes(teacher.path.read_bytes())
        return replace(teacher, path=out)

    def keep() -> tuple[Artifact, bool]:
        return keep_artifact(tmp_path / "own", "x", make, say=lines.append)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(keep)
        assert began.wait(20)
        second = pool.submit(keep)
        while not lines:
            time.sleep(0.01)
        assert lines == ["another tritonsmith is at work on the same model; waiting for it"]
        go_on.set()
        assert (first.result(20)[1], second.result(20)[1]) == (False, True)


def test_a_damaged_result_is_named(tmp_path: Path, material: Material) -> None:
    (artifact,) = run_chain((Quantize(),), material, store=tmp_path / "store")
    artifact.path.write_bytes(artifact.path.read_bytes()[:-1] + b"x")
    with pytest.raises(RepositoryError, match="is damaged") as error:
        run_chain((Quantize(),), material, store=tmp_path / "store")
    assert "made again" in str(error.value)


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ((Quantize(), Prune(flops=0.5)), "prune comes after quantize"),
        ((Cast(), QuantizeWeights()), "quantize-weights comes after cast"),
        ((Sparsify(), PruneTorch(flops=0.5)), "prune-torch is step 2"),
    ],
)
def test_orders_that_make_no_sense(material: Material, specs: tuple[Quantize, ...], match: str) -> None:
    with pytest.raises(CompressionError, match=match):
        check_order(specs, material)


def test_an_int8_teacher_is_refused(material: Material) -> None:
    with pytest.raises(CompressionError, match="int8 already"):
        check_order((Quantize(),), replace(material, teacher=replace(material.teacher, precision="int8")))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("calibration", "evaluation"),
        ("training", "evaluation"),
        ("tuning", "evaluation"),
        ("training", "tuning"),
    ],
)
def test_roles_that_share_samples(
    tmp_path: Path, material: Material, load: Load, first: str, second: str
) -> None:
    data = {"calibration": None, first: load(first, slice(100, 140)), second: load(second, slice(130, 160))}
    evaluation = data.pop("evaluation", None)
    shared = replace(material, **data)
    with pytest.raises(
        SamplesError, match=f"the {first} file {first}.npz shares samples with the {second} data"
    ) as error:
        check_roles(shared, evaluation)
    assert error.value.found == "10 of 40, first at row 30"


def test_calibration_may_be_part_of_training(material: Material, load: Load) -> None:
    check_roles(replace(material, training=load("training", slice(0, 100))), load("e", slice(200, 210)))


def test_the_ledger_multiplies_to_the_whole(tmp_path: Path, material: Material) -> None:
    artifacts = (material.teacher, *run_chain((Quantize(),), material, store=tmp_path / "store"))
    assert material.calibration is not None
    ledger = measure_ledger(artifacts, material.calibration)
    first, last = ledger.entries
    sizes = [artifact.path.stat().st_size for artifact in artifacts]
    assert [first.size_bytes, last.size_bytes] == sizes
    assert ledger.bytes_factor == pytest.approx(sizes[0] / sizes[1])
    # Conv 1-8 and 8-16 of 3x3 with biases, then Gemm: what conv_model says of itself.
    weights = {tensor.name: np.prod(tensor.dims) for tensor in conv_model().graph.initializer}
    assert 0 < first.parameters <= sum(weights.values())
    assert first.parameters == last.parameters
    assert ledger.flops_factor == 1.0
    assert ledger.speed_factor == pytest.approx(first.latency_ms / last.latency_ms, rel=0.35)
    assert ledger.json()["product"]["bytes_factor"] == ledger.bytes_factor  # type: ignore[index,call-overload]


def test_a_ledger_of_one_file(material: Material) -> None:
    assert material.calibration is not None
    ledger = measure_ledger((material.teacher,), material.calibration)
    assert [entry.step for entry in ledger.entries] == ["fp32"]
    assert (ledger.bytes_factor, ledger.speed_factor) == (1.0, 1.0)


def test_one_calibration_serves_both_dialects(tmp_path: Path, material: Material) -> None:
    said: list[str] = []
    store = tmp_path / "store"
    (ours,) = run_chain((Quantize(),), material, store=store, say=said.append)
    (theirs,) = run_chain((Quantize(dialect="tensorrt"),), material, store=store, say=said.append)
    assert len([line for line in said if line.startswith("calibrating on")]) == 1
    assert ours.path != theirs.path
