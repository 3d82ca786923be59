"""The verb `lint`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tritonsmith.cli_options import add_json


def add_lint(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "lint",
        help="what Triton would refuse or ignore, before a deployment finds out",
        description="Read a whole repository offline and say what Triton would refuse or ignore: here, in a "
        "given container, on a given GPU. Exit code 1 where there is an error; warnings alone are 0.",
    )
    verb.add_argument("repository", type=Path, metavar="DIR", help="Triton model repository")
    verb.add_argument("--for-container", metavar="RELEASE", help="of NVIDIA's image, such as 26.07")
    verb.add_argument("--gpu", metavar="GPU", help="sm90, 9.0, or a product such as h100")
    verb.add_argument("--target", metavar="T", help="what --model-config-name=T serves (default: all)")
    verb.add_argument(
        "--configs-only", action="store_true", help="without the files that building the models makes"
    )
    add_json(verb)
    verb.set_defaults(verb=run_lint)


def run_lint(options: argparse.Namespace) -> int:
    from tritonsmith.console import print_json, print_line, progress
    from tritonsmith.containers import find_container, find_gpu
    from tritonsmith.lint.findings import error_count
    from tritonsmith.lint.run import lint
    from tritonsmith.lint.scan import Deployment

    deployment = Deployment(
        container=find_container(options.for_container) if options.for_container else None,
        gpu=find_gpu(options.gpu) if options.gpu else None,
        target=options.target,
    )
    with progress() as say:
        findings = lint(options.repository, deployment, configs_only=options.configs_only, say=say)
    errors = error_count(findings)
    if options.json:
        print_json(
            {
                "repository": str(options.repository),
                "container": options.for_container,
                "gpu": deployment.gpu,
                "target": options.target,
                "errors": errors,
                "warnings": len(findings) - errors,
                "findings": [finding.json() for finding in findings],
            }
        )
    else:
        for finding in findings:
            print_line(str(finding))
        print_line(f"{errors} errors, {len(findings) - errors} warnings in {options.repository}")
    return 1 if errors else 0
