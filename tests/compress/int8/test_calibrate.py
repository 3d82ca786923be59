"""What one pass over the calibration data sees, against ONNX Runtime and numpy on the same tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

from digits_models import conv_model, split_digits, write_artifact
from quantize_models import samples_of
from tritonsmith.compress.int8 import taps
from tritonsmith.compress.int8.calibrate import BINS, collect_histograms, load_histograms, save_histograms
from tritonsmith.errors import SamplesError
from tritonsmith.samples import Samples

NAMES = ("image", "conv1", "relu2", "logits")


def observed(model: onnx.ModelProto, samples: Samples) -> dict[str, np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in NAMES[1:])
    session = InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(list(NAMES[1:]), {"image": samples.arrays["image"]})
    return {"image": samples.arrays["image"], **dict(zip(NAMES[1:], found, strict=True))}


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    artifact = write_artifact(conv_model(), tmp_path / "conv.onnx")
    return samples_of(tmp_path / "c.npz", artifact.inputs, split_digits().train_images[:60, None])


def test_ranges_and_counts_are_those_of_the_tensors(tmp_path: Path, samples: Samples) -> None:
    expected = observed(conv_model(), samples)
    found = collect_histograms(tmp_path / "conv.onnx", NAMES, samples, batched=True)

    assert set(found) == set(NAMES)
    for name, values in expected.items():
        histogram = found[name]
        assert histogram.lowest == pytest.approx(values.min(), rel=1e-4, abs=1e-5)
        assert histogram.highest == pytest.approx(values.max(), rel=1e-4)
        assert histogram.edge >= np.abs(values).max() * 0.9999
        if name != "conv1":  # 61,440 values, read with a stride
            assert histogram.counts.sum() == np.count_nonzero(values)
        share = np.count_nonzero(np.abs(values) >= histogram.edge / 2) / np.count_nonzero(values)
        outer = histogram.counts[: BINS // 2].sum() + histogram.counts[-(BINS // 2) :].sum()
        assert outer / histogram.counts.sum() == pytest.approx(share, abs=0.01)


def test_bins_that_widen_lose_nothing(tmp_path: Path, samples: Samples) -> None:
    loudness = np.geomspace(1e-2, 1, samples.count)[:, None, None, None]  # each run is louder than the last
    images = (samples.arrays["image"] * loudness).astype(np.float32)
    changed = Samples(path=samples.path, sha256="", arrays={"image": images}, target=None)
    found = collect_histograms(tmp_path / "conv.onnx", ["image"], changed, batched=True)["image"]
    assert found.edge >= images.max()
    assert found.counts.sum() == np.count_nonzero(images)
    for share in (1 / 64, 1 / 16, 1 / 4):
        expected = np.count_nonzero(images > found.edge * share)
        assert found.counts[BINS + int(BINS * share) :].sum() == pytest.approx(expected, rel=0.02)


def test_memory_is_bounded_by_running_few_rows(
    tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = 16 * 64 * 4  # of conv1
    monkeypatch.setattr(taps, "TAPPED_BYTES", 4 * row_bytes)
    runs = [
        (count, tensors["conv1"].nbytes)
        for count, tensors in taps.run_tapped(tmp_path / "conv.onnx", ["conv1"], samples, batched=True)
    ]
    assert sum(count for count, _ in runs) == samples.count
    assert max(size for _, size in runs) == 4 * row_bytes


def test_samples_that_make_a_tensor_infinite_are_named(tmp_path: Path, samples: Samples) -> None:
    loud = np.full((3, 1, 8, 8), 3e38, np.float32)
    changed = Samples(path=samples.path, sha256="", arrays={"image": loud}, target=None)
    with pytest.raises(SamplesError, match="cannot calibrate tensor 'conv1'"):
        collect_histograms(tmp_path / "conv.onnx", ["conv1"], changed, batched=True)


def test_histograms_come_back_from_their_file(tmp_path: Path, samples: Samples) -> None:
    found = collect_histograms(tmp_path / "conv.onnx", ["image", "relu2"], samples, batched=True)
    save_histograms(found, tmp_path / "kept" / "ranges.npz")
    again = load_histograms(tmp_path / "kept" / "ranges.npz")
    for name, histogram in found.items():
        assert (again[name].lowest, again[name].highest) == (histogram.lowest, histogram.highest)
        np.testing.assert_array_equal(again[name].counts, histogram.counts)
