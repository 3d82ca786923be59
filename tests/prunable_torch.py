"""Tiny PyTorch factories to prune: `prunable_torch:<function>`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Residual(nn.Module):
    """A stem and a block: the stem and the block's second convolution share their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.stem_norm(self.stem(image)))
        inner = torch.relu(self.norm1(self.conv1(hidden)))
        hidden = torch.relu(hidden + self.norm2(self.conv2(inner)))
        return {"logits": self.head(hidden.mean((2, 3)))}


class Attention(nn.Module):
    """Self-attention of four heads and a feed-forward layer, each with a way past it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        def split(values: torch.Tensor) -> torch.Tensor:
            return values.view(*values.shape[:2], -1, 4).transpose(1, 2)

        query, key, value = (split(part(states)) for part in (self.query, self.key, self.value))
        weights = (query @ key.transpose(2, 3) / 2).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        states = states + self.out(mixed)
        return states + self.narrow(torch.relu(self.wide(states)))


def _seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
        if name.endswith("running_var"):
            tensor.data = tensor.abs() + 0.5
    return module.eval()


def residual() -> Any:
    return _seeded(Residual()), (torch.rand(2, 1, 6, 6),)


def attention() -> Any:
    axes = {"states": {0: "batch", 1: "sequence"}}
    return _seeded(Attention()), (torch.rand(2, 5, 16),), axes
