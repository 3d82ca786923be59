"""What the CPU image holds beside Debian, laid at build time by the code that makes the embedded server.

<root>/environments/... wheels/...   server/environment.py's own cache, without what only a build needs
<root>/backends/                     python (Triton's), onnxruntime, openvino, and what the last two share
<root>/{environment,python-library,libraries,caches,tritonserver}   links with names that do not change
<root>/flags                         tritonserver's flags, one a line

Runs on a bare Python: TRITONSMITH_CACHE=<root> python3 -m tritonsmith.deploy.image STAGES CONSTRAINTS
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tritonsmith.deploy.flags import server_flags
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import write_text_atomically
from tritonsmith.server.environment import BASE_PINS, ServerEnvironment, cache_folder, ensure_environment
from tritonsmith.server.launch import BACKENDS
from tritonsmith.server.proof import prove_inference

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def lay_image(
    requirements: Iterable[str], constraints: Path | None, *, say: Callable[[str], None]
) -> ServerEnvironment:
    """Fill `cache_folder()` as this module's head says, prove one inference there, and return what it is.

    `requirements` are the packages of Python stages, `constraints` pins for them (pip's format). Raises
    ProvisionError where a package cannot be had, ServerError where the result does not compute.
    """
    root = cache_folder()
    wanted = tuple(requirements)
    if wanted and constraints is not None:
        pins = root / "constraints.txt"
        write_text_atomically(pins, _pins_beside_the_base(constraints.read_text(encoding="utf-8")))
        wanted = (f"-c {pins}", *wanted)
    environment = ensure_environment(wanted, say=say)
    say("proving one inference")
    prove_inference(environment)
    _remove_build_only(root, environment)
    backends = root / "backends"
    shutil.copytree(BACKENDS, backends, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(environment.backends / "python", backends / "python")
    (backends / "python" / "triton_python_backend_stub").chmod(0o755)
    compileall.compile_dir(str(backends), quiet=1)
    for name, target in (
        ("environment", environment.folder),
        ("python-library", environment.python_library_folder),
        ("libraries", environment.library_folder),
        ("caches", environment.caches),
        ("tritonserver", environment.tritonserver),
    ):
        (root / name).symlink_to(os.path.relpath(target, root))
    places = (f"--backend-directory={backends}", f"--cache-directory={root / 'caches'}")
    lines = "".join(f"{flag}\n" for flag in (*places, *server_flags()))
    write_text_atomically(root / "flags", lines)
    return environment


def _pins_beside_the_base(constraints: str) -> str:
    """`constraints` without the packages that the server's own pins fix at other versions."""
    base = {_package_of(line) for line in BASE_PINS.read_text(encoding="utf-8").splitlines()}
    return "".join(f"{line}\n" for line in constraints.splitlines() if _package_of(line) not in base - {None})


def _package_of(line: str) -> str | None:
    match = _NAME.match(line)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else None


def _remove_build_only(root: Path, environment: ServerEnvironment) -> None:
    """pip, the stubs of other Pythons and a libpython for one, caches and locks: serving needs none."""
    triton = environment.tritonserver.parent.parent
    shutil.rmtree(triton / "python_backend_stubs")
    for library in environment.library_folder.glob("libpython3*"):
        library.unlink()
    for name in ("runs", "downloads", "pip"):
        shutil.rmtree(root / name, ignore_errors=True)
    for lock in (root / "environments").glob("*.lock"):
        lock.unlink()
    for packages in (root / "environments").glob("*/lib/python3*/site-packages"):
        for pattern in ("pip", "pip-*", "setuptools", "setuptools-*", "pkg_resources", "_distutils_hack"):
            for folder in packages.glob(pattern):
                shutil.rmtree(folder)
        (packages / "distutils-precedence.pth").unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Lay out the CPU image in $TRITONSMITH_CACHE."""
    parser = argparse.ArgumentParser(prog="python3 -m tritonsmith.deploy.image", description=main.__doc__)
    parser.add_argument("stages", type=Path, help="packages of the Python stages, one requirement a line")
    parser.add_argument("constraints", type=Path, help="pins for them")
    given = parser.parse_args(arguments)
    stages = [line.strip() for line in given.stages.read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in stages if line and not line.startswith("#")]
    try:
        lay_image(wanted, given.constraints, say=lambda line: print(line, file=sys.stderr, flush=True))
    except TritonsmithError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
