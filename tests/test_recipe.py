"""recipe.toml -> requests."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tritonsmith import recipe
from tritonsmith.compress.search.goal import SearchGoal
from tritonsmith.compress.steps import Prune, Quantize
from tritonsmith.errors import RecipeError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.recipe import BuildRequest, load_recipe
from tritonsmith.repository.ensemble import EnsembleRequest, EnsembleStep
from tritonsmith.repository.warmup import WarmupRequest
from tritonsmith.targets.request import TargetRequest

MODEL = '[model]\nname = "a"\nsource = "b.h5"\n'
ENSEMBLE = '[[ensemble]]\nname = "e"\n'
STEP = '[[ensemble.step]]\nmodel = "m"\ninputs = {x = "x"}\noutputs = {y = "y"}\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def documented_example() -> str:
    assert recipe.__doc__ is not None
    return textwrap.dedent(recipe.__doc__.partition("folder:\n")[2].partition("Instead of a precision")[0])


def test_the_documented_example(tmp_path: Path) -> None:
    path = write(tmp_path, documented_example())
    loaded = load_recipe(path, repository=Path("models"), force=True, allow_code=True)
    build = BuildRequest(
        name="digits",
        source=str(tmp_path / "digits.h5"),
        repository=Path("models"),
        precision="auto",
        calibration=tmp_path / "calibration.npz",
        training=tmp_path / "training.npz",
        tuning=tmp_path / "tuning.npz",
        evaluation=tmp_path / "evaluation.npz",
        metric="accuracy",
        max_drop=0.01,
        max_batch_size=32,
        version=1,
        force=True,
        convert=ConvertOptions(server="24.10", opset=17, allow_code=True, custom_objects="package.module"),
        config={
            "instance_group": [{"kind": "KIND_CPU", "count": 2}],
            "parameters": {"intra_op_thread_count": 1},
            "dynamic_batching": {"preferred_batch_size": [8, 16], "max_queue_delay_microseconds": 500},
        },
        labels={"probabilities": tmp_path / "labels.txt"},
        warmup=WarmupRequest(samples=tmp_path / "evaluation.npz", count=2, batch_size=1),
        targets=(TargetRequest(name="gpu", backend="tensorrt", without_plan="defer"),),
    )
    step = EnsembleStep(
        model="digits_decode", version=1, inputs={"encoded": "IMAGE"}, outputs={"pixels": "pixels"}
    )
    ensemble = EnsembleRequest(
        name="digits_pipeline",
        repository=Path("models"),
        steps=(step,),
        inputs=("IMAGE",),
        outputs=("label", "confidence"),
        force=True,
        config={"response_cache": {"enable": True}},
    )
    assert loaded.builds == (build,)
    assert loaded.ensembles == (ensemble,)


def documented_tables(start: str, end: str) -> str:
    assert recipe.__doc__ is not None
    text = recipe.__doc__.partition("Instead of a precision")[2]
    return textwrap.dedent("    " + start + text.partition(start)[2].partition(end)[0])


def test_the_documented_steps(tmp_path: Path) -> None:
    text = MODEL + documented_tables("[[compress]]", "    [search]")
    (build,) = load_recipe(write(tmp_path, text), repository=Path("models")).builds
    assert build.steps == (Prune(flops=0.25, epochs=8), Quantize())
    assert build.search is None


def test_the_documented_search(tmp_path: Path) -> None:
    text = MODEL + "[accuracy]\nmax_drop = 0.01\n" + documented_tables("[search]", "A file cannot")
    (build,) = load_recipe(write(tmp_path, text), repository=Path("models")).builds
    assert build.search == SearchGoal(
        max_drop=0.01,
        size_at_most_bytes=30_000,
        speed_at_least=3.0,
        max_candidates=16,
        budget_s=1200,
        epochs=20,
    )


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ('[[compress]]\nstep = "prun"\nflops = 0.5\n', r"compress\[0\].step names no step"),
        ('[[compress]]\nstep = "prune"\n', r"compress\[0\] prune needs to know how much"),
        ('[[compress]]\nstep = "prune"\nflop = 0.5\n', r"compress\[0\].flop is no option of prune"),
        ('[[compress]]\nstep = "prune"\nflops = 1.5\n', r"compress\[0\].flops is out of range"),
        ('[[compress]]\nstep = "quantize"\nmixed = 1\n', r"compress\[0\].mixed has the wrong type"),
        ('[[compress]]\nstep = "share-rows"\n', r"compress\[0\].rows is missing"),
        ('[[compress]]\nstep = "distill"\nepochs = 1\nstudent = "m.n:f"\n', "student names Python code"),
        ('[compress]\nstep = "quantize"\n', "compress has the wrong type"),
        ('[[compress]]\nstep = "quantize"\n[search]\n', "search beside compress"),
        ("[search]\n", "needs accuracy.max_drop"),
        ('[search]\nsize_at_most = "30 kilo"\n[accuracy]\nmax_drop = 0\n', "size_at_most is no size"),
        ("[search]\nspeed_at_least = 0.0\n[accuracy]\nmax_drop = 0\n", "--speed-at-least 0.0 is no bound"),
    ],
)
def test_mistakes_in_steps_and_search(tmp_path: Path, tables: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_recipe(write(tmp_path, MODEL + tables), repository=Path("models"))


def test_the_least(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, MODEL), repository=Path("models"))
    assert loaded.builds == (
        BuildRequest(name="a", source=str(tmp_path / "b.h5"), repository=Path("models")),
    )
    assert loaded.ensembles == ()


def test_paths_above_the_recipe_are_shortened(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    loaded = load_recipe(write(folder, MODEL.replace("b.h5", "../b.h5")), repository=Path("models"))
    assert loaded.builds[0].source == str(tmp_path / "b.h5")


MISTAKES = [
    ("", "nothing to build", "[[ensemble]]"),
    ("[model", "no valid TOML", "at end of document"),
    ('[model]\nname = "a"\nname = "b"\n', "no valid TOML", "line 3"),
    ("[modl]\n", "modl ", "'model'"),
    ("[config]\n", "[config] belongs to a [model]", "add [model]"),
    ('[model]\nname = "a"\n', "model.source is missing", "a string"),
    (MODEL + 'presision = "fp32"\n', "model.presision", "'precision'"),
    (MODEL + 'calibration = "c.npz"\n', "model.calibration", "accuracy.calibration"),
    (MODEL + 'precision = "int4"\n', "model.precision", "fp32, fp16, int8, auto"),
    (MODEL + 'backend = "tensorflow"\n', "model.backend", "onnxruntime, openvino"),
    (MODEL + 'max_batch_size = "8"\n', "model.max_batch_size", "the string '8'"),
    (MODEL + "max_batch_size = true\n", "model.max_batch_size", "the boolean true"),
    (MODEL + "max_batch_size = -1\n", "model.max_batch_size", "0 or more"),
    (MODEL + "version = 0\n", "model.version", "1 or more"),
    (MODEL + "version = 2026-01-01\n", "model.version", "date"),
    (MODEL.replace('"a"', '"../x"'), "model.name", "letters, digits"),
    (MODEL + "[accuracy]\nmax_drop = nan\n", "accuracy.max_drop", "a number"),
    (MODEL + "[accuracy]\nmax_drop = -0.1\n", "accuracy.max_drop", "0 or more"),
    (MODEL + "[convert]\nallow_code = true\n", "convert.allow_code", "--allow-code"),
    (MODEL + "[convert]\nopset = 0\n", "convert.opset", "1 or more"),
    (MODEL + "[warmup]\ncount = 1\n", "warmup.samples is missing", "a string"),
    (MODEL + '[warmup]\nsamples = "x.npz"\ncount = 0\n', "warmup.count", "1 or more"),
    (MODEL + "[labels]\np = 3\n", "labels.p", "the integer 3"),
    (
        MODEL + "[config.dynamic_batching]\npreferred = [1]\n",
        "config.dynamic_batching.preferred",
        "preferred_b",
    ),
    (MODEL + '[config]\nbackend = "python"\n', "config.backend", "[model] backend"),
    ('[ensemble]\nname = "e"\n', "ensemble has the wrong type", "[[ensemble]]"),
    (ENSEMBLE, "ensemble[0].step is missing", "an array"),
    (ENSEMBLE + "step = []\n", "ensemble[0].step is empty", "at least one"),
    (ENSEMBLE + STEP + ENSEMBLE + STEP + "outpts = {}\n", "ensemble[1].step[0].outpts", "'outputs'"),
    (ENSEMBLE + STEP.replace('"x"}', "3}"), "ensemble[0].step[0].inputs.x", "the integer 3"),
    (ENSEMBLE + STEP.replace('"m"', '"a/b"'), "ensemble[0].step[0].model", "'a/b'"),
    (ENSEMBLE + "inputs = [1]\n" + STEP, "ensemble[0].inputs", "an array of names"),
    (
        ENSEMBLE + STEP + "[ensemble.config.dynamic_batching]\n",
        "ensemble[0].config.dynamic_batching",
        "steps",
    ),
    (ENSEMBLE + STEP + "[ensemble.config]\nx = 1\n", "ensemble[0].config.x", "fields here"),
]


@pytest.mark.parametrize(("text", "place", "hint"), MISTAKES)
def test_a_mistake_is_named_by_key_and_place(tmp_path: Path, text: str, place: str, hint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path, repository=Path("models"))
    assert str(path) in error.value.what
    assert place in error.value.what
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (MODEL.replace("b.h5", "package.module:factory"), "model.source"),
        (MODEL + '[convert]\ncustom_objects = "package.module"\n', "convert.custom_objects"),
        (MODEL + '[accuracy]\nmetric = "package.module:score"\n', "accuracy.metric"),
    ],
)
def test_a_recipe_runs_no_code_by_itself(tmp_path: Path, text: str, place: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=place) as error:
        load_recipe(path, repository=Path("models"))
    assert "--allow-code" in str(error.value)
    build = load_recipe(path, repository=Path("models"), allow_code=True).builds[0]
    assert "package.module" in f"{build.source} {build.convert.custom_objects} {build.metric}"


@pytest.mark.parametrize("source", ["./module:factory", "folder/../module:factory"])
def test_a_path_that_reads_as_a_factory_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    write(tmp_path, MODEL.replace("b.h5", source))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="--allow-code"):
        load_recipe(Path("recipe.toml"), repository=Path("models"))


def test_an_output_with_a_colon_is_no_code(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL + '[accuracy]\nmetric = "accuracy@output:0"\n')
    assert load_recipe(path, repository=Path("models")).builds[0].metric == "accuracy@output:0"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.toml", repository=Path("models"))
    (tmp_path / "latin.toml").write_bytes(b'[model]\nname = "\xe4"\n')
    with pytest.raises(RecipeError, match="no valid TOML"):
        load_recipe(tmp_path / "latin.toml", repository=Path("models"))
