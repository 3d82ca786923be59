"""Which target's configurations a deployment serves, and what they say of waiting."""

from __future__ import annotations

from pathlib import Path

from tritonsmith.deploy.measurements_file import model_folders
from tritonsmith.errors import DeployError


def check_target(repository: Path, target: str | None) -> None:
    """Raise DeployError where no model of the repository has a configuration for `target`."""
    if target is None:
        return
    folders = model_folders(repository)
    known = sorted({path.stem for folder in folders for path in folder.glob("configs/*.pbtxt")})
    if target not in known:
        raise DeployError(
            f"no model of {repository} has a configuration for the target {target!r}",
            found=f"configurations for {', '.join(known)}" if known else "no <model>/configs/<target>.pbtxt",
            fix="add [target.<name>] to the recipe and build, or leave --target out",
        )


def gpu_target(repository: Path, chosen: str | None) -> str:
    """What GPUs serve: the chosen target; else the only one with configurations for plans; else "" (none).

    Raises:
        DeployError: no such target, or several with plans to choose from.
        RepositoryError: a configuration that cannot be parsed.
    """
    from tritonsmith.repository.config import config_from_text

    check_target(repository, chosen)
    if chosen is not None:
        return chosen
    found = {
        path.stem
        for folder in model_folders(repository)
        for path in folder.glob("configs/*.pbtxt")
        if config_from_text(path.read_text(encoding="utf-8"), place=str(path)).backend == "tensorrt"
    }
    if len(found) > 1:
        raise DeployError(
            f"{repository} has plans for several targets",
            found=", ".join(sorted(found)),
            fix="choose one with --target",
        )
    return next(iter(found), "")


def queue_delays_s(repository: Path, target: str | None) -> dict[str, float]:
    """Model name -> how long it waits for a batch to fill, in seconds, under --model-config-name=<target>.

    Only models that wait. Raises RepositoryError for a configuration that cannot be parsed.
    """
    from tritonsmith.repository.entry import read_config

    delays = {}
    for folder in model_folders(repository):
        own = target if target is not None and (folder / "configs" / f"{target}.pbtxt").is_file() else None
        delay_us = read_config(repository, folder.name, own).dynamic_batching.max_queue_delay_microseconds
        if delay_us:
            delays[folder.name] = delay_us / 1e6
    return delays
