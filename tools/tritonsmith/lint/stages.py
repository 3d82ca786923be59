"""What Python stages need: requirements.txt, which every image installs from."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import InvalidRequirement, Requirement

from tritonsmith.containers import NUMPY2_SINCE
from tritonsmith.errors import ProvisionError
from tritonsmith.lint.findings import Finding, error_at, finding_from_error
from tritonsmith.lint.scan import Deployment, Model
from tritonsmith.server.environment import read_requirements

REQUIREMENTS = "requirements.txt"
# Releases of numpy 1 by their second number: the last patch of each; what is older has no wheel for the stub.
NUMPY1_PATCHES = {21: 6, 22: 4, 23: 5, 24: 4, 25: 2, 26: 4}
NUMPY1_VERSIONS = tuple(
    f"1.{minor}.{patch}" for minor, last in NUMPY1_PATCHES.items() for patch in range(last + 1)
)


def check_stage(model: Model, deployment: Deployment) -> Iterator[Finding]:
    """Requirements that cannot be read, name no version, or break the server."""
    path = model.folder / REQUIREMENTS
    if not path.is_file():
        return
    try:
        lines = read_requirements(path)
    except ProvisionError as error:
        yield finding_from_error(error, model=model.name, place=REQUIREMENTS)
        return
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            yield error_at(
                model.name,
                REQUIREMENTS,
                "a line is no requirement",
                found=f"{line} ({str(error).splitlines()[0]})",
                expected="one requirement a line, such as pillow>=11",
            )
            continue
        if not requirement.specifier and not requirement.url:
            yield Finding(
                severity="warning",
                model=model.name,
                place=REQUIREMENTS,
                what=f"{requirement.name} has no version: the next image may get another one",
                found=line,
                expected=f"{requirement.name}==<version>, or at least a lower bound",
            )
        if requirement.name.lower() == "numpy" and not _allows_numpy1(requirement):
            yield from _numpy2(model, line, deployment)


def _allows_numpy1(requirement: Requirement) -> bool:
    return any(requirement.specifier.contains(version) for version in NUMPY1_VERSIONS)


def _numpy2(model: Model, line: str, deployment: Deployment) -> Iterator[Finding]:
    container = deployment.container
    if container is not None and container.release >= NUMPY2_SINCE:
        return
    where = f"container {container.release}" if container else "the embedded server (24.10)"
    yield Finding(
        severity="error" if container is not None else "warning",
        model=model.name,
        place=REQUIREMENTS,
        what=f"numpy 2 makes the Python stub of {where} answer empty tensors, without an error",
        found=line,
        expected="numpy<2",
        fix=f"loosen the requirement, or take container {NUMPY2_SINCE} or later",
    )
