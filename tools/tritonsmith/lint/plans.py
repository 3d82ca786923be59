"""TensorRT plans: there, or ordered; and of the TensorRT version and the GPU that are to run them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Manifest
from tritonsmith.engines.tensorrt.facts import PlanFacts
from tritonsmith.engines.tensorrt.fit import fits
from tritonsmith.errors import PlanError, RepositoryError, SourceError
from tritonsmith.files import path_inside
from tritonsmith.lint.findings import Finding, error_at, finding_from_error, leads_out
from tritonsmith.lint.onnx_files import has_unsigned_activations
from tritonsmith.lint.scan import DEFAULT_FILES, Deployment, Model, Variant
from tritonsmith.repository.names import served_versions
from tritonsmith.targets.order import PlanOrder
from tritonsmith.targets.order_file import facts_from_json, order_name, read_order

CAPABILITY = re.compile(r"\d{1,2}\.\d")


def check_plans(
    model: Model, variant: Variant, manifests: Mapping[int, Manifest], deployment: Deployment
) -> Iterator[Finding]:
    """What is wrong with the plans of a configuration; nothing where it serves none."""
    if variant.backend != "tensorrt":
        return
    yield from _check_capabilities(model, variant)
    for version in served_versions(variant.config, model.versions):
        folder = model.folder / str(version)
        order, findings = _read_order(model, variant, folder)
        yield from findings
        facts, findings = _read_facts(model, version, manifests.get(version))
        yield from findings
        wanted = _wanted(variant, deployment.gpu)
        for gpu, name in wanted.items():
            place = f"{version}/{name}"
            path = path_inside(folder, name)
            if path is None:
                yield leads_out(model.name, variant.place, name)
            elif not path.is_file():
                yield _absent(model, variant, place, order, gpu)
            elif name not in facts:
                yield Finding(
                    severity="warning",
                    model=model.name,
                    place=place,
                    what="nothing says which TensorRT version and GPU the plan was built for",
                    fix="build it with tritonsmith, which records both in manifest.json",
                )
            else:
                yield from _check_fit(model, place, facts[name], order, gpu, deployment)


def _check_capabilities(model: Model, variant: Variant) -> Iterator[Finding]:
    for key in variant.config.cc_model_filenames:
        if not CAPABILITY.fullmatch(key):
            yield error_at(
                model.name,
                variant.place,
                "a key of cc_model_filenames is no compute capability, and no GPU would match it",
                found=key,
                expected="as Triton writes it: 9.0",
            )


def _wanted(variant: Variant, gpu: str | None) -> dict[str, str]:
    """Compute capability ("" where any) -> the plan that Triton opens there."""
    by_gpu = dict(variant.config.cc_model_filenames)
    default = variant.config.default_model_filename or DEFAULT_FILES["tensorrt"]
    if gpu is not None:
        return {gpu: by_gpu.get(gpu, default)}
    return {key: name for key, name in by_gpu.items() if CAPABILITY.fullmatch(key)} or {"": default}


def _read_order(model: Model, variant: Variant, folder: Path) -> tuple[PlanOrder | None, tuple[Finding, ...]]:
    path = folder / order_name(variant.target or "")
    if variant.target is None or not path.is_file():
        return None, ()
    place = path.relative_to(model.folder).as_posix()
    try:
        order = read_order(path)
    except RepositoryError as error:
        return None, (finding_from_error(error, model=model.name, place=place),)
    return order, tuple(_check_candidates(model, folder, order))


def _check_candidates(model: Model, folder: Path, order: PlanOrder) -> Iterator[Finding]:
    for candidate in order.candidates:
        place = f"{folder.name}/{candidate.file}"
        path = path_inside(folder, candidate.file)
        if path is None:
            order_place = f"{folder.name}/{order_name(order.target)}"
            yield leads_out(model.name, order_place, candidate.file)
            continue
        if not path.is_file():
            yield error_at(
                model.name,
                place,
                f"the ONNX file that {order_name(order.target)} wants compiled is missing",
                fix="build the model again",
            )
            continue
        try:
            graph = onnx_model.load_model(path, with_weights=False)
            digest = onnx_model.model_sha256(path)
        except SourceError as error:
            yield finding_from_error(error, model=model.name, place=place)
            continue
        if digest != candidate.sha256:
            yield error_at(
                model.name,
                place,
                "the ONNX file is another one than was ordered",
                fix="build the model again",
            )
        if has_unsigned_activations(graph):
            yield error_at(
                model.name,
                place,
                "activations are quantized to uint8, which TensorRT refuses",
                expected="symmetric int8 activations",
                fix="quantize with dialect=tensorrt",
            )


def _read_facts(
    model: Model, version: int, manifest: Manifest | None
) -> tuple[dict[str, PlanFacts], tuple[Finding, ...]]:
    facts: dict[str, PlanFacts] = {}
    findings = []
    for target in manifest.targets if manifest else ():
        for record in target.plans:
            try:
                plan = facts_from_json(record)
            except RepositoryError as error:
                findings.append(finding_from_error(error, model=model.name, place=f"{version}/manifest.json"))
            else:
                facts[plan.file] = plan
    return facts, tuple(findings)


def _absent(model: Model, variant: Variant, place: str, order: PlanOrder | None, gpu: str) -> Finding:
    machine = f"compute capability {gpu}" if gpu else "any GPU"
    if order is not None:
        fallback = f"; without a GPU {order.fallback} is served" if order.fallback else ""
        return Finding(
            severity="warning",
            model=model.name,
            place=place,
            what=f"there is no plan for {machine} yet: the first start builds it, before it is ready",
            expected=f"a GPU, and a cache that can be written (/var/cache/tritonsmith){fallback}",
            fix="build it on such a machine with `tritonsmith plans`",
        )
    return error_at(
        model.name,
        place,
        f"there is no plan for {machine}, and no order to build one",
        found=f"cc_model_filenames for {', '.join(sorted(variant.config.cc_model_filenames)) or 'none'}",
        fix="build the model on such a machine, or with --defer",
    )


def _check_fit(
    model: Model, place: str, facts: PlanFacts, order: PlanOrder | None, gpu: str, deployment: Deployment
) -> Iterator[Finding]:
    container = deployment.container
    if container is not None and container.tensorrt is None:
        yield Finding(
            severity="warning",
            model=model.name,
            place=place,
            what=f"the TensorRT of container {container.release} is not known here: the plan may not load",
            found=f"built by TensorRT {facts.tensorrt}",
            fix=f"ask the image: `dpkg -l libnvinfer*` in tritonserver:{container.release}-py3",
        )
    tensorrt = container.tensorrt if container is not None and container.tensorrt else facts.tensorrt
    try:
        reason = fits(facts, tensorrt=tensorrt, gpu=gpu or facts.device.compute_capability)
    except PlanError as error:
        yield finding_from_error(error, model=model.name, place=place)
        return
    if reason is not None:
        again = "the order lets the GPU machine build it again at the first start"
        yield Finding(
            severity="warning" if order is not None else "error",
            model=model.name,
            place=place,
            what="the plan does not run there",
            found=reason,
            fix=again if order is not None else "build it for this container and GPU",
        )
