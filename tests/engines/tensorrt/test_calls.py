"""Building, running and refitting as far as they go without a GPU: every call is one that the version has.

TensorRT's objects are stand-ins that are as strict as the published bindings (tensorrt_stand_in.py), the
driver is libcuda.c. What TensorRT and a GPU make of the calls is tested in tests/gpu/.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tensorrt_bindings_here import run_with_binding

VERSIONS = ("8.6.1", "10.16.1.11", "11.4.0.106")
Answers = dict[str, Any]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def answers(version: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What came of every scenario of tensorrt_scenarios.py under this version's binding."""
    folder = tmp_path_factory.mktemp("scenarios")
    code = "import sys, pathlib, tensorrt_scenarios as s; s.main(pathlib.Path(sys.argv[1]))"
    done = run_with_binding(version, code, str(folder), driver=True)
    assert done.returncode == 0, done.stderr
    answers: Answers = json.loads(done.stdout)
    return answers


def arguments_of(answer: Answers, kind: str, name: str) -> list[list[Any]]:
    return [call[2:] for call in answer["calls"] if call[:2] == [kind, name]]


def test_a_build_asks_for_what_the_options_say(answers: Answers, version: str) -> None:
    answer = answers["build_with_every_option"]
    flags = [flag for (flag,) in arguments_of(answer, "IBuilderConfig", "set_flag")]
    assert flags == ["SPARSE_WEIGHTS", "VERSION_COMPATIBLE"]
    assert arguments_of(answer, "IBuilderConfig", "clear_flag") == [["TF32"]]
    # EXPLICIT_BATCH is bit 0 on 8.6; STRONGLY_TYPED is bit 1 on 10 and bit 0 on 11
    assert arguments_of(answer, "Builder", "create_network") == [[2 if version.startswith("10.") else 1]]
    assert arguments_of(answer, "IBuilderConfig", "set_memory_pool_limit") == [["WORKSPACE", 1 << 20]]
    assert arguments_of(answer, "IBuilderConfig", "builder_optimization_level=") == [[5]]
    assert arguments_of(answer, "IBuilderConfig", "hardware_compatibility_level=") == [["AMPERE_PLUS"]]
    assert arguments_of(answer, "IOptimizationProfile", "set_shape") == [["x", [1, 3], [8, 3], [8, 3]]]
    # CUBLAS, CUBLAS_LT and CUDNN are bits 0 to 2 of TacticSource; all five were set
    expected = [[0b11000]] if version.startswith("8.") else []
    assert arguments_of(answer, "IBuilderConfig", "set_tactic_sources") == expected


def test_a_build_says_what_came_of_it(answers: Answers, version: str) -> None:
    answer = answers["build_with_every_option"]
    facts = answer["facts"]
    assert (facts["file"], facts["size_bytes"]) == ("model.plan", len(b"plan"))
    assert (facts["tensorrt"], facts["device"]["compute_capability"]) == (version, "9.0")
    assert facts["version_compatible"]
    assert facts["hardware_compatibility"] == "ampere_plus"
    assert facts["measured"]["layers"]["by_precision"] == {"fp32": 1}
    assert any("Building 1 of 2" in line for line in answer["said"]) is not version.startswith("8.")
    assert {"model.onnx", "model.plan"} <= set(answer["files"])


@pytest.mark.parametrize(
    ("scenario", "flag"),
    [
        ("build_a_cast_to_fp16", "FP16"),
        ("build_fp16_weights", "FP16"),
        ("build_int8_pairs", "INT8"),
    ],
)
def test_a_precision_takes_a_flag_on_86_alone(
    answers: Answers, version: str, scenario: str, flag: str
) -> None:
    flags = arguments_of(answers[scenario], "IBuilderConfig", "set_flag")
    assert flags == ([[flag], ["TF32"]] if version.startswith("8.") else [["TF32"]])


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("refuse_a_precision_that_the_graph_lacks", "holds no fp16 tensor"),
        ("refuse_what_the_parser_refuses", "no such operator: Frobnicate"),
        ("refuse_a_missing_file", "there is no file"),
        ("refuse_inputs_that_set_shapes", "set the shape of other tensors"),
        ("refuse_what_the_builder_refuses", "cannot build a plan"),
        ("refuse_another_plan", "cannot load"),
    ],
)
def test_what_fails_is_a_plan_error_and_writes_nothing(answers: Answers, scenario: str, words: str) -> None:
    assert words in answers[scenario]["error"]
    assert "model.plan" not in answers[scenario]["files"]


def test_ctrl_c_ends_a_build_and_leaves_nothing(answers: Answers, version: str) -> None:
    answer = answers["end_a_build_by_ctrl_c"]
    # without callbacks the stand-in, being Python, is interrupted as TensorRT itself would not be
    exception = "an exception inside of the builder"
    assert answer["ended_by"] == (exception if version.startswith("8.") else "the monitor")
    assert answer["restored"]
    assert [file for file in answer["files"] if file.endswith((".plan", ".cache"))] == []


def test_the_timing_cache_is_kept_merged_and_begun_anew(answers: Answers, version: str) -> None:
    answer = answers["keep_the_timing_cache"]
    assert answer["name"] == f"timing-{version}-sm90-stand-in-gpu.cache"
    assert (answer["first"], answer["second"]) == ("+", "++")
    assert answer["combined"] == 1
    assert answer["fresh"] == "+"
    assert any("refuses the timing cache" in line for line in answer["said"])


def test_a_stripped_plan_is_refitted_when_it_is_loaded_or_written_whole(
    answers: Answers, version: str
) -> None:
    answer = answers["strip_and_refit"]
    if version.startswith("8."):
        assert "cannot build plans without their weights" in answer["cannot"]
        assert answer["files"] == ["model.onnx"]
        return
    assert answer["stripped"]
    assert "without its weights" in answer["without"]
    assert answer["y"] == [[2.0, 2.0, 2.0]]
    strip = "WEIGHTLESS" if version.startswith("10.") else "STRIP_PLAN"  # one value under two names on 10
    assert arguments_of(answer, "IBuilderConfig", "set_flag")[:2] == [[strip], ["REFIT_IDENTICAL"]]
    assert arguments_of(answer, "ISerializationConfig", "clear_flag") == [["EXCLUDE_WEIGHTS"]]
    assert "whole.plan" in answer["files"]


def test_a_session_runs_times_and_frees_all(answers: Answers) -> None:
    answer = answers["run_and_time"]
    assert answer["small"] == answer["again"] == [[0, 2, 4], [6, 8, 10]]
    assert answer["large"] == 48
    assert [len(times) for times in answer["times"]] == [5, 5, 5, 5]
    assert all(time >= 0 for times in answer["times"] for time in times)
    assert answer["launches"] == 7  # of the last capture: two to warm up, five timed
    assert answer["left"] == [0, 0]


def test_inputs_that_do_not_fit_are_plan_errors(answers: Answers) -> None:
    shape, dtype, name, nothing = answers["run_and_time"]["errors"]
    assert "does not take this shape" in shape
    assert "[1 to 8, 3]" in shape
    assert "has another data type" in dtype
    assert "other inputs" in name
    assert "other inputs" in nothing


def test_the_stand_ins_are_as_strict_as_the_binding(answers: Answers) -> None:
    expected = ["AttributeError", "TypeError", "AssertionError", "TypeError", "TypeError"]
    assert answers["call_what_no_binding_has"]["errors"] == expected
