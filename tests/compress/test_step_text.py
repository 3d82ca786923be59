"""Steps as text and as tables: what comes in comes out, and every mistake has its name."""

from __future__ import annotations

import re

import pytest

from tritonsmith.compress.step_text import (
    bytes_from,
    json_from_spec,
    spec_from_table,
    spec_from_text,
    text_from_spec,
)
from tritonsmith.compress.steps import (
    SPECS,
    Cast,
    Distill,
    Prune,
    Quantize,
    QuantizeWeights,
    ShareRows,
    Sparsify,
    StepSpec,
)
from tritonsmith.errors import RecipeError

EXAMPLES = [
    (
        "prune flops=0.25 epochs=8 keep='a b,c/d'",
        Prune(flops=0.25, epochs=8, keep=("a b", "c/d")),
    ),
    ("sparsify pattern=2:4", Sparsify(pattern="2:4")),
    ("distill width=0.5 epochs=3 labels=0", Distill(width=0.5, epochs=3, labels=0.0)),
    ("quantize bias_correction=true smooth=0.5", Quantize(bias_correction=True, smooth=0.5)),
    ("quantize-weights bits=4 embeddings=false", QuantizeWeights(embeddings=False)),
    ("share-rows rows=100", ShareRows(rows=100)),
    ("cast to=bf16", Cast(to="bf16")),
]


@pytest.mark.parametrize(("text", "spec"), EXAMPLES)
def test_text_and_back(text: str, spec: StepSpec) -> None:
    assert spec_from_text(text) == spec
    assert spec_from_text(text_from_spec(spec)) == spec


@pytest.mark.parametrize(("text", "spec"), EXAMPLES)
def test_table_and_back(text: str, spec: StepSpec) -> None:
    table = {key: value for key, value in json_from_spec(spec).items() if value is not None}
    assert spec_from_table(table, place="compress[0]") == spec


def test_every_step_has_its_name() -> None:
    assert sorted(SPECS) == sorted(record.kind for record in SPECS.values())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "--step is empty"),
        ("prun flops=0.5", "did you mean 'prune'"),
        ("prune", "needs to know how much"),
        ("prune flops=0.5 ratio=0.5", "flops and ratio"),
        ("prune flops=1", "between 0 and 1"),
        ("prune flops=0", "between 0 and 1"),
        ("prune flops=a", "flops has the wrong type"),
        ("prune flops=nan", "between 0 and 1"),
        ("prune flops=0.5 flops=0.4", "'flops' stands twice"),
        ("prune flops 0.5", "'flops' says nothing"),
        ("prune flops=0.5 round_to=0", "1 or more"),
        ("prune flops=0.5 epochs=-1", "0 or more"),
        ("prune flops=0.5 epochs=1.5", "epochs has the wrong type"),
        ("quantize calibrator=max", "one of minmax, entropy, percentile, mse"),
        ("quantize mixed=yes", "true or false"),
        ("quantize-weights bits=3", "4 or 8"),
        ("sparsify pattern=4:8", "one of unstructured, 2:4"),
        ("distill", "trains nothing"),
        ("distill epochs=1 student=a.h5 width=0.5", "cannot derive one"),
        ("share-rows", "rows is missing"),
    ],
)
def test_mistakes(text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(match)):
        spec_from_text(text)


@pytest.mark.parametrize(
    ("text", "size"), [("30000", 30_000), ("30kB", 30_000), ("9.1 MB", 9_100_000), (12, 12), ("5 B", 5)]
)
def test_sizes(text: object, size: int) -> None:
    assert bytes_from(text, "--size-at-most") == size


@pytest.mark.parametrize("text", ["", "30 kiB", "-3", "x", True, 1.5, None])
def test_no_sizes(text: object) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        bytes_from(text, "--size-at-most")
