"""The inspector's report read: written after the format that NVIDIA documents, of 8.6, of 10 and of 11."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tritonsmith.engines.tensorrt.inspect import layers_from_json, precision_from_format, summary_of_layers


def conv(name: str, kind: str, words: str, weights: str | None, **more: Any) -> dict[str, Any]:
    tensor = {
        "Name": f"{name}_t",
        "Location": "Device",
        "Dimensions": [8, 64, 56, 56],
        "Format/Datatype": words,
    }
    layer = {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], **more}
    return layer | ({"Weights": {"Type": weights, "Count": 4096}} if weights else {})


INT8 = "Thirty-two wide channel vectorized row major Int8 format."
V8 = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "x'", "Format/Datatype": INT8}],
            "TacticValue": "0x00000000000003e8",
        },
        conv("conv1 + relu1", "CaskConvolution", INT8, "Int8", TacticName="sm80_xmma_fprop_i8i8"),
        conv("conv2", "CaskConvolution", "Channel major FP16 format where channel % 8 == 0", "Half"),
        conv("softmax", "CaskSoftMaxV2", "N/A due to dynamic shapes", None),
    ],
    "Bindings": ["x", "y"],
}
V11 = {
    "Layers": [
        {
            "Name": "__myl_MatMulAdd_myl0_1",
            "LayerType": "kgen",
            "Inputs": [{"Name": "x", "DataType": "BFloat16", "Format": "Row major linear (kLINEAR)"}],
            "Outputs": [
                {"Name": "y", "DataType": "Float", "Format": "Row major linear FP32 format (kLINEAR)"}
            ],
            "Metadata": "[ONNX Layer: /dense/MatMul]\x1e[ONNX Layer: /dense/Add]",
        },
        {
            "Name": "int4_gemm",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "DataType": "Half"}],
            "Outputs": [{"Name": "y", "DataType": "Half"}],
            "Weights": {"Type": "Int4", "Count": 4096},
            "Metadata": "[ONNX Layer: head]",
        },
    ],
    "I/O Tensors": [{"Name": "x", "IOMode": "Input", "DataType": "BFloat16"}],
}


def test_layers_of_86_are_read() -> None:
    reformat, first, second, softmax = layers_from_json(json.dumps(V8))
    assert (reformat.kind, reformat.inputs, reformat.outputs) == ("Reformat", ("fp32",), ("int8",))
    assert (first.precision, first.weights, first.nodes) == ("int8", "int8", ("conv1", "relu1"))
    assert first.tactic == "sm80_xmma_fprop_i8i8"
    assert second.precision == "fp16"
    assert (softmax.precision, softmax.multiplies) == ("unknown", False)


def test_layers_of_11_are_read() -> None:
    kernel, gemm = layers_from_json(json.dumps(V11))
    assert kernel.nodes == ("/dense/MatMul", "/dense/Add")
    assert (kernel.precision, kernel.outputs, kernel.multiplies) == ("bf16", ("fp32",), True)
    # weights in INT4 are read as FP16: nothing is computed in INT4
    assert (gemm.precision, gemm.weights) == ("fp16", "int4")


def test_the_summary_counts_products_by_what_they_run_in() -> None:
    summary = summary_of_layers(layers_from_json(json.dumps(V8)))
    assert summary["count"] == 4
    assert summary["reformats"] == 1
    assert summary["products"] == 2
    assert summary["products_by_precision"] == {"int8": 1, "fp16": 1}
    assert summary["by_precision"] == {"fp32": 1, "int8": 1, "fp16": 1, "unknown": 1}
    assert summary["fused_nodes"] == 2


def test_a_plan_without_details_gives_names() -> None:
    (layer,) = layers_from_json('{"Layers": ["conv1 + relu1"], "Bindings": []}')
    assert (layer.nodes, layer.precision) == (("conv1", "relu1"), "unknown")


def test_names_with_raw_control_characters_are_read() -> None:
    (layer,) = layers_from_json('{"Layers": ["a\x1eb"]}')
    assert layer.name == "a\x1eb"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"Layers": 3}', "null"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words
        layers_from_json(text)


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("Two wide channel vectorized row major FP16 format", "fp16"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16 format", "bf16"),
        (INT8, "int8"),
        ("FP8", "fp8"),
        ("Row major INT32 format", "int32"),
        ("Row major linear UInt8 format", "uint8"),
        ("Bool", "bool"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_precisions_in_words(text: str, precision: str) -> None:
    assert precision_from_format(text) == precision


def test_indices_are_no_precision_and_whole_blocks_do_not_say_theirs() -> None:
    """A gather is led by its int32 indices; Myelin's block of a transformer by its token ids."""
    ids, words = {"Name": "ids", "Format/Datatype": "Row major linear INT32"}, "Row major linear FP16 format"
    gather = {
        "Name": "embed",
        "LayerType": "Gather",
        "Inputs": [ids],
        "Outputs": [{"Name": "e", "Format/Datatype": words}],
    }
    block = {
        "Name": "{ForeignNode[...]}",
        "LayerType": "Myelin",
        "Inputs": [ids],
        "Outputs": gather["Outputs"],
    }
    layers = layers_from_json(json.dumps({"Layers": [gather, block]}))
    assert [layer.precision for layer in layers] == ["fp16", "unknown"]
