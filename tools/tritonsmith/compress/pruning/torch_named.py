"""A PyTorch module by the names of its ONNX tensors, and the gradients by which its channels are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from tritonsmith.compress.steps import Trained
from tritonsmith.errors import SamplesError
from tritonsmith.ingest.torch_export import named_tensors
from tritonsmith.ingest.torch_module import TorchModule

if TYPE_CHECKING:
    from tritonsmith.compress.chain import Material

SAMPLES, BATCH = 512, 32


class ByName(torch.nn.Module):
    """A module that takes and gives tensors by the names that its ONNX model has."""

    def __init__(self, loaded: TorchModule, *, outputs: Sequence[str]) -> None:
        super().__init__()
        self.module = loaded.module
        self._loaded = loaded
        self._outputs = tuple(outputs)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = self._loaded.example.call(self.module, inputs)
        tensors = named_tensors(self._loaded.source, result).values()
        return dict(zip(self._outputs, tensors, strict=True))


def gradients(loaded: TorchModule, material: Material, *, seed: int) -> Iterator[None]:
    """Leave in the parameters the gradients of one batch after another, for first-order Taylor terms.

    With labels the loss is theirs. Without, it is the outputs times random signs: the expected square of its
    change is the squared change of the outputs.

    Raises:
        SamplesError: there are neither training nor calibration data.
        CompressionError: the data cannot be fed in batches.
    """
    from tritonsmith.train.answers import Answers
    from tritonsmith.train.data import check_data, find_padding, read_all
    from tritonsmith.train.lessons import plan_lessons

    data = material.training or material.calibration
    if data is None:
        raise SamplesError("importance=taylor needs data", expected="training or calibration samples")
    check_data(data, material.teacher)
    rows = np.random.default_rng(seed).permutation(data.count)[:SAMPLES]
    some = replace(
        data,
        arrays={name: array[rows] for name, array in data.arrays.items()},
        target=None if data.target is None else data.target[rows],
    )
    module = ByName(loaded, outputs=[spec.name for spec in material.teacher.outputs]).eval()
    module.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    lessons = None
    for batch in read_all(some, BATCH, find_padding(some, material.teacher)):
        module.zero_grad(set_to_none=True)
        outputs = module(batch.inputs)
        if some.target is None:
            floats = [output for output in outputs.values() if output.is_floating_point()]
            signs = [torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1 for output in floats]
            loss = torch.stack([(o * s).sum() for o, s in zip(floats, signs, strict=True)]).sum()
        else:
            if lessons is None:
                lessons = plan_lessons(
                    Trained(logits=0.0),
                    material.teacher,
                    some,
                    label_weight=1.0,
                    metric=material.metric,
                    probe={name: output.detach().numpy() for name, output in outputs.items()},
                )
            nothing = Answers(arrays={}, padded=frozenset())
            loss = lessons.loss(outputs, nothing, torch.nn.ModuleDict(), batch)
        torch.autograd.backward(loss)
        yield
