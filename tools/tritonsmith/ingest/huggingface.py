"""Hugging Face folders: config.json and *.safetensors of an encoder or a classifier.

The class is the one that config.json names under `architectures`. Weights come from safetensors, which
hold numbers alone; `pytorch_model.bin` is a pickle, and a config with `auto_map` brings Python files of
its own: both need `--allow-code`. Nothing is downloaded. Attention is exported in its plain form.
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

from tritonsmith.artifact import BATCH_AXIS, Json
from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.torch_example import ExampleInputs
from tritonsmith.ingest.torch_export import quiet, reason_of, require_torch
from tritonsmith.ingest.torch_module import TorchModule, export_loaded

if TYPE_CHECKING:
    import torch

SEQUENCE_AXIS = "sequence"
EXAMPLE_LENGTH = 8
TRIED_LENGTHS = (1, 5, 32)

# The ending of an architecture's name, and the class that loads such a model from code in its folder.
TASKS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}
REFUSED = ("LMHeadModel", "DoubleHeadsModel")
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
    return export_loaded(load_huggingface(source, options), folder)


def load_huggingface(source: Path, options: ConvertOptions) -> TorchModule:
    """The model of a folder, in float32 and eval mode; `export_huggingface` says what it takes and raises."""
    config = read_config(source)
    architecture = _check_config(source, config, allow_code=options.allow_code)
    pickled = _check_weights(source, allow_code=options.allow_code)
    require_torch(source, extra="huggingface")
    with _offline():
        model = _load_model(source, config, options, pickled=pickled)
    inputs = _inputs_of(source, model)
    settings: dict[str, Json] = {"architecture": architecture}
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if stored != "float32":
        settings["cast"] = f"{stored} to float32"
    if inputs.longest is not None:
        settings["longest_sequence"] = inputs.longest
    return TorchModule(
        source=str(source),
        kind="huggingface",
        module=model,
        example=inputs.example,
        free=inputs.free,
        must_stay_free=True,
        options=settings,
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
    config = _read_json(path)
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        raise SourceError(
            f"{path} does not say which class the model is",
            expected='"architectures": ["BertModel"], or another class of transformers',
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{path} cannot be read", found=error, expected="JSON") from error
    if not isinstance(document, dict):
        raise SourceError(f"{path} cannot be read", found=type(document).__name__, expected="a JSON object")
    return document


def _check_config(source: Path, config: Mapping[str, Any], *, allow_code: bool) -> str:
    architecture = str(config["architectures"][0])
    if "auto_map" in config and not allow_code:
        raise SourceError(
            f"{source} brings Python code of its own",
            found=f"auto_map in config.json: {json.dumps(config['auto_map'])}",
            fix="read that code, then add --allow-code to run it",
        )
    decoder = config.get("is_decoder") or config.get("is_encoder_decoder")
    if decoder or architecture.endswith(REFUSED) or not architecture.endswith(tuple(TASKS)):
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
    source: Path, config: Mapping[str, Any], options: ConvertOptions, *, pickled: bool
) -> torch.nn.Module:
    architecture, own_code = str(config["architectures"][0]), "auto_map" in config
    try:
        with quiet():
            transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            f"{source} needs transformers", package="transformers", extra="huggingface"
        ) from error
    task = next(auto for ending, auto in TASKS.items() if architecture.endswith(ending))
    loader = getattr(transformers, task if own_code else architecture, None)
    if loader is None:
        raise SourceError(
            f"transformers {transformers.__version__} has no class {architecture}",
            fix="install the version in config.json's transformers_version",
        )
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
    longest: int | None  # tokens in a sequence


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
    tried = tuple(size for size in TRIED_LENGTHS if longest is None or size <= longest)
    return _Inputs(
        example=ExampleInputs(tensors=tensors, positional_count=0),
        free={name: {0: BATCH_AXIS, 1: SEQUENCE_AXIS} for name in names},
        ranges={
            "input_ids": (0, config.vocab_size - 1),
            "attention_mask": (0, 1),
            "token_type_ids": (0, max(segments - 1, 0)),
        },
        lengths={SEQUENCE_AXIS: tried},
        longest=longest,
    )


def _longest_sequence(model: Any) -> int | None:
    """The number of positions that were learnt, or None where positions are relative or rotary."""
    lengths = []
    stated = getattr(model.config, "max_position_embeddings", None)
    if isinstance(stated, int) and stated > 0:
        lengths.append(stated)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            # RoBERTa and its kin count positions from behind the padding index on.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            lengths.append(module.num_embeddings - first)
    return min(lengths, default=None)


def _image_inputs(source: Path, config: Any) -> _Inputs:
    import torch

    height, width = _image_size(source, config)
    return _Inputs(
        example=ExampleInputs(
            tensors={"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)},
            positional_count=0,
        ),
        free={"pixel_values": {0: BATCH_AXIS}},
        ranges={},
        lengths={},
        longest=None,
    )


def _image_size(source: Path, config: Any) -> tuple[int, int]:
    """Height and width in config.json, else those to which preprocessor_config.json scales and crops."""
    sizes = [getattr(config, "image_size", None)]
    path = source / "preprocessor_config.json"
    if path.is_file():
        preprocessor = _read_json(path)
        sizes += [preprocessor.get("crop_size"), preprocessor.get("size")]
    for size in sizes:
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, dict) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        if isinstance(size, dict) and {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
    raise SourceError(
        f"{source} does not say how large its images are",
        expected="image_size in config.json, or size in preprocessor_config.json",
    )
