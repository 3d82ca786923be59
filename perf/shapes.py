"""Structured pruning alone, on a classifier of our own. A part of `make bench-compression`.

The source is the PyTorch network of tools/recipes/shapes, trained in minutes. It is pruned to a quarter of
its FLOPs three ways: without training, which shows that the task is hard enough for pruning to hurt; on the
PyTorch module by torch-pruning, fine-tuned; and on the ONNX graph by the slicer, fine-tuned.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import Case

from tritonsmith.compress.steps import Prune, PruneTorch
from tritonsmith.console import Say
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import staging_folder

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


def make_source(workspace: Path, say: Say) -> Path:
    """The folder of the trained source and its data, made once."""
    folder = workspace / "source"
    if not folder.exists():
        say("training the shapes classifier")
        with staging_folder(folder) as staging:
            command = [sys.executable, str(TRAIN), str(staging / "shapes")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise TritonsmithError(f"{TRAIN} failed", found=done.stderr[-2000:].strip())
            (staging / "shapes").replace(folder)
        say(done.stdout.strip().splitlines()[-1])
    return folder


def cases(workspace: Path, say: Say) -> Sequence[Case]:
    """A case for each variant, all on the same source and data."""
    workspace.mkdir(parents=True, exist_ok=True)
    folder = make_source(workspace, say)
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
