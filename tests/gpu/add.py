"""`run.sh add FOLDER`: take over the parts that arrived, and say which are still missing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu.parts import PackError, add_parts

STATE = "GPU_STATE"
DEFAULT_STATE = "/tmp/tritonsmith-gpu"  # noqa: S108 - machines that are lent often keep nothing else


def state_folder() -> Path:
    """Where parts are gathered between calls."""
    return Path(os.environ.get(STATE, DEFAULT_STATE)).absolute()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.sh add", description=__doc__)
    parser.add_argument("folder", type=Path, help="with some parts, and pack.json the first time")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    try:
        missing = add_parts(options.folder, state_folder(), say=print)
    except PackError as error:
        print(f"run.sh add: {error}", file=sys.stderr)
        return 1
    print(f"missing: {' '.join(missing)}" if missing else f"all parts are in {state_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
