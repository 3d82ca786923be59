"""`run.sh pack FOLDER`: everything that a GPU machine needs, in parts of at most 60 MiB."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from gpu.parts import MIB, PRESET, PackError, Say, pack_bundle, read_index, write_index
from gpu.payload import lay_out_code, lay_out_python, lay_out_tensorrt
from tritonsmith.errors import TritonsmithError

NAMES = ("code", "python", "models", "tensorrt")  # what changes often comes first
PRESETS = {"models": 0}  # weights are noise: preset 6 takes four times as long for 1 % less


def pack(out: Path, names: Sequence[str], *, threads: int, say: Say) -> None:
    """Lay out and pack each bundle of `names`; the others stay as `out` has them.

    Raises:
        PackError: something that is packed cannot be fetched or made here.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(".stage-*"):
        shutil.rmtree(stale)
    wheels = out / ".wheels"
    wheels.mkdir(exist_ok=True)
    makers: Mapping[str, Callable[[Path], None]] = {
        "code": lay_out_code,
        "python": partial(lay_out_python, wheels=wheels, say=say),
        "models": partial(_lay_out_models, say=say),
        "tensorrt": partial(lay_out_tensorrt, wheels=wheels, say=say),
    }
    bundles = {bundle.name: bundle for bundle in read_index(out)} if (out / "pack.json").is_file() else {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix=".stage-", dir=out) as folder:
            stage = Path(folder) / name
            stage.mkdir()
            makers[name](stage)
            bundles[name] = pack_bundle(
                name,
                stage,
                out,
                before=bundles.get(name),
                threads=threads,
                preset=PRESETS.get(name, PRESET),
                say=say,
            )
        write_index(out, (bundles[known] for known in NAMES if known in bundles))
    total = sum(bundle.size_bytes for bundle in bundles.values())
    count = sum(len(bundle.parts) for bundle in bundles.values())
    say(f"{count} parts, {total / MIB:.0f} MiB, and pack.json in {out}")


def _lay_out_models(folder: Path, *, say: Say) -> None:
    from gpu.models import lay_out_models  # needs the project's own environment; the other bundles do not

    lay_out_models(folder, say)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.sh pack", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="BUNDLE", help=", ".join(NAMES)
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    try:
        pack(
            options.folder,
            options.only,
            threads=options.threads,
            say=partial(print, file=sys.stderr, flush=True),
        )
    except (PackError, TritonsmithError) as error:
        print(f"run.sh pack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
