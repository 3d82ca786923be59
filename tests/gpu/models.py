"""The models that the benchmark compiles, made here by the project's own tools.

    models/<name>/fp32.onnx fp16.onnx int8.onnx    opset 17: the newest that TensorRT 8.6 reads
    models/<name>/reference.npz                    128 rows of inputs, and what ONNX Runtime answers in FP32
    models/<name>/model.json                       hashes, signature, what INT8 and FP16 cost here, and where
                                                   in fp32.onnx the weights of the PyTorch module lie

So weights travel once: PyTorch reads them out of the same file that TensorRT compiles.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from gpu.parts import PackError, Say, sha256_of
from gpu.payload import ROOT
from tritonsmith.artifact import Artifact
from tritonsmith.compress.steps import Cast, Quantize, StepSpec
from tritonsmith.compression import CompressRequest, compress
from tritonsmith.engines import open_session
from tritonsmith.ingest import convert
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.targets.shape_nodes import copy_with_whole_shapes

OPSET = 17
ROWS = 128  # the largest batch
CALIBRATION_ROWS = 256
LENGTH = 64  # tokens of a sentence, padded
CHUNK_ROWS = 8
WORKSPACE = ROOT / "build" / "gpu"
CONV = re.compile(r"(conv1|conv\d_block\d+_\d)_conv")

Arrays = Mapping[str, NDArray[Any]]
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the weight of a PyTorch parameter lies in fp32.onnx."""

    offset_bytes: int
    shape: tuple[int, ...]  # as stored
    transposed: bool  # the parameter is the stored matrix, transposed


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model to prepare."""

    name: str
    source: str
    rows: Arrays  # ROWS to compare and time with
    calibration: Arrays
    int8: StepSpec
    weights_from: Callable[[onnx.ModelProto], Weights]  # the PyTorch module's parameters by name


def lay_out_models(folder: Path, say: Say) -> None:
    """Make every model below `folder`."""
    for name in ("perf", "tools/recipes/minilm"):
        sys.path.insert(0, str(ROOT / name))
    for model in (resnet50_model(say), minilm_model()):
        say(f"preparing {model.name}")
        lay_out_model(model, folder / model.name, say)


def resnet50_model(say: Say) -> Model:
    """ResNet-50 of perf/resnet50.py: random weights, drawn images."""
    import resnet50

    workspace = WORKSPACE / "resnet50"
    workspace.mkdir(parents=True, exist_ok=True)
    return Model(
        name="resnet50",
        source=str(resnet50.make_source(workspace, say)),
        rows={resnet50.INPUT: resnet50.draw_images(ROWS, seed=2)},
        calibration={resnet50.INPUT: resnet50.draw_images(resnet50.CALIBRATION_IMAGES, seed=1)},
        int8=Quantize(method="static", dialect="tensorrt"),
        weights_from=resnet50_weights,
    )


def minilm_model() -> Model:
    """MiniLM of tools/recipes/minilm, on sentences of the standard library's docstrings."""
    rows = tokenize(ROWS + CALIBRATION_ROWS)
    return Model(
        name="minilm",
        source="embedder:make_embedder",
        rows={name: array[:ROWS] for name, array in rows.items()},
        calibration={name: array[ROWS:] for name, array in rows.items()},
        int8=Quantize(
            method="static", dialect="tensorrt", smooth=0.8
        ),  # least cosine of a row 0.988, with 0.5 0.879
        weights_from=minilm_weights,
    )


def tokenize(count: int) -> Arrays:
    """Sentences as int64 token ids `[count, LENGTH]`, shuffled so that files mix."""
    from prepare import package_folder, sentences_of_docstrings
    from tokenizers import Tokenizer

    sentences = sentences_of_docstrings(count)
    if len(sentences) < count:
        raise PackError(f"only {len(sentences)} sentences were found, of {count}")
    tokenizer = Tokenizer.from_file(str(package_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    order = np.random.default_rng(0).permutation(count)
    encodings = tokenizer.encode_batch([sentences[index] for index in order])
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        "token_type_ids": np.array([encoding.type_ids for encoding in encodings], np.int64),
    }


def lay_out_model(model: Model, folder: Path, say: Say) -> None:
    """The three precisions, the reference, and model.json."""
    folder.mkdir(parents=True)
    workspace = WORKSPACE / model.name
    workspace.mkdir(parents=True, exist_ok=True)
    options = ConvertOptions(opset=OPSET, allow_code=True)
    fp32 = convert(model.source, workspace / "fp32.onnx", options, force=True, say=say)
    copy_with_whole_shapes(fp32.path, folder / "fp32.onnx")
    calibration = workspace / "calibration.npz"
    np.savez(calibration, **model.calibration)
    measured: dict[str, Any] = {}
    for precision, step in (("fp16", Cast()), ("int8", model.int8)):
        request = CompressRequest(
            source=str(fp32.path),
            out=workspace / f"{precision}.onnx",
            steps=(step,),
            calibration=calibration,
            convert=ConvertOptions(opset=OPSET),
            force=True,
        )
        made = compress(request, say=say).artifact
        check_opset(made.path)
        measured[precision] = dict(made.steps[-1].measured)
        copy_with_whole_shapes(made.path, folder / f"{precision}.onnx")
    answers = answer(folder / "fp32.onnx", model.rows)
    arrays = {f"input.{name}": array for name, array in model.rows.items()}
    np.savez(
        folder / "reference.npz", **arrays, **{f"output.{name}": array for name, array in answers.items()}
    )
    for precision in ("fp16", "int8"):
        measured[precision]["agreement_onnxruntime_cpu"] = agreement(
            answers, answer(folder / f"{precision}.onnx", model.rows)
        )
    graph = onnx.load(str(folder / "fp32.onnx"))
    places = dict(find_places(folder / "fp32.onnx", model.weights_from(graph)))
    write_description(model, fp32, folder, measured, places)


def write_description(
    model: Model, fp32: Artifact, folder: Path, measured: Mapping[str, Any], places: Mapping[str, Place]
) -> None:
    """model.json."""
    files = {path.name: path for path in sorted(folder.glob("*.onnx"))}
    description = {
        "name": model.name,
        "opset": OPSET,
        "source": Path(model.source).name,
        "inputs": [asdict(spec) for spec in fp32.inputs],
        "outputs": [asdict(spec) for spec in fp32.outputs],
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in files.items()
        },
        "int8_step": asdict(model.int8),
        "measured": measured,
        "weights": {name: asdict(place) for name, place in places.items()},
    }
    (folder / "model.json").write_text(
        json.dumps(description, indent=1, default=str) + "\n", encoding="utf-8"
    )


def check_opset(path: Path) -> None:
    """Raise PackError where a step has raised the opset beyond what TensorRT 8.6 reads."""
    found = {
        entry.domain: entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import
    }
    if found.get("", 0) > OPSET or set(found) - {""}:
        raise PackError(f"{path.name} has operator sets {found}; TensorRT 8.6 reads ONNX up to {OPSET}")


def answer(path: Path, rows: Arrays) -> Arrays:
    """What ONNX Runtime answers on its CPU, some rows at a time."""
    session = open_session(path, threads=1)
    answers = [
        session.run({name: array[start : start + CHUNK_ROWS] for name, array in rows.items()})
        for start in range(0, ROWS, CHUNK_ROWS)
    ]
    return {name: np.concatenate([part[name] for part in answers]) for name in answers[0]}


def agreement(expected: Arrays, found: Arrays) -> dict[str, dict[str, float]]:
    """The largest difference, and the smallest cosine of a row, by output."""
    result = {}
    for name, array in expected.items():
        a, b = (part.reshape(len(part), -1).astype(np.float64) for part in (array, found[name]))
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        result[name] = {"max_abs": float(np.abs(a - b).max()), "min_cosine": float(cosine.min())}
    return result


def resnet50_weights(graph: onnx.ModelProto) -> Weights:
    """Kernels of the convolutions by Keras's names, BatchNorm folded in, and the last layer.

    With random weights all biases are zero, and the ONNX file has none.
    """
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    weights = {}
    for node in graph.graph.node:
        if node.op_type == "Conv" and (match := CONV.search(node.input[1])):
            weights[f"{match[1]}.weight"] = stored[node.input[1]]
            if len(node.input) != 2:
                raise PackError(f"{node.name} has a bias, which the benchmark's PyTorch module has not")
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] in stored:
            weights["predictions.weight"] = stored[node.input[1]].T
    if len(weights) != 54:
        raise PackError(f"{len(weights)} weights of ResNet-50 were found, not {54}")
    return weights


def minilm_weights(_: onnx.ModelProto) -> Weights:
    """The parameters of the recipe's PyTorch module."""
    from embedder import make_embedder

    module, _, _ = make_embedder()
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def find_places(path: Path, weights: Weights) -> Iterator[tuple[str, Place]]:
    """Where in the file each weight lies, looked for by its bytes.

    Raises:
        PackError: a weight is not in the file, as it is or transposed.
    """
    content = path.read_bytes()
    for name, array in weights.items():
        for stored, transposed in ((array, False), (array.T, True)):
            offset = content.find(np.ascontiguousarray(stored, "<f4").tobytes())
            if offset >= 0:
                shape = tuple(int(size) for size in stored.shape)
                yield name, Place(offset_bytes=offset, shape=shape, transposed=transposed and array.ndim > 1)
                break
        else:
            raise PackError(f"weight {name} {list(array.shape)} of the PyTorch module is not in {path.name}")
