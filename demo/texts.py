"""Two classification tasks, read from the docstrings of numpy and scipy.

`sections`: from which section of a docstring does this window of words come?
`topics`:   from which part of scipy does this one-line summary come?

The sources are those already installed, read with `ast`: nothing is imported, nothing downloaded.
A text never holds the words of its own answer, near duplicates are dropped, and everything that
comes from one documented object lies on one side of the split, so memory is no help in the test.
"""

import ast
import importlib.util
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("Parameters", "Returns", "Notes", "Examples", "See Also", "References")
TOPICS = (
    "stats", "optimize", "signal", "sparse", "interpolate", "linalg", "spatial", "integrate",
)  # fmt: skip
PACKAGES = {"numpy", "np", "scipy", "sp", "plt"}

WORD = re.compile(r"[A-Za-z]{2,}")  # no digits, no ">>>": layout would give the section away
HEADING = re.compile(r"^(\w[\w ]+)\n-{3,} *$", re.MULTILINE)
WINDOW = 16  # words of a section shown to the model
TRAIN_PER_LABEL, TEST_PER_LABEL = 140, 80  # at most; some parts of scipy have fewer


@dataclass(frozen=True, slots=True)
class Text:
    """A few words, their label, and the object whose docstring they come from."""

    words: str
    label: str
    origin: str


@dataclass(frozen=True, slots=True)
class Task:
    """A question with its possible answers and two disjoint sets of texts."""

    name: str
    question: str
    labels: tuple[str, ...]
    train: tuple[Text, ...]
    test: tuple[Text, ...]

    def targets(self, texts: Iterable[Text]) -> list[int]:
        """The label of each text as an index into `labels`."""
        return [self.labels.index(text.label) for text in texts]


def tasks(seed: int) -> tuple[Task, Task]:
    """Both tasks; `seed` chooses the split."""
    return (
        split("sections", "which docstring section is this from?", SECTIONS, sections(), seed),
        split("topics", "which part of scipy is this about?", TOPICS, topics(), seed),
    )


def docstrings(package: str) -> Iterator[tuple[Path, str, str]]:
    """(file inside the package, name, docstring) of every documented function and class."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"demo: the package {package} is not installed")
    root = Path(spec.submodule_search_locations[0])
    for file in sorted(root.rglob("*.py")):
        if "tests" in file.parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # other people's "\d"
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if documentation := ast.get_docstring(node):
                yield file.relative_to(root), node.name, documentation


def sections() -> Iterator[Text]:
    """One window of words out of each section of each docstring of numpy and scipy."""
    for package in ("numpy", "scipy"):
        for file, name, documentation in docstrings(package):
            origin = f"{package}/{file}:{name}"
            _, *parts = HEADING.split(documentation)
            for heading, body in zip(parts[::2], parts[1::2], strict=True):
                words = visible(body, SECTIONS)
                if heading in SECTIONS and len(words) >= WINDOW // 2:
                    place = random.Random(f"{origin} {heading}")  # the same window on every run
                    start = place.randrange(max(1, len(words) - WINDOW + 1))
                    yield Text(" ".join(words[start : start + WINDOW]), heading, origin)


def topics() -> Iterator[Text]:
    """The summary of each docstring of scipy, labelled by the sub-package it lies in."""
    for file, name, documentation in docstrings("scipy"):
        words = visible(documentation.split("\n\n")[0], TOPICS)
        if file.parts[0] in TOPICS and len(words) >= 4:
            yield Text(" ".join(words), file.parts[0], f"{file}:{name}")


def visible(text: str, labels: tuple[str, ...]) -> list[str]:
    """The lower-case words of a text, without package names and without any of the answers."""
    stems = tuple(label.lower()[:6] for label in labels)  # "interp" also hides "interpolation"
    words = (word.lower() for word in WORD.findall(text))
    return [word for word in words if word not in PACKAGES and not word.startswith(stems)]


def distinct(texts: Iterable[Text]) -> list[Text]:
    """The texts, less those that share half of their three-word runs with earlier ones."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for text in texts:
        words = text.words.split()
        runs = set(zip(words, words[1:], words[2:], strict=False))
        if 2 * len(runs & seen) < len(runs):
            kept.append(text)
        seen |= runs
    return kept


def split(
    name: str, question: str, labels: tuple[str, ...], texts: Iterable[Text], seed: int
) -> Task:
    """A task whose objects were shuffled, every third going to the test side."""
    by_origin: dict[str, list[Text]] = {}
    for text in distinct(texts):
        by_origin.setdefault(text.origin, []).append(text)
    origins = sorted(by_origin)
    random.Random(seed).shuffle(origins)

    train: list[Text] = []
    test: list[Text] = []
    count: Counter[tuple[bool, str]] = Counter()
    for index, origin in enumerate(origins):
        tested = index % 3 == 0
        side, most = (test, TEST_PER_LABEL) if tested else (train, TRAIN_PER_LABEL)
        for text in by_origin[origin]:
            if count[tested, text.label] < most:
                count[tested, text.label] += 1
                side.append(text)
    return Task(name, question, labels, tuple(train), tuple(test))
