"""What `finish` makes of a raw export: names, axes, opset, simplification, and an atomic file."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxslim
import pytest
from numpy.typing import NDArray

from onnx_models import branching_model, linear_model, linear_weights, model_from_text, write_model
from tritonsmith import onnx_model
from tritonsmith.artifact import TensorSpec, sha256_of
from tritonsmith.engines import open_session
from tritonsmith.errors import ParityError, RepositoryError, SourceError, UsageError
from tritonsmith.ingest.finish import Origin, finish
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.onnx_model import load_model, model_files, opset_of, signature_of

Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw" / "raw.onnx"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.onnx"


def exported(
    path: Path,
    model: onnx.ModelProto,
    reference: Callable[[Arrays], Arrays] | None = None,
    *,
    inputs: tuple[str, ...] | None = None,
    outputs: tuple[str, ...] | None = None,
    batched: bool = True,
) -> Exported:
    """A raw export whose signature is the graph's own, under other names where they are given.

    Without a `reference`, ONNX Runtime on the raw file is one.
    """
    write_model(path, model)
    raw_inputs, raw_outputs = signature_of(model)
    new_inputs = inputs or tuple(spec.name for spec in raw_inputs)
    new_outputs = outputs or tuple(spec.name for spec in raw_outputs)

    def run_raw(arrays: Arrays) -> Arrays:
        session = open_session(path)
        feeds = {spec.name: arrays[name] for spec, name in zip(raw_inputs, new_inputs, strict=True)}
        answer = session.run(feeds)
        return {name: answer[spec.name] for spec, name in zip(raw_outputs, new_outputs, strict=True)}

    return Exported(
        kind="onnx",
        raw=path,
        inputs=tuple(replace(spec, name=name) for spec, name in zip(raw_inputs, new_inputs, strict=True)),
        outputs=tuple(replace(spec, name=name) for spec, name in zip(raw_outputs, new_outputs, strict=True)),
        batched=batched,
        reference=reference or run_raw,
        tools={"maker": "1.0"},
        options={"layout": "NHWC"},
    )


def run(path: Path, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def assert_linear(path: Path) -> None:
    weights = linear_weights()
    (scores,) = run(path, features=np.ones((2, 4), np.float32))
    np.testing.assert_allclose(scores, [weights["weight"].sum(axis=0) + weights["bias"]] * 2, rtol=1e-5)


def names_of(path: Path) -> tuple[list[str], list[str]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]


def test_the_source_names_are_given_and_the_lineage_is_kept(raw: Path, out: Path) -> None:
    source = exported(raw, linear_model("batch"), inputs=("image",), outputs=("label",))
    origin = Origin(sha256="ab" * 32, size_bytes=1234, export_s=2.0)
    artifact = finish(source, out, origin=origin)
    assert artifact.inputs == (TensorSpec(name="image", dtype="float32", shape=("batch", 4)),)
    assert artifact.outputs == (TensorSpec(name="label", dtype="float32", shape=("batch", 3)),)
    assert names_of(out) == (["image"], ["label"])
    assert (artifact.batched, artifact.precision, artifact.format) == (True, "fp32", "onnx")
    convert, simplify = artifact.steps
    assert (convert.name, simplify.name) == ("convert", "simplify")
    assert (convert.input_sha256, convert.bytes_before) == ("ab" * 32, 1234)
    assert convert.duration_s > 2.0
    assert convert.options["layout"] == "NHWC"
    assert convert.tools["maker"] == "1.0"
    assert convert.measured["parity"]["outputs"]["label"]["values"] == 39  # type: ignore[index, call-overload]
    assert simplify.input_sha256 == convert.output_sha256
    assert simplify.output_sha256 == sha256_of(out)
    assert simplify.bytes_after == out.stat().st_size
    features = np.ones((2, 4), dtype=np.float32)
    weights = linear_weights()
    np.testing.assert_allclose(
        run(out, image=features)[0], features @ weights["weight"] + weights["bias"], rtol=1e-5
    )
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx"]


def test_inputs_and_outputs_can_swap_the_names_of_inner_tensors(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, 2] a, float[batch, 2] b) => (float[batch, 2] y, float[batch, 2] z) "
        "{ image = Sub(a, b)  y = Mul(image, image)  z = Add(image, a) }"
    )
    source = exported(raw, model, inputs=("b", "a"), outputs=("image", "y"))
    finish(source, out)
    assert names_of(out) == (["b", "a"], ["image", "y"])
    b, a = np.array([[5, 7]], np.float32), np.array([[2, 3]], np.float32)
    image, y = run(out, b=b, a=a)
    np.testing.assert_array_equal(image, [[9, 16]])
    np.testing.assert_array_equal(y, [[8, 11]])


def test_names_inside_of_branches_step_aside(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxslim, "slim", lambda model: model)  # keep both branches
    source = exported(raw, branching_model(), inputs=("y_then", "one"), outputs=("two",), batched=False)
    finish(source, out)
    assert names_of(out) == (["y_then", "one"], ["two"])
    x = np.array([3, 4], np.float32)
    np.testing.assert_array_equal(run(out, y_then=np.array(True), one=x)[0], [4, 5])
    np.testing.assert_array_equal(run(out, y_then=np.array(False), one=x)[0], [6, 8])


def test_a_branch_that_shadows_a_name_keeps_its_own(raw: Path, out: Path) -> None:
    model = branching_model()
    branch = next(item.g for item in model.graph.node[2].attribute if item.name == "then_branch")
    branch.node[0].output[0] = branch.output[0].name = "wanted"
    model.graph.node[2].attribute[1].g.node[0].output[0] = "wanted"
    model.graph.node[2].attribute[1].g.output[0].name = "wanted"
    finish(exported(raw, model, inputs=("flag", "wanted"), batched=False), out)
    x = np.array([3, 4], np.float32)
    np.testing.assert_array_equal(run(out, flag=np.array(True), wanted=x)[0], [4, 5])


def test_an_output_that_is_an_input_a_weight_or_given_twice(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, 2] x) => (float[batch, 2] x, float[batch, 2] y, float[batch, 2] y) { y = Neg(x) }"
    )
    source = replace(
        exported(raw, model, inputs=("x",), outputs=("same", "minus", "again")),
        reference=lambda arrays: {"same": arrays["x"], "minus": -arrays["x"], "again": -arrays["x"]},
    )
    finish(source, out)
    assert names_of(out) == (["x"], ["same", "minus", "again"])
    same, minus, again = run(out, x=np.array([[1, 2]], np.float32))
    np.testing.assert_array_equal([same, minus, again], [[[1, 2]], [[-1, -2]], [[-1, -2]]])


def test_an_output_that_is_a_weight(raw: Path, out: Path) -> None:
    table = np.array([1, 2, 3], np.float32)
    model = model_from_text(
        "g (float[3] x) => (float[3] y, float[3] table) { y = Add(x, table) }", {"table": table}
    )
    finish(exported(raw, model, outputs=("sum", "classes"), batched=False), out)
    np.testing.assert_array_equal(run(out, x=np.zeros(3, np.float32))[1], table)


def test_an_output_named_like_an_input_gets_a_name_of_its_own(raw: Path, out: Path) -> None:
    model = model_from_text("g (float[batch, 2] x) => (float[batch, 2] y) { y = Neg(x) }")
    artifact = finish(
        exported(raw, model, lambda arrays: {"x": -arrays["x"]}, inputs=("x",), outputs=("x",)), out
    )
    assert [spec.name for spec in artifact.outputs] == ["x_output"]


def test_two_outputs_of_one_name_are_refused(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, 2] x) => (float[batch, 2] y, float[batch, 2] z) { y = Neg(x) z = Abs(x) }"
    )
    with pytest.raises(SourceError, match="share a name: same"):
        finish(exported(raw, model, outputs=("same", "same")), out)


def test_a_signature_of_another_length_or_type_is_refused(raw: Path, out: Path) -> None:
    source = exported(raw, linear_model("batch"))
    with pytest.raises(SourceError, match="1 inputs, the source has 2"):
        finish(replace(source, inputs=source.inputs * 2), out)
    double = replace(source.outputs[0], dtype="float64")
    with pytest.raises(SourceError, match="another data type") as caught:
        finish(replace(source, outputs=(double,)), out)
    assert (caught.value.found, caught.value.expected) == ("FLOAT", "float64")


def test_weights_that_older_files_list_as_inputs_are_weights(raw: Path, out: Path) -> None:
    model = linear_model("batch", opset=9, ir_version=3)
    for name, shape in (("weight", [4, 3]), ("bias", [3])):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    artifact = finish(exported(raw, model), out)
    assert [spec.name for spec in artifact.inputs] == ["features"]
    assert len(load_model(out).graph.input) == 1


def test_an_old_opset_is_raised_and_computes_the_same(raw: Path, out: Path) -> None:
    # Up to opset 12 the axes of Squeeze are an attribute, and Softmax flattens what follows its axis.
    model = model_from_text(
        "g (float[batch, 1, 3, 2] x) => (float[batch, 3, 2] y)"
        " { squeezed = Squeeze <axes: ints = [1]> (x)  y = Softmax <axis: int = 1> (squeezed) }",
        opset=11,
        ir_version=6,
    )
    artifact = finish(exported(raw, model), out)
    assert opset_of(load_model(out)) == artifact.steps[0].measured["opset"] == 13
    x = np.random.default_rng(0).normal(size=(2, 1, 3, 2)).astype(np.float32)
    powers = np.exp(x[:, 0])
    np.testing.assert_allclose(run(out, x=x)[0], powers / powers.sum(axis=(1, 2), keepdims=True), rtol=1e-5)


def test_an_opset_that_the_server_does_not_read_is_lowered(raw: Path, out: Path) -> None:
    finish(exported(raw, linear_model("batch", opset=23, ir_version=11)), out)
    model = load_model(out)
    assert (opset_of(model), model.ir_version) == (21, 10)


def test_a_newer_server_keeps_it(raw: Path, out: Path) -> None:
    options = ConvertOptions(server="26.07")
    finish(exported(raw, linear_model("batch", opset=23, ir_version=11)), out, options)
    model = load_model(out)
    assert (opset_of(model), model.ir_version) == (23, 11)


def test_an_operator_that_the_server_does_not_have_is_refused(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, 4] x) => (float[batch, 4] y) { y = RMSNormalization(x, scale) }",
        {"scale": np.ones(4, np.float32)},
        opset=23,
        ir_version=11,
    )
    with pytest.raises(SourceError, match="from opset 23 to 21") as caught:
        finish(exported(raw, model), out)
    assert "24.10" in str(caught.value)


def test_the_opset_that_is_asked_for_is_set(raw: Path, out: Path) -> None:
    finish(exported(raw, linear_model("batch")), out, ConvertOptions(opset=21))
    assert opset_of(load_model(out)) == 21


def test_free_axes_get_names_that_say_something(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (int64[batch, unk__7] ids, float[batch, ?, ?, 3] image)"
        " => (float[batch, ?] y, float[batch, s9, ?, 3] z)"
        " { y = Cast <to: int = 1> (ids)  z = Neg(image) }"
    )
    artifact = finish(exported(raw, model), out)
    assert [spec.shape for spec in artifact.inputs] == [
        ("batch", "sequence"),
        ("batch", "height", "width", 3),
    ]
    assert [spec.shape for spec in artifact.outputs] == [
        ("batch", "sequence"),
        ("batch", "height", "width", 3),
    ]


def test_names_that_the_source_gave_are_kept(raw: Path, out: Path) -> None:
    model = model_from_text("g (float[batch, words, 2] x) => (float[batch, words, 2] y) { y = Neg(x) }")
    assert finish(exported(raw, model), out).outputs[0].shape == ("batch", "words", 2)


def test_an_output_axis_of_a_length_of_its_own_carries_the_output_name(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, ?, 2] x) => (float[batch, ?, 2] y, float[batch, longer, 2] z)"
        " { y = Concat <axis: int = 1> (x, x)  z = Concat <axis: int = 1> (x, x) }"
    )
    artifact = finish(exported(raw, model), out)
    assert [spec.shape[1] for spec in (*artifact.inputs, *artifact.outputs)] == [
        "sequence",
        "y_sequence",
        "longer",
    ]


def test_unnamed_axes_that_only_work_at_one_length_share_a_name(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, ?] a, float[batch, ?] b) => (float[batch, ?] y) { y = Add(a, b) }"
    )
    artifact = finish(exported(raw, model), out)
    assert {spec.shape for spec in (*artifact.inputs, *artifact.outputs)} == {("batch", "sequence")}


def test_functions_and_dead_metadata_are_gone(raw: Path, out: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18, "local": 1, "ai.onnx.ml": 3]>'
        "g (float[batch, 2] x) => (float[batch, 2] y) { y = local.twice(x) }"
        '<opset_import: ["": 18], domain: "local"> twice (a) => (b) { b = Add(a, a) }'
    )
    model.doc_string = model.graph.node[0].doc_string = "made on my machine"
    model.metadata_props.add(key="pkg.torch.export", value="a graph")
    model.metadata_props.add(key="author", value="me")
    finish(exported(raw, model), out)
    clean = load_model(out)
    assert [node.op_type for node in clean.graph.node] == ["Add"]
    assert not clean.functions
    assert [entry.domain for entry in clean.opset_import] == [""]
    assert [(entry.key, entry.value) for entry in clean.metadata_props] == [("author", "me")]
    assert b"my machine" not in out.read_bytes()


def test_the_notes_of_an_exporter_are_gone(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxslim, "slim", lambda model: model)
    model = linear_model("batch")
    noted = (model.graph, model.graph.node[0], model.graph.initializer[0], model.graph.input[0])
    for item in noted:
        item.doc_string = "line 7 of train.py"
    for item in noted:
        item.metadata_props.add(key="pkg.onnxscript.source", value="line 7 of train.py")
    finish(exported(raw, model), out)
    assert b"train.py" not in out.read_bytes()


def test_a_model_is_simplified(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, 2] x) => (float[batch, 2] y)"
        " { a = Identity(x)  two = Add(one, one)  b = Mul(a, two)  y = Identity(b) }",
        {"one": np.ones(2, np.float32)},
    )
    measured = finish(exported(raw, model), out).steps[1].measured
    assert measured["used"] is True
    assert [node.op_type for node in load_model(out).graph.node] == ["Mul"]
    assert (measured["nodes_before"], measured["nodes_after"]) == (4, 1)


def break_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    return model


def rename_output(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "renamed"
    return model


def lose_a_node(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.node[0]
    return model


def fail(model: onnx.ModelProto) -> onnx.ModelProto:
    raise KeyError("no such pattern")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_weights, "'scores' differs from the source"),
        (rename_output, "changed the outputs"),
        (lose_a_node, "broken model"),
        (fail, "KeyError"),
    ],
)
def test_a_simplifier_that_damages_the_model_is_not_followed(
    raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[..., onnx.ModelProto], reason: str
) -> None:
    monkeypatch.setattr(onnxslim, "slim", damage)
    artifact = finish(exported(raw, linear_model("batch")), out)
    measured = artifact.steps[1].measured
    assert measured["used"] is False
    assert reason in str(measured["refused"])
    assert artifact.steps[1].output_sha256 == artifact.steps[0].output_sha256 == sha256_of(out)
    assert_linear(out)


def test_a_wrong_conversion_leaves_what_was_there(raw: Path, out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(b"the model before")
    source = exported(raw, linear_model("batch"), lambda arrays: {"scores": arrays["features"][:, :3]})
    with pytest.raises(ParityError, match="'scores' differs from the source at batch"):
        finish(source, out, force=True)
    assert out.read_bytes() == b"the model before"
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx"]


def test_a_full_disk_leaves_what_was_there(raw: Path, out: Path) -> None:
    source = exported(raw, linear_model("batch"))
    finish(source, out)
    before = out.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a file may not grow past 100 bytes
    try:
        with pytest.raises(RepositoryError, match="cannot write") as caught:
            finish(source, out, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.found == "File too large"
    assert out.read_bytes() == before
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx"]


CONVERT_FOREVER = """
import sys
from pathlib import Path
from tritonsmith import onnx_model
from tritonsmith.ingest import convert

onnx_model.EXTERNAL_DATA_THRESHOLD_BYTES = 1
while True:
    convert(sys.argv[1], Path(sys.argv[2]), force=True)
    print("written", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_model(raw: Path, out: Path) -> None:
    write_model(raw, linear_model("batch"))
    for delay_s in (0.0, 0.013, 0.029, 0.047):
        command = [sys.executable, "-c", CONVERT_FOREVER, str(raw), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
            time.sleep(delay_s)
            process.kill()
        assert_linear(out)


def test_nothing_is_overwritten_without_force(raw: Path, out: Path) -> None:
    source = exported(raw, linear_model("batch"))
    finish(source, out)
    with pytest.raises(UsageError, match="exists"):
        finish(source, out)
    finish(source, out, force=True)


def test_a_folder_as_target_is_wrong_usage(raw: Path, out: Path) -> None:
    out.mkdir(parents=True)
    with pytest.raises(UsageError, match="is a folder"):
        finish(exported(raw, linear_model("batch")), out, force=True)


@pytest.mark.parametrize("options", [ConvertOptions(server="9.99"), ConvertOptions(opset=22)])
def test_an_unsuitable_server_or_opset_is_wrong_usage(raw: Path, out: Path, options: ConvertOptions) -> None:
    with pytest.raises(UsageError):
        finish(exported(raw, linear_model("batch")), out, options)


@pytest.mark.parametrize("opset", [18, 11])
def test_a_large_model_is_finished_by_path(
    raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch, opset: int
) -> None:
    onnx.save(
        linear_model("batch", opset=opset),
        raw,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    source = exported(raw.parent / "unused.onnx", linear_model("batch", opset=opset))
    monkeypatch.setattr(onnx_model, "EXTERNAL_DATA_THRESHOLD_BYTES", 1)
    monkeypatch.setattr(onnxslim, "slim", fail)
    before = raw.with_name("weights.bin").read_bytes()
    artifact = finish(replace(source, raw=raw), out)
    assert [file.name for file in model_files(out)] == ["model.onnx", "model.onnx.data"]
    assert "past 2 GB" in str(artifact.steps[1].measured["refused"])
    assert opset_of(load_model(out)) == max(opset, 13)
    assert raw.with_name("weights.bin").read_bytes() == before
    assert_linear(out)
    finish(replace(source, raw=raw), out, force=True)
    assert sorted(file.name for file in out.parent.iterdir()) == ["model.onnx", "model.onnx.1.data"]
    assert_linear(out)


def test_a_model_whose_rows_depend_on_each_other_is_not_batched(raw: Path, out: Path) -> None:
    model = model_from_text(
        "g (float[batch, 3] x) => (float[batch, 3] y) { y = Softmax <axis: int = 0> (x) }"
    )
    artifact = finish(exported(raw, model), out)
    assert artifact.inputs[0].shape == ("batch", 3)  # the axis is free all the same
    assert not artifact.batched
