"""Operators with weights, pooling, and normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tritonsmith.train.node import Node, Operation

CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
MAXIMA: Mapping[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
MEANS: Mapping[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


def _build_conv(node: Node) -> Operation:
    group = node.integer("group", 1)

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = x.ndim - 2
        kernel = list(weight.shape[2:])
        strides, dilations = _spread(node, "strides", rank), _spread(node, "dilations", rank)
        begins, ends = _paddings(node, x.shape[2:], kernel, strides, dilations)
        if begins != ends:
            x, begins = functional.pad(x, _torch_pads(begins, ends)), [0] * rank
        return CONVOLUTIONS[rank](x, weight, bias, strides, begins, dilations, group)

    return conv


def _build_conv_transpose(node: Node) -> Operation:
    group, auto = node.integer("group", 1), node.text("auto_pad", "NOTSET")
    wanted = node.integers("output_shape")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = x.ndim - 2
        strides, dilations = _spread(node, "strides", rank), _spread(node, "dilations", rank)
        extra = node.integers("output_padding") or [0] * rank
        whole = [
            stride * (size - 1) + more + dilation * (kernel - 1) + 1
            for size, stride, more, dilation, kernel in zip(
                x.shape[2:], strides, extra, dilations, weight.shape[2:], strict=True
            )
        ]
        sizes = wanted and wanted[-rank:]
        if sizes is None and auto in ("SAME_UPPER", "SAME_LOWER"):
            sizes = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        if sizes is None:
            pads = node.integers("pads") or [0] * (2 * rank)
            begins, ends = pads[:rank], pads[rank:]
        else:
            totals = [max(0, have - want) for have, want in zip(whole, sizes, strict=True)]
            halves, rests = [total // 2 for total in totals], [total - total // 2 for total in totals]
            begins, ends = (halves, rests) if auto == "SAME_UPPER" else (rests, halves)
        y = _transposed(x, weight, bias, strides, group, dilations, whole)
        return functional.pad(y, _torch_pads([-pad for pad in begins], [-pad for pad in ends]))

    return run


def _transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: list[int],
    group: int,
    dilations: list[int],
    whole: list[int],
) -> Tensor:
    """The uncropped result; PyTorch wants an output padding below stride, ONNX takes any."""
    y = TRANSPOSED[len(strides)](x, weight, None, strides, 0, 0, group, dilations)
    missing = [want - have for want, have in zip(whole, y.shape[2:], strict=True)]
    y = functional.pad(y, _torch_pads([0] * len(missing), missing))
    return y if bias is None else y + bias.reshape(-1, *[1] * len(strides))


def _build_gemm(node: Node) -> Operation:
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    flip_a, flip_b = node.integer("transA", 0), node.integer("transB", 0)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.t() if flip_a else a
        product = functional.linear(a, b if flip_b else b.t())
        product = product if alpha == 1.0 else alpha * product
        if c is None:
            return product
        return product + (c if beta == 1.0 else beta * c)

    return gemm


def _build_einsum(node: Node) -> Operation:
    equation = node.text("equation", "")
    return lambda *values: torch.einsum(equation, *values)


def _build_max_pool(node: Node) -> Operation:
    if node.gives(1):
        raise node.refusal("its indices are read")
    kernel = node.integers("kernel_shape") or []

    def pool(x: Tensor) -> Tensor:
        rank = x.ndim - 2
        strides, dilations = _spread(node, "strides", rank), _spread(node, "dilations", rank)
        begins, ends = _paddings(node, x.shape[2:], kernel, strides, dilations)
        more = _ceil_pads(node, x.shape[2:], kernel, strides, dilations, begins, ends)
        ends = [end + extra for end, extra in zip(ends, more, strict=True)]
        if any(begins) or any(ends):
            x = functional.pad(x, _torch_pads(begins, ends), value=-math.inf)
        return MAXIMA[rank](x, kernel, strides, 0, dilations)

    return pool


def _build_average_pool(node: Node) -> Operation:
    kernel = node.integers("kernel_shape") or []
    counts_pads = bool(node.integer("count_include_pad", 0))
    if any(step != 1 for step in node.integers("dilations") or []):
        raise node.refusal("dilations")

    def pool(x: Tensor) -> Tensor:
        rank = x.ndim - 2
        strides, dilations = _spread(node, "strides", rank), [1] * rank
        begins, ends = _paddings(node, x.shape[2:], kernel, strides, dilations)
        more = _ceil_pads(node, x.shape[2:], kernel, strides, dilations, begins, ends)
        if not (any(begins) or any(ends) or any(more)):
            return MEANS[rank](x, kernel, strides)
        # The share of each window that counts: 1 for the elements, and for the pads where they count.
        ones = x.new_ones((1, 1, *x.shape[2:]))
        counted = functional.pad(ones, _torch_pads(begins, ends), value=1.0 if counts_pads else 0.0)
        counted = functional.pad(counted, _torch_pads([0] * rank, more))
        ends = [end + extra for end, extra in zip(ends, more, strict=True)]
        means = MEANS[rank](functional.pad(x, _torch_pads(begins, ends)), kernel, strides)
        return means / MEANS[rank](counted, kernel, strides)

    return pool


def _build_global(reduction: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Node], Operation]:
    return lambda _: lambda x: reduction(x, list(range(2, x.ndim)), True)


def _build_batch_norm(node: Node) -> Operation:
    if node.integer("training_mode", 0):
        raise node.refusal("training_mode = 1")
    epsilon = node.number("epsilon", 1e-5)

    def norm(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)

    return norm


def _build_layer_norm(node: Node) -> Operation:
    axis, epsilon = node.integer("axis", -1), node.number("epsilon", 1e-5)

    def norm(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return functional.layer_norm(x, shape, scale, bias, epsilon)
        y = functional.layer_norm(x, shape, None, None, epsilon) * scale
        return y if bias is None else y + bias

    def norm_and_statistics(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        dims = list(range(axis % x.ndim, x.ndim))
        mean = x.mean(dims, keepdim=True)
        deviation = torch.rsqrt(x.var(dims, unbiased=False, keepdim=True) + epsilon)
        return norm(x, scale, bias), mean, deviation

    return norm_and_statistics if node.gives(1) or node.gives(2) else norm


def _build_instance_norm(node: Node) -> Operation:
    epsilon = node.number("epsilon", 1e-5)
    return lambda x, scale, bias: functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _build_group_norm(node: Node) -> Operation:
    """Scale and bias are one number a group up to opset 20, one a channel since."""
    groups, epsilon = node.integer("num_groups", 1), node.number("epsilon", 1e-5)

    def norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if node.opset < 21:
            each = x.shape[1] // groups
            scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
        return functional.group_norm(x, groups, scale, bias, epsilon)

    return norm


def _build_lp_norm(node: Node) -> Operation:
    axis, power = node.integer("axis", -1), node.integer("p", 2)
    return lambda x: functional.normalize(x, float(power), axis)


def _spread(node: Node, name: str, rank: int) -> list[int]:
    return node.integers(name) or [1] * rank


def _paddings(
    node: Node, sizes: Sequence[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """What is added before and after each axis."""
    auto, rank = node.text("auto_pad", "NOTSET"), len(kernel)
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if auto == "NOTSET":
        pads = node.integers("pads") or [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    totals = [
        max(0, (-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size)
        for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    halves, rests = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (halves, rests) if auto == "SAME_UPPER" else (rests, halves)


def _ceil_pads(
    node: Node,
    sizes: Sequence[int],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    begins: list[int],
    ends: list[int],
) -> list[int]:
    """What ceil_mode adds after each axis; a window that would begin behind the input is left out."""
    more = []
    for size, length, stride, dilation, begin, end in zip(
        sizes, kernel, strides, dilations, begins, ends, strict=True
    ):
        room = size + begin + end - (length - 1) * dilation - 1
        steps = -(-room // stride) if node.integer("ceil_mode", 0) else room // stride
        if steps * stride >= size + begin:
            steps -= 1
        more.append(max(0, steps * stride - room))
    return more


def _torch_pads(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """PyTorch names the last axis first."""
    return [pad for pair in reversed(list(zip(begins, ends, strict=True))) for pad in pair]


LAYERS: Mapping[str, Callable[[Node], Any]] = {
    "AveragePool": _build_average_pool,
    "BatchNormalization": _build_batch_norm,
    "Conv": _build_conv,
    "ConvTranspose": _build_conv_transpose,
    "Einsum": _build_einsum,
    "Gemm": _build_gemm,
    "GlobalAveragePool": _build_global(lambda x, dims, keep: torch.mean(x, dims, keep)),
    "GlobalMaxPool": _build_global(lambda x, dims, keep: torch.amax(x, dims, keep)),
    "GroupNormalization": _build_group_norm,
    "InstanceNormalization": _build_instance_norm,
    "LayerNormalization": _build_layer_norm,
    "LpNormalization": _build_lp_norm,
    "MatMul": lambda _: torch.matmul,
    "MaxPool": _build_max_pool,
}
