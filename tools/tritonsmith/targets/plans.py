"""Every plan that a repository's orders ask for, built for this machine: published, or served by a view."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.artifact import sha256_of
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.errors import NotCompiledError, PlanError
from tritonsmith.targets.choose import ChosenPlan, PlanTools, choose_plan, tensorrt_tools
from tritonsmith.targets.found import FoundOrder, check_order, find_orders, target_of
from tritonsmith.targets.order_file import facts_from_json
from tritonsmith.targets.placing import PlanReport, publish_plan, viewed_models
from tritonsmith.targets.plan_cache import plan_from_cache
from tritonsmith.targets.view import check_view, lay_view

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to build, and where it goes: into the repository, or, with `view`, into a view of it."""

    repository: Path
    cache: Path
    target: str | None = None  # None: all
    view: Path | None = None
    force: bool = False  # build again what is cached or published


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What plans are built for here."""

    tensorrt: str
    device: Device

    def built(self, facts: PlanFacts) -> bool:
        """Whether a plan is of exactly this TensorRT and this kind of GPU."""
        here = (self.tensorrt, self.device.gpu, self.device.compute_capability)
        return here == (facts.tensorrt, facts.device.gpu, facts.device.compute_capability)


def build_plans(
    request: PlanRequest, *, tools: PlanTools | None = None, say: Say = lambda _: None
) -> tuple[PlanReport, ...]:
    """Build, or take from the cache, every plan that is asked for, and publish it or lay the view.

    Orders of versions that the target's version policy does not serve are passed over. Where one fails the
    others are still built, and stay in the cache; a view is laid only where nothing failed.

    Raises:
        PlanError: no GPU, no TensorRT, a plan that cannot be built or published: every reason, by target.
        RepositoryError: no repository, a target that no model has, a damaged order, a changed ONNX file.
        UsageError: a view in the repository, or over what is no view.
    """
    tools = tools or tensorrt_tools()
    if request.view is not None:
        check_view(request.repository, request.view)
    orders = find_orders(request.repository, request.target)
    for found in orders:
        check_order(found)
    unavailable = tools.why_unavailable() if orders else None
    machine = None
    if orders and unavailable is None:
        machine = Machine(tensorrt=tools.version(), device=tools.device())
        say(f"building for TensorRT {machine.tensorrt} on {machine.device.gpu}")
    reports: list[PlanReport] = []
    failures: list[tuple[FoundOrder, str]] = []
    for found in orders:
        try:
            if machine is None:
                raise NotCompiledError("no plan can be built on this machine", found=unavailable)
            reports.append(_fill(found, machine, request, tools, say))
        except PlanError as error:
            reason = error.reason
            if request.view is None or not isinstance(error, NotCompiledError) or not found.order.fallback:
                failures.append((found, f"{reason}. {error.fix}" if error.fix else reason))
                continue
            say(f"{found}: {reason}; {found.order.fallback} is served by ONNX Runtime instead")
            path = found.folder / found.order.fallback
            report = PlanReport(found=found, outcome="fallback", path=path, duration_s=0.0, reason=reason)
            reports.append(report)
    if failures:
        raise _failure(failures, len(orders), unavailable, request)
    if request.view is not None:
        models = viewed_models(reports, request.repository, cache=request.cache, gpu=machine is not None)
        lay_view(request.repository, request.view, models, say=say)
    return tuple(reports)


def _fill(
    found: FoundOrder, machine: Machine, request: PlanRequest, tools: PlanTools, say: Say
) -> PlanReport:
    """The plan of one order: published before, cached, or built; without a view it is published."""
    began_s = time.monotonic()
    if not request.force and (report := _published(found, machine, request.repository)) is not None:
        say(f"{found}: its plan is published")
        return report

    def build(out: Path, timing_cache: Path) -> ChosenPlan:
        return choose_plan(found.order, found.folder, out, tools=tools, timing_cache=timing_cache, say=tell)

    def tell(line: str) -> None:
        say(f"{found}: {line}")

    plan = plan_from_cache(
        request.cache,
        found.order,
        tensorrt=machine.tensorrt,
        device=machine.device,
        build=build,
        force=request.force,
        say=tell,
    )
    seconds = time.monotonic() - began_s
    say(f"{found}: {'built' if plan.built else 'from the cache'} in {seconds:.1f} s")
    report = PlanReport(
        found=found,
        outcome="built" if plan.built else "cached",
        path=plan.path,
        duration_s=seconds,
        facts=plan.facts,
        candidates=plan.candidates,
    )
    if request.view is not None:
        return report
    return publish_plan(report, request.repository, force=request.force)


def _published(found: FoundOrder, machine: Machine, repository: Path) -> PlanReport | None:
    """A plan of exactly this machine that lies in the version's folder as it was published."""
    target = target_of(found, repository)
    for record in () if target is None else target.plans:
        facts = facts_from_json(record)
        path = found.folder / facts.file
        if machine.built(facts) and path.is_file() and sha256_of(path) == facts.sha256:
            return PlanReport(found=found, outcome="published", path=path, duration_s=0.0, facts=facts)
    return None


def _failure(
    failures: Sequence[tuple[FoundOrder, str]], count: int, unavailable: str | None, request: PlanRequest
) -> PlanError:
    what = f"{len(failures)} of {count} plans cannot be built on this machine"
    if unavailable is None:
        return PlanError(what, found="\n         ".join(f"{found}: {reason}" for found, reason in failures))
    names = sorted({found.target for found, _ in failures})
    fix = "run this on the GPU machine, in NVIDIA's Triton container (docker/Dockerfile.gpu)"
    if request.view is not None:
        tables = ", ".join(f"[target.{name}]" for name in names)
        fix += f', or set without_plan = "fallback" in {tables} and build again'
    wanted = "; ".join(str(found) for found, _ in failures)
    return PlanError(what, found=unavailable, expected=f"TensorRT and a GPU for {wanted}", fix=fix)
