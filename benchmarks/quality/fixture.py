"""The fixture: tasks, heads and an expert for each task, made once for a seed and kept on disk.

What is kept is plain: a folder that transformers loads for the base and for each expert. Its key is
made of VERSION, the seed, the sizes and the texts themselves, so whatever would give other experts
gives another folder.
"""

import hashlib
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from benchmarks.quality import tasks as made_of
from benchmarks.quality.encoder import Classifier, classifier, encode, minilm, prototypes
from benchmarks.quality.sources import Text, versions
from benchmarks.quality.tasks import FULL, Sizes, TextTask

VERSION = 1
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Training:
    """How an expert is made: AdamW, a linear warm-up under a cosine."""

    steps: int = 100
    batch: int = 16
    rate: float = 1e-4
    warm_up: float = 0.1

    def slope(self, step: int) -> float:
        """The learning rate at a step, in parts of ``rate``."""
        rise = min(1.0, (step + 1) / (self.warm_up * self.steps))
        return rise * (1 + math.cos(math.pi * step / self.steps)) / 2


USUAL = Training()


@dataclass(frozen=True, slots=True)
class Fixture:
    """All that is merged and measured for one seed."""

    seed: int
    base: Path
    experts: dict[str, Path]
    tasks: tuple[TextTask, ...]
    heads: dict[str, Tensor]
    seconds: float
    """What it took to make, when it was made."""


def default_cache() -> Path:
    """Where fixtures are kept if nobody says otherwise."""
    return Path(tempfile.gettempdir()) / "merge-quality"


def fixture(
    seed: int,
    cache: Path,
    given: Sequence[TextTask] | None = None,
    sizes: Sizes = FULL,
    training: Training = USUAL,
    source: Path | None = None,
    say: Callable[[str], None] = print,
) -> Fixture:
    """The fixture of a seed, from the cache where it is there already.

    given: other tasks than the eight. source: the folder of another base than all-MiniLM-L6-v2.
    """
    source = source or minilm()
    start = time.perf_counter()
    all_tasks = tuple(given or texts(seed, cache, sizes, say))
    settings = {"version": VERSION, "seed": seed, "sizes": asdict(sizes),
                "training": asdict(training), "texts": digest([asdict(t) for t in all_tasks]),
                "base": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest(),
                }  # fmt: skip
    root = cache / f"fixture-{seed}-{digest(settings)[:12]}"
    base = root / "base"
    stamp = root / "made.json"
    if not stamp.exists():
        save(AutoModel.from_pretrained(source).float(), source, base)
    module = classifier(base)
    heads = {t.name: prototypes(module, base, t, sizes.shots) for t in all_tasks}
    experts = {t.name: root / t.name for t in all_tasks}
    if not stamp.exists():
        for task in all_tasks:
            expert = trained(base, task, heads[task.name], training, seed)
            save(expert, source, experts[task.name])
            say(f"  {task.name}: trained, {time.perf_counter() - start:.0f} s so far")
        stamp.write_text(json.dumps({**settings, "seconds": time.perf_counter() - start}, indent=2))
    seconds = json.loads(stamp.read_text())["seconds"]
    return Fixture(seed, base, experts, all_tasks, heads, seconds)


def texts(seed: int, cache: Path, sizes: Sizes, say: Callable[[str], None]) -> tuple[TextTask, ...]:
    """The tasks of a seed, kept as JSON under the versions of the packages they are read from."""
    key = digest([VERSION, seed, asdict(sizes), versions()])[:12]
    file = cache / f"texts-{seed}-{key}.json"
    if not file.exists():
        say("  reading texts from the installed packages")
        cache.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".part")
        fresh.write_text(json.dumps([asdict(t) for t in made_of.tasks(seed, sizes)]))
        fresh.rename(file)
    parts = ("train", "valid", "adapt", "test")
    return tuple(
        TextTask(t["name"], tuple(t["labels"]), *(tuple(Text(**x) for x in t[p]) for p in parts))
        for t in json.loads(file.read_text())
    )


def trained(base: Path, task: TextTask, head: Tensor, training: Training, seed: int) -> Classifier:
    """The base fine-tuned on a task: the layers move; embeddings, pooler and head stay."""
    module = classifier(base, head)  # in evaluation mode: no dropout
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))
    moving = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(moving, training.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, training.slope)
    draw = random.Random(f"{task.name} {seed}")
    waiting: list[Text] = []
    for _ in range(training.steps):
        if len(waiting) < training.batch:
            waiting += draw.sample(task.train, len(task.train))
        batch, waiting = waiting[: training.batch], waiting[training.batch :]
        loss = functional.cross_entropy(
            module(**encode(base, batch)), torch.tensor(task.targets(batch))
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return module


def save(module: torch.nn.Module, source: Path, folder: Path) -> None:
    """Weights, config and the source's tokenizer as a folder that transformers loads."""
    shutil.rmtree(folder, ignore_errors=True)
    module.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(source / name, folder / name)


def digest(data: object) -> str:
    """SHA-256 of data that JSON can say."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
