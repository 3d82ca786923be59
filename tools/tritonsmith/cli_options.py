"""Options that several verbs take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonsmith.ingest.source import ConvertOptions


def add_source(verb: argparse.ArgumentParser, *, recipe: bool = False) -> None:
    kinds = (
        "Keras .h5 or .keras, SavedModel folder, PyTorch .pt2 or package.module:factory, "
        "Hugging Face folder, .onnx"
    )
    verb.add_argument("source", metavar="SOURCE", help=f"{kinds}{', or a recipe.toml' if recipe else ''}")


def add_conversion(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--opset", type=int, metavar="N", help="ONNX opset (default: what the server reads)")
    verb.add_argument("--server", metavar="RELEASE", help="Triton release that must load it, such as 24.10")
    add_code(verb)


def add_code(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--custom-objects", metavar="MODULE", help="module with a Keras model's own classes")
    verb.add_argument("--allow-code", action="store_true", help="run code that the source carries")


def conversion_from(options: argparse.Namespace) -> ConvertOptions:
    from tritonsmith.ingest.source import ConvertOptions

    given = {
        name: getattr(options, name)
        for name in ("server", "opset", "custom_objects", "allow_code")
        if getattr(options, name, None) is not None
    }
    return ConvertOptions(**given)


def add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
