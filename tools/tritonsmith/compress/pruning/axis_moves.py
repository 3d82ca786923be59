"""How channel ids pass through operators that move, join and pick elements; see `axes.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith.compress.pruning.axes import (
    Ids,
    Kept,
    Rewrite,
    Walk,
    attribute_of,
    count_of,
    is_unread,
    label_of,
    listed,
)

PACKED_QKV = 3  # query, key and value made by one product


def concatenate(walk: Walk, node: onnx.NodeProto) -> None:
    out = walk.shape(node.output[0], node)
    axis = attribute_of(node, "axis", 0) % len(out)
    operands = [walk.read(name, node) for name in node.input]
    sizes = [walk.shape(name, node)[axis] for name in node.input]
    result: list[Ids | None] = list(operands[0])
    for labels in operands[1:]:
        for place in range(len(out)):
            if place != axis:
                result[place] = walk.tie(result[place], labels[place], node)
    if any(labels[axis] is not None for labels in operands):
        reason = f"part of what {label_of(node)} joins must stay"
        parts = [
            walk.stay(size, reason) if labels[axis] is None else labels[axis]
            for labels, size in zip(operands, sizes, strict=True)
        ]
        result[axis] = np.concatenate([part for part in parts if part is not None])
    walk.write(node.output[0], result)


def split(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    axis = attribute_of(node, "axis", 0) % len(labels)
    ids = labels[axis]
    start = 0
    parts: list[Ids] = []
    for name in node.output:
        size = walk.shape(name, node)[axis]
        part = None if ids is None or size == 1 else ids[start : start + size]
        if ids is not None:
            parts.append(ids[start : start + size])
            if size == 1:
                walk.freeze(parts[-1], f"{label_of(node)} takes it alone")
        start += size
        walk.write(name, [part if place == axis else label for place, label in enumerate(labels)])
    if parts:
        target = "split" if walk.opset < 13 else 1
        walk.rewrites.append(
            Rewrite(
                node=walk.index,
                target=target,
                element=None,
                value=lambda kept: np.array([kept(part).sum() for part in parts], dtype=np.int64),
            )
        )


def slice_axes(walk: Walk, node: onnx.NodeProto) -> None:
    labels = list(walk.read(node.input[0], node))
    shape, out = walk.shape(node.input[0], node), walk.shape(node.output[0], node)
    starts, ends = (listed(walk, node, place, name) for place, name in ((1, "starts"), (2, "ends")))
    axes = listed(walk, node, 3, "axes")
    steps = listed(walk, node, 4, "steps")
    unknown = starts is None or ends is None or is_unread(node, 3, walk) or is_unread(node, 4, walk)
    if starts is None or ends is None or unknown:
        walk.freeze_all(node, f"{label_of(node)} takes a part that is computed")
        return
    for place, axis in enumerate(axes if axes is not None else range(len(starts))):
        axis %= len(shape)
        ids = labels[axis]
        if ids is None or out[axis] == shape[axis]:
            continue
        window = slice(starts[place], ends[place], steps[place] if steps else 1)
        fixed = len(node.input) > 1 and walk.is_constant(node.input[1]) and walk.is_constant(node.input[2])
        if window.step not in (1, None) or not fixed or out[axis] == 1:
            walk.freeze(ids, f"{label_of(node)} takes a part that cannot be rewritten")
            labels[axis] = None
            continue
        first, last, _ = window.indices(shape[axis])
        labels[axis] = ids[first:last]
        for target, stop in ((1, first), (2, last)):
            walk.rewrites.append(
                Rewrite(node=walk.index, target=target, element=place, value=count_of(ids[:stop]))
            )
    walk.write(node.output[0], labels)


def gather(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    axis = attribute_of(node, "axis", 0) % len(labels)
    places = walk.shape(node.input[1], node)
    ids = labels[axis]
    taken: list[Ids | None] = [None] * len(places)
    if ids is not None:
        constant = node.input[1] in walk.shapes.values and walk.is_constant(node.input[1])
        if constant and len(places) == 1 and places[0] > 1:
            indices = walk.shapes.values[node.input[1]] % len(ids)
            taken = [ids[indices]]
            walk.rewrites.append(
                Rewrite(node=walk.index, target=1, element=None, value=_renumber(ids, indices))
            )
        else:
            walk.freeze(ids, f"{label_of(node)} picks from it")
    walk.write(node.output[0], (*labels[:axis], *taken, *labels[axis + 1 :]))
    if walk.is_constant(node.input[0]) and not walk.is_constant(node.input[1]):
        for label in (*labels[:axis], *labels[axis + 1 :]):
            walk.produce(node, "neurons", label)


def _renumber(ids: Ids, indices: NDArray[Any]) -> Callable[[Kept], NDArray[Any]]:
    def value(kept: Kept) -> NDArray[Any]:
        stays = kept(ids)
        fresh = np.cumsum(stays) - 1
        return np.asarray(fresh[indices[stays[indices]]], dtype=np.int64)

    return value


def transpose(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    order = attribute_of(node, "perm", list(range(len(labels)))[::-1])
    walk.write(node.output[0], [labels[axis] for axis in order])


def reshape(walk: Walk, node: onnx.NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: ids by index arithmetic, in the smallest blocks that fit."""
    labels = walk.read(node.input[0], node)
    source, target = walk.shape(node.input[0], node), walk.shape(node.output[0], node)
    result: list[Ids | None] = [None] * len(target)
    for inner, outer in _blocks(source, target):
        labelled = [(axis, ids) for axis in inner if (ids := labels[axis]) is not None]
        if not labelled:
            continue
        if len(labelled) > 1:
            for _, ids in labelled:
                walk.freeze(ids, f"{label_of(node)} merges two axes of channels")
            continue
        axis, ids = labelled[0]
        view = [-1 if place == axis else 1 for place in inner]
        flat = np.broadcast_to(ids.reshape(view), [source[place] for place in inner])
        spread = flat.reshape([target[place] for place in outer])
        place = _varying(walk, node, spread, outer)
        ids = np.moveaxis(spread, place, 0).reshape(spread.shape[place], -1)
        walk.unions.join(ids, ids[:, :1])
        result[outer[place]] = np.ascontiguousarray(ids[:, 0])
        if node.op_type == "Reshape":
            _note_size(walk, node, outer[place], ids[:, 0])
    walk.write(node.output[0], result)


def _blocks(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of equal product in both shapes; axes of length 1 belong to none."""
    left = [axis for axis, size in enumerate(source) if size != 1]
    right = [axis for axis, size in enumerate(target) if size != 1]
    blocks = []
    while left and right:
        inner, outer = [left.pop(0)], [right.pop(0)]
        have, want = source[inner[0]], target[outer[0]]
        while have != want:
            if have < want:
                inner.append(left.pop(0))
                have *= source[inner[-1]]
            else:
                outer.append(right.pop(0))
                want *= target[outer[-1]]
        blocks.append((inner, outer))
    return blocks


def _varying(walk: Walk, node: onnx.NodeProto, spread: Ids, outer: list[int]) -> int:
    """The axis along which channels are told apart from here on; along the others they go together.

    Where several would do: the channels inside of the groups for a shuffle, else the groups: whole heads.
    """
    roots = walk.unions.find(spread)
    for place in range(spread.ndim):
        if (roots == np.take(roots, [0], axis=place)).all():
            continue
        others = tuple(other for other in range(spread.ndim) if other != place)
        first = roots[tuple(slice(0, 1) if other in others else slice(None) for other in range(spread.ndim))]
        if (roots == first).all():
            return place
    if spread.ndim > 1 and (spread.shape[0] == PACKED_QKV or _is_shuffle(walk, node, outer)):
        return 1
    return 0


def _is_shuffle(walk: Walk, node: onnx.NodeProto, outer: list[int]) -> bool:
    """Whether the split axes are swapped and merged again."""
    readers = walk.readers.get(node.output[0], ())
    if len(readers) != 1 or readers[0].op_type != "Transpose" or len(outer) != 2:
        return False
    order = list(attribute_of(readers[0], "perm", []))
    after = walk.readers.get(readers[0].output[0], ())
    swapped = bool(order) and order.index(outer[1]) + 1 == order.index(outer[0])
    return swapped and len(after) == 1 and after[0].op_type in ("Reshape", "Flatten")


def _note_size(walk: Walk, node: onnx.NodeProto, element: int, ids: Ids, place: int = 1) -> None:
    """A size that is written down as a constant follows its axis; -1, 0 and computed sizes do so anyhow."""
    value = walk.shapes.values.get(node.input[place])
    if value is not None and value[element] > 0:
        walk.rewrites.append(Rewrite(node=walk.index, target=place, element=element, value=count_of(ids)))


def expand(walk: Walk, node: onnx.NodeProto) -> None:
    labels, shape = walk.read(node.input[0], node), walk.shape(node.input[0], node)
    out = walk.shape(node.output[0], node)
    result: list[Ids | None] = [None] * len(out)
    given = walk.shape(node.input[1], node)[0]
    for back in range(1, len(shape) + 1):
        ids = labels[-back]
        result[-back] = ids
        if ids is not None and back <= given:
            value = walk.shapes.values.get(node.input[1])
            if value is not None and value[-back] > 1:
                _note_size(walk, node, given - back, ids)
    walk.write(node.output[0], result)


def resize(walk: Walk, node: onnx.NodeProto) -> None:
    labels = list(walk.read(node.input[0], node))
    shape, out = walk.shape(node.input[0], node), walk.shape(node.output[0], node)
    for axis, ids in enumerate(labels):
        if ids is None:
            continue
        if shape[axis] != out[axis]:
            walk.freeze(ids, f"{label_of(node)} resizes it")
            labels[axis] = None
        elif len(node.input) > 3 and node.input[3]:
            axes = attribute_of(node, "axes")
            if axes is None or axis in axes:
                _note_size(walk, node, axis if axes is None else list(axes).index(axis), ids, place=3)
    walk.write(node.output[0], labels)


def same_length(walk: Walk, node: onnx.NodeProto) -> None:
    """Pad and Tile: labelled axes pass where they stay as long as they are."""
    labels = list(walk.read(node.input[0], node))
    shape, out = walk.shape(node.input[0], node), walk.shape(node.output[0], node)
    pads = listed(walk, node, 1, "pads") if node.op_type == "Pad" else None
    for axis, ids in enumerate(labels):
        shifted = pads is not None and len(pads) == 2 * len(shape) and pads[axis] != 0
        if ids is not None and (shape[axis] != out[axis] or shifted):
            walk.freeze(ids, f"{label_of(node)} makes it longer")
            labels[axis] = None
    walk.write(node.output[0], labels)


def move_blocks(walk: Walk, node: onnx.NodeProto) -> None:
    """DepthToSpace and SpaceToDepth: the channels that share a place go together."""
    labels = walk.read(node.input[0], node)
    count = attribute_of(node, "blocksize") ** 2
    ids = labels[1]
    if ids is not None and node.op_type == "DepthToSpace":
        rows = (
            ids.reshape(-1, count).T
            if attribute_of(node, "mode", b"DCR") == b"CRD"
            else ids.reshape(count, -1)
        )
        walk.unions.join(rows, rows[:1])
        ids = np.ascontiguousarray(rows[0]) if rows.shape[1] > 1 else None
        if rows.shape[1] == 1:
            walk.freeze(rows[0], f"{label_of(node)} makes a single channel of it")
    elif ids is not None:
        ids = np.tile(ids, count)
    walk.write(node.output[0], (labels[0], ids, None, None))
