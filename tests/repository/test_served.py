"""What Triton itself says to published models, to what a killed publish leaves, and to ensembles."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from publishing import PAYLOAD_ARTIFACT, artifact_of, manifest_of, publish_payload, tensor
from tritonsmith.client import Client
from tritonsmith.errors import RecipeError, ServerError
from tritonsmith.repository.config import config_from_artifact, config_from_text
from tritonsmith.repository.ensemble import EnsembleRequest, EnsembleStep, publish_ensemble
from tritonsmith.repository.entry import publish
from tritonsmith.repository.rules import check_rules
from tritonsmith.repository.warmup import WarmupRequest, warmup_from_samples
from tritonsmith.server.environment import ServerEnvironment
from tritonsmith.server.options import ServerOptions
from tritonsmith.server.process import Server, serve

pytestmark = pytest.mark.usefixtures("server_environment")

ANY_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
ONE = np.ones((1, 1), np.float32)

# Answers what it was warmed up with, once; then the shapes of its inputs.
REMEMBER = """
import json
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        self.seen = []

    def execute(self, requests):
        for request in requests:
            inputs = {t.name(): t.as_numpy() for t in request.inputs()}
            self.seen.append({n: [v.dtype.name, list(v.shape), str(v.ravel().tolist())]
                              for n, v in inputs.items()})
        answer = np.array([[json.dumps(self.seen)]], dtype=object)
        return [pb.InferenceResponse([pb.Tensor("seen", answer)]) for _ in requests]
"""


def answers(server: Server, name: str = "m") -> list[str]:
    with Client(server.http_url) as client:
        return [value.decode() for value in client.model(name)(x=ONE)["y"].ravel()]


def publish_code(repository: Path, name: str, code: str, config: object, **options: object) -> None:
    folder = repository.parent / f"{name}-files"
    folder.mkdir()
    (folder / "model.py").write_text(code)
    publish(folder, config, repository, manifest=manifest_of(PAYLOAD_ARTIFACT, name), **options)


def leave_as_after_a_kill(repository: Path, host: str) -> None:
    """A half-built folder staged in another model's folder, the probe and the lock."""
    stage = repository / host / ".tritonsmith.staging" / "m.abc" / "new"
    shutil.copytree(repository / "m", stage)
    (stage / "1" / "manifest.json").unlink()
    (repository / ".tritonsmith.probe").touch()
    (repository / ".tritonsmith.lock").touch()


@pytest.fixture(scope="module")
def explicit(
    tmp_path_factory: pytest.TempPathFactory, server_environment: ServerEnvironment
) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("explicit") / "repository"
    publish_payload(repository, "old")
    publish_payload(repository, "other", name="other")
    leave_as_after_a_kill(repository, "other")
    with serve(
        repository, ServerOptions(model_control="explicit", load_models=("*",), exit_timeout_s=2, **ANY_PORTS)
    ) as server:
        yield server


def test_explicit_control_passes_over_what_a_kill_leaves(explicit: Server) -> None:
    assert answers(explicit) == ["old", "old"]
    assert answers(explicit, "other") == ["other", "other"]


def test_a_hidden_folder_in_the_repository_stops_triton(tmp_path: Path) -> None:
    """The reason why staging is kept out of the repository; if Triton learns better, it may move in."""
    repository = tmp_path / "repository"
    publish_payload(repository, "old")
    (repository / ".staging" / "m.abc").mkdir(parents=True)
    with pytest.raises(ServerError, match=r"\.staging"), serve(repository, ServerOptions(**ANY_PORTS)):
        pass


def test_publishing_under_a_polling_server(tmp_path: Path) -> None:
    """Every request in the meantime is answered, by the old or the new, never by a mixture.

    What a killed publish left is there as well when the server starts.
    """
    repository = tmp_path / "repository"
    publish_payload(repository, "old")
    publish_payload(repository, "other", name="other")
    leave_as_after_a_kill(repository, "other")
    options = ServerOptions(model_control="poll", poll_interval_s=1, **ANY_PORTS)
    seen: list[list[str]] = []
    with serve(repository, options) as server:
        done = threading.Event()

        def ask() -> None:
            with Client(server.http_url) as client:
                model = client.model("m")
                while not done.is_set():
                    seen.append([value.decode() for value in model(x=ONE)["y"].ravel()])
                    time.sleep(0.005)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            publish_payload(repository, "new")
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and asking.is_alive() and seen[-1:] != [["new", "new"]]:
                time.sleep(0.05)
        finally:
            done.set()
            asking.join()
    assert seen[0] == ["old", "old"]
    assert seen[-1] == ["new", "new"]
    assert {tuple(answer) for answer in seen} == {("old", "old"), ("new", "new")}


@pytest.fixture(scope="module")
def remembering(
    tmp_path_factory: pytest.TempPathFactory, server_environment: ServerEnvironment
) -> Iterator[Server]:
    """Models that tell what they were warmed up with, and ensembles, batched, single and mixed."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    _publish_warm(repository)
    for name, size, shape in (
        ("double", 8, "[3]"),
        ("half", 4, "[3]"),
        ("single", 0, "[3]"),
        ("free", 0, "[-1, 3]"),
    ):
        _write_scale(repository, name, size, shape, 0.5 if name == "half" else 2.0)
    for name, models in (
        ("batched", ("double", "half")),
        ("one_by_one", ("double", "single")),
        ("one_by_one_back", ("single", "double")),
        ("mixed", ("free", "double")),
    ):
        first, second = models
        request = EnsembleRequest(
            name=name,
            repository=repository,
            steps=(
                EnsembleStep(model=first, inputs={"x": "in"}, outputs={"y": "between"}),
                EnsembleStep(model=second, inputs={"x": "between"}, outputs={"y": "out"}),
            ),
        )
        publish_ensemble(request)
    # As git keeps an empty version folder.
    shutil.copytree(repository / "batched", repository / "kept")
    text = (repository / "kept" / "config.pbtxt").read_text().replace('name: "batched"', 'name: "kept"', 1)
    (repository / "kept" / "config.pbtxt").write_text(text)
    (repository / "kept" / "1" / "manifest.json").unlink()
    (repository / "kept" / "1" / ".gitkeep").touch()
    publish_payload(repository, "old")
    leave_as_after_a_kill(repository, "warm")
    with serve(repository, ServerOptions(**ANY_PORTS)) as server:
        yield server


def test_no_control_passes_over_what_a_kill_leaves(remembering: Server) -> None:
    assert answers(remembering) == ["old", "old"]


def _publish_warm(repository: Path) -> None:
    inputs = [
        tensor("image", "float32", "batch", 2, "width"),
        tensor("flag", "bool", "batch"),
        tensor("text", "string", "batch", "words"),
    ]
    artifact = artifact_of(inputs, [tensor("seen", "string", "batch", 1)])
    repository.mkdir()
    samples = repository.parent / "samples.npz"
    np.savez(
        samples,
        image=np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        flag=np.array([True, False]),
        text=np.array([["ä", "bc"], ["", "def"]]),
    )
    warmup = warmup_from_samples(WarmupRequest(samples=samples, count=2, batch_size=2), artifact)
    config = config_from_artifact(artifact, name="warm", backend="python", warmup=warmup)
    publish_code(repository, "warm", REMEMBER, config, warmup=warmup.files)


def _write_scale(repository: Path, name: str, size: int, dims: str, factor: float) -> None:
    """A Python stage as a person writes it: y = factor * x."""
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(
        "import numpy as np, triton_python_backend_utils as pb\n"
        "class TritonPythonModel:\n"
        "    def execute(self, requests):\n"
        "        xs = [pb.get_input_tensor_by_name(r, 'x').as_numpy() for r in requests]\n"
        f"        ys = [np.asarray(x * {factor}, np.float32) for x in xs]\n"
        "        return [pb.InferenceResponse([pb.Tensor('y', y)]) for y in ys]\n"
    )
    (folder.parent / "config.pbtxt").write_text(
        f'name: "{name}" backend: "python" max_batch_size: {size}\n'
        f'input {{ name: "x" data_type: TYPE_FP32 dims: {dims} }}\n'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: {dims} }}\n'
    )


def test_warmup_is_the_samples(remembering: Server) -> None:
    x = {
        "image": np.zeros((1, 2, 1), np.float32),
        "flag": np.zeros((1, 1), bool),
        "text": np.array([["z"]], dtype=object),
    }
    with Client(remembering.http_url) as client:
        seen = json.loads(client.model("warm")(**x)["seen"].item())
    first = {
        "image": ["float32", [1, 2, 3], "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]"],
        "flag": ["bool", [1], "[True]"],
        "text": ["object", [1, 2], "[b'\\xc3\\xa4', b'bc']"],
    }
    second = {
        "image": ["float32", [1, 2, 3], "[6.0, 7.0, 8.0, 9.0, 10.0, 11.0]"],
        "flag": ["bool", [1], "[False]"],
        "text": ["object", [1, 2], "[b'', b'def']"],
    }
    assert seen[:4] == [first, first, second, second]
    # `flag` is a number a sample: [batch, 1] for the client, [batch] for the model.
    assert seen[4]["flag"][1] == [1]


@pytest.mark.parametrize(
    ("name", "max_batch_size", "shape", "factor"),
    [
        ("batched", 4, (4, 3), 1.0),
        ("kept", 4, (4, 3), 1.0),
        ("one_by_one", 0, (3,), 4.0),
        ("one_by_one_back", 0, (3,), 4.0),
        ("mixed", 8, (2, 3), 4.0),
    ],
)
def test_ensemble_answers(
    remembering: Server, name: str, max_batch_size: int, shape: tuple[int, ...], factor: float
) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with Client(remembering.http_url) as client:
        model = client.model(name)
        assert model.signature.max_batch_size == max_batch_size
        y = model(**{"in": x})["out"]
    assert y.shape == shape
    np.testing.assert_array_equal(y, x * factor)


REFUSED = [
    ("dynamic_batching { preferred_batch_size: 9 }", "preferred size must be <= max batch size"),
    ("dynamic_batching { priority_levels: 2 }", "default priority level must be in range"),
    ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "default priority level must be"),
    (
        "dynamic_batching { priority_levels: 2 default_priority_level: 1 "
        "priority_queue_policy { key: 3 value { max_queue_size: 1 } } }",
        "priority queue policy must have priority level in range",
    ),
    (
        "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
        "Only one priority level is allowed",
    ),
    (
        "dynamic_batching { preserve_ordering: true "
        "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 } }",
        "can not have DELAY",
    ),
    ("response_cache { enable: true } sequence_batching { }", "with sequence batching scheduler"),
    (
        "response_cache { enable: true } model_transaction_policy { decoupled: true }",
        "with 'decoupled' transaction policy",
    ),
    ("instance_group { kind: KIND_CPU gpus: [0] }", "KIND_CPU but specifies one or more GPUs"),
    ('instance_group { kind: KIND_CPU profile: ["0"] }', "only supported for TensorRT"),
    ("sequence_batching { oldest { preferred_batch_size: 9 } }", "preferred batch size must be <= max"),
    ("sequence_batching { direct { minimum_slot_utilization: 2 } }", "slot utilization must be in range"),
    ("version_policy { specific { } }", "at least one version must be available"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_rules_are_tritons_own(explicit: Server, text: str, reason: str) -> None:
    """What `check_rules` refuses, Triton refuses for that very reason."""
    config = config_from_artifact(
        PAYLOAD_ARTIFACT, name="m", backend="python", extra={"parameters": {"payload": "p"}}
    )
    config.MergeFrom(config_from_text(text))
    with pytest.raises(RecipeError):
        check_rules(config)
    before = len(explicit.read_log())
    with pytest.raises(InferenceServerException):
        load(explicit, config)
    deadline = time.monotonic() + 5
    while reason not in explicit.read_log()[before:]:
        assert time.monotonic() < deadline, explicit.read_log()[before:]
        time.sleep(0.02)


def load(server: Server, config: model_config_pb2.ModelConfig) -> None:
    with InferenceServerClient(server.http_address) as client:
        client.load_model(
            config.name, config=json_format.MessageToJson(config, preserving_proto_field_name=True)
        )


def test_triton_refuses_an_empty_reshape_without_a_batch_axis(explicit: Server) -> None:
    """Why a scalar of a model without a batch axis has dims [1] and no reshape."""
    artifact = artifact_of([tensor("x", "float32")], [tensor("y", "string", 2)])
    config = config_from_artifact(
        artifact, name="m", backend="python", extra={"parameters": {"payload": "p"}}
    )
    load(explicit, config)
    config.input[0].reshape.SetInParent()
    with pytest.raises(InferenceServerException, match="scalar tensors are not supported"):
        load(explicit, config)
