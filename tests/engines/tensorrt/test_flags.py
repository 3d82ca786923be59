"""What is asked of the builder for options, a graph and a version."""

from __future__ import annotations

import pytest

from tritonsmith.engines.tensorrt.flags import flags_from_options
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.engines.tensorrt.versions import capabilities_of
from tritonsmith.errors import PlanError

V8, V10, V11 = capabilities_of("8.6.1"), capabilities_of("10.16.1.11"), capabilities_of("11.4.0.106")


@pytest.mark.parametrize(
    ("held", "flags"),
    [
        ({"fp32"}, ("TF32",)),
        ({"fp32", "fp16"}, ("FP16", "TF32")),
        ({"fp32", "int8"}, ("INT8", "TF32")),
        ({"fp32", "fp16", "int8"}, ("FP16", "INT8", "TF32")),
    ],
)
def test_86_allows_exactly_what_the_graph_holds(held: set[str], flags: tuple[str, ...]) -> None:
    assert flags_from_options(PlanOptions(), held, V8).builder == flags
    assert flags_from_options(PlanOptions(), held, V10).builder == ("TF32",)
    assert flags_from_options(PlanOptions(), held, V11).builder == ("TF32",)


@pytest.mark.parametrize("held", ["bf16", "fp8", "int4"])
def test_86_refuses_precisions_that_it_lacks(held: str) -> None:
    with pytest.raises(PlanError, match=f"8.6.1 does not have the precision {held}"):
        flags_from_options(PlanOptions(), {"fp32", held}, V8)
    flags_from_options(PlanOptions(), {"fp32", held}, V10)


def test_tf32_is_cleared_where_it_is_not_wanted() -> None:
    flags = flags_from_options(PlanOptions(tf32=False, sparse_weights=True), {"fp32"}, V11)
    assert (flags.builder, flags.cleared) == (("SPARSE_WEIGHTS",), ("TF32",))
    assert flags_from_options(PlanOptions(), {"fp32"}, V11).cleared == ()


@pytest.mark.parametrize(
    ("version", "options", "what"),
    [
        ("8.6.1", PlanOptions(strip_weights=True), "cannot build plans without their weights"),
        ("8.6.1", PlanOptions(hardware_compatibility="same_compute_capability"), "hardware compatibility"),
        ("10.8.0", PlanOptions(hardware_compatibility="same_compute_capability"), "hardware compatibility"),
        ("11.4.0", PlanOptions(hardware_compatibility="turing"), "hardware compatibility 'turing'"),
        ("11.4.0", PlanOptions(strip_weights=True, version_compatible=True), "cannot be refitted"),
        ("11.4.0", PlanOptions(optimization_level=6), "no such optimisation level"),
        ("11.4.0", PlanOptions(workspace_bytes=0), "not positive"),
    ],
)
def test_what_a_version_cannot_do_is_refused(version: str, options: PlanOptions, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        flags_from_options(options, {"fp32"}, capabilities_of(version))


def test_hardware_levels_are_named_as_the_binding_names_them() -> None:
    levels = [
        flags_from_options(PlanOptions(hardware_compatibility=level), {"fp32"}, V11).hardware_level
        for level in V11.hardware_levels
    ]
    assert levels == [None, "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]
