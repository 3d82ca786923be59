"""What a build of an image needs beside docker/'s static files: this package, and what stages declare."""

from __future__ import annotations

import argparse
import gzip
import io
import sys
import tarfile
from pathlib import Path

from tritonsmith.errors import TritonsmithError
from tritonsmith.server.environment import stage_requirements

PACKAGE = Path(__file__).parent.parent
PINS = Path(__file__).with_name("constraints.txt")  # what was tested together
_HEAD = "# Packages of the Python stages, from <model>/requirements.txt. Change those, not this file.\n"


def context_files(repository: Path) -> dict[str, bytes]:
    """File name -> content, to be laid beside the Dockerfiles.

    `tritonsmith.tar.gz` is this package as it is installed or checked out: an image is built from the same
    code that rendered it, with no index that would have to hold it. Equal sources give equal bytes.
    `constraints.txt` pins what stages.txt names. Raises ProvisionError for a requirements.txt that cannot be
    read.
    """
    requirements = "".join(f"{line}\n" for line in stage_requirements(repository))
    return {
        "tritonsmith.tar.gz": archive_package(),
        "stages.txt": (_HEAD + requirements).encode(),
        "constraints.txt": PINS.read_bytes(),
    }


def archive_package() -> bytes:
    """The package's files below `tritonsmith/`, without docker/ (the context itself) and without caches."""
    stream = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(PACKAGE.rglob("*")):
            place = path.relative_to(PACKAGE)
            if not path.is_file() or "__pycache__" in place.parts:
                continue
            if place.parts[:2] == ("deploy", "docker"):
                continue
            member = tarfile.TarInfo(f"tritonsmith/{place.as_posix()}")
            content = path.read_bytes()
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Lay tritonsmith.tar.gz, stages.txt and constraints.txt into a folder with the Dockerfiles."""
    parser = argparse.ArgumentParser(prog="python3 -m tritonsmith.deploy.context", description=main.__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    try:
        for name, content in context_files(given.repository).items():
            (given.folder / name).write_bytes(content)
    except TritonsmithError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
