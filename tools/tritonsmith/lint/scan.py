"""The repository as Triton reads it: every folder a model, every configuration parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from tritonsmith.containers import Container
from tritonsmith.errors import RepositoryError, UsageError
from tritonsmith.lint.findings import Finding, error_at, finding_from_error
from tritonsmith.repository.config import config_from_text
from tritonsmith.repository.entry import CONFIG_NAME, CONFIGS_FOLDER, config_name
from tritonsmith.repository.names import check_name
from tritonsmith.targets.view import MARKER

# `platform` of a configuration that names no backend, in Triton core's `src/constants.h`
PLATFORM_BACKENDS = {
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
    "tensorrt_plan": "tensorrt",
    "ensemble": "ensemble",
}
# The file names by which Triton core finds a backend that is not named (AutoCompleteBackendFields), and
# what each backend opens where default_model_filename says nothing.
DEFAULT_FILES = {
    "onnxruntime": "model.onnx",
    "openvino": "model.xml",
    "python": "model.py",
    "pytorch": "model.pt",
    "tensorrt": "model.plan",
    "dali": "model.dali",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Where the repository is to run; None is not said, and then not checked."""

    container: Container | None = None
    gpu: str | None = None  # compute capability, "9.0"
    target: str | None = None  # --model-config-name


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A configuration of a model: the default's, or a target's."""

    target: str | None
    place: str  # config.pbtxt or configs/<target>.pbtxt
    config: model_config_pb2.ModelConfig

    @property
    def backend(self) -> str:
        """The backend, also where only a platform is named; empty where neither is."""
        return self.config.backend or PLATFORM_BACKENDS.get(self.config.platform, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A folder of the repository."""

    name: str
    folder: Path
    default: Variant | None  # None: config.pbtxt is missing or cannot be read
    targets: tuple[Variant, ...]
    versions: tuple[int, ...]  # the folders that Triton takes for versions, oldest first

    def served(self, target: str | None) -> tuple[Variant, ...]:
        """The configurations to check: all of them, or what `--model-config-name=<target>` reads."""
        own = tuple(variant for variant in self.targets if variant.target == target)
        if target is None or not own:
            default = () if self.default is None else (self.default,)
            return default + (self.targets if target is None else ())
        return own


def read_models(repository: Path, target: str | None) -> tuple[tuple[Model, ...], tuple[Finding, ...]]:
    """Every model of the repository, and what is wrong with its folder or cannot be parsed.

    Raises:
        UsageError: no such folder, a view, no model in it, or none that has the target.
    """
    if not repository.is_dir():
        raise UsageError(f"{repository} is no folder", expected="a Triton model repository")
    if (repository / MARKER).is_file():
        raise UsageError(
            f"{repository} is a view that `tritonsmith plans` laid", fix="lint the repository under it"
        )
    models: list[Model] = []
    findings: list[Finding] = []
    for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
        model, own = _read_model(folder)
        findings += own
        if model is not None:
            models.append(model)
    if not models and not findings:
        raise UsageError(f"{repository} holds no model", expected="a folder for each model")
    known = sorted({variant.target or "" for model in models for variant in model.targets})
    if target is not None and target not in known and not findings:
        raise UsageError(
            f"no model of {repository} has the target {target!r}",
            expected=f"one of {', '.join(known)}" if known else "a repository with configs/<target>.pbtxt",
        )
    return tuple(models), tuple(findings)


def _read_model(folder: Path) -> tuple[Model | None, list[Finding]]:
    name = folder.name
    findings: list[Finding] = []
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        return None, [error_at(name, "", "the folder cannot be read", found=error.strerror)]
    configs = sorted((folder / CONFIGS_FOLDER).glob("*.pbtxt"))
    if not (folder / CONFIG_NAME).is_file() and not configs:
        missing = Finding(
            severity="error",
            model=name,
            place=CONFIG_NAME,
            what="there is no configuration, and Triton reads every folder of a repository as a model",
            found=f"{len(entries)} entries in the folder",
            fix="write one, or move the folder out of the repository",
        )
        return None, [missing]
    try:
        check_name(name)
    except RepositoryError as error:
        findings.append(finding_from_error(error, model=name, place=""))
    default = _read_variant(folder, None, findings)
    targets = [_read_variant(folder, path.stem, findings) for path in configs]
    model = Model(
        name=name,
        folder=folder,
        default=default,
        targets=tuple(variant for variant in targets if variant is not None),
        versions=_version_folders(folder),
    )
    return model, findings


def _read_variant(folder: Path, target: str | None, findings: list[Finding]) -> Variant | None:
    place = config_name(target)
    try:
        text = (folder / place).read_text(encoding="utf-8")
        config = config_from_text(text, place=place)
    except (OSError, UnicodeDecodeError) as error:
        unread = RepositoryError(f"{place} cannot be read", found=error)
        findings.append(finding_from_error(unread, model=folder.name, place=place))
        return None
    except RepositoryError as error:
        findings.append(finding_from_error(error, model=folder.name, place=place))
        return None
    if config.name and config.name != folder.name:
        findings.append(
            Finding(
                severity="error",
                model=folder.name,
                place=place,
                what="the name is another one than the folder's, which Triton refuses",
                found=config.name,
                expected=folder.name,
                fix="rename one of them, or leave the name out",
            )
        )
    config.name = folder.name
    if not config.backend and not config.platform:
        config.backend = _backend_of_files(folder, config)
    return Variant(target=target, place=place, config=config)


def _version_folders(folder: Path) -> tuple[int, ...]:
    """Triton passes over folders that are no number, and over those that begin with 0."""
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return tuple(
        sorted(int(name) for name in names if name.isascii() and name.isdecimal() and name[0] != "0")
    )


def _backend_of_files(folder: Path, config: model_config_pb2.ModelConfig) -> str:
    """The backend that Triton takes by the name of the model's file; empty where it finds none."""
    if config.default_model_filename:
        names = {config.default_model_filename}
    else:
        names = {
            path.name for version in _version_folders(folder) for path in (folder / str(version)).iterdir()
        }
    return next((backend for backend, name in DEFAULT_FILES.items() if name in names), "")
