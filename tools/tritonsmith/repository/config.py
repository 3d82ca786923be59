"""config.pbtxt: from an artifact and a recipe's [config] table, through Triton's own protobuf."""

from __future__ import annotations

from collections.abc import Mapping

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Artifact, Json

DEFAULT_MAX_BATCH_SIZE = 8


def config_from_artifact(
    artifact: Artifact,
    *,
    name: str,
    backend: str,
    max_batch_size: int | None = None,
    extra: Mapping[str, Json] | None = None,
    labels: Mapping[str, str] | None = None,
) -> model_config_pb2.ModelConfig:
    """The configuration that serves `artifact`.

    `max_batch_size` None is DEFAULT_MAX_BATCH_SIZE for a model with a batch axis and 0 for one without.
    `extra` is the recipe's [config] table; `labels` maps outputs to file names in the model's folder.
    """
    raise NotImplementedError


def text_from_config(config: model_config_pb2.ModelConfig) -> str:
    """The text of config.pbtxt: always the same for the same configuration."""
    raise NotImplementedError


def config_from_text(text: str, *, place: str = "config.pbtxt") -> model_config_pb2.ModelConfig:
    """Parse the text of a config.pbtxt; `place` names it in errors."""
    raise NotImplementedError
