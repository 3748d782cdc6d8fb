"""Texts from installed packages, read with `ast`: docstrings, messages of exceptions, expressions.

Nothing is imported and nothing downloaded. Every source comes with ``pip install hf-merge[dev]``.
"""

import ast
import importlib.util
import random
import re
import warnings
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGES = {
    "numpy": "numpy", "scipy": "scipy", "sympy": "sympy", "torch": "torch",
    "sklearn": "scikit-learn", "networkx": "networkx", "matplotlib": "matplotlib",
    "sqlalchemy": "sqlalchemy", "optuna": "optuna", "diffusers": "diffusers",
}  # fmt: skip
"""Import names, with the names under which their versions are asked for."""

FILES = 60  # of a sub-package at most; which ones is drawn once and for all
LONGEST = 150_000  # bytes of a file: what is longer is mostly generated
SHORT = 60  # bytes of an expression at most
SKIPPED = {"tests", "test", "testing", "benchmarks", "_vendor", "externals", "models"}

PATHS = re.compile(rf"\b(?:{'|'.join(PACKAGES)}|np|plt|sp)\b(?:\.\w+)*")
MARKUP = re.compile(r":\w+:|[`*_~]{1,2}(?=\W|\b)|\s+")


@dataclass(frozen=True, slots=True)
class Text:
    """A text, the name of its class, and the object that it comes from."""

    words: str
    label: str
    origin: str


def versions() -> dict[str, str]:
    """The version of every source."""
    return {package: version(name) for package, name in PACKAGES.items()}


def plain(text: str) -> str:
    """One line without markup and without the paths of packages, which would tell the answer."""
    return MARKUP.sub(" ", PATHS.sub(lambda m: m[0].rpartition(".")[2] if "." in m[0] else " ",
                                     text)).strip()  # fmt: skip


@dataclass(slots=True)
class Facts:
    """What is read of a package: documentation, messages, expressions that fill one line."""

    docs: list[tuple[str, str, str]] = field(default_factory=list)
    """(first folder or file, object, docstring) of documented functions and classes."""

    messages: list[tuple[str, str, str]] = field(default_factory=list)
    """(exception, message, the function it is raised in)."""

    expressions: list[tuple[type[ast.expr], int, str, str]] = field(default_factory=list)
    """(kind, number of arguments if a call, source, the function it stands in)."""


@cache
def facts(package: str) -> Facts:
    """Documentation, messages and expressions of a package's source files."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"quality: the package {package} is missing: pip install 'hf-merge[dev]'")
    root = Path(spec.submodule_search_locations[0])
    found = sorted(p.relative_to(root) for p in root.rglob("*.py"))
    found = [p for p in found if not SKIPPED & {*p.parts} and not p.name.startswith("test_")]
    parts: dict[str, list[Path]] = {}
    for path in random.Random(package).sample(found, len(found)):
        parts.setdefault(path.parts[0], []).append(path)
    out = Facts()
    for path in sorted(path for part in parts.values() for path in part[:FILES]):
        source = (root / path).read_bytes()
        if len(source) <= LONGEST:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # other people's "\d"
                tree = ast.parse(source)
            _look(tree, out, path.parts[0], f"{package}/{path}", source.splitlines(), None)
    return out


def _look(node: ast.AST, out: Facts, part: str, file: str, lines: list[bytes],
          inside: str | None) -> None:  # fmt: skip
    """Add what stands in a node to the facts; ``inside`` is the object around it."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        inside = f"{file}:{node.name}:{node.lineno}"
        if doc := ast.get_docstring(node):
            out.docs.append((part, inside, doc))
    elif isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call):
        if isinstance(call.func, ast.Name) and call.args and (message := written(call.args[0])):
            out.messages.append((call.func.id, message, inside or file))
    elif isinstance(node, ast.expr) and inside and node.lineno == node.end_lineno:
        source = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
        if len(source) <= SHORT:
            count = len(node.args) + len(node.keywords) if isinstance(node, ast.Call) else 0
            out.expressions.append((type(node), count, source.decode(errors="replace"), inside))
    for child in ast.iter_child_nodes(node):
        _look(child, out, part, file, lines, inside)


def written(node: ast.expr) -> str:
    """The text of a literal, with ``x`` for what is put in; empty where it is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return written(node.left)
    return ""
