"""ResNet-50 and MiniLM as PyTorch modules with the weights of the ONNX files.

They are written as one writes them in PyTorch (convolutions that may run channels-last, the fused attention
of `scaled_dot_product_attention`), not interpreted from the graph: that is what a plan has to beat. BatchNorm
is folded into the convolutions, and biases that are zero are left out, as in the ONNX file. Needs torch and
numpy alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from reference import read_weights
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, LAYERS, INNER, TOKENS, POSITIONS, KINDS = 384, 12, 6, 1536, 30522, 512, 2
EPSILON = 1e-12
HIDDEN_FROM_ATTENTION = -10_000.0


class Block(nn.Module):
    """A bottleneck of ResNet-50 v1: the stride is that of the first 1x1 convolution."""

    def __init__(self, channels: int, width: int, stride: int, *, shortcut: bool) -> None:
        super().__init__()
        if shortcut:
            self.conv0 = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
        self.conv1 = nn.Conv2d(channels, width, 1, stride, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        past = self.conv0(x) if self.shortcut else x
        y = functional.relu(self.conv1(x))
        y = functional.relu(self.conv2(y))
        return functional.relu(past + self.conv3(y))


class ResNet50(nn.Module):
    """Images `[B, 224, 224, 3]` to 1000 logits, as Keras has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        channels, stages = 64, []
        for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            blocks = []
            for index in range(count):
                first = index == 0
                blocks.append(Block(channels, width, 2 if first and stage else 1, shortcut=first))
                channels = 4 * width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.predictions = nn.Linear(channels, 1000, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.conv1(images.permute(0, 3, 1, 2)))
        x = functional.max_pool2d(functional.pad(x, (1, 1, 1, 1)), 3, 2)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.predictions(x.mean(dim=(2, 3)))
        return logits


class Layer(nn.Module):
    """Self-attention and two dense layers; `hidden` `[B, 1, 1, L]` is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.attended = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attention_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.inner = nn.Linear(WIDTH, INNER)
        self.outer = nn.Linear(INNER, WIDTH)
        self.output_norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        # The query's weights hold the scale.
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=hidden, scale=1.0)
        x = self.attention_norm(x + self.attended(attended.transpose(1, 2).flatten(2)))
        y: Tensor = self.output_norm(x + self.outer(functional.gelu(self.inner(x))))
        return y


class Embedder(nn.Module):
    """Token ids `[B, L]` three times to unit vectors `[B, WIDTH]`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.kinds = nn.Embedding(KINDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.tokens(input_ids) + self.positions(places) + self.kinds(token_type_ids))
        mask = attention_mask.to(x.dtype)
        hidden = (1.0 - mask)[:, None, None, :] * HIDDEN_FROM_ATTENTION
        for layer in self.layers:
            x = layer(x, hidden)
        return functional.normalize((x * mask[:, :, None]).sum(dim=1), dim=-1)


def make_module(folder: Path) -> nn.Module:
    """The module of the prepared model in `folder`, in FP32 on the CPU.

    Raises:
        ValueError: no module is written for it.
    """
    weights = {name: torch.from_numpy(array) for name, array in read_weights(folder).items()}
    if folder.name == "resnet50":
        module: nn.Module = ResNet50()
        weights = {resnet50_name(name): tensor for name, tensor in weights.items()}
    elif folder.name == "minilm":
        module = Embedder()
    else:
        raise ValueError(f"no PyTorch module is written for {folder.name}")
    module.load_state_dict(weights)
    return module.eval()


def resnet50_name(keras: str) -> str:
    """`conv3_block1_0.weight` as the module calls it: `stages.1.0.conv0.weight`."""
    layer, _, part = keras.partition(".")
    if "_block" not in layer:
        return keras
    stage, block, number = layer.removeprefix("conv").replace("_block", "_").split("_")
    return f"stages.{int(stage) - 2}.{int(block) - 1}.conv{number}.{part}"
