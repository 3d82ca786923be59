"""BF16: weights stored in bfloat16 behind a Cast, so that the file halves and runs everywhere.

ONNX Runtime's CPU (1.32) has no bfloat16 kernels beside Cast and LayerNormalization: it widens the weights
once, when it loads the model, and computes in FP32. OpenVINO keeps them narrow where the processor has BF16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tritonsmith import dtypes, onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step
from tritonsmith.compress.float16 import compare_models, draw_probes
from tritonsmith.compress.prepare import prepare_graph, tidy
from tritonsmith.errors import CompressionError
from tritonsmith.files import staging_folder
from tritonsmith.samples import Samples

BFLOAT16 = dtypes.BY_NAME["bfloat16"]
FEWEST_VALUES = 64  # of a weight: the Cast takes as many bytes as a smaller one would save
NOTE = "weights are stored in BF16; ONNX Runtime's CPU widens them and computes in FP32: smaller, not faster"


def cast_bfloat16(
    artifact: Artifact,
    out: Path,
    *,
    samples: Samples | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Store FP32 weights in bfloat16, rounded to nearest; what is read from them is FP32 again.

    The step records how many were stored so, and the largest difference from FP32 on the first of
    `samples`, or on seeded inputs.

    Raises:
        CompressionError: there is nothing to cast, or the result cannot be run or is NaN.
    """
    work = step.begin("cast-bfloat16", {"inputs_and_outputs": "unchanged", "arithmetic": "fp32"})
    with staging_folder(out) as folder:
        original = onnx_model.load_model(artifact.path, with_weights=False)
        probes = list(draw_probes(artifact, original, samples))
        model = onnx_model.load_model(prepare_graph(artifact.path, folder))
        stored = _store_weights(model.graph)
        if not stored:
            raise CompressionError(f"{artifact.path.name} has no FP32 weights to cast to BF16")
        tidy(model, original)
        staged = folder / out.name
        onnx_model.save_model(model, staged)
        measured: dict[str, Json] = {"bf16_weights": stored, "note": NOTE}
        measured |= compare_models(artifact.path, staged, probes, name="BF16")
        say(NOTE)
        return step.finish(work, artifact, staged, out, precision="bf16", measured=measured)


def _store_weights(graph: onnx.GraphProto) -> int:
    given = {value.name for value in graph.input}
    stored = 0
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < FEWEST_VALUES:
            continue
        with np.errstate(over="ignore"):  # told by the next line
            narrow = numpy_helper.to_array(tensor).astype(BFLOAT16.numpy)
        if tensor.name in given or not np.isfinite(narrow.astype(np.float32)).all():
            continue
        name = f"{tensor.name}_bf16"
        cast = helper.make_node("Cast", [name], [tensor.name], f"{tensor.name}_widen", to=TensorProto.FLOAT)
        graph.node.insert(stored, cast)
        tensor.CopyFrom(
            helper.make_tensor(name, TensorProto.BFLOAT16, list(tensor.dims), narrow.tobytes(), raw=True)
        )
        stored += 1
    return stored
