"""Keras 2 and Keras 3 files, against the models that were saved into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import keras_models
from tritonsmith import dtypes
from tritonsmith.artifact import Artifact, TensorSpec
from tritonsmith.engines import open_session
from tritonsmith.errors import MissingExtraError, SourceError, UsageError
from tritonsmith.ingest import convert
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.tensorflow_framework import import_framework

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are saving your model as an HDF5 file:UserWarning",  # tf_keras
    "ignore:The object being serialized includes a `lambda`:UserWarning",  # both, where a test wants that
)

# What convert must say of each model of keras_models.BOTH.
SIGNATURES = {
    "conv2d": ("image: float32[batch, 8, 8, 2]", "label: float32[batch, 3]"),
    "conv1d": ("signal: float32[batch, sequence, 3]", "denoised: float32[batch, sequence, 2]"),
    "conv3d": ("volume: float32[batch, 4, 6, 6, 1]", "features: float32[batch, 72]"),
    "image_to_image": (
        "photo: float32[batch, height, width, 3]",
        "restored: float32[batch, restored_height, restored_width, 3]",
    ),
    "recurrent": (
        "series: float32[batch, sequence, 3]",
        "encoder: float32[batch, 5]; encoder_1: float32[batch, 5]; encoder_2: float32[batch, 5]",
    ),
    "masked_recurrent": ("words: int32[batch, sequence]", "meaning: float32[batch, 3]"),
    "attention": (
        "tokens: int64[batch, sequence]; mask: bool[batch, sequence]",
        "encoded: float32[batch, sequence, 4]",
    ),
    "several": (
        "count: int32[batch, 2]; price: float32[batch, 2]",
        "risk: float32[batch, 2]; value: float32[batch, 1]",
    ),
    "nested": (
        "scale: float32[batch, 2]; left: float32[batch, 2]; right: float32[batch, 2]",
        "pair_0: float32[batch, 2]; pair_1: float32[batch, 3]; scaled: float32[batch, 2]",
    ),
    "fixed_batch": ("rows: float32[4, 3]", "scores: float32[4, 2]"),
    "float64": ("wide: float64[batch, 3]", "sums: float64[batch, 2]"),
    "mixed_float16": ("image: float32[batch, 6, 6, 1]", "label: float32[batch, 2]"),
}
# Every model in the form that its Keras prefers, and some in the other form too.
FORMS = [
    *((framework, suffix, name)
      for framework, suffix in (("keras", ".keras"), ("tf_keras", ".h5"))
      for name in SIGNATURES),
    *((framework, suffix, name)
      for framework, suffix in (("keras", ".h5"), ("tf_keras", ".keras"))
      for name in ("conv2d", "several", "nested", "mixed_float16")),
]  # fmt: skip
LENGTHS = {"batch": 2, "sequence": 6, "height": 8, "width": 12}


@pytest.fixture(scope="session")
def frameworks() -> dict[str, Any]:
    return {name: import_framework(name, Path("a test")) for name in ("keras", "tf_keras")}


@pytest.fixture
def keras(frameworks: dict[str, Any]) -> Any:
    return frameworks["keras"]


def signature(specs: tuple[TensorSpec, ...]) -> str:
    return "; ".join(str(spec) for spec in specs)


def example(artifact: Artifact, seed: int = 5) -> dict[str, Any]:
    """Inputs that the seeded ones of the parity check are not."""
    random = np.random.default_rng(seed)
    arrays = {}
    for spec in artifact.inputs:
        shape = tuple(LENGTHS[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        array = random.integers(1, 5, shape) if spec.dtype.startswith("int") else random.normal(size=shape)
        arrays[spec.name] = array.astype(dtypes.BY_NAME[spec.dtype].numpy)
        if spec.dtype == "bool":
            arrays[spec.name] = np.arange(array.size).reshape(shape) % 3 != 1
    return arrays


def flat(answer: Any) -> list[Any]:
    if isinstance(answer, dict):
        return [leaf for key in sorted(answer) for leaf in flat(answer[key])]
    if isinstance(answer, (list, tuple)):
        return [leaf for item in answer for leaf in flat(item)]
    return [np.asarray(answer)]


def assert_computes(artifact: Artifact, model: Callable[[Any], Any], arguments: Callable[..., Any]) -> None:
    """The ONNX file answers what the model in memory, which no file has been through, answers."""
    inputs = example(artifact)
    answer = open_session(artifact.path).run(inputs)
    expected = flat(model(arguments(**inputs)))
    assert len(answer) == len(expected) > 0
    for spec, wanted in zip(artifact.outputs, expected, strict=True):
        np.testing.assert_allclose(answer[spec.name], wanted, rtol=1e-3, atol=1e-5)


def arguments_of(name: str) -> Callable[..., Any]:
    if name == "several":
        return lambda **inputs: inputs
    if name == "nested":
        return lambda left, right, scale: {"sides": [left, right], "scale": scale}
    if name == "attention":
        return lambda tokens, mask: [tokens, mask]
    return lambda **inputs: next(iter(inputs.values()))


@pytest.mark.parametrize(("framework", "suffix", "name"), FORMS)
def test_saved_model_becomes_the_same_onnx_model(
    frameworks: dict[str, Any], tmp_path: Path, framework: str, suffix: str, name: str
) -> None:
    model = keras_models.randomised(keras_models.BOTH[name](frameworks[framework]))
    source = tmp_path / f"{name}{suffix}"
    model.save(source)

    artifact = convert(str(source), tmp_path / "model.onnx")

    assert (signature(artifact.inputs), signature(artifact.outputs)) == SIGNATURES[name]
    assert artifact.batched == (name != "fixed_batch")
    assert artifact.precision == "fp32"
    options = artifact.steps[0].options
    assert options["loaded_with"] == framework
    if name == "mixed_float16":
        assert options["policy"] == "mixed_float16, loaded in float32"
        return  # the model in memory computes in float16
    assert_computes(artifact, lambda inputs: model(inputs, training=False), arguments_of(name))
    if name == "image_to_image":
        parity: Any = artifact.steps[0].measured["parity"]
        assert parity["compared"][0] == {"batch": 1, "height": 97, "width": 128}
    if name == "recurrent":
        operators = Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
        assert (operators["LSTM"], operators["GRU"], operators["Loop"]) == (2, 2, 0)


def test_names_that_nobody_chose_are_the_layers_names(keras: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.save(tmp_path / "model.keras")

    artifact = convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")

    assert artifact.inputs[0].name.startswith("input_layer")
    assert artifact.outputs[0].name == model.layers[-1].name


def test_layers_that_tf2onnx_lacks(keras: Any, tmp_path: Path) -> None:
    """XLA compiles grouped convolutions, GELU is made of erfc and CELU of expm1, statistics are captured.

    A scalar added to a convolution without bias breaks tf2onnx's removal of transposes.
    """
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4), name="image"),
            layers.Normalization(mean=[0.1, 0.2, 0.3, 0.4], variance=[1.0, 2.0, 3.0, 4.0]),
            layers.Conv2D(4, 3, groups=2, activation="gelu"),
            layers.Conv2D(4, 1, use_bias=False),
            layers.Rescaling(0.5, offset=3.0),
            layers.Conv2D(2, 3, activation="celu", name="features"),
        ]
    )
    model.save(tmp_path / "model.keras")

    artifact = convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")

    assert [spec.name for spec in artifact.inputs] == ["image"]
    assert_computes(artifact, model, arguments_of("image"))
    operators = Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
    assert operators["Transpose"] <= 2  # channels first once, channels last once


def test_images_of_odd_sizes_are_not_tried_where_the_source_refuses_them(keras: Any, tmp_path: Path) -> None:
    image = keras.Input((None, None, 1), name="image")
    half = keras.layers.MaxPooling2D()(image)
    joined = keras.layers.Concatenate(name="joined")([image, keras.layers.UpSampling2D()(half)])
    keras.Model(image, joined).save(tmp_path / "model.keras")

    artifact = convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")

    parity: Any = artifact.steps[0].measured["parity"]
    assert parity["compared"][0] == {"batch": 1, "height": 96, "width": 128}
    assert signature(artifact.outputs) == "joined: float32[batch, height, width, 2]"


CUSTOM = """
    import {keras} as keras

    @keras.saving.register_keras_serializable(package="mine")
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(name="factor", shape=(shape[-1],))
        def call(self, inputs):
            return inputs * self.factor

    @keras.saving.register_keras_serializable(package="mine")
    class Two(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.words = keras.layers.Embedding(9, 3)
            self.mix = keras.layers.Dense(3)
            self.scale = Scale()
        def call(self, inputs, training=False):
            mixed = self.scale(self.mix(inputs["numbers"]) + self.words(inputs["word"]))
            return {{"mixed": mixed, "positive": mixed > 0}}

    @keras.saving.register_keras_serializable(package="mine")
    class Single(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.mix = keras.layers.Dense(3)
        def call(self, features):
            return self.mix(features)

    @keras.saving.register_keras_serializable(package="mine")
    class Pair(Single):
        def call(self, first, second):
            return self.mix(first) + self.mix(second)

    @keras.saving.register_keras_serializable(package="mine")
    class BuiltPair(Pair):
        def build(self, shape):
            self.mix.build(shape)
"""


@pytest.fixture
def own_classes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module for one framework, as `import` gives it; its folder is the current one."""
    framework = getattr(request, "param", "keras")
    name = f"own_{framework}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(CUSTOM).format(keras=framework))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


@pytest.mark.parametrize("own_classes", ["keras", "tf_keras"], indirect=True)
def test_subclassed_model(frameworks: dict[str, Any], own_classes: Any, tmp_path: Path) -> None:
    model = own_classes.Two()
    model({"numbers": np.ones((2, 4), np.float32), "word": np.ones(2, np.int32)})
    keras_models.randomised(model)
    model.save(tmp_path / "two.keras")

    options = ConvertOptions(custom_objects=own_classes.__name__)
    artifact = convert(str(tmp_path / "two.keras"), tmp_path / "model.onnx", options)

    assert signature(artifact.inputs) == "numbers: float32[batch, 4]; word: int32[batch]"
    assert signature(artifact.outputs) == "mixed: float32[batch, 3]; positive: bool[batch, 3]"
    assert_computes(artifact, model, lambda **inputs: inputs)


def test_single_tensors_of_a_subclassed_model_have_plain_names(own_classes: Any, tmp_path: Path) -> None:
    model = own_classes.Single()
    model(np.ones((2, 4), np.float32))
    model.save(tmp_path / "single.keras")

    options = ConvertOptions(custom_objects=own_classes.__name__)
    artifact = convert(str(tmp_path / "single.keras"), tmp_path / "model.onnx", options)

    assert signature(artifact.inputs) == "features: float32[batch, 4]"
    assert signature(artifact.outputs) == "output: float32[batch, 3]"


@pytest.mark.parametrize("own_classes", ["keras", "tf_keras"], indirect=True)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_custom_layer_is_refused_until_it_is_supplied(
    frameworks: dict[str, Any], own_classes: Any, tmp_path: Path, suffix: str
) -> None:
    keras = frameworks[own_classes.__name__.removeprefix("own_")]
    model = keras.Sequential([keras.Input((3,), name="x"), own_classes.Scale(name="gain")])
    model.save(tmp_path / f"model{suffix}")
    keras.saving.get_custom_objects().clear()  # as in a process that has never seen the class

    with pytest.raises(SourceError, match=r"uses '(mine>)?Scale', which is not part of Keras") as caught:
        convert(str(tmp_path / f"model{suffix}"), tmp_path / "model.onnx")
    assert "layer 'gain'" in str(caught.value.found)
    assert "--custom-objects package.module" in str(caught.value.fix)

    sys.modules.pop(own_classes.__name__)
    options = ConvertOptions(custom_objects=own_classes.__name__)
    artifact = convert(str(tmp_path / f"model{suffix}"), tmp_path / "model.onnx", options)
    assert_computes(artifact, model, lambda x: x)


def test_keras_2_file_with_classes_of_keras_3_is_read_by_keras_3(
    frameworks: dict[str, Any], own_classes: Any, tmp_path: Path
) -> None:
    old = frameworks["tf_keras"]
    keras_models.several(old).save(tmp_path / "old.h5")

    options = ConvertOptions(custom_objects=own_classes.__name__)
    artifact = convert(str(tmp_path / "old.h5"), tmp_path / "model.onnx", options)

    assert artifact.steps[0].options["loaded_with"] == "keras"
    assert str(artifact.steps[0].options["keras_version"]).startswith("2")


@pytest.mark.parametrize("name", ["no_such_module", "not a name", "json.nothing"])
def test_custom_objects_that_cannot_be_imported(keras: Any, tmp_path: Path, name: str) -> None:
    keras_models.several(keras).save(tmp_path / "model.keras")
    with pytest.raises(UsageError, match="no Python module is named"):
        convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx", ConvertOptions(custom_objects=name))


def test_weights_that_keras_loses_are_an_error(own_classes: Any, tmp_path: Path) -> None:
    """Keras 3 only warns, and leaves random weights; a conversion of those would pass its parity check."""
    convert_pair(own_classes, own_classes.Pair(), tmp_path, "weights that Keras could not give back")


def test_call_of_several_arguments_is_refused(own_classes: Any, tmp_path: Path) -> None:
    convert_pair(own_classes, own_classes.BuiltPair(), tmp_path, "call takes several arguments")


def convert_pair(own_classes: Any, model: Any, folder: Path, message: str) -> None:
    model(np.ones((2, 4), np.float32), np.ones((2, 4), np.float32))
    model.save(folder / "pair.keras")
    options = ConvertOptions(custom_objects=own_classes.__name__)
    with pytest.raises(SourceError, match=message):
        convert(str(folder / "pair.keras"), folder / "model.onnx", options)


@pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built:UserWarning")
def test_model_that_was_never_called_is_refused(keras: Any, tmp_path: Path) -> None:
    keras.Sequential([keras.layers.Dense(2)]).save(tmp_path / "model.keras")

    with pytest.raises(SourceError, match="does not say what the model takes"):
        convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
def test_state_between_calls_is_refused(frameworks: dict[str, Any], tmp_path: Path, framework: str) -> None:
    keras = frameworks[framework]
    rows = keras.Input(batch_size=2, shape=(3, 1))
    keras.Model(rows, keras.layers.LSTM(2, stateful=True, name="memory")(rows)).save(tmp_path / "model.h5")

    with pytest.raises(SourceError, match="keeps state between calls") as caught:
        convert(str(tmp_path / "model.h5"), tmp_path / "model.onnx")

    assert caught.value.found == "layer 'memory' is stateful"


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_lambda_runs_only_when_it_is_allowed(
    frameworks: dict[str, Any], tmp_path: Path, framework: str, suffix: str
) -> None:
    mark = tmp_path / "mark"
    model = keras_models.randomised(keras_models.with_lambda(frameworks[framework], str(mark)))
    model.save(tmp_path / f"model{suffix}")
    mark.unlink(missing_ok=True)

    with pytest.raises(SourceError, match="holds Python code") as caught:
        convert(str(tmp_path / f"model{suffix}"), tmp_path / "model.onnx")
    assert caught.value.found == "Lambda layer 'trick'"
    assert not mark.exists()

    artifact = convert(
        str(tmp_path / f"model{suffix}"), tmp_path / "model.onnx", ConvertOptions(allow_code=True)
    )
    assert mark.exists()
    assert_computes(artifact, model, lambda numbers: numbers)


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
@pytest.mark.parametrize(
    ("module", "name"), [("builtins", "exec"), ("os", "system"), ("keras.utils", "get_file")]
)
def test_file_does_not_choose_what_is_imported(
    frameworks: dict[str, Any], tmp_path: Path, framework: str, module: str, name: str
) -> None:
    """tf_keras alone would take any function of any module as an activation."""
    model = frameworks[framework].Sequential(
        [frameworks[framework].Input((2,)), frameworks[framework].layers.Dense(1, activation="relu")]
    )
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    config = json.loads(members["config.json"])
    dense = config["config"]["layers"][-1]["config"]
    dense["activation"] = {
        "module": module,
        "class_name": "function",
        "config": name,
        "registered_name": name,
    }
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        for entry, content in members.items():
            archive.writestr(entry, content)

    with pytest.raises(SourceError, match=f"uses '{name}', which is not part of Keras"):
        convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_truncated_file_is_refused(keras: Any, tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"model{suffix}"
    keras_models.conv2d(keras).save(source)
    whole = source.read_bytes()
    for share in (0.99, 0.5, 0.1):
        source.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(SourceError, match=r"truncated|damaged|cannot be loaded"):
            convert(str(source), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_weights_of_other_shapes_are_refused(keras: Any, tmp_path: Path) -> None:
    keras_models.conv2d(keras).save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"][-1]["config"]["units"] = 7
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        for entry, content in members.items():
            archive.writestr(entry, content)

    with pytest.raises(SourceError, match="cannot be loaded by keras"):
        convert(str(tmp_path / "model.keras"), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("suffix", "missing"), [(".keras", "tensorflow"), (".keras", "tf2onnx"), (".h5", "tf_keras")]
)
def test_missing_framework_names_the_extra(
    frameworks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, missing: str
) -> None:
    framework = "tf_keras" if missing == "tf_keras" else "keras"
    keras_models.several(frameworks[framework]).save(tmp_path / f"model{suffix}")
    monkeypatch.setitem(sys.modules, missing, None)

    with pytest.raises(MissingExtraError) as caught:
        convert(str(tmp_path / f"model{suffix}"), tmp_path / "model.onnx")

    assert caught.value.found == f"the Python package {missing!r} is not installed"
    assert caught.value.fix == "pip install 'tritonsmith[keras]'"


SCRIPT = """
    import sys
    from pathlib import Path
    from tritonsmith.errors import TritonsmithError
    from tritonsmith.ingest import convert
    try:
        convert(sys.argv[1], Path(sys.argv[2]))
    except TritonsmithError as error:
        print(error)
"""


def run_convert(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(source), str(source.with_suffix(".onnx"))],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
        env={**{key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}, **environment},
    )


def test_conversion_is_silent(frameworks: dict[str, Any], tmp_path: Path) -> None:
    """float64 makes tf2onnx warn; TensorFlow's own libraries write to file descriptor 2 while they load."""
    keras_models.randomised(keras_models.float64(frameworks["keras"])).save(tmp_path / "model.keras")

    done = run_convert(tmp_path / "model.keras")

    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "model.onnx").is_file()


def test_another_backend_is_an_error_that_says_so(frameworks: dict[str, Any], tmp_path: Path) -> None:
    keras_models.several(frameworks["keras"]).save(tmp_path / "model.keras")

    done = run_convert(tmp_path / "model.keras", KERAS_BACKEND="torch")

    assert "found: Keras runs on torch in this process" in done.stdout
    assert "to do: set KERAS_BACKEND=tensorflow" in done.stdout
    assert "Traceback" not in done.stderr
