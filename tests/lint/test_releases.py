"""What a container has and has not."""

from __future__ import annotations

from pathlib import Path

import pytest

from linted import DOUBLE, LINEAR, add_double, add_linear, add_model, ensemble, findings_of, only, step

METRICS = """
model_metrics { metric_control { metric_identifier { family: "nv_inference_first_response_histogram_ms" }
  histogram_options { buckets: [1, 2] } } }
"""


@pytest.mark.parametrize(
    ("container", "missing"),
    [("26.06", "26.07"), ("25.08", "26.03, 26.06, 26.07"), ("24.10", "25.07, 25.08, 26.03, 26.06, 26.07")],
)
def test_known_vulnerabilities_are_a_warning(tmp_path: Path, container: str, missing: str) -> None:
    add_double(tmp_path)
    finding = only(findings_of(tmp_path, container=container))
    assert (finding.severity, finding.model) == ("warning", "")
    assert str(finding.found).endswith(f"of {missing}")


@pytest.mark.parametrize(
    ("container", "gpu", "refused"),
    [("26.07", "7.0", True), ("26.07", "7.5", False), ("26.07", "12.0", False), ("24.10", "6.0", False)],
)
def test_gpus_that_a_container_left_behind(tmp_path: Path, container: str, gpu: str, refused: bool) -> None:
    add_double(tmp_path)
    errors = [f for f in findings_of(tmp_path, container=container, gpu=gpu) if f.severity == "error"]
    assert len(errors) == refused
    assert all("does not support the GPU" in finding.what for finding in errors)


@pytest.mark.parametrize(("container", "refused"), [("24.10", True), ("24.11", False)])
def test_model_metrics_came_with_2411(tmp_path: Path, container: str, refused: bool) -> None:
    add_double(tmp_path, config=DOUBLE + METRICS)
    errors = [finding for finding in findings_of(tmp_path, container=container) if finding.model]
    assert ["model_metrics" in finding.what for finding in errors] == [True] * refused


@pytest.mark.parametrize(("container", "refused"), [("25.10", True), ("25.11", False)])
def test_max_inflight_requests_came_with_2511(tmp_path: Path, container: str, refused: bool) -> None:
    add_double(tmp_path)
    bounded = ensemble(step("double", "in", "out")).replace(
        "ensemble_scheduling {", "ensemble_scheduling { max_inflight_requests: 4"
    )
    add_model(tmp_path, "once", bounded)
    errors = [finding for finding in findings_of(tmp_path, container=container) if finding.model]
    assert ["max_inflight_requests" in finding.what for finding in errors] == [True] * refused


@pytest.mark.parametrize("platform", ["tensorflow_savedmodel", "tensorflow_graphdef"])
@pytest.mark.parametrize(
    ("container", "severity"), [("26.07", "error"), ("25.03", "error"), ("25.02", None), (None, "warning")]
)
def test_tensorflow_is_gone_since_2503(
    tmp_path: Path, platform: str, container: str | None, severity: str | None
) -> None:
    add_model(tmp_path, "m", DOUBLE.replace('backend: "python"', f'platform: "{platform}"'))
    about = [finding for finding in findings_of(tmp_path, container=container) if finding.model]
    assert [finding.severity for finding in about] == ([] if severity is None else [severity])
    assert all("tritonsmith build" in str(finding.fix) for finding in about)


def parameters(**values: str) -> str:
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in values.items()
    )


@pytest.mark.parametrize(
    ("given", "severity", "words"),
    [
        (parameters(INFERENCE_PRECISION_HINT="F32", ENABLE_BATCH_PADDING="YES"), "warning", "bfloat16"),
        (parameters(HINT_BF16="YES"), "error", "refuses batches smaller"),
        (parameters(SKIP_OV_DYNAMIC_BATCHSIZE="YES"), None, ""),
    ],
)
def test_the_native_openvino_backend_differs(
    tmp_path: Path, given: str, severity: str | None, words: str
) -> None:
    config = LINEAR.replace("onnxruntime", "openvino") + 'default_model_filename: "model.onnx"\n' + given
    add_linear(tmp_path, config=config)
    about = [finding for finding in findings_of(tmp_path, container="26.07") if finding.model]
    assert (about == []) if severity is None else (only(about).severity == severity)
    assert all(words in finding.what for finding in about)
    assert findings_of(tmp_path) == ()  # embedded, it is as it says
