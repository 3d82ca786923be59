"""The shapes classifier: a residual network of our own, and the factory that `tritonsmith convert` calls.

train.py lays this file into the folder that it fills, beside the weights, so that the folder is the whole
source: `shapes_network:classifier`, run from there or with the folder on PYTHONPATH.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

WIDTHS = (32, 64, 128)
BLOCKS = 2  # of each width
CLASSES = 12
WEIGHTS = "shapes.npz"  # arrays by the names of the module's state


class Block(nn.Module):
    """Two convolutions and a way past them (He et al., 2016, arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.past: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.past = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norm1(self.conv1(hidden)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.past(hidden))


class Shapes(nn.Module):
    """Images `[N, 1, 32, 32]` in 0..1 to logits `[N, 12]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        blocks, channels = [], WIDTHS[0]
        for index, width in enumerate(WIDTHS):
            for number in range(BLOCKS):
                blocks.append(Block(channels, width, stride=2 if index and not number else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.blocks(self.stem(image)).mean((2, 3)))}


def classifier() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The trained module and an example of its input."""
    module = Shapes()
    with np.load(Path(__file__).parent / WEIGHTS, allow_pickle=False) as arrays:
        module.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return module.eval(), (torch.zeros(2, 1, 32, 32),)
