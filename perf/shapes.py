"""Structured pruning alone, on a classifier of our own. A part of `make bench-compression`.

The source is the PyTorch network of tools/recipes/shapes, trained in minutes. It is pruned to a quarter of
its FLOPs three ways: without training, which shows that the task is hard enough for pruning to hurt; on the
PyTorch module by torch-pruning, fine-tuned; and on the ONNX graph by the slicer, fine-tuned.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases import Case, make_folder

from tritonsmith.compress.steps import Prune, PruneTorch
from tritonsmith.console import Say

TRAIN = Path(__file__).resolve().parents[1] / "tools" / "recipes" / "shapes" / "train.py"
SOURCE = "shapes_network:classifier"
BATCHES = (1, 16)
HEADLINE_BATCH = 1
TARGETS = {"flops_ratio": 4.0, "drop": 0.01, "speedup": 2.5}
VARIANTS: dict[str, Prune | PruneTorch] = {
    "prune-torch-untrained": PruneTorch(flops=0.25, round_to=16),
    "prune-torch": PruneTorch(flops=0.25, round_to=16, importance="taylor", epochs=6, learning_rate=3e-3),
    "prune": Prune(flops=0.25, round_to=16, importance="taylor", epochs=6, learning_rate=3e-3),
}


def cases(workspace: Path, say: Say) -> Sequence[Case]:
    """A case for each variant, all on the same source and data."""
    workspace.mkdir(parents=True, exist_ok=True)
    folder = make_folder(TRAIN, workspace / "source", say)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # where the source is found by its name
    return tuple(
        Case(
            model="shapes",
            variant=variant,
            source=SOURCE,
            steps=(spec,),
            calibration=folder / "calibration.npz",
            training=folder / "training.npz",
            tuning=folder / "tuning.npz",
            evaluation=folder / "evaluation.npz",
            metric="accuracy",
            max_drop=0.01,
            allow_code=True,
            batches=BATCHES,
            headline_batch=HEADLINE_BATCH,
            targets=TARGETS if spec.epochs else {},
        )
        for variant, spec in VARIANTS.items()
    )
