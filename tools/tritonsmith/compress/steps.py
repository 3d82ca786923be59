"""The steps that a chain is made of: one record each, and how a recipe or a command line writes them.

In a recipe a step is a table, on a command line one argument; the keys are the fields of its record:

    [[compress]]                          --step "prune flops=0.25 epochs=8"
    step = "prune"
    flops = 0.25
    epochs = 8

`step_text.py` reads both. What a step does is a function `apply_<step>` in the file named beside its record;
`chain.py` calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a step that trains takes; `epochs = 0` trains nothing.

    The teacher is always the FP32 model that the chain began with. Each loss has a weight, 0 leaves it out.
    """

    epochs: int = 0
    learning_rate: float = 1e-3  # of AdamW, after a short warm-up, falling to 0 as a half cosine
    batch_size: int = 64
    seed: int = 7
    labels: float | None = None  # cross-entropy to `target`; left out: 1 where the training data has labels
    logits: float = 1.0  # each output against the teacher's: KL for probabilities, else mean squared error
    temperature: float = 2.0  # of that KL (Hinton et al., 2015)
    hidden: float = 0.0  # mean squared error of hidden states at the same tensor names
    embedding: float = 0.0  # cosine distance of outputs pooled over their free axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune(Trained):
    """Remove whole channels, heads and neurons: as many as one of `flops`, `parameters`, `ratio` says."""

    kind: ClassVar[str] = "prune"  # compress/pruning/prune.py

    flops: float | None = None  # share of the FLOPs that may be left
    parameters: float | None = None  # share of the parameters that may be left
    ratio: float | None = None  # share of the channels that goes, of every group alike
    importance: str = "magnitude"  # or "taylor": first-order, from the training data (else calibration)
    round_to: int = 8  # sizes that are left are multiples of this
    iterations: int = 1  # prune a part, train, and again; `epochs` are those of each iteration
    keep: tuple[str, ...] = ()  # names of nodes whose channels all stay


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneTorch(Trained):
    """The same on the PyTorch module itself, by torch-pruning; only as the first step of a PyTorch source."""

    kind: ClassVar[str] = "prune-torch"  # compress/pruning/prune_torch.py

    flops: float | None = None
    parameters: float | None = None
    ratio: float | None = None
    importance: str = "magnitude"
    round_to: int = 8
    iterations: int = 1
    keep: tuple[str, ...] = ()  # names of modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsify(Trained):
    """Set weights to zero: a share of them, or two of every four; shapes stay."""

    kind: ClassVar[str] = "sparsify"  # compress/pruning/sparsify.py

    sparsity: float = 0.5
    pattern: str = "unstructured"  # or "2:4"
    scope: str = "layer"  # the share is of each layer's weights alike; "global": of all together
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(Trained):
    """Train a student to answer as the teacher does; by default the student is the artifact itself."""

    kind: ClassVar[str] = "distill"  # compress/distillation/distill.py

    student: str | None = None  # any source that `convert` reads, trained or not
    width: float | None = None  # derive the student: this share of the channels of every group
    depth: float | None = None  # derive the student: this share of the repeated blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(Trained):
    """INT8 weights and activations; with `epochs`, after quantization-aware fine-tuning."""

    kind: ClassVar[str] = "quantize"  # compress/int8/quantize.py

    method: str = "auto"  # "static", "dynamic"
    calibrator: str = "minmax"  # "entropy", "percentile", "mse"
    percentile: float = 99.99
    dialect: str | None = None  # "onnxruntime", "openvino", "tensorrt"; left out: the engine's
    smooth: float | None = None  # SmoothQuant's alpha (arXiv 2211.10438); 0.5 is usual
    bias_correction: bool = False
    keep: tuple[str, ...] = ()  # names of nodes that stay in floating point
    mixed: bool = False  # put the layers that hurt back into floating point until `max_drop` holds


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeWeights(Trained):
    """INT4 or INT8 weights in blocks; activations stay as they are, or are quantized as they come."""

    kind: ClassVar[str] = "quantize-weights"  # compress/weight_only/quantize.py

    bits: int = 4
    block: int = 32
    embeddings: bool = True
    # "float": QDQ of opset 21, weights widened when the model is loaded; "int8": INT4 stored, INT8 computed
    # (progressive group quantization, arXiv 2405.04532)
    arithmetic: str = "float"
    smooth: float | None = None  # SmoothQuant's alpha, as in Quantize
    compensate: bool = False  # GPTQ (arXiv 2210.17323) on the calibration data
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareRows:
    """Let rows of an embedding table that the data do not use share the nearest row that stays."""

    kind: ClassVar[str] = "share-rows"  # compress/weight_only/share_rows.py

    rows: int  # how many stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """FP16 or BF16, with what would overflow left in FP32."""

    kind: ClassVar[str] = "cast"  # compress/float16.py

    to: str = "fp16"  # or "bf16"


StepSpec: TypeAlias = Prune | PruneTorch | Sparsify | Distill | Quantize | QuantizeWeights | ShareRows | Cast
SPECS: Mapping[str, type[StepSpec]] = {
    spec.kind: spec
    for spec in (Prune, PruneTorch, Sparsify, Distill, Quantize, QuantizeWeights, ShareRows, Cast)
}
