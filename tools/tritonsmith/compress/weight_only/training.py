"""Quantization-aware training of weights that will be stored in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from tritonsmith.compress import steps
from tritonsmith.compress.chain import Material
from tritonsmith.compress.weight_only.blocks import Grid
from tritonsmith.compress.weight_only.targets import Target
from tritonsmith.errors import MissingExtraError

if TYPE_CHECKING:
    from tritonsmith.train.loop import TrainReport


def train_on_grids(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    grids: Mapping[str, Grid],
    spec: steps.QuantizeWeights,
    material: Material,
    *,
    checkpoint: Path,
    say: Callable[[str], None],
) -> TrainReport:
    """Train the float weights of `model`, in place, to answer as the teacher does once they are rounded.

    In training each weight of `targets` is rounded to its grid, which stays where it is; with
    `arithmetic = "int8"` what its products multiply is rounded to uint8, too.

    Raises:
        CompressionError: an operator without a counterpart in PyTorch, or data that do not fit.
        SamplesError: neither training nor calibration data.
        MissingExtraError: PyTorch is not installed.
    """
    try:
        from tritonsmith.train.fake_rounding import FakeDynamicUint8, FakeRounding
        from tritonsmith.train.loop import train
        from tritonsmith.train.module import OnnxModule, Wrap
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("nothing can be trained", package="torch", extra="train") from error
    wraps: dict[str, Wrap] = {target.weight: FakeRounding(grids[target.weight]) for target in targets}
    if spec.arithmetic == "int8":
        products = {name for target in targets if not target.is_table for name in target.nodes}
        inputs = dict.fromkeys(node.input[0] for node in model.graph.node if node.name in products)
        wraps |= {name: FakeDynamicUint8() for name in inputs}
    module = OnnxModule(model, wraps=wraps)
    report = train(module, material, spec, teacher=material.teacher, checkpoint=checkpoint, say=say)
    module.write_weights(model)
    return report
