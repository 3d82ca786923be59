"""How channel ids pass through each operator; see `axes.py`.

A rule reads the labels of a node's inputs, joins or freezes ids, and writes the labels of its outputs. It
also notes what has to be rewritten in the node once channels are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith.compress.axes import Ids, Kept, Labels, Producer, Rewrite, Walk, label_of, node_name

Rule = Callable[[Walk, onnx.NodeProto], None]
PACKED_QKV = 3  # query, key and value made by one product

POINTWISE = (
    *("Abs", "Acos", "Asin", "Atan", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu"),
    *("Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin"),
    *("Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
ELEMENTWISE = (
    *("Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where"),
    "Xor",
)
REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
)
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
SHAPE_ONLY = ("ConstantOfShape", "Range", "Shape", "Size")


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _listed(walk: Walk, node: onnx.NodeProto, place: int, name: str) -> list[int] | None:
    """Whole numbers that older opsets have in an attribute, newer ones in an input; None: not given."""
    if len(node.input) > place and node.input[place]:
        array = walk.shapes.values.get(node.input[place])
        return None if array is None else [int(item) for item in np.ravel(array)]
    found = _attribute(node, name)
    return None if found is None else [int(item) for item in found]


def _unread(node: onnx.NodeProto, place: int, walk: Walk) -> bool:
    """Whether an input is there whose value is not known."""
    return len(node.input) > place and bool(node.input[place]) and node.input[place] not in walk.shapes.values


def pass_on(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    for name in filter(None, node.output):
        walk.write(name, labels)


def forget(walk: Walk, node: onnx.NodeProto) -> None:
    for name in filter(None, node.output):
        walk.write(name, [None] * len(walk.shape(name, node)))


def join_operands(walk: Walk, node: onnx.NodeProto) -> None:
    """Operands meet position by position; axes of length 1 broadcast."""
    _broadcast(walk, node, list(filter(None, node.input)), node.output[0])


def _broadcast(walk: Walk, node: onnx.NodeProto, names: list[str], output: str) -> None:
    out = walk.shape(output, node)
    result: list[Ids | None] = []
    for back in range(len(out), 0, -1):
        meeting = []
        for name in names:
            shape = walk.shape(name, node)
            if len(shape) >= back and shape[-back] > 1:
                meeting.append(walk.read(name, node)[-back])
        axis = meeting[0] if meeting else None
        for other in meeting[1:]:
            axis = walk.tie(axis, other, node)
        result.append(axis)
    walk.write(output, result)


def concatenate(walk: Walk, node: onnx.NodeProto) -> None:
    out = walk.shape(node.output[0], node)
    axis = _attribute(node, "axis", 0) % len(out)
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
    axis = _attribute(node, "axis", 0) % len(labels)
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
    starts, ends = (_listed(walk, node, place, name) for place, name in ((1, "starts"), (2, "ends")))
    axes = _listed(walk, node, 3, "axes")
    steps = _listed(walk, node, 4, "steps")
    unknown = starts is None or ends is None or _unread(node, 3, walk) or _unread(node, 4, walk)
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
                Rewrite(node=walk.index, target=target, element=place, value=_count_of(ids[:stop]))
            )
    walk.write(node.output[0], labels)


def _count_of(ids: Ids) -> Callable[[Kept], int]:
    return lambda kept: int(kept(ids).sum())


def gather(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    axis = _attribute(node, "axis", 0) % len(labels)
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
            _produce(walk, node, "neurons", label)


def _renumber(ids: Ids, indices: NDArray[Any]) -> Callable[[Kept], NDArray[Any]]:
    def value(kept: Kept) -> NDArray[Any]:
        stays = kept(ids)
        fresh = np.cumsum(stays) - 1
        return np.asarray(fresh[indices[stays[indices]]], dtype=np.int64)

    return value


def transpose(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    order = _attribute(node, "perm", list(range(len(labels)))[::-1])
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
    order = list(_attribute(readers[0], "perm", []))
    after = walk.readers.get(readers[0].output[0], ())
    swapped = bool(order) and order.index(outer[1]) + 1 == order.index(outer[0])
    return swapped and len(after) == 1 and after[0].op_type in ("Reshape", "Flatten")


def _note_size(walk: Walk, node: onnx.NodeProto, element: int, ids: Ids, place: int = 1) -> None:
    """A size that is written down as a constant follows its axis; -1, 0 and computed sizes do so anyhow."""
    value = walk.shapes.values.get(node.input[place])
    if value is not None and value[element] > 0:
        walk.rewrites.append(Rewrite(node=walk.index, target=place, element=element, value=_count_of(ids)))


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
            axes = _attribute(node, "axes")
            if axes is None or axis in axes:
                _note_size(walk, node, axis if axes is None else list(axes).index(axis), ids, place=3)
    walk.write(node.output[0], labels)


def same_length(walk: Walk, node: onnx.NodeProto) -> None:
    """Pad and Tile: labelled axes pass where they stay as long as they are."""
    labels = list(walk.read(node.input[0], node))
    shape, out = walk.shape(node.input[0], node), walk.shape(node.output[0], node)
    pads = _listed(walk, node, 1, "pads") if node.op_type == "Pad" else None
    for axis, ids in enumerate(labels):
        shifted = pads is not None and len(pads) == 2 * len(shape) and pads[axis] != 0
        if ids is not None and (shape[axis] != out[axis] or shifted):
            walk.freeze(ids, f"{label_of(node)} makes it longer")
            labels[axis] = None
    walk.write(node.output[0], labels)


def normalise_over(walk: Walk, node: onnx.NodeProto) -> None:
    """Softmax and its like: the axis that is normalised stays."""
    labels = list(walk.read(node.input[0], node))
    first = _attribute(node, "axis", -1 if walk.opset >= 13 else 1) % len(labels)
    several = walk.opset < 13 and node.op_type in ("Hardmax", "LogSoftmax", "Softmax")
    for axis in range(first, len(labels)) if several else [first]:
        walk.freeze(labels[axis], f"{label_of(node)} computes over it")
    walk.write(node.output[0], labels)


def normalise_layer(walk: Walk, node: onnx.NodeProto) -> None:
    """LayerNormalization: the mean of fewer channels is another mean, so they stay."""
    labels = walk.read(node.input[0], node)
    first = _attribute(node, "axis", -1) % len(labels)
    for axis in range(first, len(labels)):
        walk.freeze(labels[axis], f"{label_of(node)} takes the mean over it")
        for name in filter(None, node.input[1:]):
            back = len(labels) - axis
            shape = walk.shape(name, node)
            if len(shape) >= back and shape[-back] > 1:
                walk.tie(labels[axis], walk.read(name, node)[-back], node)
    for name in filter(None, node.output[1:]):
        walk.write(name, [None] * len(walk.shape(name, node)))
    walk.write(node.output[0], labels)


def normalise_channels(walk: Walk, node: onnx.NodeProto) -> None:
    """BatchNormalization and InstanceNormalization: one number of each vector for each channel."""
    labels = list(walk.read(node.input[0], node))
    if walk.shape(node.input[0], node)[1] > 1:
        for name in filter(None, node.input[1:]):
            labels[1] = walk.tie(labels[1], walk.read(name, node)[0], node)
    for name in filter(None, node.output[1:]):
        walk.write(name, [None] * len(walk.shape(name, node)))
    walk.write(node.output[0], labels)


def reduce(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    axes = _listed(walk, node, 1, "axes")
    if axes is None and _unread(node, 1, walk):
        walk.freeze_all(node, f"{label_of(node)} computes its axes")
        return
    if not axes:
        axes = [] if _attribute(node, "noop_with_empty_axes", 0) else list(range(len(labels)))
    _drop(walk, node, labels, {axis % len(labels) for axis in axes})


def pick_along(walk: Walk, node: onnx.NodeProto) -> None:
    """ArgMax and ArgMin."""
    labels = walk.read(node.input[0], node)
    _drop(walk, node, labels, {_attribute(node, "axis", 0) % len(labels)})


def _drop(walk: Walk, node: onnx.NodeProto, labels: Labels, axes: set[int]) -> None:
    for axis in axes:
        walk.freeze(labels[axis], f"{label_of(node)} computes over it")
    keeps = _attribute(node, "keepdims", 1)
    left = [None if axis in axes else label for axis, label in enumerate(labels) if keeps or axis not in axes]
    walk.write(node.output[0], left)


def pool(walk: Walk, node: onnx.NodeProto) -> None:
    labels = walk.read(node.input[0], node)
    for axis in labels[2:]:
        walk.freeze(axis, f"{label_of(node)} pools over it")
    if len(node.output) > 1 and node.output[1] in walk.readers:
        walk.freeze(labels[1], f"{label_of(node)} gives places that count channels")
    for name in filter(None, node.output):
        walk.write(name, (*labels[:2], *[None] * (len(labels) - 2)))


def convolve(walk: Walk, node: onnx.NodeProto) -> None:
    image, weight = walk.read(node.input[0], node), walk.read(node.input[1], node)
    size = walk.shape(node.input[1], node)  # [O, I / group, ...]
    groups = _attribute(node, "group", 1)
    for axis in image[2:]:
        walk.freeze(axis, f"{label_of(node)} slides over it")
    made = weight[0]
    if groups == 1:
        if size[1] > 1:
            walk.contract(image[1], weight[1], node)
    elif size[1] == 1:
        made = _depthwise(walk, node, image[1], made, groups)
    else:
        parts = [None] * groups if image[1] is None else list(image[1].reshape(groups, -1))
        for part in parts:
            walk.contract(part, weight[1], node)
    if groups > 1 and size[1] > 1 and made is not None:
        walk.unions.join(made.reshape(groups, -1), made.reshape(groups, -1)[:1])
    _finish_convolution(walk, node, image, made, is_producer=groups == 1 or size[1] > 1)


def _depthwise(
    walk: Walk, node: onnx.NodeProto, image: Ids | None, made: Ids | None, groups: int
) -> Ids | None:
    if image is None or made is None:
        walk.tie(image, made, node)
        return None
    walk.unions.join(made.reshape(groups, -1), image[:, None])
    walk.rewrites.append(Rewrite(node=walk.index, target="group", element=None, value=_count_of(image)))
    return made


def convolve_back(walk: Walk, node: onnx.NodeProto) -> None:
    """ConvTranspose, whose weights are [I, O / group, ...]."""
    image, weight = walk.read(node.input[0], node), walk.read(node.input[1], node)
    groups = _attribute(node, "group", 1)
    size = walk.shape(node.input[1], node)
    if groups == 1:
        if size[0] > 1:
            walk.contract(image[1], weight[0], node)
        _finish_convolution(walk, node, image, weight[1], is_producer=True)
    elif size[1] == 1:
        walk.tie(image[1], weight[0], node)
        if image[1] is not None:
            walk.rewrites.append(
                Rewrite(node=walk.index, target="group", element=None, value=_count_of(image[1]))
            )
        _finish_convolution(walk, node, image, image[1], is_producer=False)
    else:
        walk.freeze_all(node, f"{label_of(node)} is transposed and in groups")


def _finish_convolution(
    walk: Walk, node: onnx.NodeProto, image: Labels, made: Ids | None, *, is_producer: bool
) -> None:
    if len(node.input) > 2 and node.input[2] and walk.shape(node.input[2], node)[0] > 1:
        made = walk.tie(made, walk.read(node.input[2], node)[0], node)
    if is_producer and walk.is_constant(node.input[1]):
        _produce(walk, node, "channels", made)
    walk.write(node.output[0], (image[0], made, *[None] * (len(image) - 2)))


def _produce(walk: Walk, node: onnx.NodeProto, kind: str, ids: Ids | None) -> None:
    if ids is not None:
        walk.producers.append(Producer(node=node_name(node), kind=kind, ids=ids))


def multiply(walk: Walk, node: onnx.NodeProto) -> None:
    """MatMul: the axis that is summed over is tied, those before the last two meet as in a sum."""
    names = node.input[:2]
    shapes = [walk.shape(name, node) for name in names]
    left, right = (walk.read(name, node) for name in names)
    if min(map(len, shapes)) < 1 or (len(left) == 1 and len(right) == 1):
        walk.freeze_all(node, f"{label_of(node)} multiplies vectors")
        return
    if shapes[0][-1] > 1:
        walk.contract(left[-1], right[-2] if len(right) > 1 else right[0], node)
    ends = [*(left[-2:-1] if len(left) > 1 else ()), *(right[-1:] if len(right) > 1 else ())]
    batch: list[Ids | None] = []
    for back in range(max(map(len, shapes)), 2, -1):
        meeting = [
            labels[-back]
            for labels, shape in zip((left, right), shapes, strict=True)
            if len(shape) >= back and shape[-back] > 1
        ]
        axis = meeting[0] if meeting else None
        for other in meeting[1:]:
            axis = walk.tie(axis, other, node)
            if axis is not None:
                walk.heads.append(axis)
        batch.append(axis)
    walk.write(node.output[0], [*batch, *ends])
    if walk.is_constant(names[1]) and len(right) > 1:
        _produce(walk, node, "neurons", right[-1])
    if walk.is_constant(names[0]) and len(left) > 1:
        _produce(walk, node, "neurons", left[-2])


def multiply_and_add(walk: Walk, node: onnx.NodeProto) -> None:
    """Gemm."""
    left, right = (walk.read(name, node) for name in node.input[:2])
    left = left[::-1] if _attribute(node, "transA", 0) else left
    right = right[::-1] if _attribute(node, "transB", 0) else right
    depth = walk.shape(node.input[0], node)[0 if _attribute(node, "transA", 0) else 1]
    if depth > 1:
        walk.contract(left[1], right[0], node)
    made = [left[0], right[1]]
    if len(node.input) > 2 and node.input[2]:
        bias, shape = walk.read(node.input[2], node), walk.shape(node.input[2], node)
        for back in range(1, len(shape) + 1):
            if shape[-back] > 1:
                made[-back] = walk.tie(made[-back], bias[-back], node)
    walk.write(node.output[0], made)
    if walk.is_constant(node.input[1]):
        _produce(walk, node, "neurons", made[1])


def move_blocks(walk: Walk, node: onnx.NodeProto) -> None:
    """DepthToSpace and SpaceToDepth: the channels that share a place go together."""
    labels = walk.read(node.input[0], node)
    count = _attribute(node, "blocksize") ** 2
    ids = labels[1]
    if ids is not None and node.op_type == "DepthToSpace":
        rows = (
            ids.reshape(-1, count).T if _attribute(node, "mode", b"DCR") == b"CRD" else ids.reshape(count, -1)
        )
        walk.unions.join(rows, rows[:1])
        ids = np.ascontiguousarray(rows[0]) if rows.shape[1] > 1 else None
        if rows.shape[1] == 1:
            walk.freeze(rows[0], f"{label_of(node)} makes a single channel of it")
    elif ids is not None:
        ids = np.tile(ids, count)
    walk.write(node.output[0], (labels[0], ids, None, None))


def dequantize(walk: Walk, node: onnx.NodeProto) -> None:
    """QuantizeLinear and DequantizeLinear: a scale for each channel goes with it."""
    labels = list(walk.read(node.input[0], node))
    for name in filter(None, node.input[1:3]):
        shape = walk.shape(name, node)
        if len(shape) > 1:
            walk.freeze_all(node, f"{label_of(node)} scales in blocks")
            return
        if shape and shape[0] > 1:
            axis = _attribute(node, "axis", 1) % len(labels)
            labels[axis] = walk.tie(labels[axis], walk.read(name, node)[0], node)
    walk.write(node.output[0], labels)


def sum_products(walk: Walk, node: onnx.NodeProto) -> None:
    """Einsum: axes of one letter meet; a letter that is summed over is tied like any other."""
    equation = _attribute(node, "equation").decode().replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if "..." in equation or not arrow or any(len(set(term)) < len(term) for term in terms.split(",")):
        walk.freeze_all(node, f"{label_of(node)} is written in a way that is not followed")
        return
    met: dict[str, Ids | None] = {}
    for term, name in zip(terms.split(","), node.input, strict=True):
        for letter, ids, size in zip(term, walk.read(name, node), walk.shape(name, node), strict=True):
            if size == 1:
                continue
            met[letter] = walk.tie(met[letter], ids, node) if letter in met else ids
    lone = [letter for letter in met if terms.count(letter) == 1 and letter not in result]
    for letter in lone:
        walk.freeze(met[letter], f"{label_of(node)} computes over it")
    walk.write(node.output[0], [met.get(letter) for letter in result])
    for term, name in zip(terms.split(","), node.input, strict=True):
        for letter in term:
            if walk.is_constant(name) and letter in result and terms.count(letter) == 1:
                _produce(walk, node, "neurons", met.get(letter))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE, pass_on),
    **dict.fromkeys(SHAPE_ONLY, forget),
    **dict.fromkeys(ELEMENTWISE, join_operands),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), reshape),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "LpNormalization", "Softmax"), normalise_over),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), normalise_layer),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), normalise_channels),
    **dict.fromkeys(("ArgMax", "ArgMin"), pick_along),
    **dict.fromkeys(("Pad", "Tile"), same_length),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), move_blocks),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), dequantize),
    **dict.fromkeys(("Resize", "Upsample"), resize),
    "Concat": concatenate,
    "Conv": convolve,
    "ConvTranspose": convolve_back,
    "Einsum": sum_products,
    "Expand": expand,
    "Gather": gather,
    "Gemm": multiply_and_add,
    "MatMul": multiply,
    "Slice": slice_axes,
    "Split": split,
    "Transpose": transpose,
}
