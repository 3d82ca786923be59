"""TensorFlow, Keras and tf2onnx, imported where they are needed and without their noise."""

from __future__ import annotations

import importlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritonsmith.errors import MissingExtraError, SourceError

LOGGERS = ("tensorflow", "absl", "tf2onnx")
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ERROR_LINE = re.compile(r"\w*(Error|Exception)\b.*: ")


def import_framework(name: str, source: Path) -> Any:
    """Import tensorflow, keras, tf_keras or tf2onnx, on the TensorFlow backend and without their noise.

    Raises:
        MissingExtraError: it is not installed.
        SourceError: it is broken, or Keras already runs on another backend in this process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    try:
        with _native_stderr_held(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their own deprecations
            importlib.import_module("tensorflow")
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise MissingExtraError(f"cannot read {source}", package=package, extra="keras") from error
    except ImportError as error:
        raise SourceError(
            f"cannot read {source}", found=f"{name} is broken: {first_line(error)}", fix=f"reinstall {name}"
        ) from error
    for logger in LOGGERS:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    if name == "keras" and (backend := module.backend.backend()) != "tensorflow":
        raise SourceError(
            f"cannot read {source}",
            found=f"Keras runs on {backend} in this process",
            expected="the TensorFlow backend",
            fix="set KERAS_BACKEND=tensorflow, and import keras nowhere before",
        )
    return module


def first_line(error: BaseException) -> str:
    """The part of an error's message that says most, cut to a readable length."""
    text = ANSI_COLOUR.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0] == "in user code:":  # AutoGraph puts the source lines before the error's own
        start = next((index for index, line in enumerate(lines) if ERROR_LINE.match(line)), 0)
        lines = lines[start:]
    else:
        lines[0] = f"{type(error).__name__}: {lines[0]}"
    inner = [line for line in lines if line.startswith("Exception encountered: ")]
    if inner:  # Keras prints the configuration first
        return inner[-1][:300]
    if "Exception encountered when calling" in lines[0]:  # Keras says where first, then what
        lines[0] = " ".join(lines[:2])
    return lines[0][:300]


@contextmanager
def warnings_held() -> Iterator[None]:
    """Keep back what tf2onnx logs through the root logger: it is about its own optimisations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _native_stderr_held() -> Iterator[None]:
    """Keep what C++ code prints while it is imported off the terminal; no setting reaches it so early."""
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
