"""The shapes recipe: images are the same for the same seed only; the source is its folder alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.torch_module import load_module

RECIPE = Path(__file__).resolve().parents[2] / "tools" / "recipes" / "shapes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in ("drawing", "network", "train", "shapes_network"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("recipe")
def test_images_follow_the_seed() -> None:
    from drawing import LEVELS, SHAPES, draw_shapes  # type: ignore[import-not-found]

    images, labels = draw_shapes(600, seed=11)
    again, other = draw_shapes(600, seed=11), draw_shapes(600, seed=12)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert not {row.tobytes() for row in images} & {row.tobytes() for row in other[0]}
    assert images.shape == (600, 1, 32, 32)
    assert (images.min(), images.max() < 1) == (0, True)
    levels = images.astype(np.float32) * LEVELS
    np.testing.assert_array_equal(levels, np.round(levels))
    assert set(labels.tolist()) == set(range(len(SHAPES)))


@pytest.mark.usefixtures("recipe")
def test_stars_and_polygons_have_the_area_of_geometry() -> None:
    from drawing import SHAPES

    side = (np.arange(800) + 0.5) / 400 - 1
    u, v = np.meshgrid(side, side)
    cell = (2 / 800) ** 2

    def area(name: str) -> float:
        return float(SHAPES[name](u, v).sum() * cell)

    def regular(corners: int) -> float:  # inscribed in the unit circle
        return corners / 2 * np.sin(2 * np.pi / corners)

    def star(points: int, waist: float) -> float:  # triangles from the middle to each edge
        return points * waist * np.sin(np.pi / points)

    assert area("disc") == pytest.approx(np.pi * 0.81, rel=0.01)
    assert area("ring") == pytest.approx(np.pi * (1 - 0.25), rel=0.01)
    assert area("triangle") == pytest.approx(regular(3), rel=0.01)
    assert area("pentagon") == pytest.approx(regular(5), rel=0.01)
    assert area("star of four") == pytest.approx(star(4, 0.4), rel=0.01)
    assert area("star of five") == pytest.approx(star(5, 0.45), rel=0.01)
    assert area("half disc") == pytest.approx(np.pi / 2, rel=0.01)


@pytest.mark.usefixtures("recipe")
def test_the_folder_is_the_whole_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from network import WEIGHTS, Shapes  # type: ignore[import-not-found]

    module = Shapes()
    shutil.copyfile(RECIPE / "network.py", tmp_path / "shapes_network.py")
    np.savez(tmp_path / WEIGHTS, **{name: tensor.numpy() for name, tensor in module.state_dict().items()})
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_module("shapes_network:classifier", ConvertOptions())
    image = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(image), module.eval()(image))
    monkeypatch.delitem(sys.modules, "shapes_network")
