"""`run.sh run --out FOLDER`: join what was added, run the tests marked `gpu`, then the benchmark.

FOLDER gets tests.xml and gpu.json; the second is what perf/results/ keeps. Tests and plans run on the
CPython 3.10 that was packed; the rows of PyTorch on the machine's own python3.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from gpu.add import state_folder
from gpu.parts import PackError, Say, missing_parts, read_index, unpack_bundle

NAMES = ("code", "python", "models", "tensorrt")
ROOT = Path(__file__).resolve().parents[2]
WHY = "from tritonsmith.engines.tensorrt.versions import why_unavailable; print(why_unavailable() or '')"
VERSION = "from tritonsmith.engines.tensorrt.versions import import_tensorrt as i; print(i().__version__)"


def unpack(state: Path, names: Sequence[str], say: Say) -> Mapping[str, Path]:
    """The folder of each bundle.

    Raises:
        PackError: parts are missing or damaged.
    """
    bundles = {bundle.name: bundle for bundle in read_index(state)}
    if missing := missing_parts(state, (bundle for name, bundle in bundles.items() if name in names)):
        raise PackError(f"parts are missing: {' '.join(missing)}")
    if absent := set(names) - set(bundles):
        raise PackError(f"the pack has no bundle {', '.join(sorted(absent))}: pack it, and add its parts")
    return {name: unpack_bundle(bundles[name], state, say) for name in names}


def environment_of(folders: Mapping[str, Path], code: Path) -> dict[str, str]:
    """What CPython 3.10 and TensorRT need; the machine's own stays readable as OUTER_*."""
    python, tensorrt = folders["python"], folders["tensorrt"]
    outer = {f"OUTER_{name}": os.environ.get(name, "") for name in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    # run.sh set PYTHONPATH for this script alone.
    outer["OUTER_PYTHONPATH"] = os.environ.get("RUN_SH_PYTHONPATH", "")
    libraries = (
        python / "lib",
        tensorrt / "tensorrt",
        tensorrt / "stand-ins",
        outer["OUTER_LD_LIBRARY_PATH"],
    )
    packages = (code / "tools", python / "site", tensorrt)
    return {
        **os.environ,
        **outer,
        "PYTHONHOME": str(python),
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries if str(path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITONSMITH_GPU_MODELS": str(folders["models"]),
        "TRITONSMITH_GPU_TIMING": str(state_folder() / "plans" / "timing"),
    }


def run_tests(python: Path, environment: Mapping[str, str], code: Path, out: Path) -> tuple[int, str]:
    """pytest's exit status, and its counts in words."""
    results = out / "tests.xml"
    command = [str(python), "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-ra"]
    ended = subprocess.run([*command, f"--junitxml={results}"], cwd=code, env=dict(environment))
    if not results.is_file():
        return ended.returncode, "pytest did not run"
    suite = ElementTree.parse(results).getroot().find("testsuite")  # noqa: S314 - pytest wrote it just now
    counts = {} if suite is None else suite.attrib
    words = ", ".join(
        f"{counts.get(name, '0')} {name}" for name in ("tests", "failures", "errors", "skipped")
    )
    return ended.returncode, words


def run_benchmark(
    python: Path, environment: Mapping[str, str], code: Path, options: argparse.Namespace
) -> int:
    """The benchmark's exit status; gpu.json is written as it goes."""
    command = [
        *(str(python), str(code / "perf" / "gpu" / "compare.py")),
        *("--models", environment["TRITONSMITH_GPU_MODELS"], "--plans", str(state_folder() / "plans")),
        *("--out", str(options.out / "gpu.json"), "--minutes", str(options.minutes)),
        *("--torch-python", options.torch_python),
    ]
    return subprocess.run(command, env=dict(environment)).returncode


def run(options: argparse.Namespace, say: Say) -> int:
    """0 where everything passed and was measured.

    Raises:
        PackError: parts are missing or damaged.
    """
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in NAMES if not (name == "code" and options.here)]
    folders = unpack(state_folder(), names, say)
    code = ROOT if options.here else folders["code"]
    environment = environment_of(folders, code)
    python = folders["python"] / "bin" / "python3.10"
    ask = partial(subprocess.run, env=environment, capture_output=True, text=True)
    asked = ask([str(python), "-c", VERSION])
    if asked.returncode:
        raise PackError(f"TensorRT cannot be imported: {asked.stderr.strip()[-500:]}")
    say(f"TensorRT {asked.stdout.strip()} is imported by {python}")
    reason = ask([str(python), "-c", WHY]).stdout.strip()
    if reason:
        say(f"no GPU: {reason}")
    failed = []
    if not options.only or options.only == "tests":
        status, words = run_tests(python, environment, code, options.out)
        say(f"tests: {words}")
        if status:
            failed.append("tests")
    wanted = not options.only or options.only == "benchmark"
    if wanted and run_benchmark(python, environment, code, options) and not (reason and options.allow_no_gpu):
        failed.append("benchmark")
    if reason and not options.allow_no_gpu:
        failed.append("no GPU")
    say(f"failed: {', '.join(dict.fromkeys(failed))}" if failed else f"done: {options.out}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.sh run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tests.xml and gpu.json")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the benchmark (default 9)")
    parser.add_argument("--only", choices=("tests", "benchmark"), help="one of the two")
    parser.add_argument("--torch-python", default="python3", help="a Python with PyTorch for CUDA")
    parser.add_argument("--here", action="store_true", help="this checkout's code, not the packed one's")
    parser.add_argument("--allow-no-gpu", action="store_true", help="succeed where the tests were skipped")
    options = parser.parse_args(arguments)
    try:
        return run(options, partial(print, file=sys.stderr, flush=True))
    except PackError as error:
        print(f"run.sh run: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
