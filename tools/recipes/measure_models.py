"""Measure model_repository/ and render docker/ from that: `make measure`, on a quiet machine.

With `--render-only`, docker/ is rendered again from the measurements that it has. The largest requests are a
choice: images of 256 by 256 pixels of noise, which no PNG makes smaller, and texts that fill the 256 tokens
that MiniLM reads.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tritonsmith.console import print_error, progress
from tritonsmith.deploy.measure import measure_repository
from tritonsmith.deploy.measurements_file import read_measurements, write_measurements
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import write_text_atomically
from tritonsmith.render import print_measurements

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "docker" / "measurements.json"
IMAGE_SIDE = 256
TOKENS = 256  # what minilm_tokenize cuts at
TEXT = "measured " * TOKENS


def write_samples(folder: Path) -> dict[str, Path]:
    """An .npz for each model that cannot be asked without; by model name."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    image = np.array(
        [[png.getvalue()]]
    )  # S ends at the last byte that is not 0; a PNG ends in its IEND's CRC
    text = np.array([[TEXT]])
    files = {}
    for name, arrays in {"image": {"image": image}, "text": {"text": text}}.items():
        files[name] = folder / f"{name}.npz"
        np.savez(files[name], **arrays)
    return {
        "digits_decode": files["image"],
        "digits_image": files["image"],
        "minilm_text": files["text"],
        "minilm_tokenize": files["text"],
    }


def render_docker() -> None:
    """Write what docker/ has of its compose folder that follows from measurements."""
    from tritonsmith.deploy.compose import ComposeOptions, render_settings

    measurements = read_measurements(MEASUREMENTS)
    options = ComposeOptions(repository="../model_repository")
    for name, text in render_settings(ROOT / "model_repository", measurements, options).items():
        write_text_atomically(MEASUREMENTS.with_name(name), text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render-only", action="store_true", help="from docker/measurements.json as it is")
    options = parser.parse_args(arguments)
    try:
        if not options.render_only:
            with progress() as say, tempfile.TemporaryDirectory() as folder:
                measurements = measure_repository(
                    ROOT / "model_repository",
                    samples=write_samples(Path(folder)),
                    axis_length=TOKENS,
                    say=say,
                )
            write_measurements(MEASUREMENTS, measurements)
            print_measurements(measurements)
        render_docker()
    except TritonsmithError as error:
        print_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
