"""The rooms of the project: who may import whom, what is installed, what is public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import merge
from merge import methods

ROOT = Path(__file__).parent.parent
MODULES = sorted(ROOT.glob("merge/**/*.py"))
COMMANDS = sorted(ROOT.glob("cli/*.py"))

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "ir": {"errors"},
    "methods": {"errors"},
    "families": {"ir", "errors"},
    "vocabulary": {"ir", "errors"},
    "symmetry": {"errors"},
    "tracing": {"symmetry", "errors"},
    "alignment": {"statistics", "symmetry", "ir", "errors"},
    "transport": {"alignment", "statistics", "symmetry", "ir", "errors"},
    "learning": {"statistics", "ir", "methods", "errors"},
    "statistics": {"ir", "errors"},
    "resize": {"transport", "alignment", "symmetry", "errors"},
    "partial": {"resize", "transport", "alignment", "statistics", "symmetry", "errors"},
    "training": {
        "partial",
        "resize",
        "learning",
        "statistics",
        "methods",
        "families",
        "checkpoint",
        "analysis",
        "ir",
        "errors",
    },
    "adapters": {"ir", "families", "errors"},
    "hub": {"errors"},
    "checkpoint": {"ir", "adapters", "hub", "errors"},
    "recipe": {"ir", "learning", "methods", "families", "vocabulary", "errors"},
    "plan": {"ir", "methods", "errors"},
    "engine": {"plan", "ir", "methods", "errors"},
    "write": {"plan", "ir", "hub", "errors"},
    "analysis": {"families", "smoke", "statistics", "ir", "errors"},
    "smoke": {"checkpoint", "methods", "ir", "errors"},
    "streams": {"analysis", "smoke", "errors"},
    "tuning": {"recipe", "learning", "analysis", "ir", "errors"},
}
"""Which rooms each room may use besides itself. A new room states here what it stands on."""

FRONT = {
    "__init__",
    "aligning",
    "api",
    "applying",
    "axes",
    "barriers",
    "blocks",
    "candidates",
    "card",
    "carrying",
    "comparing",
    "chosen",
    "coefficients",
    "converging",
    "deepening",
    "differences",
    "enlarging",
    "experts",
    "extraction",
    "fusing",
    "gathering",
    "given",
    "in_order",
    "inspect",
    "interpolating",
    "jobs",
    "joining",
    "judging",
    "learn",
    "learned",
    "on_ray",
    "parting",
    "parting_data",
    "placing",
    "outcome",
    "provenance",
    "publishing",
    "publishing_folder",
    "publishing_shares",
    "ranks",
    "resizing",
    "resizing_data",
    "resizing_layers",
    "run",
    "score",
    "searches",
    "states",
    "steps",
    "stitching",
    "stream",
    "symmetries",
    "task_files",
    "task_model",
    "task_network",
    "task_plan",
    "tasks",
    "verify",
    "widths",
    "zipping",
    "zipping_data",
}
"""Modules at the top, which join the rooms and may use them all."""

VERBS = ("ir/checkpoint.py", {"run", "publishing"})
"""The one way down: a checkpoint's verbs, such as save, are those of `merge.run` inside."""

PURE = (
    "ir",
    "methods",
    "families",
    "learning",
    "partial",
    "resize",
    "statistics",
    "symmetry",
    "alignment",
    "transport",
    "vocabulary",
    "adapters",
)
"""Rooms that know tensors, not files."""

LATE = (*PURE, "recipe", "plan", "checkpoint", "hub", "smoke")
"""Rooms that `merge plan` and an error in a recipe go through: torch would cost them seconds."""

FILES = {"fileinput", "glob", "io", "mmap", "os", "pathlib", "shutil", "socket", "tempfile"}


@dataclass(frozen=True)
class Import:
    """One imported module: ``top`` unless it stands in a function."""

    module: str
    line: int
    top: bool


def name_of(path: Path) -> str:
    """``merge/ir/expr.py`` as ``merge.ir.expr``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """``merge.ir.expr`` is in room ``ir``; ``merge`` itself is ``__init__``."""
    return [*module.split("."), "__init__"][1]


EXISTING = {name_of(p) for p in MODULES}


def imports_of(path: Path) -> list[Import]:
    """What a file imports when it runs, not what it imports for type checkers."""
    found: list[Import] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other, top)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(a.name, node.lineno, top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.append(Import(inner if inner in EXISTING else module, node.lineno, top))
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), True)
    return found


def paths(*rooms: str) -> list[Path]:
    return [p for p in MODULES if room_of(name_of(p)) in rooms]


def show(path: Path, found: Import) -> str:
    return f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"


def test_the_walk_sees_imports() -> None:
    """What the other tests stand on, looked at in files that are known."""
    here = {i.module for i in imports_of(Path(__file__)) if i.top}
    assert {"ast", "merge", "merge.methods", "pathlib"} <= here
    checkpoint = imports_of(ROOT / "merge" / "ir" / "checkpoint.py")
    assert any(i.module == "merge.run" and not i.top for i in checkpoint)
    assert not any(i.module in ("torch", "pathlib") for i in checkpoint)  # for type checkers only
    assert any(i.module == "torch" for i in imports_of(ROOT / "merge" / "engine" / "execute.py"))


def test_every_room_states_what_it_stands_on() -> None:
    rooms = {room_of(name_of(p)) for p in MODULES}
    assert rooms == set(ALLOWED) | FRONT


def test_data_flows_one_way() -> None:
    wrong = []
    for path in paths(*ALLOWED):
        room = room_of(name_of(path))
        for found in imports_of(path):
            if found.module.partition(".")[0] != "merge":
                continue
            target = room_of(found.module)
            verb = path == ROOT / "merge" / VERBS[0] and target in VERBS[1] and not found.top
            if target not in ALLOWED[room] | {room} and not verb:
                wrong.append(show(path, found))
    assert not wrong


def test_no_rooms_stand_on_each_other() -> None:
    done: list[str] = []
    while rest := [r for r in ALLOWED if r not in done]:
        ready = [r for r in rest if ALLOWED[r] <= set(done)]
        assert ready, f"a circle among {rest}"
        done += ready


def test_nothing_in_the_library_knows_the_command_line() -> None:
    wrong = [
        show(path, i)
        for path in MODULES
        for i in imports_of(path)
        if i.module.partition(".")[0] in ("cli", "merge_cli", "click", "tqdm")
    ]
    assert not wrong


def test_the_command_line_uses_the_library_and_does_no_arithmetic() -> None:
    wrong = [
        show(path, i)
        for path in COMMANDS
        for i in imports_of(path)
        if i.module.partition(".")[0]
        not in {"", "merge", "click", "tqdm", *sys.stdlib_module_names}
    ]
    assert not wrong


def test_rooms_of_tensors_know_no_files() -> None:
    wrong = []
    for path in paths(*PURE):
        wrong += [show(path, i) for i in imports_of(path) if i.module.partition(".")[0] in FILES]
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        wrong += [
            f"{path.relative_to(ROOT)}:{call.lineno} opens a file"
            for call in calls
            if ast.unparse(call.func) == "open"
        ]
    assert not wrong


HEAVY = {"torch", "transformers", "scipy", "huggingface_hub", "tokenizers", "peft"}


def test_heavy_libraries_are_imported_late() -> None:
    wrong = [
        show(path, i)
        for path in (*paths(*LATE, *FRONT), *COMMANDS)
        for i in imports_of(path)
        if i.top and i.module.partition(".")[0] in HEAVY
    ]
    assert not wrong


def test_nothing_private_is_imported() -> None:
    wrong = []
    for path in (*MODULES, *COMMANDS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                names = [*(node.module or "").split("."), *(a.name for a in node.names)]
                private = [n for n in names if n.startswith("_") and not n.startswith("__")]
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno} imports {n}" for n in private]
    assert not wrong


@pytest.mark.parametrize("path", [*MODULES, *COMMANDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text())
    doc = ast.get_docstring(tree)
    assert doc is not None
    first = doc.partition("\n\n")[0].replace("\n", " ")
    assert first.endswith((".", ":", "::")), first
    for name in public(tree):
        assert name in defined(tree), f"{name} in __all__ is not there"


def public(tree: ast.Module) -> list[str]:
    """The names in ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found = ast.literal_eval(node.value)
            assert len(set(found)) == len(found)
            return list(found)
    return []


def defined(tree: ast.Module) -> set[str]:
    """The names that a module binds at its top."""

    def bound(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                yield node.name
            elif isinstance(node, ast.Assign):
                yield from (ast.unparse(t) for t in node.targets)
            elif isinstance(node, ast.AnnAssign):
                yield ast.unparse(node.target)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                yield from (a.asname or a.name for a in node.names)
            elif isinstance(node, ast.If):
                yield from bound([*node.body, *node.orelse])

    return set(bound(tree.body))


# -- what is installed ---------------------------------------------------------------------------


def test_the_package_list_is_the_folders_there_are() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [name_of(p) for p in MODULES if p.name == "__init__.py"]
    assert setup["packages"] == [*sorted(folders), "merge_cli"]
    assert setup["package-dir"] == {"merge_cli": "cli"}
    stray = {p.parent for p in MODULES} - {p.parent for p in MODULES if p.name == "__init__.py"}
    assert not stray, "folders of modules without an __init__.py"


def test_types_are_shipped() -> None:
    assert (ROOT / "merge" / "py.typed").is_file()
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-data"] == {
        "merge": ["py.typed"],
        "merge.symmetry": ["templates/*.json"],
    }


# -- what is public ------------------------------------------------------------------------------


def test_what_is_exposed_is_what_is_listed() -> None:
    exposed = {
        name
        for name, value in vars(merge).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("merge")
    }
    assert exposed == set(merge.__all__)
    assert merge.__all__ == sorted(merge.__all__)


def test_every_public_name_is_documented() -> None:
    for name in merge.__all__:
        assert getattr(merge, name).__doc__, name


def test_public_names_stay_what_they_are() -> None:
    """A package below may bear the name of a function; importing it must not take its place."""
    for path in MODULES:
        importlib.import_module(name_of(path))
    modules = [n for n in merge.__all__ if isinstance(getattr(merge, n), ModuleType)]
    assert not modules


def test_public_names_stay_what_they_are_in_a_fresh_process() -> None:
    code = (
        "import merge, importlib\n"
        "for name in ('recipe.schema', 'recipe.compile', 'verify', 'plan', 'inspect', 'run'):\n"
        "    importlib.import_module(f'merge.{name}')\n"
        "print(*(n for n in merge.__all__ if type(getattr(merge, n)).__name__ == 'module'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_method_is_a_function_of_the_library() -> None:
    for name in methods.registry():
        assert callable(getattr(merge, name))
        assert name in dir(merge)
    assert set(merge.__all__) <= set(dir(merge))
    for name in ("nonsense", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(merge, name)


def test_no_method_hides_a_public_name() -> None:
    assert not set(methods.registry()) & {*merge.__all__, *ALLOWED, *FRONT}
