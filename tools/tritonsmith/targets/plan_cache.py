"""Plans that this machine built, kept by what they depend on: order, TensorRT, GPU.

<cache>/<target>-sm90-<key>/model.plan    the plan
<cache>/<target>-sm90-<key>/plan.json     the plan's facts, and what became of each candidate
<cache>/<target>-sm90-<key>.lock          held by the one that builds it
<cache>/timing/                           TensorRT's timings of kernels, which make the next build shorter

The driver is recorded and no part of the key: a plan holds kernels for its GPU, not text for the driver.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.artifact import Json, sha256_of
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.errors import PlanError, RepositoryError
from tritonsmith.files import clear_staging, existing_parent, locked, staging_folder, write_text_atomically
from tritonsmith.repository.entry import flush_file
from tritonsmith.repository.staging import replace_folder, sync_folder
from tritonsmith.targets.choose import ChosenPlan
from tritonsmith.targets.order import PlanOrder
from tritonsmith.targets.order_file import facts_from_json, json_from_facts

Say = Callable[[str], None]

CACHE_SCHEMA = 1  # of plan.json, and of how a plan is chosen: another one is built again
PLAN_NAME = "model.plan"
FACTS_NAME = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPlan:
    """A plan in the cache, read whole and equal to its recorded hash."""

    path: Path
    facts: PlanFacts
    candidates: tuple[Mapping[str, Json], ...]
    built: bool  # now, not by an earlier run


def plan_from_cache(
    cache: Path,
    order: PlanOrder,
    *,
    tensorrt: str,
    device: Device,
    build: Callable[[Path, Path], ChosenPlan],
    force: bool = False,
    say: Say = lambda _: None,
) -> CachedPlan:
    """The plan of an order for one TensorRT and GPU, from the cache or built into it.

    `build` is given where to write the plan and the timing cache to use. Who finds another process building
    the same plan waits for it. An interrupted build leaves nothing; a damaged entry is built again.

    Raises:
        PlanError: `build` found no plan to publish, or the cache cannot be written.
    """
    folder = cache.absolute() / entry_name(order, tensorrt=tensorrt, device=device)
    timing = cache.absolute() / "timing"
    try:
        existing_parent(timing / "a file")
    except RepositoryError as error:
        raise PlanError(
            f"the cache of plans {cache} cannot be written",
            found=error.found,
            fix="name another with --cache",
        ) from error
    with locked(folder.with_name(f"{folder.name}.lock"), what="this plan", say=say):
        clear_staging(folder)
        if not force and (found := find_plan(folder, say=say)) is not None:
            return found
        with staging_folder(folder) as stage:
            new = stage / "new"
            new.mkdir(mode=0o755)
            chosen = build(new / PLAN_NAME, timing)
            (new / PLAN_NAME).chmod(0o644)  # a server may run as another user
            _write_facts(new, chosen)
            flush_file(new / PLAN_NAME)
            sync_folder(new)
            replace_folder(stage, folder)
        stored = find_plan(folder, say=say)
    if stored is None:
        raise PlanError(f"the plan in {folder} did not read back as it was written", fix="check the disk")
    return CachedPlan(path=stored.path, facts=stored.facts, candidates=stored.candidates, built=True)


def entry_name(order: PlanOrder, *, tensorrt: str, device: Device) -> str:
    """The folder of an order's plan: every part that makes another plan makes another name."""
    exact = order.plan.hardware_compatibility == "none"
    parts = {
        "order": order.fingerprint,
        "tensorrt": tensorrt,
        "compute_capability": device.compute_capability,
        # A plan for all GPUs of a kind is the same on each of them.
        "gpu": device.gpu if exact else None,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{order.target}-sm{device.compute_capability.replace('.', '')}-{key[:32]}"


def find_plan(folder: Path, *, say: Say = lambda _: None) -> CachedPlan | None:
    """The plan in an entry of the cache; None where there is none, or, said, where it is damaged."""
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))
        if record["schema"] != CACHE_SCHEMA:
            say(f"the plan in {folder} was chosen by another version of tritonsmith: building it again")
            return None
        facts = facts_from_json(record["facts"])
        candidates = tuple(record["candidates"])
        sha256 = sha256_of(folder / PLAN_NAME)
    except (OSError, ValueError, KeyError, TypeError, RepositoryError) as error:
        say(f"the plan in {folder} is damaged ({error}): building it again")
        return None
    if sha256 != facts.sha256:
        say(f"the plan in {folder} is damaged (its SHA-256 is not the recorded one): building it again")
        return None
    return CachedPlan(path=folder / PLAN_NAME, facts=facts, candidates=candidates, built=False)


def _write_facts(folder: Path, chosen: ChosenPlan) -> None:
    record = {
        "schema": CACHE_SCHEMA,
        "facts": json_from_facts(chosen.facts),
        "candidates": list(chosen.candidates),
    }
    write_text_atomically(folder / FACTS_NAME, json.dumps(record, indent=1) + "\n")
