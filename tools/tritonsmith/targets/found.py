"""The plan orders of a repository: found, read, and held against what was published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Target
from tritonsmith.errors import RepositoryError, SourceError
from tritonsmith.files import path_inside
from tritonsmith.repository.entry import config_name, read_config, read_entry
from tritonsmith.repository.names import is_model, served_versions, versions_of
from tritonsmith.targets.order import PlanOrder
from tritonsmith.targets.order_file import SUFFIX, read_order, signed


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundOrder:
    """An order of a version that its target serves."""

    model: str
    version: int
    folder: Path  # of the version
    order: PlanOrder

    @property
    def target(self) -> str:
        return self.order.target

    def __str__(self) -> str:
        return f"{self.model} version {self.version}, target {self.target}"


def find_orders(repository: Path, target: str | None = None) -> tuple[FoundOrder, ...]:
    """The orders of all versions that are served, by model and version.

    Raises:
        RepositoryError: no repository, a target that no model has, an order that cannot be read.
    """
    if not repository.is_dir():
        raise RepositoryError(f"{repository} is no folder", expected="a Triton model repository")
    models = [entry for entry in sorted(repository.iterdir()) if is_model(entry)]
    if not models:
        raise RepositoryError(
            f"{repository} holds no model",
            expected="folders with a config.pbtxt, as `tritonsmith build` makes",
        )
    known = sorted({path.stem for model in models for path in model.glob(config_name("*"))})
    if target is not None and target not in known:
        raise RepositoryError(
            f"no model in {repository} has a target {target!r}",
            found=", ".join(known) or "no targets at all",
            fix=f"add [target.{target}] to a recipe and build it, or name another --target",
        )
    return tuple(found for model in models for found in _orders_of(model, target))


def check_order(found: FoundOrder) -> None:
    """Raise RepositoryError where an order, or an ONNX file that it names, is not what was published."""
    order = found.order
    again = "build the model again with `tritonsmith build --force`"
    if signed(order).fingerprint != order.fingerprint:
        raise RepositoryError(f"the plan order of {found} was changed", expected=order.fingerprint, fix=again)
    names = [candidate.file for candidate in order.candidates]
    if not names or (order.fallback is not None and order.fallback not in names):
        raise RepositoryError(f"the plan order of {found} names no such candidate", found=order.fallback)
    for candidate in order.candidates:
        path = path_inside(found.folder, candidate.file)
        if path is None:
            raise RepositoryError(f"the plan order of {found} names a file elsewhere", found=candidate.file)
        try:
            sha256 = onnx_model.model_sha256(path)
        except SourceError as error:
            raise RepositoryError(f"{found}: {error.what}", found=error.found, fix=again) from error
        if sha256 != candidate.sha256:
            raise RepositoryError(
                f"{path} is not the file that was ordered",
                found=f"SHA-256 {sha256}",
                expected=candidate.sha256,
                fix=again,
            )


def _orders_of(model: Path, target: str | None) -> Iterator[FoundOrder]:
    for version in versions_of(model):
        for path in sorted((model / str(version)).glob(f"{target or '*'}{SUFFIX}")):
            order = read_order(path)
            if path.name != f"{order.target}{SUFFIX}":
                raise RepositoryError(f"{path} is the order of another target", found=order.target)
            config = read_config(model.parent, model.name, order.target)
            if version in served_versions(config, versions_of(model)):
                yield FoundOrder(model=model.name, version=version, folder=path.parent, order=order)


def target_of(found: FoundOrder, repository: Path) -> Target | None:
    """What the manifest says of the order's target."""
    targets = read_entry(repository, found.model, found.version).manifest.targets
    return next((target for target in targets if target.name == found.target), None)
