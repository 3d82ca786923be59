"""Reading a `.pt2` file of torch.export without running anything that it carries.

`torch.export.load` warns that it must never see an untrusted file. What it would run, found in torch
2.13 and closed here unless code is allowed:

- `data/weights` and `data/constants` entries that say `use_pickle` (tensor subclasses), `custom_obj_*`
  and `opaque_obj_*` constants: unpickled freely. Refused. Plain tensors are raw bytes.
- `data/sample_inputs/*.pt`, and whole weight files of older versions: unpickled with `weights_only`,
  and on failure again without it. `TORCH_FORCE_WEIGHTS_ONLY_LOAD` takes the second try away.
- `models/*.json`: the expressions of symbolic sizes go through `sympy.sympify`, which evaluates them
  as Python. They must be calls of known sympy functions on numbers and plain symbols.
- The same file's pytree specifications may name an enumeration, whose module is imported. Refused.
- Targets of graph nodes are looked up by attribute, starting at torch. They must be operators.
- `guards_code` in it is compiled and run by `ExportedProgram.module()`, and so by `torch.onnx.export`.
  Guards must be comparisons of sizes.
- `data/aotinductor` holds native code, loaded as a shared library. Refused.

The checks read records through torch's own archive reader, so that both see the same bytes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonsmith.errors import SourceError
from tritonsmith.ingest.torch_export import quiet, reason_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SAVE_AGAIN = "torch.export.save(torch.export.export(module, example_inputs), 'model.pt2')"
FACTORY = "name a factory instead: package.module:function that returns (module, example inputs)"
TARGET = re.compile(
    r"(_operator|math)\.\w+|torch\._?sym_\w+|torch\.ops\.(?!higher_order)\w+\.\w+\.\w+|torch\.ops\.higher_order"
    r"\.(associative_scan|cond|map_impl|scan|while_loop|wrap_with_autocast|wrap_with_set_grad_enabled)"
)
# What sympy prints of the sizes that torch computes, and torch's own functions of sizes.
FUNCTION = re.compile(
    "Abs|Add|And|Eq|Equality|Float|Ge|GreaterThan|Gt|Half|Integer|Le|LessThan|Lt|Max|Min|Mod|Mul|Ne"
    "|NegativeOne|Not|One|Or|Piecewise|Pow|Rational|StrictGreaterThan|StrictLessThan|Symbol|Tuple"
    "|Unequality|Zero|ceiling|floor"
    "|CeilDiv|CeilToInt|CleanDiv|FloatPow|FloatTrueDiv|FloorDiv|FloorToInt|Identity|IntTrueDiv"
    "|IsNonOverlappingAndDenseIndicator|LShift|ModularIndexing|PowByNatural|PythonMod|RShift"
    "|RoundDecimal|RoundToInt|ToFloat|TruncToFloat|TruncToInt|Where"
)
EXPRESSION_NODES = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.Tuple,
)
GUARD_NODES = (*EXPRESSION_NODES, ast.BoolOp, ast.boolop, ast.Subscript, ast.Attribute)
GUARD_CALL = re.compile(r"(size|stride|storage_offset|dim)|(math\.)?(floor|ceil|trunc|sqrt)|max|min|Max|Min")
WORDS = re.compile(r"[\w .-]*")


def load_program(path: Path, *, allow_code: bool) -> ExportedProgram:
    """The program that `torch.export.save` wrote to `path`.

    Raises:
        SourceError: the file is missing, broken, another kind of PyTorch file, or carries something
            that would run, and `allow_code` is not given.
    """
    import torch

    _check_kind(path)
    if not allow_code:
        _refuse_code(path)
    try:
        with quiet(), _weights_only(force=not allow_code):
            return torch.export.load(path)
    except Exception as error:
        raise SourceError(
            f"{path} cannot be loaded by torch.export",
            found=f"{reason_of(error)} (torch {torch.__version__})",
            expected=f"a file written by a torch no newer than this: {SAVE_AGAIN}",
            fix=None
            if allow_code
            else "if its example inputs are of classes of your own, trust the file with --allow-code",
        ) from error


def _check_kind(path: Path) -> None:
    """Tell a `.pt2` archive from everything else that PyTorch writes."""
    if not path.is_file():
        raise SourceError(f"{path} is no file", expected="a .pt2 file of torch.export")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty", expected="a .pt2 file of torch.export")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            start = stream.read(2)
        found = (
            "a pickle" if start[:1] == b"\x80" else "a truncated archive" if start == b"PK" else "no archive"
        )
        raise SourceError(f"{path} is no .pt2 file", found=found, expected=SAVE_AGAIN, fix=FACTORY)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
            # Example inputs are an archive of their own: in a truncated file, theirs is the last directory.
            truncated = all(entry.header_offset for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceError(f"{path} cannot be read", found=error, expected="a .pt2 file") from error
    if truncated:
        raise SourceError(f"{path} is truncated", expected="a whole .pt2 file", fix="copy or save it again")
    names = {name.partition("/")[2] for name in entries}
    if "serialized_exported_program.json" in entries or "version" in entries:
        kind = "the format of torch 2.7 and older"
    elif "constants.pkl" in names:
        kind = "a TorchScript archive, which torch.export cannot read"
    elif "data.pkl" in names:
        kind = "a pickle of torch.save: weights, or a module without the example inputs that a trace needs"
    elif any(name.startswith("data/aotinductor/") for name in names):
        kind = "a model compiled by AOTInductor, which has no graph left"
    elif not any(name.startswith("models/") for name in names):
        kind = "an archive without an exported program"
    else:
        return
    raise SourceError(f"{path} is no exported program", found=kind, expected=SAVE_AGAIN, fix=FACTORY)


@contextmanager
def _weights_only(*, force: bool) -> Iterator[None]:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    if force:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if force and before is None:
            del os.environ[name]
        elif force and before is not None:
            os.environ[name] = before


def _refuse_code(path: Path) -> None:
    import torch

    try:
        reader = torch._C.PyTorchFileReader(str(path))
        names = reader.get_all_records()
        texts = {
            name: reader.get_record(name) for name in names if name.endswith(".json") or "models/" in name
        }
        documents = {name: json.loads(text) for name, text in texts.items()}
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"{path} is damaged", found=reason_of(error), expected=SAVE_AGAIN) from error
    reasons = [f"{name}: native code" for name in names if name.startswith("data/aotinductor/")]
    for name, document in documents.items():
        reasons += [f"{name}: {reason}" for reason in _code_in(document)]
    if reasons:
        raise SourceError(
            f"{path} carries something that runs when it is loaded",
            found=reasons[0] + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""),
            fix="add --allow-code if you trust the file",
        )


def _code_in(value: Any, *, nested: bool = False) -> Iterator[str]:
    """What in a JSON document would be run, described; `nested` is a document within a string."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            yield f"{value.get('path_name')} is a pickle"
        if re.match(r"(custom|opaque)_obj", str(value.get("path_name"))):
            yield f"{value['path_name']} is an object of its own class"
        if "__enum__" in value:
            yield f"imports {value.get('fqn')}"
        for key, part in value.items():
            if key == "expr_str" and not _is_plain_expression(part):
                yield f"the size {part!r} is no plain expression"
            if key in ("target", "as_operator") and not nested and not _is_operator(part):
                yield f"{part!r} is no operator of a graph"
            if key == "guards_code" and not all(_is_plain_guard(guard) for guard in part):
                yield "a guard is no comparison of sizes"
            yield from _code_in(part, nested=nested)
    elif isinstance(value, list):
        for part in value:
            yield from _code_in(part, nested=nested)
    elif isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            inner = json.loads(value)
        except ValueError:
            return
        yield from _code_in(inner, nested=True)


def _is_operator(target: Any) -> bool:
    return isinstance(target, str) and TARGET.fullmatch(target) is not None


def _is_plain_expression(text: Any) -> bool:
    """Whether a symbolic size is made of known functions, numbers and names alone."""
    for node in _nodes(text):
        if not isinstance(node, EXPRESSION_NODES) or not _is_harmless_text(node):
            return False
        if isinstance(node, ast.Call) and not FUNCTION.fullmatch(ast.unparse(node.func)):
            return False
    return True


def _is_plain_guard(text: Any) -> bool:
    """Whether a guard compares sizes of inputs, such as `L['x'].size()[0] % 2 == 0`, and does no more."""
    for node in _nodes(text):
        if not isinstance(node, GUARD_NODES) or not _is_harmless_text(node):
            return False
        if isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "math"
            name = (
                node.func.attr if method and isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            )
            if not GUARD_CALL.fullmatch(name):
                return False
    return True


def _nodes(text: Any) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(str(text), mode="eval"))
    except (SyntaxError, ValueError, RecursionError):
        yield ast.Pass()  # in no plain expression


def _is_harmless_text(node: ast.AST) -> bool:
    """Whether a string, if the node is one, cannot end the quotes that torch puts round it."""
    return not (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str | bytes)
        and not (isinstance(node.value, str) and WORDS.fullmatch(node.value))
    )
