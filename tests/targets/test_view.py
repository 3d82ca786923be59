"""A view of a repository: what Triton serves of it, and what it may replace."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from onnx_models import linear_weights
from plan_orders import OnnxTools, publish_order
from served_models import write_repository
from tritonsmith.client import Client
from tritonsmith.errors import RepositoryError, UsageError
from tritonsmith.repository.config import config_from_text
from tritonsmith.server import ServerOptions, serve
from tritonsmith.targets import view as view_module
from tritonsmith.targets.plans import PlanRequest, build_plans
from tritonsmith.targets.view import MARKER, ViewedModel, lay_view

FREE_PORTS = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
# Reads a file beside its own, as stages with a vocabulary do.
BESIDE = """
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        beside = Path(__file__).with_name("word.txt")
        named = Path(args["model_repository"], args["model_version"], "word.txt")
        self.words = np.array([beside.read_text(), named.read_text()], dtype=object)

    def execute(self, requests):
        return [pb.InferenceResponse([pb.Tensor("words", self.words)]) for _ in requests]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Models m and n, with a folder of configurations, a hidden folder and a file beside them."""
    root = tmp_path / "repository"
    for name in ("m", "n"):
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(f'name: "{name}"')
        (root / name / "1" / "model.onnx").write_text(f"{name} 1")
    (root / "m" / "2").mkdir()
    (root / "m" / "2" / "model.onnx").write_text("m 2")
    (root / "m" / "configs").mkdir()
    (root / "m" / "configs" / "gpu.pbtxt").write_text("gpu")
    (root / "m" / "configs" / "cpu.pbtxt").write_text("cpu")
    (root / ".git").mkdir()
    (root / "README.md").write_text("about")
    return root


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for place, _, names in os.walk(folder, followlinks=True)
        for path in (Path(place, name) for name in names)
        if path.name != MARKER
    }


def test_a_plain_view_is_the_repository(tmp_path: Path, repository: Path) -> None:
    view = lay_view(repository, tmp_path / "volume" / "view")
    assert contents(view) == contents(repository)
    assert not (view / ".git").exists()
    assert (view / "m").is_symlink()
    assert json.loads((view / MARKER).read_text())["repository"] == str(repository)


def test_folders_that_are_no_models_are_left_out(tmp_path: Path, repository: Path) -> None:
    """A block volume has a lost+found, and Triton reads every folder as a model."""
    (repository / "lost+found").mkdir()
    lines = list[str]()
    view = lay_view(repository, tmp_path / "view", say=lines.append)
    assert sorted(path.name for path in view.iterdir()) == [MARKER, "README.md", "m", "n"]
    assert lines[0] == "lost+found holds no config.pbtxt, is no model, and is left out of the view"


def test_what_differs_is_in_place_and_nothing_else(tmp_path: Path, repository: Path) -> None:
    plan = tmp_path / "cache" / "model.plan"
    plan.parent.mkdir()
    plan.write_text("a plan")
    before = contents(repository)
    model = ViewedModel(name="m", texts={"configs/gpu.pbtxt": "plan"}, links={"1/gpu.sm90.plan": plan})
    view = lay_view(repository, tmp_path / "view", [model])
    assert contents(view) == {**before, "m/configs/gpu.pbtxt": "plan", "m/1/gpu.sm90.plan": "a plan"}
    assert contents(repository) == before
    assert (view / "m" / "2").is_symlink()
    assert not (view / "m" / "configs" / "gpu.pbtxt").is_symlink()
    assert (view / "m" / "1" / "gpu.sm90.plan").resolve() == plan


def test_a_published_plan_is_hidden_by_the_one_in_place(tmp_path: Path, repository: Path) -> None:
    (repository / "m" / "1" / "gpu.sm90.plan").write_text("of another TensorRT")
    plan = tmp_path / "model.plan"
    plan.write_text("of this one")
    view = lay_view(repository, tmp_path / "view", [ViewedModel(name="m", links={"1/gpu.sm90.plan": plan})])
    assert (view / "m" / "1" / "gpu.sm90.plan").read_text() == "of this one"
    assert (repository / "m" / "1" / "gpu.sm90.plan").read_text() == "of another TensorRT"


def test_a_stale_view_is_replaced_whole(tmp_path: Path, repository: Path) -> None:
    view = tmp_path / "view"
    lay_view(repository, view, [ViewedModel(name="m", texts={"configs/gpu.pbtxt": "old"})])
    shutil.rmtree(repository / "n")
    (repository / "o" / "1").mkdir(parents=True)
    (repository / "o" / "config.pbtxt").write_text("o")
    lay_view(repository, view, [ViewedModel(name="o", texts={"configs/gpu.pbtxt": "new"})])
    assert contents(view) == {**contents(repository), "o/configs/gpu.pbtxt": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository", "view"]


def test_an_equal_view_is_left_alone(tmp_path: Path, repository: Path) -> None:
    """A server may be starting from it."""
    view, lines = tmp_path / "view", list[str]()
    model = ViewedModel(name="m", texts={"configs/gpu.pbtxt": "plan"})
    lay_view(repository, view, [model])
    inode = view.stat().st_ino
    lay_view(repository, view, [model], say=lines.append)
    assert view.stat().st_ino == inode
    assert lines == [f"the view {view} is as it should be"]
    lay_view(repository, view, [ViewedModel(name="m", texts={"configs/gpu.pbtxt": "other"})])
    assert view.stat().st_ino != inode


def test_a_killed_laying_leaves_the_old_view_and_is_cleared(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = tmp_path / "view"
    lay_view(repository, view)
    before = contents(view)
    stale = tmp_path / ".view.abc.staging"
    (stale / "new").mkdir(parents=True)

    def stop(stage: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(view_module, "replace_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            lay_view(repository, view, [ViewedModel(name="m", texts={"configs/gpu.pbtxt": "new"})])
    assert contents(view) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repository", "view"]


def test_what_is_no_view_is_never_replaced(tmp_path: Path, repository: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    lay_view(repository, other)  # an empty folder may become one
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    with pytest.raises(UsageError, match="no view that tritonsmith laid"):
        lay_view(repository, precious)
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(UsageError, match="no view that tritonsmith laid"):
        lay_view(repository, tmp_path / "link")
    assert (precious / "file").read_text() == "kept"
    for place in (repository, repository / "view", tmp_path):
        with pytest.raises(UsageError, match="lie in each other"):
            lay_view(repository, place)


def test_a_view_that_cannot_be_written(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match="cannot write"):
        lay_view(repository, tmp_path / "file" / "view")


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """Python stages, an ensemble of them, and `linear` with a fallback."""
    models = write_repository(tmp_path / "models")
    root = tmp_path / "everything"
    for name in ("affine", "twice"):
        shutil.copytree(models / name, root / name)
    (root / "beside" / "1").mkdir(parents=True)
    (root / "beside" / "1" / "model.py").write_text(BESIDE)
    (root / "beside" / "1" / "word.txt").write_text("here")
    (root / "beside" / "config.pbtxt").write_text(
        'backend: "python"\noutput { name: "words" data_type: TYPE_STRING dims: [2] }\n'
        'input { name: "any" data_type: TYPE_FP32 dims: [1] }'
    )
    publish_order(root, tmp_path / "work", ("fp32",), fallback="gpu.fp32.onnx")
    return root


def test_triton_serves_the_view(tmp_path: Path, everything: Path) -> None:
    """On this machine without a GPU: the fallback, Python stages with a file beside them, an ensemble."""
    view = tmp_path / "volume" / "view"
    request = PlanRequest(repository=everything, cache=tmp_path / "cache", target="gpu", view=view)
    (report,) = build_plans(request, tools=OnnxTools(unavailable="there is no GPU").tools())
    assert (report.outcome, report.reason) == (
        "fallback",
        "no plan can be built on this machine: there is no GPU",
    )
    config = config_from_text((view / "linear" / "configs" / "gpu.pbtxt").read_text())
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "gpu.fp32.onnx")
    # The default is another model here, so that an answer shows which file is served.
    (everything / "linear" / "1" / "model.onnx").unlink()
    everything.chmod(0o555)
    features = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    options = ServerOptions(**FREE_PORTS, target="gpu", flags=("--disable-auto-complete-config",))
    with serve(view, options) as server, Client(server.http_url) as client:
        scores = client.model("linear")(features=features)["scores"]
        assert client.model("twice")(x=np.ones((1, 3), np.float32))["z"].tolist() == [[7, 7, 7]]
        assert client.model("beside")(any=np.ones(1, np.float32))["words"].tolist() == [b"here"] * 2
        loaded = [
            line.partition("loading: ")[2] for line in server.read_log().splitlines() if "loading: " in line
        ]
    everything.chmod(0o755)
    weights = linear_weights()
    np.testing.assert_allclose(scores, features @ weights["weight"] + weights["bias"], rtol=1e-5, atol=1e-6)
    models = [path.name for path in everything.iterdir() if path.is_dir()]
    assert sorted(line.split(":")[0].strip('"') for line in loaded) == sorted(models)
