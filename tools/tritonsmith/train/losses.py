"""What a student is told by labels and by a teacher. Every loss is a mean over the rows of a batch.

A mask `[B, L]` is 1 for tokens and 0 for padding; where a tensor has that axis, padding counts nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST = 1e-30  # of a probability before its logarithm: float32 holds it


def label_loss(output: Tensor, labels: Tensor, *, probabilities: bool, mask: Tensor | None) -> Tensor:
    """Cross-entropy of classes `[B]` (or `[B, L]`) on an output `[B, C]` (or `[B, L, C]`).

    An output of one number a row is that of two classes: `[B]` or `[B, 1]`.
    """
    if output.ndim == 1 or output.shape[-1] == 1:
        chance, wanted = output.reshape(labels.shape), labels.to(output.dtype)
        if probabilities:
            return functional.binary_cross_entropy(chance.clamp(1e-7, 1 - 1e-7), wanted)
        return functional.binary_cross_entropy_with_logits(chance, wanted)
    each = functional.nll_loss(
        _log_probabilities(output, probabilities).flatten(0, -2), labels.flatten(), reduction="none"
    )
    return masked_mean(each.reshape(labels.shape), mask)


def value_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error to the labels of a regression."""
    return functional.mse_loss(output, target.to(output.dtype).reshape(output.shape))


def logits_loss(
    output: Tensor, answer: Tensor, *, probabilities: bool, temperature: float, mask: Tensor | None
) -> Tensor:
    """What the teacher answered: KL at a temperature for probabilities, else the mean squared error.

    The KL is that of Hinton et al., 2015 (arXiv 1503.02531), times the temperature squared, so that its
    gradients keep their size.
    """
    if not probabilities:
        error = (output - answer).square()
        return masked_mean(error.flatten(2).mean(2) if error.ndim > 2 else error, mask)
    ours, theirs = (
        functional.log_softmax(_log_probabilities(side, True) / temperature, -1) for side in (output, answer)
    )
    each = (theirs.exp() * (theirs - ours)).sum(-1)
    return masked_mean(each, mask) * temperature**2


def hidden_loss(state: Tensor, answer: Tensor, *, mask: Tensor | None) -> Tensor:
    """Mean squared error of hidden states, in units of the teacher's variance, so that layers weigh alike."""
    spread = answer.var().clamp_min(1e-12)
    error = (state - answer).square() / spread
    return masked_mean(error.flatten(2).mean(2) if error.ndim > 2 else error, mask)


def embedding_loss(output: Tensor, answer: Tensor) -> Tensor:
    """Mean cosine distance of embeddings `[B, D]`."""
    return (1 - functional.cosine_similarity(output, answer, dim=-1)).mean()


def pool(output: Tensor, axes: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """The mean over the free axes, without padding where the mask has that axis: `[B, D]`."""
    if mask is not None and axes == (1,) and output.shape[1] == mask.shape[1]:
        weights = mask.to(output.dtype).reshape(*mask.shape, *[1] * (output.ndim - 2))
        return ((output * weights).sum(1) / weights.sum(1).clamp_min(1.0)).flatten(1)
    return (output.mean(axes) if axes else output).flatten(1)


def masked_mean(each: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of `[B]` or `[B, L]`; with a mask of that shape, over what it shows."""
    if mask is None or each.shape != mask.shape:
        return each.mean()
    weights = (mask != 0).to(each.dtype)
    return (each * weights).sum() / weights.sum().clamp_min(1.0)


def _log_probabilities(output: Tensor, probabilities: bool) -> Tensor:
    return torch.log(output.clamp_min(SMALLEST)) if probabilities else functional.log_softmax(output, -1)
