"""Each operator against ONNX Runtime, and gradients against finite differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions

from tritonsmith.errors import CompressionError
from tritonsmith.train.module import OnnxModule

Array = NDArray[Any]

RANDOM = np.random.default_rng(3)
I64 = onnx.TensorProto.INT64


def floats(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def ints(*values: Any) -> Array:
    return np.array(values, dtype=np.int64)


def one_node(
    kind: str,
    arrays: list[Array | None],
    *,
    opset: int = 18,
    weights: tuple[int, ...] = (),
    outputs: int = 1,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node, and its feeds; the inputs that `weights` counts are initializers."""
    names = ["" if array is None else f"x{index}" for index, array in enumerate(arrays)]
    given = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
    fixed = {name for index, name in enumerate(names) if index in weights}
    tensor_type = onnx.helper.np_dtype_to_tensor_dtype
    results = [f"y{index}" for index in range(outputs)]
    node = onnx.helper.make_node(kind, names, results, name="the_node", **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            onnx.helper.make_tensor_value_info(name, tensor_type(array.dtype), array.shape)
            for name, array in given.items()
            if name not in fixed
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in results],
        [onnx.numpy_helper.from_array(given[name], name) for name in sorted(fixed)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    return model, {name: array for name, array in given.items() if name not in fixed}


def run_ort(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    options = SessionOptions()
    options.log_severity_level = 3
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, dict(feeds))
    return results


def run_module(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    outputs = OnnxModule(model)({name: torch.from_numpy(array) for name, array in feeds.items()})
    return [value.detach().numpy() for value in outputs.values()]


def case(name: str, *arrays: Array | None, **options: Any) -> Any:
    kind = options.pop("kind", name.split()[0])
    given = [None if array is None else np.asarray(array) for array in arrays]
    return pytest.param(kind, given, options, id=name)


IMAGE = floats(2, 4, 7, 6)
KERNEL = floats(6, 4, 3, 3)
TABLE = floats(5, 3)
MASK = RANDOM.random((3, 4)) > 0.5
POSITIVE = np.abs(floats(3, 4)) + 0.1

LAYERS = [
    case("Conv", IMAGE, KERNEL, floats(6)),
    case("Conv pads strides", IMAGE, KERNEL, pads=[1, 0, 2, 1], strides=[2, 1]),
    case("Conv dilations", IMAGE, KERNEL, dilations=[2, 1], pads=[2, 1, 2, 1]),
    case("Conv groups", IMAGE, floats(6, 2, 3, 3), floats(6), group=2),
    case(
        "Conv depthwise SAME_UPPER", IMAGE, floats(4, 1, 3, 3), group=4, auto_pad="SAME_UPPER", strides=[2, 2]
    ),
    case("Conv SAME_LOWER", IMAGE, floats(6, 4, 2, 2), auto_pad="SAME_LOWER"),
    case("Conv VALID", IMAGE, KERNEL, auto_pad="VALID"),
    case("Conv 1d", floats(2, 3, 9), floats(4, 3, 3), floats(4), pads=[2, 0]),
    case("Conv 3d", floats(1, 2, 4, 5, 4), floats(3, 2, 2, 3, 2), strides=[1, 2, 1]),
    case("ConvTranspose", IMAGE, floats(4, 5, 3, 3), floats(5), strides=[2, 2]),
    case("ConvTranspose pads", IMAGE, floats(4, 5, 3, 3), strides=[2, 2], pads=[1, 0, 2, 1]),
    case("ConvTranspose output_padding", IMAGE, floats(4, 5, 3, 3), strides=[2, 3], output_padding=[1, 2]),
    case("ConvTranspose groups dilations", IMAGE, floats(4, 3, 2, 2), group=2, dilations=[2, 1]),
    case("ConvTranspose SAME_UPPER", IMAGE, floats(4, 5, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose output_shape", IMAGE, floats(4, 5, 3, 3), strides=[2, 2], output_shape=[14, 12]),
    case("ConvTranspose 1d", floats(2, 3, 5), floats(3, 2, 4), strides=[3]),
    case("Gemm", floats(3, 4), floats(4, 5), floats(5)),
    case("Gemm scaled", floats(4, 3), floats(5, 4), floats(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Gemm bare", floats(3, 4), floats(5, 4), transB=1),
    case("MatMul", floats(2, 3, 4), floats(4, 5)),
    case("MatMul batches", floats(2, 1, 3, 4), floats(5, 4, 2)),
    case("MatMul vector", floats(3, 4), floats(4)),
    case("Einsum", floats(2, 3, 4), floats(2, 5, 4), equation="bij,bkj->bik"),
    case("MaxPool", IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
    case("MaxPool pads", IMAGE, kernel_shape=[3, 3], pads=[1, 0, 1, 2], strides=[2, 2]),
    case("MaxPool SAME_UPPER", IMAGE, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("MaxPool ceil", IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    case("MaxPool dilations", IMAGE, kernel_shape=[2, 2], dilations=[2, 3]),
    case("MaxPool 1d", floats(2, 3, 9), kernel_shape=[3], strides=[2]),
    case("AveragePool", IMAGE, kernel_shape=[2, 3]),
    case("AveragePool pads", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    case("AveragePool counts pads", IMAGE, kernel_shape=[3, 3], pads=[1, 0, 1, 1], count_include_pad=1),
    case("AveragePool SAME_UPPER", IMAGE, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("AveragePool ceil", IMAGE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, opset=19),
    case("GlobalAveragePool", IMAGE),
    case("GlobalMaxPool", floats(2, 3, 5)),
    case("BatchNormalization", IMAGE, floats(4), floats(4), floats(4), POSITIVE[0], epsilon=1e-3),
    case("LayerNormalization", IMAGE, floats(6), floats(6), epsilon=1e-3),
    case("LayerNormalization axes", IMAGE, floats(7, 6), floats(7, 6), axis=2),
    case("LayerNormalization bare", IMAGE, floats(6)),
    case("LayerNormalization statistics", floats(3, 4), floats(4), floats(4), outputs=3),
    case("InstanceNormalization", IMAGE, floats(4), floats(4)),
    case("GroupNormalization 18", IMAGE, floats(2), floats(2), num_groups=2),
    case("GroupNormalization 21", IMAGE, floats(4), floats(4), num_groups=2, opset=21),
    case("LpNormalization", floats(3, 4), axis=1),
]

SHAPES = [
    case("Reshape", IMAGE, ints(0, -1, 6), weights=(1,)),
    case("Reshape allowzero", floats(0, 3), ints(3, 0), weights=(1,), allowzero=1),
    case("Transpose", IMAGE, perm=[0, 2, 3, 1]),
    case("Transpose reversed", floats(2, 3, 4)),
    case("Flatten", IMAGE),
    case("Flatten 0", IMAGE, axis=0),
    case("Flatten negative", IMAGE, axis=-1),
    case("Concat", floats(2, 3), floats(2, 1), axis=-1),
    case("Split even", floats(2, 7), axis=1, num_outputs=3, outputs=3),
    case("Split 13", floats(2, 6), axis=1, outputs=3, opset=13),
    case("Split sizes", floats(2, 7), ints(2, 5), axis=1, outputs=2),
    case("Slice", floats(5, 6), ints(1, -3), ints(9, -1), ints(0, 1), ints(2, 1)),
    case("Slice backward", floats(5, 6), ints(-1), ints(-(2**62)), ints(1), ints(-2)),
    case("Slice bare", floats(5, 6), ints(1, 2), ints(3, 4)),
    case("Gather rows", TABLE, ints([0, -1], [3, 3])),
    case("Gather axis", IMAGE, ints(2, 0), axis=2),
    case("Gather scalar", floats(2, 5, 3), np.array(1), axis=1),
    case("GatherElements", floats(3, 4), ints([0, -1], [2, 1], [3, 3]), axis=1),
    case("GatherND", IMAGE, ints([0, 1], [1, -1])),
    case("GatherND batch", floats(2, 3, 4), ints([[0], [2]], [[1], [1]]), batch_dims=1),
    case("ScatterND", floats(4, 3), ints([0], [2]), floats(2, 3)),
    case("Pad constant", floats(2, 3), ints(0, 1, 2, -1), np.float32(0.5), weights=(1, 2)),
    case("Pad axes", floats(2, 3), ints(1, 2), None, ints(-1), weights=(1,)),
    case("Pad reflect", floats(2, 1, 4, 5), ints(0, 0, 1, 2, 0, 0, 2, 1), mode="reflect"),
    case("Pad edge", floats(2, 3), ints(0, 2, 0, 1), mode="edge"),
    case("Pad wrap", floats(2, 3), ints(0, 2, 0, 1), mode="wrap", opset=19),
    case("Unsqueeze", floats(2, 3), ints(0, -1)),
    case("Squeeze", floats(2, 1, 3, 1), ints(1, -1)),
    case("Squeeze all", floats(2, 1, 3, 1)),
    case("Expand", floats(3, 1), ints(2, 1, 4)),
    case("Tile", floats(2, 3), ints(2, 1)),
    case("Shape", IMAGE),
    case("Shape part", IMAGE, start=1, end=-1),
    case("Size", IMAGE),
    case("Constant", value=onnx.numpy_helper.from_array(floats(2, 3))),
    case("Constant ints", value_ints=[1, 2, 3]),
    case("Constant float", value_float=1.5),
    case("ConstantOfShape", ints(2, 3), value=onnx.helper.make_tensor("v", I64, [1], [7])),
    case("ConstantOfShape bare", ints(2, 3)),
    case("Range", np.array(2), np.array(9), np.array(3)),
    case("Trilu", floats(4, 5), np.array(1)),
    case("Trilu lower", floats(2, 4, 5), upper=0),
    case("OneHot", ints(0, -1, 2), np.array(4), floats(2)),
    case("TopK", floats(3, 7), ints(2), outputs=2),
    case("DepthToSpace", floats(1, 8, 2, 3), blocksize=2),
    case("DepthToSpace CRD", floats(1, 8, 2, 3), blocksize=2, mode="CRD"),
    case("SpaceToDepth", floats(1, 2, 4, 6), blocksize=2),
]

ELEMENTWISE = [
    *[case(kind, floats(3, 4)) for kind in ("Abs", "Neg", "Exp", "Relu", "Sigmoid", "Tanh", "Erf", "Floor")],
    *[case(kind, floats(3, 4)) for kind in ("Ceil", "Sin", "Cos", "Tan", "Atan", "Softplus", "Softsign")],
    *[case(kind, floats(3, 4)) for kind in ("HardSwish", "HardSigmoid", "Elu", "Selu", "Celu", "LeakyRelu")],
    *[case(kind, floats(3, 4)) for kind in ("Identity", "Sign", "Mish", "ThresholdedRelu", "IsNaN", "IsInf")],
    *[case(kind, POSITIVE) for kind in ("Sqrt", "Log", "Reciprocal")],
    *[case(kind, np.tanh(floats(3, 4))) for kind in ("Asin", "Acos")],
    *[
        case(kind, floats(3, 4), floats(4))
        for kind in ("Add", "Sub", "Mul", "Div", "Less", "Greater", "Equal")
    ],
    *[case(kind, floats(3, 4), floats(4)) for kind in ("LessOrEqual", "GreaterOrEqual")],
    *[case(kind, MASK, ~MASK[:1]) for kind in ("And", "Or", "Xor")],
    *[case(kind, floats(3, 4), floats(4), floats(3, 1)) for kind in ("Max", "Min", "Sum", "Mean")],
    case("Not", MASK),
    case("Round", np.array([0.5, 1.5, -2.5, 0.4], dtype=np.float32)),
    case("Div integers", ints(7, -7), ints(2, 2)),
    case("Mod", ints(7, -7), ints(4, 4)),
    case("Mod fmod", floats(5), floats(5), fmod=1),
    case("Pow", floats(3, 4), np.float32(2.0), weights=(1,)),
    case("Pow integers", floats(3), np.array(3)),
    case("PRelu", floats(2, 3, 4), floats(3, 1)),
    case("Where", MASK, floats(3, 4), floats(4)),
    case("Clip", floats(3, 4), np.float32(-0.5), np.float32(0.5), weights=(1, 2)),
    case("Clip above", floats(3, 4), None, np.float32(0.5)),
    case("Gelu", floats(3, 4), opset=20),
    case("Gelu tanh", floats(3, 4), approximate="tanh", opset=20),
    case("Elu alpha", floats(3, 4), alpha=0.3),
    case("HardSigmoid slope", floats(3, 4), alpha=0.5, beta=0.1),
    case("Softmax", floats(3, 4, 2)),
    case("Softmax axis", floats(3, 4, 2), axis=1),
    case("LogSoftmax", floats(3, 4)),
    case("Cast", floats(3, 4) * 9, to=I64),
    case("CastLike", ints(1, 2), floats(1), opset=19),
    case("Dropout", floats(3, 4)),
    case("CumSum", floats(3, 4), np.array(1)),
    case("CumSum reverse", floats(3, 4), np.array(0), exclusive=1, reverse=1),
    case("ArgMax", floats(3, 4), axis=1, keepdims=0),
    case("ArgMin", floats(3, 4)),
]

REDUCTIONS = [
    *[
        case(f"{kind} 18", floats(2, 3, 4), ints(0, -1), keepdims=0, weights=(1,))
        for kind in ("ReduceMean", "ReduceMax")
    ],
    *[
        case(f"{kind} 13", floats(2, 3, 4), axes=[1], opset=13)
        for kind in ("ReduceMean", "ReduceMin", "ReduceL2")
    ],
    *[case(kind, floats(2, 3)) for kind in ("ReduceSum", "ReduceL1", "ReduceProd", "ReduceSumSquare")],
    case("ReduceSum axes", floats(2, 3, 4), ints(1), opset=13),
    case("ReduceSum nothing", floats(2, 3), noop_with_empty_axes=1),
    case("ReduceLogSumExp", floats(2, 3), ints(1)),
    case("ReduceSum integers", ints([1, 2], [3, 4])),
]

RESIZES = [
    case(
        f"Resize {mode} {coordinates} {size}",
        floats(1, 2, 4, 5),
        None,
        None,
        ints(1, 2, size, size),
        mode=mode,
        coordinate_transformation_mode=coordinates,
        weights=(3,),
    )
    for mode in ("nearest", "linear")
    for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    for size in (8, 3)
] + [
    case(
        "Resize scales",
        floats(1, 2, 4, 5),
        None,
        np.array([1, 1, 2, 1.5], np.float32),
        weights=(2,),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    case("Resize axes", floats(1, 2, 4, 5), None, None, ints(7, 9), weights=(3,), axes=[2, 3], mode="linear"),
    case("Resize ceil", floats(1, 1, 4, 5), None, None, ints(1, 1, 6, 7), weights=(3,), nearest_mode="ceil"),
]

QUANTIZED = [
    case("DequantizeLinear", RANDOM.integers(-128, 128, (3, 4)).astype(np.int8), np.float32(0.1), np.int8(3)),
    case("DequantizeLinear axis", RANDOM.integers(-9, 9, (3, 4)).astype(np.int8), POSITIVE[:, 0], axis=0),
    case("DequantizeLinear blocks", RANDOM.integers(-9, 9, (2, 6)).astype(np.int8), POSITIVE[:2, :3],
         axis=1, block_size=2, opset=21),
    case("QuantizeLinear", floats(3, 4) * 9, np.float32(0.05), np.uint8(120), weights=(1, 2)),
    case("QuantizeLinear axis", floats(3, 4), POSITIVE[0], np.zeros(4, np.int8), axis=1, weights=(1, 2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "arrays", "options"), LAYERS + SHAPES + ELEMENTWISE + REDUCTIONS + RESIZES + QUANTIZED
)
def test_operator_matches_onnx_runtime(
    kind: str, arrays: list[Array | None], options: dict[str, Any]
) -> None:
    model, feeds = one_node(kind, arrays, **options)

    for ours, theirs in zip(run_module(model, feeds), run_ort(model, feeds), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype or kind == "QuantizeLinear"  # kept as floats, for gradients
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "arrays", "options"),
    [
        case("Conv", floats(1, 2, 4, 4), floats(2, 1, 3, 3), floats(2), group=2, auto_pad="SAME_LOWER"),
        case("ConvTranspose", floats(1, 2, 3, 3), floats(2, 1, 2, 2), strides=[2, 2], pads=[1, 0, 0, 1]),
        case("AveragePool", floats(1, 1, 5, 5), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        case("GroupNormalization", floats(1, 4, 3), floats(2), floats(2), num_groups=2),
        case("Gather", floats(4, 2), ints(1, -1, 1)),
        case("Resize", floats(1, 1, 3, 3), None, None, ints(1, 1, 5, 4), weights=(3,), mode="linear"),
        case("PRelu", floats(2, 3), floats(3)),
        case("Pad", floats(1, 4), ints(0, 2, 0, 1), mode="reflect"),
    ],
)
def test_gradients_match_finite_differences(
    kind: str, arrays: list[Array | None], options: dict[str, Any]
) -> None:
    wide = [
        array.astype(np.float64) if array is not None and array.dtype == np.float32 else array
        for array in arrays
    ]
    model, feeds = one_node(kind, wide, **options)
    module = OnnxModule(model)
    names = [name for name, array in feeds.items() if array.dtype == np.float64]
    fixed = {name: torch.from_numpy(array) for name, array in feeds.items() if name not in names}

    def run(*values: torch.Tensor) -> torch.Tensor:
        return module({**fixed, **dict(zip(names, values, strict=True))})["y0"]

    values = tuple(torch.from_numpy(feeds[name]).requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, values)


def test_rounding_passes_gradients_inside_the_range_only() -> None:
    model, _ = one_node(
        "QuantizeLinear", [floats(3), np.array(0.5, np.float32), np.array(0, np.int8)], weights=(1, 2)
    )
    x = torch.tensor([0.3, -7.1, 900.0], requires_grad=True)

    OnnxModule(model)({"x0": x})["y0"].sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 0.0]  # 1 / scale


@pytest.mark.parametrize(
    ("kind", "arrays", "options", "found"),
    [
        ("Det", [floats(2, 2)], {}, "operator Det"),
        ("MaxPool", [floats(1, 1, 4, 4)], {"kernel_shape": [2, 2], "outputs": 2}, "its indices are read"),
        ("Resize", [floats(1, 1, 4, 4), None, None, ints(1, 1, 8, 8)], {"mode": "cubic"}, "mode 'cubic'"),
        ("Cast", [floats(2)], {"to": onnx.TensorProto.STRING}, "a cast to data type 8"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    kind: str, arrays: list[Array | None], options: dict[str, Any], found: str
) -> None:
    model, _ = one_node(kind, arrays, **options)

    with pytest.raises(CompressionError, match="'the_node'") as refusal:
        OnnxModule(model)

    assert found in str(refusal.value)
