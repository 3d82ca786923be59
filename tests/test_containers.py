"""The table of Triton's containers, and GPUs by name."""

from __future__ import annotations

import pytest

from tritonsmith.containers import CONTAINERS, GPUS, SECURITY_FIXES, find_container, find_gpu
from tritonsmith.errors import UsageError


# The server's version and TensorRT as NVIDIA's release notes print them; 26.07 as its image was seen.
@pytest.mark.parametrize(
    ("release", "server", "tensorrt", "cuda", "oldest_gpu"),
    [
        ("24.10", "2.51.0", "10.5.0.18", "12.6.2", "6.0"),
        ("24.12", "2.53.0", "10.7.0.23", "12.6.3", "6.0"),
        ("25.01", "2.54.0", "10.8.0.43", "12.8.0.038", "7.5"),
        ("25.08", "2.60.0", None, "13.0.0.044", "7.5"),
        ("26.07", "2.71.0", "11.1.0.106", "13.3.1", "7.5"),
    ],
)
def test_rows(release: str, server: str, tensorrt: str | None, cuda: str, oldest_gpu: str) -> None:
    container = find_container(release)
    found = (container.server, container.tensorrt, container.cuda, container.oldest_gpu)
    assert found == (server, tensorrt, cuda, oldest_gpu)


def test_every_month_has_a_row_and_nothing_goes_back() -> None:
    releases = list(CONTAINERS)
    months = [f"{year}.{month:02}" for year in (24, 25, 26) for month in range(1, 13)]
    assert releases == months[months.index("24.10") : months.index(releases[-1]) + 1]
    for column in ("server", "onnxruntime", "tensorrt", "cuda", "oldest_gpu"):
        known = [value for row in CONTAINERS.values() if (value := getattr(row, column)) is not None]
        numbers = [tuple(int(part) for part in value.split(".")) for value in known]
        assert numbers == sorted(numbers), column
    assert set(SECURITY_FIXES) <= CONTAINERS.keys()


def test_an_unknown_container_names_those_that_are_known() -> None:
    with pytest.raises(UsageError) as caught:
        find_container("23.01")
    assert "24.10" in str(caught.value)
    assert "26.07" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("sm90", "9.0"),
        ("SM_120", "12.0"),
        ("9.0", "9.0"),
        ("90", "9.0"),
        ("sm90a", "9.0"),
        ("T4", "7.5"),
        ("A100", "8.0"),
        ("a10", "8.6"),
        ("l40s", "8.9"),
        ("NVIDIA GeForce RTX 4090", "8.9"),
        ("h100", "9.0"),
        ("B200", "10.0"),
        ("Jetson AGX Orin", "8.7"),
    ],
)
def test_gpus_by_name(name: str, capability: str) -> None:
    assert find_gpu(name) == capability


@pytest.mark.parametrize("name", ["", "voodoo", "42", "sm", "9", "h100 h200"])
def test_a_gpu_that_is_none(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_gpu(name)
    assert "h100" in str(caught.value)


def test_every_gpu_of_the_table_has_a_capability() -> None:
    assert {find_gpu(name) for name in GPUS} == set(GPUS.values())
