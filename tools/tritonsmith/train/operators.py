"""What each ONNX operator computes, opsets 13 to 21: a table from its name to a builder.

A builder reads a node's attributes once and returns the operation. Layers and what moves elements about
are in the files beside this one; here is arithmetic, element by element and over axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from tritonsmith.train.layers import LAYERS
from tritonsmith.train.node import Node, Operation
from tritonsmith.train.rounding import ROUNDING
from tritonsmith.train.shapes import SHAPES
from tritonsmith.train.tensors import TYPES

Builder: TypeAlias = Callable[[Node], Operation]


def _plain(operation: Operation) -> Builder:
    """For an operator that has no attributes."""
    return lambda _: operation


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def _mean(*values: Tensor) -> Tensor:
    return reduce(torch.add, values) / len(values)


def _build_mod(node: Node) -> Operation:
    return torch.fmod if node.integer("fmod", 0) else torch.remainder


def _build_clip(node: Node) -> Operation:
    def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        return x if low is None and high is None else torch.clamp(x, low, high)

    return clip


def _build_cast(node: Node) -> Operation:
    wanted = TYPES.get(node.integer("to", 0))
    if wanted is None:
        raise node.refusal(f"a cast to data type {node.integer('to', 0)}")
    return lambda x: x.to(wanted)


def _build_softmax(node: Node) -> Operation:
    axis = node.integer("axis", -1)
    return lambda x: functional.softmax(x, axis)


def _build_log_softmax(node: Node) -> Operation:
    axis = node.integer("axis", -1)
    return lambda x: functional.log_softmax(x, axis)


def _build_gelu(node: Node) -> Operation:
    approximate = node.text("approximate", "none")
    return lambda x: functional.gelu(x, approximate=approximate)


def _build_leaky_relu(node: Node) -> Operation:
    alpha = node.number("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


def _build_elu(node: Node) -> Operation:
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


def _build_selu(node: Node) -> Operation:
    alpha = node.number("alpha", 1.67326319217681884765625)
    gamma = node.number("gamma", 1.05070102214813232421875)
    return lambda x: gamma * functional.elu(x, alpha)


def _build_celu(node: Node) -> Operation:
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.celu(x, alpha)


def _build_hard_sigmoid(node: Node) -> Operation:
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0)


def _build_thresholded_relu(node: Node) -> Operation:
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.threshold(x, alpha, 0.0)


def _build_prelu(node: Node) -> Operation:
    return lambda x, slope: torch.where(x >= 0, x, slope * x)


def _build_dropout(node: Node) -> Operation:
    if node.gives(1):
        raise node.refusal("its mask is read")
    return lambda x, *_: x


def _build_is_inf(node: Node) -> Operation:
    if not (node.integer("detect_negative", 1) and node.integer("detect_positive", 1)):
        raise node.refusal("infinity of one sign alone")
    return torch.isinf


def _build_cumsum(node: Node) -> Operation:
    exclusive, backward = node.integer("exclusive", 0), node.integer("reverse", 0)

    def cumsum(x: Tensor, axis: Tensor) -> Tensor:
        dim = int(axis)
        if backward:
            x = x.flip(dim)
        total = torch.cumsum(x, dim, dtype=x.dtype)
        if exclusive:
            total = total - x
        return total.flip(dim) if backward else total

    return cumsum


def _build_arg(select: Callable[..., Tensor]) -> Builder:
    def build(node: Node) -> Operation:
        axis, keep = node.integer("axis", 0), bool(node.integer("keepdims", 1))
        if node.integer("select_last_index", 0):
            raise node.refusal("select_last_index")
        return lambda x: select(x, dim=axis, keepdim=keep)

    return build


def _build_reduce(reduction: Callable[[Tensor, list[int], bool], Tensor]) -> Builder:
    """Axes are an attribute before opset 18 (ReduceSum: 13) and an input since; none mean all."""

    def build(node: Node) -> Operation:
        given, keep = node.integers("axes"), bool(node.integer("keepdims", 1))
        none_is_nothing = bool(node.integer("noop_with_empty_axes", 0))

        def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
            dims = given if axes is None else axes.tolist()
            if not dims and none_is_nothing:
                return x
            return reduction(x, dims or list(range(x.ndim)), keep)

        return run

    return build


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((dim % x.ndim for dim in dims), reverse=True):
        x = torch.prod(x, dim, keepdim=keep)
    return x


REDUCTIONS: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, dims, keep: torch.mean(x, dims, keep),
    "ReduceSum": lambda x, dims, keep: torch.sum(x, dims, keep, dtype=x.dtype),
    "ReduceMax": lambda x, dims, keep: torch.amax(x, dims, keep),
    "ReduceMin": lambda x, dims, keep: torch.amin(x, dims, keep),
    "ReduceL1": lambda x, dims, keep: torch.sum(torch.abs(x), dims, keep),
    "ReduceL2": lambda x, dims, keep: torch.sqrt(torch.sum(x * x, dims, keep)),
    "ReduceSumSquare": lambda x, dims, keep: torch.sum(x * x, dims, keep),
    "ReduceLogSumExp": lambda x, dims, keep: torch.logsumexp(x, dims, keep),
    "ReduceProd": _product,
}

PLAIN: Mapping[str, Operation] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Add": torch.add,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Div": _divide,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "Max": lambda *values: reduce(torch.maximum, values),
    "Mean": _mean,
    "Min": lambda *values: reduce(torch.minimum, values),
    "Mish": functional.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": _power,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Sum": lambda *values: reduce(torch.add, values),
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}

ARITHMETIC: Mapping[str, Builder] = {
    "ArgMax": _build_arg(torch.argmax),
    "ArgMin": _build_arg(torch.argmin),
    "Cast": _build_cast,
    "CastLike": lambda _: lambda x, like: x.to(like.dtype),
    "Celu": _build_celu,
    "Clip": _build_clip,
    "CumSum": _build_cumsum,
    "Dropout": _build_dropout,
    "Elu": _build_elu,
    "Gelu": _build_gelu,
    "HardSigmoid": _build_hard_sigmoid,
    "IsInf": _build_is_inf,
    "LeakyRelu": _build_leaky_relu,
    "LogSoftmax": _build_log_softmax,
    "Mod": _build_mod,
    "PRelu": _build_prelu,
    "Selu": _build_selu,
    "Softmax": _build_softmax,
    "ThresholdedRelu": _build_thresholded_relu,
}

OPERATORS: Mapping[str, Builder] = {
    **{name: _plain(operation) for name, operation in PLAIN.items()},
    **{name: _build_reduce(reduction) for name, reduction in REDUCTIONS.items()},
    **ARITHMETIC,
    **LAYERS,
    **SHAPES,
    **ROUNDING,
}
