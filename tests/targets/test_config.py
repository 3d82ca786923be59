"""configs/<target>.pbtxt: what it takes from the default, what it is given, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tritonclient.grpc import model_config_pb2

from publishing import artifact_of, tensor
from tritonsmith.artifact import Json
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import RecipeError
from tritonsmith.repository.config import config_from_artifact, config_from_text
from tritonsmith.targets.config import check_same_model, config_for_fallback, config_for_target, with_plans
from tritonsmith.targets.order import PlanCandidate, PlanOrder
from tritonsmith.targets.request import TargetRequest

IDS = tensor("ids", "int64", "batch", "sequence")
MASK = tensor("mask", "int64", "batch", "sequence")
KIND = tensor("kind", "float32", "batch", 3)
ARTIFACT = artifact_of([IDS, MASK, KIND], [tensor("vectors", "float32", "batch", "sequence", 8)])
Group = model_config_pb2.ModelInstanceGroup


def default(**extra: Json) -> model_config_pb2.ModelConfig:
    """A configuration with everything that a recipe may have set."""
    table: dict[str, Json] = {
        "instance_group": [{"kind": "KIND_CPU", "count": 2}],
        "parameters": {"intra_op_thread_count": 1},
        "optimization": {"graph": {"level": 1}},
        "dynamic_batching": {"preferred_batch_size": [4, 8], "max_queue_delay_microseconds": 500},
        "response_cache": {"enable": True},
        "version_policy": {"latest": {"num_versions": 2}},
    }
    return config_from_artifact(
        ARTIFACT, name="m", backend="onnxruntime", max_batch_size=16, extra={**table, **extra}
    )


def profile(batch: tuple[int, int, int], sequence: tuple[int, int, int]) -> Profile:
    ranges = {"batch": batch, "sequence": sequence}
    return Profile(
        axes={
            axis: AxisRange(minimum=low, best=best, maximum=high)
            for axis, (low, best, high) in ranges.items()
        }
    )


def target(backend: str = "tensorrt", **changes: object) -> TargetRequest:
    return replace(TargetRequest(name="gpu", backend=backend), **changes)


def made(request: TargetRequest, *profiles: Profile) -> model_config_pb2.ModelConfig:
    plan = PlanOptions(profiles=profiles or (profile((1, 8, 16), (1, 32, 128)),))
    return config_for_target(default(), request, inputs=ARTIFACT.inputs, plan=plan)


def test_what_a_plan_needs() -> None:
    """Written by hand after NVIDIA's documentation of model_config.proto."""
    graphs = "".join(
        f"graph_spec {{ batch_size: {size} "
        f'input {{ key: "ids" value {{ dim: [32] }} }} input {{ key: "mask" value {{ dim: [32] }} }} '
        f'input {{ key: "kind" value {{ dim: [3] }} }} }}\n'
        for size in (1, 4, 8, 16)
    )
    assert made(target()) == config_from_text(
        f"""
        name: "m"  platform: "tensorrt_plan"  backend: "tensorrt"  max_batch_size: 16
        default_model_filename: "gpu.plan"
        input [{{ name: "ids" data_type: TYPE_INT64 dims: [-1] }},
               {{ name: "mask" data_type: TYPE_INT64 dims: [-1] }},
               {{ name: "kind" data_type: TYPE_FP32 dims: [3] }}]
        output [{{ name: "vectors" data_type: TYPE_FP32 dims: [-1, 8] }}]
        instance_group [{{ kind: KIND_GPU count: 1 }}]
        dynamic_batching {{ preferred_batch_size: [4, 8] max_queue_delay_microseconds: 500 }}
        response_cache {{ enable: true }}
        version_policy {{ latest {{ num_versions: 2 }} }}
        optimization {{ cuda {{ graphs: true {graphs} }} }}
        """
    )


def test_inputs_without_another_free_axis_are_left_to_triton() -> None:
    artifact = artifact_of([KIND], [tensor("y", "float32", "batch", 2)])
    config = config_from_artifact(artifact, name="m", backend="onnxruntime", max_batch_size=4)
    plan = PlanOptions(profiles=(Profile(axes={"batch": AxisRange(minimum=1, best=4, maximum=4)}),))
    own = config_for_target(config, target(), inputs=artifact.inputs, plan=plan)
    specs = own.optimization.cuda.graph_spec
    assert [(spec.batch_size, dict(spec.input)) for spec in specs] == [(1, {}), (4, {})]


def test_a_model_without_a_batch_axis_has_one_graph() -> None:
    artifact = artifact_of([tensor("x", "float32", "length", 3)], [tensor("y", "float32", "length")])
    config = config_from_artifact(artifact, name="m", backend="onnxruntime")
    plan = PlanOptions(profiles=(Profile(axes={"length": AxisRange(minimum=1, best=9, maximum=20)}),))
    own = config_for_target(config, target(), inputs=artifact.inputs, plan=plan)
    (spec,) = own.optimization.cuda.graph_spec
    assert (spec.batch_size, list(spec.input["x"].dim)) == (0, [9, 3])


def test_every_group_has_all_profiles_unless_it_names_some() -> None:
    profiles = (profile((1, 1, 16), (1, 32, 32)), profile((1, 16, 16), (1, 128, 128)))
    assert [list(group.profile) for group in made(target(), *profiles).instance_group] == [["0", "1"]]
    groups: list[Json] = [{"gpus": [0]}, {"gpus": [1], "profile": ["1"]}]
    own = made(target(config={"instance_group": groups}), *profiles)
    found = [(list(group.gpus), list(group.profile), group.kind) for group in own.instance_group]
    assert found == [([0], ["0", "1"], Group.KIND_GPU), ([1], ["1"], Group.KIND_GPU)]


def test_a_field_of_the_target_takes_the_place_of_the_inherited_one() -> None:
    own = made(target(config={"dynamic_batching": {}, "optimization": {"cuda": {"graphs": False}}}))
    assert not own.dynamic_batching.preferred_batch_size
    assert own.dynamic_batching.max_queue_delay_microseconds == 0
    assert own.optimization.HasField("cuda")
    assert not own.optimization.cuda.graphs
    sequences: Json = {"oldest": {"max_candidate_sequences": 4}}
    own = made(target(config={"sequence_batching": sequences, "response_cache": {}}))
    assert own.WhichOneof("scheduling_choice") == "sequence_batching"


def test_another_engine_on_the_same_model() -> None:
    own = config_for_target(default(), target("openvino", max_batch_size=8))
    assert (own.backend, own.platform, own.max_batch_size) == ("openvino", "", 8)
    assert {key: value.string_value for key, value in own.parameters.items()} == {
        "INFERENCE_PRECISION_HINT": "F32",
        "ENABLE_BATCH_PADDING": "YES",
    }
    assert not own.instance_group
    assert not own.HasField("optimization")
    assert own.response_cache.enable


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (target(max_batch_size=17), "target.gpu.max_batch_size does not fit"),
        (target(max_batch_size=0), "target.gpu.max_batch_size does not fit"),
        (target(max_batch_size=4), "target.gpu: config.dynamic_batching.preferred_batch_size"),
        (target(config={"input": [{"name": "idz", "optional": True}]}), r"target.gpu.config.input\[0\]"),
        (target(config={"instance_group": [{"kind": "KIND_CPU"}]}), r"instance_group\[0\].kind does not"),
        (target(config={"instance_group": [{"profile": ["1"]}]}), r"instance_group\[0\].profile names no"),
        (target("openvino", config={"instance_group": [{"profile": ["0"]}]}), "is for TensorRT only"),
    ],
)
def test_what_is_refused(request_: TargetRequest, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        made(request_)


def test_a_plan_has_no_strings() -> None:
    artifact = artifact_of([tensor("text", "string", "batch", 1)], [tensor("y", "float32", "batch", 2)])
    config = config_from_artifact(artifact, name="m", backend="onnxruntime")
    with pytest.raises(RecipeError, match="TensorRT has no STRING, and tensor 'text'"):
        config_for_target(config, target())


@pytest.mark.parametrize(
    "change",
    [
        'input { name: "more" data_type: TYPE_FP32 dims: [1] }',
        'output { name: "y" dims: [1] }',
        'name: "other"',
    ],
)
def test_another_model_is_found(change: str) -> None:
    other = default()
    other.MergeFrom(config_from_text(change))
    with pytest.raises(RecipeError, match="another"):
        check_same_model(default(), other)


def test_plans_for_a_mixed_fleet() -> None:
    older = with_plans(made(target()), {"8.0": "gpu.sm80.plan"}, newest="gpu.sm80.plan")
    assert older.default_model_filename == "gpu.sm80.plan"
    own = with_plans(older, {"9.0": "gpu.sm90.plan"}, newest="gpu.sm90.plan")
    assert dict(own.cc_model_filenames) == {"9.0": "gpu.sm90.plan"}
    assert own.default_model_filename == "gpu.sm90.plan"
    both = with_plans(older, {"8.0": "gpu.sm80.plan", "9.0": "gpu.sm90.plan"}, newest="gpu.sm90.plan")
    assert both.default_model_filename == "gpu.sm80.plan"  # that is still there


def test_the_fallback_is_onnx_by_tensorrts_provider() -> None:
    order = PlanOrder(
        target="gpu",
        candidates=(PlanCandidate(file="gpu.fp16.onnx", sha256="", precision="fp16"),),
        inputs=ARTIFACT.inputs,
        outputs=ARTIFACT.outputs,
        max_batch_size=16,
        plan=PlanOptions(),
        precision="auto",
        allow_slow_int8=False,
        fallback="gpu.fp16.onnx",
        fingerprint="",
    )
    plans = with_plans(made(target()), {"9.0": "gpu.sm90.plan"}, newest="gpu.sm90.plan")
    own = config_for_fallback(plans, order, engine_cache="/cache")
    assert (own.backend, own.platform, own.default_model_filename) == ("onnxruntime", "", "gpu.fp16.onnx")
    assert not own.cc_model_filenames
    assert own.instance_group[0].kind == Group.KIND_AUTO  # a GPU where there is one
    (accelerator,) = own.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert {**accelerator.parameters} | {"precision_mode": "FP16", "trt_engine_cache_path": "/cache"} == {
        **accelerator.parameters
    }
    check_same_model(plans, own)
    with pytest.raises(RecipeError, match=r"target\.gpu has no fallback"):
        config_for_fallback(plans, replace(order, fallback=None), engine_cache="/cache")
