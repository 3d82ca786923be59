"""Operators that move elements about, and those that compute with shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tritonsmith.train.node import Node, Operation
from tritonsmith.train.resize import build_resize
from tritonsmith.train.tensors import tensor_from_onnx


def _build_reshape(node: Node) -> Operation:
    keeps_zero = bool(node.integer("allowzero", 0))

    def reshape(x: Tensor, shape: Tensor) -> Tensor:
        sizes: list[int] = shape.tolist()
        if not keeps_zero:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        return x.reshape(sizes)

    return reshape


def _build_transpose(node: Node) -> Operation:
    order = node.integers("perm")
    return lambda x: x.permute(order or list(range(x.ndim))[::-1])


def _build_flatten(node: Node) -> Operation:
    axis = node.integer("axis", 1)

    def flatten(x: Tensor) -> Tensor:
        rows = int(np.prod(x.shape[: axis if axis >= 0 else axis + x.ndim], dtype=np.int64))
        return x.reshape(rows, x.numel() // rows if rows else 0)

    return flatten


def _build_concat(node: Node) -> Operation:
    axis = node.integer("axis", 0)
    return lambda *values: torch.cat(values, axis)


def _build_split(node: Node) -> Operation:
    axis, parts = node.integer("axis", 0), len(node.outputs)

    def split(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        each: int | list[int] = -(-x.shape[axis] // parts) if sizes is None else sizes.tolist()
        return tuple(torch.split(x, each, axis))

    return split


def _build_slice(node: Node) -> Operation:
    def cut(
        x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
    ) -> Tensor:
        firsts, lasts = starts.tolist(), ends.tolist()
        dims = list(range(len(firsts))) if axes is None else axes.tolist()
        strides = [1] * len(firsts) if steps is None else steps.tolist()
        for dim, first, last, stride in zip(dims, firsts, lasts, strides, strict=True):
            span = range(*slice(first, last, stride).indices(x.shape[dim]))
            if stride == 1:
                x = x.narrow(dim, span.start, len(span)) if len(span) < x.shape[dim] else x
            else:
                x = x.index_select(dim, torch.tensor(list(span), dtype=torch.int64, device=x.device))
        return x

    return cut


def _build_gather(node: Node) -> Operation:
    axis = node.integer("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        dim = axis % x.ndim
        if x.dtype == torch.uint16:  # PyTorch takes no rows of these
            return gather(x.int(), indices).to(x.dtype)
        rows = _counted_from_start(indices, x.shape[dim])
        if dim == 0 and x.ndim == 2:
            return functional.embedding(rows, x)
        taken = x.index_select(dim, rows.reshape(-1))
        return taken.reshape(*x.shape[:dim], *rows.shape, *x.shape[dim + 1 :])

    return gather


def _build_gather_elements(node: Node) -> Operation:
    axis = node.integer("axis", 0)
    return lambda x, indices: torch.gather(x, axis, _counted_from_start(indices, x.shape[axis]))


def _build_gather_nd(node: Node) -> Operation:
    shared = node.integer("batch_dims", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        places = []
        for axis in range(shared):
            view = [1] * (indices.ndim - 1)
            view[axis] = x.shape[axis]
            places.append(torch.arange(x.shape[axis], device=x.device).reshape(view))
        places += [
            _counted_from_start(part, x.shape[shared + i]) for i, part in enumerate(indices.unbind(-1))
        ]
        return x[tuple(places)]

    return gather


def _build_scatter_nd(node: Node) -> Operation:
    if node.text("reduction", "none") != "none":
        raise node.refusal(f"reduction {node.text('reduction', 'none')!r}")

    def scatter(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = tuple(_counted_from_start(part, x.shape[i]) for i, part in enumerate(indices.unbind(-1)))
        return torch.index_put(x, places, updates)

    return scatter


def _build_pad(node: Node) -> Operation:
    mode = node.text("mode", "constant")

    def pad(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        sizes: list[int] = pads.tolist()
        dims = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes.tolist()]
        pairs = dict(zip(dims, zip(sizes[: len(dims)], sizes[len(dims) :], strict=True), strict=True))
        if mode == "constant":
            flat = [size for dim in reversed(range(x.ndim)) for size in pairs.get(dim, (0, 0))]
            return functional.pad(x, flat, value=0.0 if value is None else value.item())
        for dim, pair in pairs.items():
            if pair != (0, 0):
                x = x.index_select(dim, _padded_places(x.shape[dim], pair, mode).to(x.device))
        return x

    return pad


def _padded_places(size: int, pair: tuple[int, int], mode: str) -> Tensor:
    """Where each element of a padded axis comes from; negative pads cut."""
    grown = (max(0, pair[0]), max(0, pair[1]))
    places = np.arange(size)
    if mode == "reflect":
        places = np.pad(places, grown, mode="reflect")
    elif mode == "edge":
        places = np.pad(places, grown, mode="edge")
    else:
        places = np.pad(places, grown, mode="wrap")
    first, last = max(0, -pair[0]), len(places) - max(0, -pair[1])
    return torch.from_numpy(places[first:last].copy())


def _build_unsqueeze(node: Node) -> Operation:
    def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.ndim + axes.numel()
        for axis in sorted(axis % rank for axis in axes.reshape(-1).tolist()):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def _build_squeeze(node: Node) -> Operation:
    def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(axes.reshape(-1).tolist()))

    return squeeze


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    both = np.broadcast_shapes(tuple(x.shape), tuple(shape.tolist()))
    return x.expand(both)


def _build_shape(node: Node) -> Operation:
    start, end = node.integer("start", 0), node.attributes.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


def _build_constant(node: Node) -> Operation:
    attributes = node.attributes
    if "value" in attributes:
        value = tensor_from_onnx(attributes["value"])
    elif "value_float" in attributes or "value_floats" in attributes:
        value = torch.tensor(attributes.get("value_float", attributes.get("value_floats")))
    elif "value_int" in attributes or "value_ints" in attributes:
        value = torch.tensor(attributes.get("value_int", attributes.get("value_ints")), dtype=torch.int64)
    else:
        raise node.refusal(f"a constant of {', '.join(attributes)}")
    return lambda: value


def _build_constant_of_shape(node: Node) -> Operation:
    given = node.attributes.get("value")
    value = torch.zeros(1) if given is None else tensor_from_onnx(given)
    return lambda shape: torch.full(shape.tolist(), value.item(), dtype=value.dtype, device=shape.device)


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def _build_trilu(node: Node) -> Operation:
    upper = node.integer("upper", 1)

    def trilu(x: Tensor, k: Tensor | None = None) -> Tensor:
        diagonal = 0 if k is None else int(k)
        return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)

    return trilu


def _build_one_hot(node: Node) -> Operation:
    axis = node.integer("axis", -1)

    def one_hot(indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        count = int(depth.reshape(()))
        rows = _counted_from_start(indices, count).unsqueeze(axis)
        view = [1] * rows.ndim
        view[axis] = count
        hits = rows == torch.arange(count, device=rows.device).reshape(view)
        return torch.where(hits, values[1], values[0])

    return one_hot


def _build_top_k(node: Node) -> Operation:
    axis, largest = node.integer("axis", -1), bool(node.integer("largest", 1))
    return lambda x, k: tuple(torch.topk(x, int(k.reshape(())), axis, largest))


def _build_depth_to_space(node: Node) -> Operation:
    block, mode = node.integer("blocksize", 1), node.text("mode", "DCR")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        each = c // block**2
        if mode == "DCR":
            x = x.reshape(n, block, block, each, h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            x = x.reshape(n, each, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(n, each, h * block, w * block)

    return run


def _build_space_to_depth(node: Node) -> Operation:
    block = node.integer("blocksize", 1)

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(n, c * block**2, h // block, w // block)

    return run


def _counted_from_start(indices: Tensor, size: int) -> Tensor:
    """Indices of int64, those from the end turned round."""
    return torch.where(indices < 0, indices + size, indices).to(torch.int64)


SHAPES: Mapping[str, Callable[[Node], Any]] = {
    "Concat": _build_concat,
    "Constant": _build_constant,
    "ConstantOfShape": _build_constant_of_shape,
    "DepthToSpace": _build_depth_to_space,
    "Expand": lambda _: _expand,
    "Flatten": _build_flatten,
    "Gather": _build_gather,
    "GatherElements": _build_gather_elements,
    "GatherND": _build_gather_nd,
    "OneHot": _build_one_hot,
    "Pad": _build_pad,
    "Range": lambda _: _range,
    "Reshape": _build_reshape,
    "Resize": build_resize,
    "ScatterND": _build_scatter_nd,
    "Shape": _build_shape,
    "Size": lambda _: lambda x: torch.tensor(x.numel(), dtype=torch.int64, device=x.device),
    "Slice": _build_slice,
    "SpaceToDepth": _build_space_to_depth,
    "Split": _build_split,
    "Squeeze": _build_squeeze,
    "Tile": lambda _: lambda x, repeats: x.repeat(*repeats.tolist()),
    "TopK": _build_top_k,
    "Transpose": _build_transpose,
    "Trilu": _build_trilu,
    "Unsqueeze": _build_unsqueeze,
}
