"""Hugging Face folders: config.json and *.safetensors of an encoder or a classifier.

The class is the one that config.json names under `architectures`, found through the library's own
registry of the task. Weights come from safetensors, which hold numbers alone; `pytorch_model.bin` is a
pickle and a config with `auto_map` brings Python files of its own: both need `--allow-code`. Nothing
is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonsmith.artifact import BATCH_AXIS
from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.torch_export import (
    ExampleInputs,
    export_module,
    quiet,
    reason_of,
    require_torch,
)

if TYPE_CHECKING:
    import torch

SEQUENCE_AXIS = "sequence"
EXAMPLE_LENGTH = 8
TRIED_LENGTHS = (1, 5, 32)

# The ending of an architecture's name, the transformers class that loads it.
TASKS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}
SUPPORTED = f"an encoder (...Model) or one of {', '.join(ending for ending in TASKS if ending != 'Model')}"


def export_huggingface(source: Path, folder: Path, options: ConvertOptions) -> Exported:
    """Load the model of a folder and write `folder/raw.onnx`.

    Text models take `input_ids`, `attention_mask` and, where the model tells segments apart,
    `token_type_ids`, all int64[batch, sequence]; image models take `pixel_values`
    float32[batch, channels, height, width] at the size in config.json. Outputs are named as the
    fields of the model's output: `last_hidden_state`, `pooler_output`, `logits`, ...

    Raises:
        MissingExtraError: torch, onnxscript or transformers is not installed.
        SourceError: the folder is incomplete, of an unsupported kind, or needs `--allow-code`.
    """
    config = read_config(source)
    architecture = _check_config(source, config, allow_code=options.allow_code)
    pickled = _check_weights(source, allow_code=options.allow_code)
    require_torch(source, extra="huggingface")
    with _offline():
        model = _load_model(source, architecture, options, pickled=pickled)
    inputs = _inputs_of(source, model)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return export_module(
        str(source),
        model,
        inputs.example,
        inputs.free,
        folder,
        kind="huggingface",
        must_stay_free=True,
        options={
            "architecture": architecture,
            **({"cast": f"{stored} to float32"} if stored != "float32" else {}),
        },
        ranges=inputs.ranges,
        lengths=inputs.lengths,
    )


def read_config(source: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        SourceError: it is missing, is no JSON object or names no architecture.
    """
    path = source / "config.json"
    if not path.is_file():
        raise SourceError(f"{source} has no config.json", expected="a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{path} cannot be read", found=error, expected="JSON") from error
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("architectures"), list)
        or not config["architectures"]
    ):
        raise SourceError(
            f"{path} does not say which class the model is",
            expected='"architectures": ["BertModel"], or another class of transformers',
        )
    return config


def _check_config(source: Path, config: Mapping[str, Any], *, allow_code: bool) -> str:
    architecture = str(config["architectures"][0])
    if "auto_map" in config and not allow_code:
        raise SourceError(
            f"{source} brings Python code of its own",
            found=f"auto_map in config.json: {json.dumps(config['auto_map'])}",
            fix="read that code, then add --allow-code to run it",
        )
    decoder = config.get("is_decoder") or config.get("is_encoder_decoder")
    if decoder or not architecture.endswith(tuple(TASKS)):
        raise SourceError(
            f"{source} is a kind of model that is not supported",
            found=f"{architecture}" + (", a decoder" if decoder else ""),
            expected=SUPPORTED,
        )
    return architecture


def _check_weights(source: Path, *, allow_code: bool) -> bool:
    """Whether the weights are pickled.

    Raises:
        SourceError: there are none, or they are pickled and `allow_code` is not given.
    """
    if any((source / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return False
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (source / name).is_file():
            if allow_code:
                return True
            raise SourceError(
                f"{source} keeps its weights in a pickle, which can run code when it is read",
                found=name,
                expected="model.safetensors",
                fix="save it again with save_pretrained(folder), or add --allow-code if you trust the file",
            )
    raise SourceError(
        f"{source} has no weights",
        found=", ".join(sorted(path.name for path in source.iterdir())),
        expected="model.safetensors, or model.safetensors.index.json and its shards",
    )


@contextmanager
def _offline() -> Iterator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _load_model(
    source: Path, architecture: str, options: ConvertOptions, *, pickled: bool
) -> torch.nn.Module:
    try:
        with quiet():
            transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            f"{source} needs transformers", package="transformers", extra="huggingface"
        ) from error
    task = next(auto for ending, auto in TASKS.items() if architecture.endswith(ending))
    loader = getattr(transformers, task)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return _load_complete(source, loader, architecture, options, pickled=pickled)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _load_complete(
    source: Path, loader: Any, architecture: str, options: ConvertOptions, *, pickled: bool
) -> torch.nn.Module:
    model, missing = _from_pretrained(source, loader, options, pickled=pickled, without={})
    if missing and all("pooler." in key for key in missing):
        model, missing = _from_pretrained(
            source, loader, options, pickled=pickled, without={"add_pooling_layer": False}
        )
    if missing:
        raise SourceError(
            f"{source} lacks weights that {architecture} needs",
            found=f"{len(missing)} missing, such as {missing[0]}",
            fix="save the whole model again with save_pretrained(folder)",
        )
    return model  # type: ignore[no-any-return]


def _from_pretrained(
    source: Path, loader: Any, options: ConvertOptions, *, pickled: bool, without: Mapping[str, bool]
) -> tuple[Any, list[str]]:
    """The model in float32 and eval mode, and the names of weights that the folder did not have."""
    import torch

    try:
        with quiet():
            model, info = loader.from_pretrained(
                str(source.resolve()),
                local_files_only=True,
                trust_remote_code=options.allow_code,
                use_safetensors=not pickled,
                dtype=torch.float32,
                attn_implementation="eager",  # plainer in ONNX: 216 nodes for MiniLM, 288 by sdpa
                output_loading_info=True,
                **without,
            )
    except Exception as error:
        raise SourceError(
            f"transformers cannot load {source}",
            found=reason_of(error),
            expected="a folder that save_pretrained() wrote",
        ) from error
    model.config.return_dict = True
    model.config.use_cache = False
    model.config.output_attentions = False
    model.config.output_hidden_states = False
    return model.eval(), sorted(info["missing_keys"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    example: ExampleInputs
    free: Mapping[str, Mapping[int, str]]
    ranges: Mapping[str, tuple[float, float]]
    lengths: Mapping[str, tuple[int, ...]]


def _inputs_of(source: Path, model: Any) -> _Inputs:
    if model.main_input_name == "pixel_values":
        return _image_inputs(source, model.config)
    if model.main_input_name == "input_ids":
        return _text_inputs(model)
    raise SourceError(
        f"{source} is a kind of model that is not supported",
        found=f"{type(model).__name__}, which takes {model.main_input_name}",
        expected="a model of input_ids or pixel_values",
    )


def _text_inputs(model: Any) -> _Inputs:
    import torch

    config = model.config
    names = ["input_ids", "attention_mask"]
    segments = int(getattr(config, "type_vocab_size", 0) or 0)
    if segments > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        names.append("token_type_ids")
    tensors = {name: torch.ones(2, EXAMPLE_LENGTH, dtype=torch.int64) for name in names}
    longest = _longest_sequence(model)
    tried = {size for size in TRIED_LENGTHS if longest is None or size <= longest}
    return _Inputs(
        example=ExampleInputs(tensors=tensors, positional_count=0),
        free={name: {0: BATCH_AXIS, 1: SEQUENCE_AXIS} for name in names},
        ranges={
            "input_ids": (0, config.vocab_size - 1),
            "attention_mask": (0, 1),
            "token_type_ids": (0, max(segments - 1, 0)),
        },
        lengths={SEQUENCE_AXIS: tuple(sorted(tried))},
    )


def _longest_sequence(model: Any) -> int | None:
    """The number of positions that were learnt, or None where positions are relative or rotary."""
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings")
    ]
    # RoBERTa and its kin count positions from the padding index on.
    return min(
        (table.num_embeddings - (table.padding_idx or -1) - 1 for table in tables),
        default=None,
    )


def _image_inputs(source: Path, config: Any) -> _Inputs:
    import torch

    size = getattr(config, "image_size", None)
    sides = [size, size] if isinstance(size, int) else list(size or ())
    channels = getattr(config, "num_channels", None)
    if len(sides) != 2 or not isinstance(channels, int):
        raise SourceError(
            f"{source / 'config.json'} does not say how large its images are",
            found=f"image_size {size}, num_channels {channels}",
            expected="both, as numbers",
        )
    return _Inputs(
        example=ExampleInputs(tensors={"pixel_values": torch.zeros(2, channels, *sides)}, positional_count=0),
        free={"pixel_values": {0: BATCH_AXIS}},
        ranges={},
        lengths={},
    )
