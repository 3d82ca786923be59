"""Build the weights of model_repository/ from their recipes: `make_models.py [NAME ...] [--repository DIR]`.

The configurations that come out are those that are committed; a test holds them to that.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tritonsmith.build import build_recipe
from tritonsmith.console import Say, print_error, progress
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import existing_parent, locked, staging_folder, write_text_atomically
from tritonsmith.render import print_build

RECIPES = Path(__file__).resolve().parent
ROOT = RECIPES.parents[1]
# Each writes what its recipe names into build/<name>/; the file says that it was done, and when.
PREPARE = {"digits": ("train.py", "samples.npz"), "minilm": ("prepare.py", "tokens.npz")}


def prepare(name: str, say: Say) -> Path:
    """Make the source and the data of a recipe, in a process of its own; its folder.

    The folder is made beside and then renamed: what is there is whole, and a second run waits.
    """
    script_name, last = PREPARE[name]
    script, folder = RECIPES / name / script_name, ROOT / "build" / name
    with locked(existing_parent(folder) / f".{name}.lock", say=say):
        made = folder / last
        if made.exists() and made.stat().st_mtime > script.stat().st_mtime:
            return folder
        say(f"preparing the source of {name}")
        with staging_folder(folder) as staging:
            command = [sys.executable, str(script), str(staging / name)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise TritonsmithError(f"{script} failed", found=done.stderr[-2000:].strip())
            if folder.exists():
                folder.replace(staging / "before")
            (staging / name).replace(folder)
        if done.stdout.strip():
            say(done.stdout.strip())
    return folder


def lay_stages(name: str, repository: Path) -> None:
    """The Python stages that the recipe's ensemble runs, and the files that their weights are."""
    for stage in sorted((ROOT / "model_repository").glob(f"{name}_*/1/model.py")):
        model = stage.parents[1]
        if repository.resolve() != model.parent:
            unused = shutil.ignore_patterns("__pycache__")
            shutil.copytree(model, repository / model.name, dirs_exist_ok=True, ignore=unused)
    if name == "minilm":
        tokenizer = ROOT / "build" / name / "source" / "tokenizer.json"
        target = repository / "minilm_tokenize" / "1" / "tokenizer.json"
        write_text_atomically(target, tokenizer.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the weights of model_repository/.")
    parser.add_argument("names", nargs="*", choices=[[], *PREPARE], help="recipes (default: all)")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        with progress() as say:
            reports = []
            for name in options.names or PREPARE:
                prepare(name, say)
                lay_stages(name, options.repository)
                recipe = RECIPES / name / "recipe.toml"
                reports += build_recipe(recipe, repository=options.repository, say=say)
    except TritonsmithError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for report in reports:
        print_build(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
