"""Rules of one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from linted import DOUBLE, add_double, findings_of, only

X = 'input { name: "x" data_type: TYPE_FP32 dims: [3] }'
CASES = [
    ('backend: "python"', 'default_model_filename: "a.py"', "error", "no backend is named"),
    ('backend: "python"', 'platform: "onnx"', "error", "no backend is named"),
    ('backend: "python"', 'backend: "pyton"', "warning", "no backend of this name"),
    (X, "", "warning", "no input is described"),
    (X, X + X, "error", "described twice"),
    (X, "input { data_type: TYPE_FP32 dims: [3] }", "error", "has no name"),
    (X, 'input { name: "x" dims: [3] }', "error", "has no data_type"),
    (X, 'input { name: "x" data_type: TYPE_FP32 }', "error", "has no dims"),
    (X, 'input { name: "x" data_type: TYPE_FP32 dims: [3, 0] }', "error", "a dimension of 0"),
    (X, 'input { name: "x" data_type: TYPE_FP32 dims: [-2] }', "error", "a dimension of -2"),
    (
        "max_batch_size: 4",
        "max_batch_size: 4 dynamic_batching { preferred_batch_size: 9 }",
        "error",
        "preferred_batch_size",
    ),
    (
        "max_batch_size: 4",
        "max_batch_size: 4 instance_group { kind: KIND_CPU gpus: [0] }",
        "error",
        "instance_group[0].gpus",
    ),
]


@pytest.mark.parametrize(("right", "wrong", "severity", "words"), CASES, ids=[case[3] for case in CASES])
def test_a_mistake_in_a_field(tmp_path: Path, right: str, wrong: str, severity: str, words: str) -> None:
    assert right in DOUBLE
    add_double(tmp_path, config=DOUBLE.replace(right, wrong))
    finding = only(findings_of(tmp_path, configs_only=True))
    assert finding.severity == severity
    assert words in finding.what


def test_a_backend_may_be_known_by_its_file(tmp_path: Path) -> None:
    add_double(tmp_path, config=DOUBLE.replace('backend: "python"', ""))
    assert findings_of(tmp_path) == ()


def test_every_broken_rule_is_said(tmp_path: Path) -> None:
    wrong = (
        "max_batch_size: 4 dynamic_batching { preferred_batch_size: 9 } "
        "response_cache { enable: true } model_transaction_policy { decoupled: true }"
    )
    add_double(tmp_path, config=DOUBLE.replace("max_batch_size: 4", wrong))
    said = " ".join(finding.what for finding in findings_of(tmp_path))
    assert "preferred_batch_size" in said
    assert "response_cache" in said


def test_a_misspelt_platform_gets_advice(tmp_path: Path) -> None:
    add_double(tmp_path, config=DOUBLE.replace('backend: "python"', 'platform: "tensorrt_pln"'))
    assert "tensorrt_plan" in str(only(findings_of(tmp_path)).fix)


def test_a_scalar_without_a_batch_axis(tmp_path: Path) -> None:
    scalar = 'input { name: "x" data_type: TYPE_FP32 dims: [1] reshape { } }'
    config = DOUBLE.replace("max_batch_size: 4", "max_batch_size: 0").replace(X, scalar)
    add_double(tmp_path, config=config)
    assert "reshaped to a scalar" in only(findings_of(tmp_path)).what
