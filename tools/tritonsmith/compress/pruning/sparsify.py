"""Zeros in the weights: a share of the smallest, or two of every four; shapes and bytes stay as they are."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step
from tritonsmith.compress.pruning.zeros import Mask, find_layers, masks_for, measure_zeros, write_zeros
from tritonsmith.compress.steps import Sparsify
from tritonsmith.engines import ENGINES, open_session
from tritonsmith.errors import CompressionError, MissingExtraError
from tritonsmith.files import staging_folder
from tritonsmith.measure import ALIKE, SpeedRatio, compare_speed

if TYPE_CHECKING:
    import torch

    from tritonsmith.compress.chain import Material

Say = Callable[[str], None]

PATTERNS = ("unstructured", "2:4")
SCOPES = ("layer", "global")
CHUNK_BYTES = 1 << 20


def apply_sparsify(
    spec: Sparsify,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Say = lambda _: None,
) -> Artifact:
    """Set the smallest weights to zero, by magnitude, and train the others where `spec` says so.

    What is zero stays zero while training. Biases, norms and tables stay as they are. Says whether the
    zeros save bytes or time on the engine.

    Raises:
        CompressionError: the request makes no sense, or no layer can have zeros.
        MissingExtraError: training needs torch.
        SamplesError: training needs data that are missing.
    """
    two_of_four = _check_spec(spec)
    work = step.begin("sparsify", {key: value for key, value in asdict(spec).items() if value is not None})
    model = onnx_model.load_model(artifact.path)
    layers, alone = find_layers(model, two_of_four=two_of_four, keep=spec.keep)
    if alone:
        say(f"left alone: {'; '.join(alone)}")
    if not layers:
        raise CompressionError(
            f"{artifact.path.name} has no weights that can be set to zero",
            found="; ".join(alone[:5]) or "no Conv, Gemm or MatMul with weights of its own",
            fix="leave sparsify out",
        )
    masks = masks_for(
        layers, sparsity=spec.sparsity, two_of_four=two_of_four, together=spec.scope == "global"
    )
    training = _train(spec, model, masks, material, checkpoint, say) if spec.epochs else None
    write_zeros(model, masks)
    with staging_folder(out) as folder:
        staged = folder / out.name
        onnx_model.save_model(model, staged)
        speed = _compare(artifact, staged, material)
        deflated = _deflated_bytes(staged) / max(1, _deflated_bytes(artifact.path))
        note = _note(material.engine, speed, deflated, two_of_four=two_of_four)
        say(note)
        measured: dict[str, Json] = {
            **measure_zeros(staged, layers),
            "left_alone": alone,
            "deflated_share": round(deflated, 4),
            "speed": None if speed is None else speed.json(),
            "training": training,
            "note": note,
        }
        tools = (*step.TOOLS, "torch") if spec.epochs else step.TOOLS
        return step.finish(
            work, artifact, staged, out, precision=artifact.precision, measured=measured, tools=tools
        )


def _check_spec(spec: Sparsify) -> bool:
    """Whether the pattern is 2:4."""
    if spec.pattern not in PATTERNS:
        raise CompressionError(f"no pattern is named {spec.pattern!r}", expected=" or ".join(PATTERNS))
    if spec.scope not in SCOPES:
        raise CompressionError(f"no scope is named {spec.scope!r}", expected=" or ".join(SCOPES))
    if not 0 < spec.sparsity < 1:
        found = f"sparsity={spec.sparsity:g}"
        raise CompressionError("sparsify needs a share", found=found, expected="more than 0, less than 1")
    two_of_four = spec.pattern == "2:4"
    if two_of_four and (spec.sparsity != 0.5 or spec.scope != "layer"):
        raise CompressionError(
            "the pattern 2:4 is half zeros in every layer",
            found=f"sparsity={spec.sparsity:g}, scope={spec.scope}",
            expected="sparsity=0.5, scope=layer",
        )
    return two_of_four


def _train(
    spec: Sparsify,
    model: onnx.ModelProto,
    masks: Mapping[str, Mask],
    material: Material,
    checkpoint: Path,
    say: Say,
) -> Json:
    """Train the weights that stay, and put them into the model."""
    try:
        import torch

        from tritonsmith.train.loop import train
        from tritonsmith.train.module import OnnxModule
    except ImportError as error:
        raise MissingExtraError(
            "training needs torch", package=error.name or "torch", extra="train"
        ) from error

    def holding(mask: Mask) -> Callable[[torch.Tensor], torch.Tensor]:
        tensor = torch.from_numpy(mask)
        return lambda weight: weight * tensor.to(weight.dtype)

    module = OnnxModule(model, wraps={name: holding(mask) for name, mask in masks.items()})
    report = train(module, material, spec, teacher=material.teacher, checkpoint=checkpoint, say=say)
    module.write_weights(model)
    trained: Json = asdict(report)
    return trained


def _compare(artifact: Artifact, staged: Path, material: Material) -> SpeedRatio | None:
    """How fast the zeros are, where there is a sample to run and the engine runs here."""
    samples = material.calibration or material.training or material.tuning
    if samples is None or material.engine not in ENGINES:
        return None
    inputs = {name: array[:1] if artifact.batched else array[0] for name, array in samples.arrays.items()}
    before, after = (
        open_session(path, engine=material.engine, threads=1) for path in (artifact.path, staged)
    )
    return compare_speed(before, after, inputs, batch_size=1)


def _note(engine: str, speed: SpeedRatio | None, deflated: float, *, two_of_four: bool) -> str:
    """What the zeros are good for, and what not."""
    if speed is None:
        time = f"time on {engine} not measured"
    elif speed.low > 1 + ALIKE:
        time = f"{speed.ratio:.2f} times as fast on {engine} ({speed.low:.2f} to {speed.high:.2f})"
    else:
        time = f"no time on {engine} ({speed.ratio:.2f} times as fast, {speed.low:.2f} to {speed.high:.2f})"
    use = "TensorRT built with SPARSE_WEIGHTS on a GPU from Ampere on" if two_of_four else ""
    transfer = f"a compressed transfer (deflated, the file has {deflated:.0%} of the bytes that it had)"
    return f"zeros save no bytes on disk; {time}; they help {' and '.join(filter(None, (use, transfer)))}"


def _deflated_bytes(path: Path) -> int:
    """Bytes of a model's files after zlib."""
    total = 0
    for file in onnx_model.model_files(path):
        deflate = zlib.compressobj(6)
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                total += len(deflate.compress(chunk))
        total += len(deflate.flush())
    return total
