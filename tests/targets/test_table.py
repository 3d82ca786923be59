"""[target.<name>] tables: what the documented one says, and mistakes named by their key."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_models import linear_model, write_model
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import RecipeError, UsageError
from tritonsmith.fingerprint import fingerprint_of
from tritonsmith.recipe import BuildRequest, load_recipe
from tritonsmith.targets import table
from tritonsmith.targets.request import TargetRequest
from tritonsmith.targets.table import pick_targets, targets_by_name

MODEL = '[model]\nname = "m"\nsource = "m.onnx"\n'
GPU = '[target.gpu]\nbackend = "tensorrt"\n'


def targets_of(folder: Path, text: str) -> tuple[TargetRequest, ...]:
    path = folder / "recipe.toml"
    path.write_text(MODEL + text, encoding="utf-8")
    return load_recipe(path, repository=folder / "repository").builds[0].targets


def test_the_documented_example(tmp_path: Path) -> None:
    assert table.__doc__ is not None
    text = textwrap.dedent(table.__doc__.partition("place.\n")[2].partition("Instead of the batches")[0])
    assert targets_of(tmp_path, text) == (
        TargetRequest(
            name="gpu",
            backend="tensorrt",
            max_batch_size=64,
            without_plan="fallback",
            plan=PlanOptions(
                profiles=(
                    Profile(
                        axes={
                            "batch": AxisRange(minimum=1, best=8, maximum=64),
                            "sequence": AxisRange(minimum=8, best=64, maximum=256),
                        }
                    ),
                ),
                workspace_bytes=4 * 1024**3,
            ),
            config={
                "dynamic_batching": {
                    "preferred_batch_size": [32, 64],
                    "max_queue_delay_microseconds": 200,
                },
                "instance_group": [{"count": 2, "gpus": [0, 1]}],
            },
        ),
    )


def test_one_number_is_one_length(tmp_path: Path) -> None:
    (target,) = targets_of(tmp_path, GPU + "[[target.gpu.profile]]\nsequence = 128\n")
    assert target.plan.profiles[0].axes == {"sequence": AxisRange(minimum=128, best=128, maximum=128)}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[target.gpu]\n", "target.gpu.backend is missing"),
        ('[target.gpu]\nbackend = "onnx"\n', "target.gpu.backend has no value 'onnx'"),
        ('[target."a/b"]\nbackend = "tensorrt"\n', r"\[target.a/b\] cannot name a target"),
        (GPU + 'precision = "fp8"\n', "target.gpu.precision has no value 'fp8'"),
        (GPU + 'without_plan = "wait"\n', "target.gpu.without_plan has no value"),
        (GPU + "allow_slow_int8 = 1\n", "target.gpu.allow_slow_int8 has the wrong type"),
        (GPU + "max_batch_size = true\n", "target.gpu.max_batch_size has the wrong type"),
        (GPU + "max_batch_size = -1\n", "target.gpu.max_batch_size is negative"),
        (GPU + "profil = []\n", "target.gpu.profil is no key"),
        (GPU + "profile = {batch = 1}\n", "target.gpu.profile has the wrong type"),
        (GPU + "[[target.gpu.profile]]\n", r"target.gpu.profile\[0\] is empty"),
        (GPU + "[[target.gpu.profile]]\nbatch = [1, 8]\n", r"target.gpu.profile\[0\].batch is no range"),
        (GPU + "[[target.gpu.profile]]\nbatch = [1, 8, 4]\n", r"profile\[0\].batch is out of order"),
        (GPU + "[[target.gpu.profile]]\nbatch = [0, 8, 9]\n", r"profile\[0\].batch is no range"),
        (GPU + "[target.gpu.plan]\noptimization_level = 6\n", "target.gpu.plan.optimization_level is out"),
        (GPU + '[target.gpu.plan]\nworkspace = "4 pages"\n', "target.gpu.plan.workspace is no size"),
        (GPU + "[target.gpu.plan]\nworkspace = 0\n", "target.gpu.plan.workspace is out of range"),
        (GPU + '[target.gpu.plan]\nhardware_compatibility = "all"\n', "target.gpu.plan.hardware_comp"),
        (GPU + '[target.gpu.plan]\ntf32 = "yes"\n', "target.gpu.plan.tf32 has the wrong type"),
        (GPU + "[target.gpu.config]\nmax_batch_size = 4\n", "target.gpu.config.max_batch_size cannot be set"),
        (GPU + '[target.gpu.config]\ncc_model_filenames = {"9.0" = "x"}\n', "cc_model_filenames cannot"),
        (GPU + "[target.gpu.config]\ninstances = 2\n", "target.gpu.config.instances is no field"),
        (GPU + 'traffic = "t.json"\n[[target.gpu.profile]]\nbatch = 4\n', "both say the batches"),
        ('[target.cpu]\nbackend = "openvino"\nprecision = "int8"\n', "precision is for TensorRT alone"),
        ('[target.cpu]\nbackend = "openvino"\n[target.cpu.plan]\n', "target.cpu.plan is for TensorRT alone"),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        targets_of(tmp_path, text)


def test_targets_without_a_recipe_are_named_after_their_backend() -> None:
    names = tuple((target.name, target.backend) for target in targets_by_name(("tensorrt", "openvino")))
    assert names == (("tensorrt", "tensorrt"), ("openvino", "openvino"))
    with pytest.raises(UsageError, match="--target gpu needs a recipe"):
        targets_by_name(("gpu",))


def test_some_of_a_recipes_targets() -> None:
    gpu, cpu = (TargetRequest(name=name, backend="openvino") for name in ("gpu", "cpu"))
    assert pick_targets((gpu, cpu), (), place="recipe.toml") == (gpu, cpu)
    assert pick_targets((gpu, cpu), ("cpu",), place="recipe.toml") == (cpu,)
    with pytest.raises(UsageError, match=r"recipe.toml has no \[target.tpu\]"):
        pick_targets((gpu, cpu), ("tpu",), place="recipe.toml")


def test_targets_count_in_the_fingerprint(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.onnx", linear_model())
    request = BuildRequest(name="m", source=str(source), repository=tmp_path / "repository")
    traffic = tmp_path / "stats.json"
    traffic.write_text("{}")
    target = TargetRequest(name="gpu", backend="tensorrt", traffic=traffic)
    requests = (
        request,
        replace(request, targets=(target,)),
        replace(request, targets=(target,), defer=True),
        replace(request, targets=(replace(target, precision="fp16"),)),
    )
    before = [fingerprint_of(request, arithmetic={}) for request in requests]
    assert len(set(before)) == 4
    assert before == [fingerprint_of(request, arithmetic={}) for request in requests]
    traffic.write_text("{ }")
    after = [fingerprint_of(request, arithmetic={}) for request in requests]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, False, False]
