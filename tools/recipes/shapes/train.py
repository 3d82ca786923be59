"""Train the shapes classifier and write it with its data: `train.py FOLDER`.

Minutes on two cores. FOLDER gets

    shapes_network.py  the network and its factory; the source is `shapes_network:classifier`
    shapes.npz         the trained weights
    training.npz       24,000 drawn images with labels
    calibration.npz    512 more, for the ranges of INT8
    tuning.npz         2,000 more with labels, for choices
    evaluation.npz     8,000 more with labels, for the gate alone

Each file is drawn with a seed of its own; an image that two of them share is refused.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from drawing import draw_shapes
from numpy.typing import NDArray

INPUT, TARGET = "image", "target"
SPLITS = {"training": (24_000, 1), "calibration": (512, 2), "tuning": (2_000, 3), "evaluation": (8_000, 4)}
EPOCHS = 7
BATCH = 64
LEARNING_RATE = 4e-3
SEED = 7


def train(images: NDArray[Any], labels: NDArray[Any]) -> Any:
    """The network, fitted; the same seed gives nearly the same weights on another machine."""
    import torch
    from network import Shapes

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    module = Shapes().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    began_s = time.monotonic()
    for epoch in range(EPOCHS):
        order, total = rng.permutation(len(images)), 0.0
        for start in range(0, len(images) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            inputs = torch.from_numpy(images[rows].astype(np.float32))
            loss = torch.nn.functional.cross_entropy(
                module(inputs)["logits"], torch.from_numpy(labels[rows]), label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        seconds = time.monotonic() - began_s
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / (len(images) // BATCH):.3f}, {seconds:.0f} s")
    return module.eval()


def accuracy_of(module: Any, images: NDArray[Any], labels: NDArray[Any]) -> float:
    import torch

    with torch.no_grad():
        parts = [
            module(torch.from_numpy(images[start : start + 500].astype(np.float32)))["logits"].argmax(1)
            for start in range(0, len(images), 500)
        ]
    return float((torch.cat(parts).numpy() == labels).mean())


def write_all(folder: Path) -> None:
    """Draw, train, and write the model and its data into `folder`."""
    splits = {name: draw_shapes(count, seed) for name, (count, seed) in SPLITS.items()}
    rows = [image.tobytes() for images, _ in splits.values() for image in images]
    if len(set(rows)) != len(rows):
        sys.exit("two of the drawn images are the same")
    module = train(*splits["training"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in splits.items():
        np.savez(folder / f"{name}.npz", **{INPUT: images, TARGET: labels})
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    np.savez(folder / "shapes.npz", **state)
    shutil.copyfile(Path(__file__).parent / "network.py", folder / "shapes_network.py")
    accuracy = accuracy_of(module, *splits["evaluation"])
    counts = {name: count for name, (count, _) in SPLITS.items()}
    print(
        f"trained on {counts['training']} images, accuracy {accuracy:.4f} on {counts['evaluation']} held out"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: train.py FOLDER")
    write_all(Path(sys.argv[1]))
