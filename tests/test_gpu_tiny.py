"""The models of the tests in tests/gpu/, which GPU machines write without onnx: they are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from gpu.tiny import Tiny, all_tiny, draw, write_tiny
from tritonsmith.engines import open_session


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("model", all_tiny(), ids=lambda model: model.name)
def test_a_model_is_valid_and_answers_as_its_function_in_numpy(
    model: Tiny, external: bool, tmp_path: Path
) -> None:
    path = write_tiny(model, tmp_path, external=external)
    onnx.checker.check_model(str(path), full_check=True)
    assert (tmp_path / f"{model.name}.data").exists() is external
    session = open_session(path, threads=1)
    for batch in (1, 3):
        x = draw(model, batch, seed=batch)
        y = session.run({"x": x})["y"]
        np.testing.assert_allclose(y, model.answer(x), atol=model.tolerance, rtol=1e-3)
        assert np.abs(y).max() > 0.1
