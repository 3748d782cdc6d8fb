"""Eight classification tasks out of the sources, split by object and without near-duplicates."""

import ast
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality.sources import Text, facts, plain

SCIPY = (
    "stats", "signal", "linalg", "sparse", "special", "optimize", "interpolate", "integrate",
    "spatial",
)  # fmt: skip
SYMPY = (
    "functions", "polys", "geometry", "physics", "stats", "combinatorics", "solvers", "matrices",
    "ntheory", "printing", "core", "tensor",
)  # fmt: skip
TORCH = (
    "nn", "distributed", "utils", "ao", "onnx", "fx", "distributions", "_inductor", "_dynamo",
)  # fmt: skip
PROJECTS = (
    "numpy", "scipy", "sympy", "torch", "sklearn", "networkx", "matplotlib", "sqlalchemy",
    "optuna", "diffusers",
)  # fmt: skip
SECTIONS = (
    "Parameters", "Returns", "Notes", "Examples", "See Also", "References", "Raises", "Attributes",
)  # fmt: skip
EXCEPTIONS = (
    "ValueError", "TypeError", "NotImplementedError", "RuntimeError", "AttributeError",
    "ImportError", "AssertionError",
)  # fmt: skip
KINDS: dict[type[ast.expr], str] = {
    ast.Call: "call", ast.Attribute: "attribute", ast.Subscript: "item", ast.BinOp: "arithmetic",
    ast.BoolOp: "and, or", ast.Compare: "comparison", ast.UnaryOp: "sign, not",
    ast.IfExp: "conditional", ast.ListComp: "list built", ast.GeneratorExp: "generator",
    ast.Dict: "dictionary", ast.List: "list", ast.Tuple: "tuple",
}  # fmt: skip
MOST_ARGUMENTS = 6

HEADING = re.compile(r"^(\w[\w ]+)\n-{3,} *$", re.MULTILINE)
TOKEN = re.compile(r"\w+|[^\w\s]")
WINDOW = 12
READ = {"section": ("numpy", "scipy", "sklearn", "networkx", "optuna"),
        "code": ("scipy", "sklearn", "networkx", "sympy", "torch")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many texts of a task go where; heads are made of ``shots`` training texts a class."""

    train: int = 720
    valid: int = 90
    adapt: int = 216
    test: int = 270
    shots: int = 5


FULL = Sizes()
"""What the published table is made with."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """Texts of one task in four disjoint parts; ``adapt`` is for learning without labels."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Text, ...]
    valid: tuple[Text, ...]
    adapt: tuple[Text, ...]
    test: tuple[Text, ...]

    def targets(self, texts: Iterable[Text]) -> list[int]:
        """The classes of texts, as numbers."""
        return [self.labels.index(text.label) for text in texts]


def areas(package: str, labels: Sequence[str]) -> Iterator[Text]:
    """The first sentences of docstrings, by the sub-package they come from."""
    for part, origin, doc in facts(package).docs:
        words = plain(doc.split("\n\n")[0])
        if part in labels and len(words.split()) >= 4:
            yield Text(words, part, origin)


def projects(packages: Sequence[str]) -> Iterator[Text]:
    """A window of words out of each docstring, by package."""
    for package in packages:
        for _, origin, doc in facts(package).docs:
            words = plain(doc).split()
            if len(words) >= WINDOW:
                start = random.Random(origin).randrange(len(words) - WINDOW + 1)
                yield Text(" ".join(words[start : start + WINDOW]), package, origin)


def sections(packages: Sequence[str]) -> Iterator[Text]:
    """A window of words out of each section of each docstring; the layout is taken off."""
    for package in packages:
        for _, origin, doc in facts(package).docs:
            _, *parts = HEADING.split(doc)
            for heading, body in zip(parts[::2], parts[1::2], strict=True):
                words = re.findall(r"[A-Za-z]\w+", plain(body))
                if heading in SECTIONS and len(words) >= 5:
                    room = max(1, len(words) - WINDOW + 1)
                    start = random.Random(f"{origin} {heading}").randrange(room)
                    yield Text(" ".join(words[start : start + WINDOW]), heading, origin)


def exceptions(packages: Sequence[str]) -> Iterator[Text]:
    """Messages, by the exception that carries them."""
    for package in packages:
        for name, message, origin in facts(package).messages:
            words = plain(message)
            if name in EXCEPTIONS and len(words.split()) >= 3:
                yield Text(words, name, origin)


def kinds(packages: Sequence[str]) -> Iterator[Text]:
    """Expressions of one line, by what they are at the top."""
    for package in packages:
        for kind, _, source, origin in facts(package).expressions:
            if kind in KINDS and len(source) >= 12:
                yield Text(source, KINDS[kind], origin)


def arguments(packages: Sequence[str]) -> Iterator[Text]:
    """Calls of one line, by the number of their arguments."""
    for package in packages:
        for kind, count, source, origin in facts(package).expressions:
            if kind is ast.Call and count <= MOST_ARGUMENTS:
                yield Text(source, str(count), origin)


def distinct(texts: Iterable[Text]) -> list[Text]:
    """The texts, less those that share half of their three-token runs with an earlier one."""
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    kept: list[Text] = []
    for text in texts:
        tokens = TOKEN.findall(text.words.lower())
        runs = set(zip(tokens, tokens[1:], tokens[2:], strict=False)) or {tuple(tokens)}
        shared = Counter(i for run in runs for i in where[run])
        if 2 * max(shared.values(), default=0) >= len(runs):
            continue
        for run in runs:
            where[run].append(len(kept))
        kept.append(text)
    return kept


def split(
    name: str, labels: Sequence[str], texts: Iterable[Text], seed: int, sizes: Sizes
) -> TextTask:
    """A task of like many texts from each class, all of an object on one side of the split."""
    draw = random.Random(f"{name} {seed}")
    whole = sizes.train + sizes.valid + sizes.adapt + sizes.test
    pool = sorted(texts, key=lambda t: (t.origin, t.words))
    draw.shuffle(pool)
    most = -(-whole // len(labels))
    count: Counter[str] = Counter()
    few: list[Text] = []
    for text in pool:  # before the slower look for duplicates: four times what is needed
        if count[text.label] < 4 * most:
            count[text.label] += 1
            few.append(text)
    count.clear()
    chosen: dict[str, list[Text]] = defaultdict(list)
    for text in distinct(few):
        if count[text.label] < most:
            count[text.label] += 1
            chosen[text.origin].append(text)
    parts: dict[str, list[Text]] = {"test": [], "adapt": [], "valid": [], "train": []}
    room = {part: getattr(sizes, part) * min(1.0, sum(count.values()) / whole) for part in parts}
    for origin in draw.sample(sorted(chosen), len(chosen)):
        part = next((p for p in parts if len(parts[p]) < room[p]), "train")
        parts[part] += chosen[origin]
    for texts_of in parts.values():
        draw.shuffle(texts_of)
    return TextTask(name, tuple(labels), **{p: tuple(t) for p, t in parts.items()})


def tasks(seed: int, sizes: Sizes = FULL) -> tuple[TextTask, ...]:
    """All eight; the seed chooses texts and split."""
    return (
        split("scipy", SCIPY, areas("scipy", SCIPY), seed, sizes),
        split("sympy", SYMPY, areas("sympy", SYMPY), seed, sizes),
        split("torch", TORCH, areas("torch", TORCH), seed, sizes),
        split("project", PROJECTS, projects(PROJECTS), seed, sizes),
        split("section", SECTIONS, sections(READ["section"]), seed, sizes),
        split("exception", EXCEPTIONS, exceptions(PROJECTS), seed, sizes),
        split("kind", tuple(KINDS.values()), kinds(READ["code"]), seed, sizes),
        split("arguments", tuple(map(str, range(MOST_ARGUMENTS + 1))), arguments(READ["code"]),
              seed, sizes),
    )  # fmt: skip
