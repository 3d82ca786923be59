"""The verb `deploy`: a repository measured, and rendered for Compose or for Kubernetes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonsmith.cli_options import add_json
from tritonsmith.errors import UsageError

if TYPE_CHECKING:
    from tritonsmith.deploy.kubernetes import KubernetesOptions
    from tritonsmith.deploy.measurements import Measurements

Parsers = argparse._SubParsersAction  # what argparse gives for subcommands; it has no public name

# --option of `deploy kubernetes` -> its field, what it takes, what it is.
_KUBERNETES: Mapping[str, tuple[str, str, str]] = {
    "--name": ("name", "NAME", "of the Deployment and the Services (default: triton)"),
    "--namespace": ("namespace", "NAME", "default: triton"),
    "--cpu-image": ("cpu_image", "IMAGE", "NAME[:TAG][@sha256:DIGEST] of docker/Dockerfile.cpu"),
    "--gpu-image": ("gpu_image", "IMAGE", "NAME[:TAG][@sha256:DIGEST] of docker/Dockerfile.gpu"),
    "--target": ("target", "NAME", "what the overlay gpu serves (default: the only target with plans)"),
    "--storage": ("storage", "WHERE", "the repository: pvc:CLAIM[/PATH] or s3://BUCKET/PREFIX"),
    "--endpoint": ("object_store_endpoint", "URL", "of an object store that is not AWS"),
    "--object-store-secret": (
        "object_store_secret",
        "NAME",
        "Secret with the key `credentials`; '': the pods' own identity",
    ),
    "--fetch-image": ("fetch_image", "IMAGE", "rclone, which copies the repository from the object store"),
    "--gpu-product": ("gpu_product", "NAME", "of nodes: nvidia.com/gpu.product, NVIDIA-L4 for one"),
    "--plan-cache": (
        "plan_cache",
        "WHERE",
        "built plans: pod (each on its own disk, the default) or claim (a ReadWriteMany volume)",
    ),
    "--plan-cache-size": ("plan_cache_size", "SIZE", "of the volume of built plans (default: 10Gi)"),
    "--storage-class": ("storage_class", "NAME", "of that claim (default: the cluster's)"),
    "--monitoring-namespace": ("monitoring_namespace", "NAME", "where Prometheus is (default: monitoring)"),
    "--prometheus": ("prometheus_url", "URL", "what the scalers ask"),
}


def add_deploy(verbs: Parsers[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "deploy",
        help="measure a repository, and render it for containers or a cluster",
        description="Measure what a repository needs on the embedded Triton of this machine, and render "
        "files for Compose or Kubernetes whose limits, probes and time-outs come from that.",
    )
    kinds = verb.add_subparsers(metavar="WHAT", required=True)
    _add_measure(kinds)
    _add_compose(kinds)
    _add_kubernetes(kinds)


def _add_measure(kinds: Parsers[argparse.ArgumentParser]) -> None:
    verb = kinds.add_parser(
        "measure", help="start, stop, memory, shared memory and processor of a repository"
    )
    _add_repository(verb)
    verb.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="file to write")
    verb.add_argument("--target", metavar="NAME", help="measure configs/NAME.pbtxt (default: config.pbtxt)")
    _add_measuring(verb)
    verb.add_argument("--force", action="store_true", help="replace an existing file")
    add_json(verb)
    verb.set_defaults(verb=run_measure)


def _add_compose(kinds: Parsers[argparse.ArgumentParser]) -> None:
    verb = kinds.add_parser("compose", help="Triton, Prometheus, Grafana and a balancer for Docker Compose")
    _add_repository(verb)
    _add_rendering(verb)
    verb.add_argument("--replicas", type=int, metavar="N", help="behind the balancer (default: 2)")
    verb.add_argument("--release", metavar="YY.MM", help="of NVIDIA's images (default: 26.07)")
    verb.add_argument(
        "--target",
        dest="gpu_target",
        metavar="NAME",
        help="what GPUs serve: configs/NAME.pbtxt (default: the only target with plans)",
    )
    verb.set_defaults(verb=run_compose)


def _add_kubernetes(kinds: Parsers[argparse.ArgumentParser]) -> None:
    verb = kinds.add_parser("kubernetes", help="a Kustomize base, and overlays for CPUs, GPUs and KServe")
    _add_repository(verb)
    _add_rendering(verb)
    for flag, (field, metavar, text) in _KUBERNETES.items():
        verb.add_argument(flag, dest=field, metavar=metavar, help=text)
    verb.add_argument("--min-replicas", type=int, metavar="N", help="default: 2")
    verb.add_argument("--max-replicas", type=int, metavar="N", help="default: 4")
    verb.set_defaults(verb=run_kubernetes)


def _add_repository(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("repository", type=Path, metavar="DIR", help="Triton model repository")


def _add_rendering(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    verb.add_argument(
        "--measurements", type=Path, metavar="FILE", help="of `deploy measure` (default: measure now)"
    )
    _add_measuring(verb)
    verb.add_argument("--force", action="store_true", help="replace a folder that was rendered before")
    add_json(verb)


def _add_measuring(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="NAME=X.npz",
        help="the largest inputs of a model, as often as there are models (default: ones)",
    )
    verb.add_argument("--axis-length", type=int, metavar="N", help="of free axes, where there are no samples")
    verb.add_argument("--runs", type=int, metavar="N", help="starts of the server (default: 3)")


def run_measure(options: argparse.Namespace) -> int:
    from tritonsmith.console import print_json
    from tritonsmith.deploy.measurements_file import json_from_measurements, write_measurements
    from tritonsmith.deploy.targets import check_target
    from tritonsmith.files import refuse_overwrite
    from tritonsmith.render import print_measurements

    refuse_overwrite(options.out, force=options.force)
    check_target(options.repository, options.target)
    measurements = _measure(options, options.target)
    write_measurements(options.out, measurements)
    if options.json:
        print_json(json_from_measurements(measurements))
    else:
        print_measurements(measurements)
        print(f"\nwritten: {options.out}")
    return 0


def run_compose(options: argparse.Namespace) -> int:
    from tritonsmith.deploy.compose import ComposeOptions, render_compose
    from tritonsmith.deploy.folder import check_folder
    from tritonsmith.deploy.targets import gpu_target

    check_folder(options.out, force=options.force)
    chosen = ComposeOptions(**_given(options, ("replicas", "release", "gpu_target")))
    gpu_target(options.repository, chosen.gpu_target)
    measurements = _measurements(options)
    files = render_compose(options.repository, measurements, chosen)
    following = (
        f"cd {options.out} && ./make_secrets.sh",
        "one of: docker compose -f compose.cpu.yaml up --build, or docker compose up --build (GPUs)",
        "README.md there has addresses, settings, and how to stop a replica",
    )
    return _write(options, files, measurements, following)


def run_kubernetes(options: argparse.Namespace) -> int:
    from tritonsmith.deploy.folder import check_folder
    from tritonsmith.deploy.kubernetes import render_kubernetes
    from tritonsmith.deploy.kubernetes.render import check_built
    from tritonsmith.deploy.targets import gpu_target

    check_folder(options.out, force=options.force)
    chosen = _kubernetes_options(options)
    gpu_target(options.repository, chosen.target)
    if chosen.claim is None:
        check_built(options.repository)
    measurements = _measurements(options)
    files = render_kubernetes(options.repository, measurements, chosen)
    following = (
        f"read {options.out / 'README.md'}: what must be in the cluster first",
        f"one of: kubectl apply -k {options.out / 'overlays/cpu'}, or .../gpu, or .../kserve",
    )
    return _write(options, files, measurements, following)


def _kubernetes_options(options: argparse.Namespace) -> KubernetesOptions:
    from tritonsmith.deploy.kubernetes import KubernetesOptions

    fields = (*(field for field, _, _ in _KUBERNETES.values()), "min_replicas", "max_replicas")
    return KubernetesOptions(**_given(options, fields))


def _given(options: argparse.Namespace, fields: Sequence[str]) -> dict[str, Any]:
    """What the command line gave, by field; the record has its own defaults for the rest."""
    return {name: getattr(options, name) for name in fields if getattr(options, name) is not None}


def _measurements(options: argparse.Namespace) -> Measurements:
    """Those of the file, held against the repository, or new ones."""
    from tritonsmith.deploy.measurements_file import check_measurements, model_folders, read_measurements

    model_folders(options.repository)
    if options.measurements is None:
        return _measure(options, None)
    measuring = {"samples": options.samples, "axis-length": options.axis_length, "runs": options.runs}
    if beside := [f"--{name}" for name, value in measuring.items() if value]:
        raise UsageError(f"{' '.join(beside)} beside --measurements", expected="measure, or take the file")
    measurements = read_measurements(options.measurements)
    check_measurements(measurements, options.repository)
    return measurements


def _measure(options: argparse.Namespace, target: str | None) -> Measurements:
    from tritonsmith.console import progress
    from tritonsmith.deploy.measure import RUNS, measure_repository

    with progress() as say:
        return measure_repository(
            options.repository,
            target=target,
            samples=_samples(options.samples),
            axis_length=options.axis_length,
            runs=RUNS if options.runs is None else options.runs,
            say=say,
        )


def _samples(texts: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UsageError(f"--samples {text}", expected="NAME=X.npz")
        if name in found:
            raise UsageError(f"--samples gives {name!r} twice")
        found[name] = Path(path)
    return found


def _write(
    options: argparse.Namespace,
    files: Mapping[str, str | bytes],
    measurements: Measurements,
    following: Sequence[str],
) -> int:
    from tritonsmith.console import print_json, print_line
    from tritonsmith.deploy.folder import write_folder
    from tritonsmith.deploy.measurements_file import text_from_measurements

    whole = {"measurements.json": text_from_measurements(measurements), **files}
    write_folder(options.out, whole, force=options.force)
    names = sorted(whole)
    if options.json:
        print_json({"folder": str(options.out), "files": names, "next": list(following)})
        return 0
    print_line(f"{options.out}:")
    for name in names:
        print_line(f"  {name}")
    print_line("next:")
    for step in following:
        print_line(f"  {step}")
    return 0
