"""Rounding in blocks: against brute force, and the same in numpy and in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tritonsmith.compress.weight_only.blocks import (
    INT4,
    INT8,
    Grid,
    codes_of,
    fit_grid,
    fit_progressive,
    values_of,
)
from tritonsmith.train.fake_rounding import FakeDynamicUint8, FakeRounding


def weight_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    weight = random.standard_t(4, size=shape).astype(np.float32)
    weight[:, 0] = 0.0  # a column that nothing can be learned from
    return weight


def grids_of(weight: np.ndarray, axis: int) -> list[Grid]:
    return [
        fit_grid(weight, codes=INT4, block=16, axis=axis),
        fit_grid(weight, codes=INT8, block=32, axis=axis),
        fit_progressive(weight, block=16, axis=axis),
        fit_progressive(weight, block=16, axis=axis, limit=63),
    ]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 48), (40, 50)])  # the second has shorter last blocks
def test_training_rounds_bit_for_bit_as_the_file_is_written(shape: tuple[int, int], axis: int) -> None:
    weight = weight_of(shape)
    for grid in grids_of(weight, axis):
        stored = values_of(codes_of(weight, grid), grid)
        trained = FakeRounding(grid)(torch.from_numpy(weight)).numpy()
        assert stored.dtype == np.float32
        assert np.array_equal(stored, trained)


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_the_nearest_values_of_their_block(axis: int) -> None:
    weight = weight_of((32, 32))
    for grid in grids_of(weight, axis):
        codes = codes_of(weight, grid)
        assert codes.min() >= grid.lowest
        assert codes.max() <= grid.highest
        turned = weight if axis == 0 else weight.T
        per_block = grid.steps if axis == 0 else grid.steps.T
        steps = np.repeat(per_block, grid.block, axis=0)[: len(turned)].astype(np.float64)
        every = np.arange(grid.lowest, grid.highest + 1) * steps[:, :, None]
        nearest = np.abs(every - turned[:, :, None]).min(axis=2)
        stored = values_of(codes, grid)
        found = np.abs((stored if axis == 0 else stored.T) - turned)
        np.testing.assert_allclose(found, nearest, atol=1e-5)


def test_the_best_of_many_steps_is_hardly_better() -> None:
    weight = weight_of((64, 24), seed=1)
    grid = fit_grid(weight, codes=INT4, block=32)
    found = np.square(values_of(codes_of(weight, grid), grid) - weight).sum()
    blocks = weight.reshape(2, 32, 24)
    errors = []
    for share in np.linspace(0.4, 1.2, 300):
        steps = np.maximum(np.abs(blocks).max(axis=1), 1e-9)[:, None] * share / 7
        errors.append(np.square(np.clip(np.rint(blocks / steps), -8, 7) * steps - blocks).sum(axis=1))
    assert found <= np.min(errors, axis=0).sum() * 1.03
    plain = np.maximum(np.abs(blocks).max(axis=1), 1e-9)[:, None] / 7
    assert found < np.square(np.clip(np.rint(blocks / plain), -8, 7) * plain - blocks).sum() * 0.95


@pytest.mark.parametrize("limit", [63, 127])
def test_multipliers_times_codes_stay_in_the_range_of_int8(limit: int) -> None:
    weight = weight_of((64, 48), seed=2) * 5
    grid = fit_progressive(weight, block=16, limit=limit)
    assert grid.multipliers is not None
    assert grid.scales is not None
    whole = codes_of(weight, grid).reshape(4, 16, 48).astype(int) * grid.multipliers[:, None].astype(int)
    assert np.abs(whole).max() <= limit
    np.testing.assert_allclose(
        whole.reshape(64, 48) * grid.scales, values_of(codes_of(weight, grid), grid), rtol=1e-6
    )
    # -8 serves the side with the larger magnitude: both signs occur
    assert (grid.multipliers < 0).any()
    assert (grid.multipliers > 0).any()


def test_the_gradient_of_a_rounded_weight_is_that_of_the_weight() -> None:
    weight = torch.from_numpy(weight_of((32, 8))).requires_grad_()
    grid = fit_grid(weight.detach().numpy(), codes=INT4, block=16)
    slopes = torch.arange(256.0).reshape(32, 8)
    (FakeRounding(grid)(weight) * slopes).sum().backward()
    assert torch.equal(weight.grad, slopes)


def test_activations_are_rounded_as_onnx_runtime_rounds_them() -> None:
    import onnxruntime

    from onnx_models import model_from_text

    model = model_from_text(
        "dynamic (float[N, 8] x) => (float[N, 8] y) {"
        " codes, scale, zero = DynamicQuantizeLinear(x)  y = DequantizeLinear(codes, scale, zero) }"
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for seed, shift in ((0, 0.0), (1, 3.0), (2, -3.0)):
        x = (np.random.default_rng(seed).normal(size=(50, 8)) + shift).astype(np.float32)
        expected = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(FakeDynamicUint8()(torch.from_numpy(x)).numpy(), expected, atol=1e-6)
