"""How much each channel of a group matters: by its weights, or by the loss that its removal would cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith.artifact import Artifact
from tritonsmith.compress.pruning.groups import Group, Plan
from tritonsmith.compress.steps import Trained
from tritonsmith.errors import CompressionError
from tritonsmith.metrics import Metric
from tritonsmith.samples import Samples

if TYPE_CHECKING:
    import torch

    from tritonsmith.train.lessons import Lessons

Scores = Mapping[str, NDArray[np.float64]]  # group name -> [channels], higher matters more

TAYLOR_SAMPLES = 512
TAYLOR_BATCH = 8  # small, so that terms of opposite sign do not cancel before they are squared


def score_by_magnitude(model: onnx.ModelProto, plan: Plan) -> Scores:
    """The L2 norm of all matrices and kernels of a channel, over the mean of its group.

    The norm is that of Li et al., 2017 (arXiv 1608.08710), over all weights that are coupled, as in DepGraph
    (Fang et al., arXiv 2301.12900); the mean makes layers comparable. Biases and scales are left out.
    """
    squares = {}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in {member.tensor for group in plan.prunable for member in group.members}:
        squares[name] = onnx.numpy_helper.to_array(tensors[name]).astype(np.float64) ** 2
    scores = {}
    for group in plan.prunable:
        norms = np.sqrt(_sum_members(group, squares, matrices_only=True))
        scores[group.name] = norms / max(norms.mean(), np.finfo(np.float64).tiny)
    return scores


def score_by_taylor(
    model: onnx.ModelProto,
    plan: Plan,
    artifact: Artifact,
    data: Samples,
    *,
    metric: Metric | None = None,
    seed: int = 7,
    say: Callable[[str], None] = lambda _: None,
) -> Scores:
    """The squared first-order change of the loss where a channel is removed, mean over batches.

    That is Molchanov et al., 2019 (arXiv 1906.10771): the gradient times the weights, summed over the weights
    that read the channel, squared. With labels the loss is theirs. Without, it is the outputs times random
    signs, whose expected square is the squared change of the outputs: what the teacher's answers would say,
    had their own loss a gradient where the model is still the teacher.

    Raises:
        CompressionError: the graph has an operator that has no gradient here.
        SamplesError: labels that no output fits.
    """
    import torch
    from torch import nn

    from tritonsmith.train.answers import Answers
    from tritonsmith.train.data import check_data, find_padding, read_all
    from tritonsmith.train.module import OnnxModule

    check_data(data, artifact)
    module = OnnxModule(model)
    some = _first(data, TAYLOR_SAMPLES)
    torch.manual_seed(seed)
    total = {group.name: np.zeros(group.size) for group in plan.prunable}
    lessons: Lessons | None = None
    nothing = Answers(arrays={}, padded=frozenset())
    count = 0
    for batch in read_all(some, TAYLOR_BATCH, find_padding(some, artifact)):
        module.zero_grad(set_to_none=True)
        outputs = module(batch.inputs)
        if some.target is None:
            loss = _signed_sum(outputs)
        else:
            lessons = lessons or _plan_lessons(outputs, artifact, some, metric)
            loss = lessons.loss(outputs, nothing, nn.ModuleDict(), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        terms = {
            name: (weight * weight.grad).detach().numpy().astype(np.float64)
            for name, weight in module.weights.items()
            if weight.grad is not None
        }
        for group in plan.prunable:
            total[group.name] += _sum_members(group, terms, matrices_only=False) ** 2
        count += 1
    say(f"importance by first-order terms of {some.count} samples")
    if not any(scores.any() for scores in total.values()):
        raise CompressionError(
            "no channel has a gradient", found="zeros throughout", fix="prune with importance=magnitude"
        )
    return {name: scores / count for name, scores in total.items()}


def _sum_members(
    group: Group, values: Mapping[str, NDArray[np.float64]], *, matrices_only: bool
) -> NDArray[np.float64]:
    """Sums `[channels]` over members: matrices for magnitude, what reads the channel for gradients."""
    known = [member for member in group.members if member.tensor in values]
    if matrices_only:
        chosen = [member for member in known if values[member.tensor].ndim > 1] or known
    else:
        chosen = [member for member in known if member.reads] or known
    sums = np.zeros(group.size)
    for member in chosen:
        array = values[member.tensor]
        others = tuple(axis for axis in range(array.ndim) if axis != member.axis)
        ours = member.channels >= 0
        sums += np.bincount(member.channels[ours], array.sum(axis=others)[ours], minlength=group.size)
    return sums


def _first(data: Samples, count: int) -> Samples:
    """Samples spread evenly over the data, in its order."""
    if data.count <= count:
        return data
    rows = np.linspace(0, data.count - 1, count).astype(np.int64)
    return Samples(
        path=data.path,
        sha256=data.sha256,
        arrays={name: array[rows] for name, array in data.arrays.items()},
        target=None if data.target is None else data.target[rows],
    )


def _plan_lessons(
    outputs: Mapping[str, torch.Tensor], artifact: Artifact, data: Samples, metric: Metric | None
) -> Lessons:
    """The loss of the labels alone, as training has it."""
    from tritonsmith.train.lessons import plan_lessons

    probe = {name: output.detach().numpy() for name, output in outputs.items()}
    only_labels = Trained(labels=1.0, logits=0.0)
    return plan_lessons(only_labels, artifact, data, label_weight=1.0, metric=metric, probe=probe)


def _signed_sum(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch

    floats = [output for output in outputs.values() if output.is_floating_point()]
    signs = [torch.randint(0, 2, output.shape).to(output.dtype) * 2 - 1 for output in floats]
    return torch.stack([(output * sign).sum() for output, sign in zip(floats, signs, strict=True)]).sum()
