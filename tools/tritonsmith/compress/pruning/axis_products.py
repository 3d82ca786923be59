"""How channel ids pass through operators with weights, which make new channels; see `axes.py`."""

from __future__ import annotations

import onnx

from tritonsmith.compress.pruning.axes import Ids, Labels, Rewrite, Walk, attribute_of, count_of, label_of


def convolve(walk: Walk, node: onnx.NodeProto) -> None:
    image, weight = walk.read(node.input[0], node), walk.read(node.input[1], node)
    size = walk.shape(node.input[1], node)  # [O, I / group, ...]
    groups = attribute_of(node, "group", 1)
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
    walk.rewrites.append(Rewrite(node=walk.index, target="group", element=None, value=count_of(image)))
    return made


def convolve_back(walk: Walk, node: onnx.NodeProto) -> None:
    """ConvTranspose, whose weights are [I, O / group, ...]."""
    image, weight = walk.read(node.input[0], node), walk.read(node.input[1], node)
    groups = attribute_of(node, "group", 1)
    size = walk.shape(node.input[1], node)
    if groups == 1:
        if size[0] > 1:
            walk.contract(image[1], weight[0], node)
        _finish_convolution(walk, node, image, weight[1], is_producer=True)
    elif size[1] == 1:
        walk.tie(image[1], weight[0], node)
        if image[1] is not None:
            walk.rewrites.append(
                Rewrite(node=walk.index, target="group", element=None, value=count_of(image[1]))
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
        walk.produce(node, "channels", made)
    walk.write(node.output[0], (image[0], made, *[None] * (len(image) - 2)))


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
        walk.produce(node, "neurons", right[-1])
    if walk.is_constant(names[0]) and len(left) > 1:
        walk.produce(node, "neurons", left[-2])


def multiply_and_add(walk: Walk, node: onnx.NodeProto) -> None:
    """Gemm."""
    left, right = (walk.read(name, node) for name in node.input[:2])
    left = left[::-1] if attribute_of(node, "transA", 0) else left
    right = right[::-1] if attribute_of(node, "transB", 0) else right
    depth = walk.shape(node.input[0], node)[0 if attribute_of(node, "transA", 0) else 1]
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
        walk.produce(node, "neurons", made[1])


def sum_products(walk: Walk, node: onnx.NodeProto) -> None:
    """Einsum: axes of one letter meet; a letter that is summed over is tied like any other."""
    equation = attribute_of(node, "equation").decode().replace(" ", "")
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
                walk.produce(node, "neurons", met.get(letter))
