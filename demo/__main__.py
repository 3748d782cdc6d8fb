"""Make two fine-tunes, merge them with the command line, measure base, fine-tunes and merge."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from .encoder import accuracy, head, load
from .finetune import base_model, fine_tune
from .table import reading, table
from .texts import tasks

ROOT = Path(__file__).parent.parent  # the recipe names its models from here
MODELS = ROOT / "demo" / "models"
RECIPE = "recipes/quickstart.yml"
MERGED = "demo/merged"

# transformers' load reports and bars would hide the story
QUIET: tuple[Callable[[], None], ...] = (
    logging.set_verbosity_error,
    logging.disable_progress_bar,
)


def main() -> None:
    """Run the whole demo; the second time only the merge and the measurement are left to do."""
    options = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    options.add_argument("--seed", type=int, default=0, help="of the split and the order of texts")
    seed = options.parse_args().seed
    start = time.monotonic()
    torch.manual_seed(seed)
    torch.set_num_threads(2)  # the number of threads changes the last bits of a fine-tune
    for silence in QUIET:
        silence()

    say("Two tasks, read from the docstrings of the installed numpy and scipy")
    both = tasks(seed)
    for task in both:
        example = task.test[0]
        print(f"  {task.name}: {task.question}\n    {example.words!r} -> {example.label}")

    say("A base and two fine-tunes of it, in demo/models")
    models = {"base": base_model(MODELS / "minilm")}
    heads = {task.name: head(models["base"], task) for task in both}
    for task in both:
        folder = MODELS / task.name
        models[task.name] = fine_tune(MODELS / "minilm", task, heads[task.name], seed, folder)

    merge("plan", RECIPE)
    merge("apply", RECIPE, MERGED, "--replace")
    models["merge"] = load(ROOT / MERGED)

    say("Test accuracy of each model on both tasks")
    accuracies = {
        model: {task.name: accuracy(encoder, task, heads[task.name]) for task in both}
        for model, encoder in models.items()
    }
    print(table(both, accuracies))
    print(f"\n{reading(both, accuracies)}")
    print(f"All of it took {time.monotonic() - start:.0f} seconds.")


def say(headline: str) -> None:
    """Print what comes next."""
    print(f"\n{headline}", flush=True)


def merge(*words: str) -> None:
    """Run one `merge` command in the foreground, and stop with its exit code where it fails."""
    say(f"$ merge {' '.join(words)}")
    done = subprocess.run([sys.executable, "-m", "merge_cli", *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
