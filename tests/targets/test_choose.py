"""What is compiled, compared, timed and chosen; plans are ONNX files in ONNX Runtime here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plan_orders import H100, OnnxTools, write_order
from tritonsmith.artifact import sha256_of
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import NotCompiledError, PlanError
from tritonsmith.targets.choose import ChosenPlan, choose_plan, tensorrt_tools

ALL = ("fp32", "fp16", "int8")


def choose(folder: Path, machine: OnnxTools, precisions: tuple[str, ...], **changes: Any) -> ChosenPlan:
    order = write_order(folder, precisions, **changes)
    try:
        return choose_plan(order, folder, folder / "model.plan", tools=machine.tools())
    finally:
        assert not list(folder.glob(".*")), "what was staged is left"


def told(chosen: ChosenPlan) -> dict[str, Any]:
    return {str(candidate["precision"]): candidate for candidate in chosen.candidates}


def test_the_plan_its_facts_and_every_candidate(tmp_path: Path) -> None:
    machine = OnnxTools(milliseconds={"fp32": 2.0, "fp16": 1.0, "int8": 0.5})
    chosen = choose(tmp_path, machine, ALL)
    plan = tmp_path / "model.plan"
    assert (chosen.facts.precision, chosen.facts.file) == ("int8", "model.plan")
    assert chosen.facts.sha256 == sha256_of(plan) == sha256_of(tmp_path / "gpu.int8.onnx")
    assert chosen.facts.device == H100
    assert machine.compiled == ["gpu.fp32.onnx", "gpu.fp16.onnx", "gpu.int8.onnx"]
    candidates = told(chosen)
    assert [candidate["chosen"] for candidate in candidates.values()] == [False, False, True]
    assert candidates["int8"]["yardstick"] == "fp16"
    best, *others = candidates["int8"]["speed"]
    assert (best["case"], best["axes"], best["batch_size"]) == ("best", {"batch": 4}, 4)
    assert best["ratio"] == pytest.approx(2.0)
    assert np.shape(best["samples_s"]) == (21, 2)
    assert [timing["axes"] for timing in others] == [{"batch": 1}, {"batch": 8}]
    assert chosen.facts.measured["layers"] == 3
    assert chosen.facts.measured["speed"] == candidates["int8"]["speed"]
    agreement = candidates["int8"]["agreement"]
    assert agreement["passed"]
    assert agreement["reference"] == "gpu.int8.onnx"
    assert [(case["output"], case["axes"]["batch"]) for case in agreement["cases"]] == [
        *(("scores", 4), ("scores", 1), ("scores", 8)),
    ]


def test_a_plan_with_a_wrong_weight_is_refused(tmp_path: Path) -> None:
    chosen = choose(tmp_path, OnnxTools(wrong=("fp16",)), ("fp32", "fp16"))
    assert chosen.facts.precision == "fp32"
    assert "output 'scores' at batch 4" in told(chosen)["fp16"]["refusal"]
    for precision in ALL:
        folder = tmp_path / precision
        folder.mkdir()
        with pytest.raises(PlanError, match=f"the best is {precision}") as caught:
            choose(folder, OnnxTools(wrong=(precision,)), (precision,))
        assert "relative error" in str(caught.value)
        assert not isinstance(caught.value, NotCompiledError)


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({"fp16": 1.0, "int8": 0.9}, "int8"),
        ({"fp16": 1.0, "int8": 1.0}, "fp16"),  # no faster
        ({"fp16": 1.0, "int8": 1.1}, "fp16"),
    ],
)
def test_int8_must_be_faster(tmp_path: Path, milliseconds: dict[str, float], expected: str) -> None:
    chosen = choose(tmp_path, OnnxTools(milliseconds=milliseconds), ("fp16", "int8"))
    assert chosen.facts.precision == expected
    refusal = told(chosen)["int8"]["refusal"]
    assert (refusal is None) == (expected == "int8")
    if refusal:
        assert refusal.startswith("no faster than fp16 at batch 4: ")


@pytest.mark.parametrize(("precision", "other"), [("auto", "int8"), ("auto", "fp32"), ("int8", "int8")])
def test_the_interval_decides(tmp_path: Path, precision: str, other: str) -> None:
    """Twice as fast in the median, and slower in many rounds: not beyond doubt."""
    even = np.arange(21) % 2 == 0
    times_s = np.stack([np.full(21, 1.0), np.where(even, 0.5, 1.5)], axis=1)
    tools = dataclasses.replace(OnnxTools().tools(), time=lambda sessions, inputs: times_s)
    order = write_order(tmp_path, ("fp16", other), precision=precision)
    if precision == "int8":
        with pytest.raises(PlanError, match="the best is int8"):
            choose_plan(order, tmp_path, tmp_path / "model.plan", tools=tools)
        return
    chosen = choose_plan(order, tmp_path, tmp_path / "model.plan", tools=tools)
    assert chosen.facts.precision == "fp16"
    refusal = told(chosen)[other]["refusal"]
    assert refusal.startswith(
        "no faster than fp16" if other == "int8" else "not faster than fp16 beyond doubt"
    )
    assert "2.00 times the speed (0.67 to 2.00)" in refusal


def test_slow_int8_asked_for_by_name(tmp_path: Path) -> None:
    machine = OnnxTools(milliseconds={"fp16": 1.0, "int8": 1.25})
    with pytest.raises(PlanError, match="no plan can be published; the best is int8") as caught:
        choose(tmp_path, machine, ("fp16", "int8"), precision="int8")
    assert "no faster than fp16 at batch 4: 0.80 times the speed" in str(caught.value)
    assert "allow_slow_int8 = true" in str(caught.value)
    assert not (tmp_path / "model.plan").exists()
    chosen = choose(tmp_path, machine, ("fp16", "int8"), precision="int8", allow_slow_int8=True)
    assert chosen.facts.precision == "int8"
    assert "the recipe allows it" in told(chosen)["int8"]["notes"][0]
    assert told(chosen)["fp16"]["refusal"] == "int8 was asked for"


def test_every_profile_counts_for_int8(tmp_path: Path) -> None:
    """Faster at the best batch of one profile, slower at the other's."""

    def time(sessions: Any, inputs: Any) -> Any:
        batch = len(inputs["features"])
        return np.tile([1.0, 2.0 if batch > 8 else 0.25], (21, 1))

    profiles = tuple(
        Profile(axes={"batch": AxisRange(minimum=low, best=low + 1, maximum=low + 2)}) for low in (1, 16)
    )
    tools = dataclasses.replace(OnnxTools().tools(), time=time)
    order = write_order(tmp_path, ("fp16", "int8"), plan=PlanOptions(profiles=profiles))
    chosen = choose_plan(order, tmp_path, tmp_path / "model.plan", tools=tools)
    assert chosen.facts.precision == "fp16"
    assert "at batch 17" in told(chosen)["int8"]["refusal"]


def test_what_does_not_compile_is_named(tmp_path: Path) -> None:
    chosen = choose(tmp_path, OnnxTools(fails=("int8",)), ("fp16", "int8"))
    assert chosen.facts.precision == "fp16"
    assert told(chosen)["int8"]["refusal"] == "TensorRT refuses gpu.int8.onnx: no implementation of node 7"
    with pytest.raises(NotCompiledError, match="the best is fp32") as caught:
        choose(tmp_path, OnnxTools(fails=ALL), ("fp32",))
    assert "no implementation of node 7" in str(caught.value)


def test_a_wrong_yardstick_still_shows_what_fp16_costs(tmp_path: Path) -> None:
    machine = OnnxTools(wrong=("fp16",), milliseconds={"fp16": 1.0, "int8": 2.0})
    with pytest.raises(PlanError) as caught:
        choose(tmp_path, machine, ("fp16", "int8"))
    assert "the best is int8" in caught.value.what
    assert "no faster than fp16" in str(caught.value.found)


def test_a_stripped_plan_gets_its_weights(tmp_path: Path) -> None:
    chosen = choose(tmp_path, OnnxTools(stripped=True), ("fp32",))
    assert not chosen.facts.stripped
    assert chosen.facts.sha256 == sha256_of(tmp_path / "model.plan")
    assert chosen.facts.measured["stripped_bytes"] > 0


def test_the_real_tools_say_what_is_missing_here() -> None:
    """On a machine with neither TensorRT nor a GPU; with both there is nothing to say."""
    reason = tensorrt_tools().why_unavailable()
    assert reason is None or "TensorRT" in reason or "driver" in reason or "GPU" in reason
