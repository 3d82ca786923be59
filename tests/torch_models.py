"""Tiny PyTorch factories, one for each thing that a conversion must keep: `torch_models:<function>`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Scores(NamedTuple):
    logits: torch.Tensor
    best: torch.Tensor


def _seeded(module: nn.Module) -> nn.Module:
    """The module with weights that are the same in every process and not symmetric round zero."""
    generator = torch.Generator().manual_seed(7)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) * 0.8 - 0.3
    return module


def mlp() -> Any:
    """One row of example, which would freeze the batch axis if it were traced as it is."""
    return _seeded(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))), (torch.randn(1, 4),)


def training() -> Any:
    """Left in train mode: dropout would make noise, batch norm would use the batch's own mean."""
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.9))
    module[0] = _seeded(module[0])
    module[1].running_mean.fill_(0.25)
    return module.train(), (torch.randn(2, 4),)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 4, batch_first=True)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        states, _ = self.lstm(self.embed(ids))
        steps, last = self.gru(states)
        return {"steps": steps, "last": last[0]}


def recurrent() -> Any:
    return _seeded(Recurrent()), (torch.arange(10).reshape(2, 5) + 1,)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(ids))
        return self.attention(hidden, hidden, hidden, key_padding_mask=padding)[0]


def attention() -> Any:
    """Integer and boolean inputs with a free sequence axis."""
    inputs = {"ids": torch.randint(0, 20, (2, 6)), "padding": torch.zeros(2, 6, dtype=torch.bool)}
    axes = {0: "batch", 1: "sequence"}
    return _seeded(Attention()), inputs, {"ids": axes, "padding": axes}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
        self.plane = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.MaxPool2d(2))
        self.space = nn.Sequential(
            nn.Conv3d(1, 4, 2), nn.InstanceNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1)
        )
        self.norm = nn.LayerNorm(4)

    def forward(
        self, line: torch.Tensor, plane: torch.Tensor, space: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        planes = self.plane(plane).mean((2, 3))
        return self.norm(self.line(line).mean(2) + planes), self.space(space).flatten(1)


def convolutions() -> Any:
    inputs = (torch.randn(2, 2, 9), torch.randn(2, 3, 12, 12), torch.randn(2, 1, 4, 4, 4))
    module = _seeded(Convolutions())
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.data = buffer.abs() + 0.5
    return module, inputs


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)

    def forward(self, features: torch.Tensor, keep: torch.Tensor) -> Scores:
        logits = torch.where(keep, self.dense(features), torch.zeros(()))
        return Scores(logits, logits.argmax(1))


def named_outputs() -> Any:
    return _seeded(Classifier()), (torch.randn(2, 4), torch.tensor([[True], [False]]))


def half() -> Any:
    return _seeded(nn.Linear(4, 3)).half(), (torch.randn(2, 4).half(),)


def brain() -> Any:
    return _seeded(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))).bfloat16(), (
        torch.randn(2, 4).bfloat16(),
    )


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, signal: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return (signal * self.weight).sum() * gain


def unbatched() -> Any:
    """A vector and a scalar: no axis that could be a batch."""
    return Unbatched(), (torch.randn(4), torch.tensor(2.0))


class Square(nn.Module):
    def forward(self, table: torch.Tensor) -> torch.Tensor:
        return torch.ones(5, 3) @ table


def fixed_rows() -> Any:
    """Axis 0 is no batch: the module multiplies it away."""
    return Square(), (torch.randn(3, 2),)


def frozen_axis() -> Any:
    return Square(), (torch.randn(3, 2),), {"table": {0: "rows"}}
