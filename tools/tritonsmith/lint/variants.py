"""configs/<target>.pbtxt against config.pbtxt: for a client they are one model."""

from __future__ import annotations

from collections.abc import Iterator

from tritonsmith.errors import RecipeError
from tritonsmith.lint.findings import Finding, finding_from_error
from tritonsmith.lint.scan import Model, Variant
from tritonsmith.targets.config import check_same_model


def check_variant(model: Model, variant: Variant) -> Iterator[Finding]:
    """A target that a client would see as another model than the default."""
    if variant.target is None or model.default is None:
        return
    try:
        check_same_model(model.default.config, variant.config, place=f"target {variant.target}")
    except RecipeError as error:
        yield finding_from_error(error, model=model.name, place=variant.place)
