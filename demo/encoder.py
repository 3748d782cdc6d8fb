"""From a transformers folder to an accuracy: texts, unit vectors, fixed class directions.

The classifier on top is never trained. Its class directions are means of a few training texts
under the *base* model, the same for every model that is measured; so a fine-tune can only improve
by moving its weights, which is what a merge then combines.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .texts import Task

TOKENS = 32  # a text is cut here
SHOTS = 8  # training texts behind each class direction
SHARPNESS = 20.0  # logits are SHARPNESS x cosine
BATCH = 64


@dataclass(frozen=True, slots=True)
class Encoder:
    """A network and its own tokenizer, both read from one transformers folder."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(folder: Path) -> Encoder:
    """The encoder in a folder, in float32 and without dropout."""
    network = AutoModel.from_pretrained(folder).float().eval()
    return Encoder(network, AutoTokenizer.from_pretrained(folder))


def embed(encoder: Encoder, words: list[str]) -> Tensor:
    """Unit vectors of shape (texts, width): the mean over each text's tokens, normalised."""
    batch = encoder.tokenizer(
        words, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    states = encoder.network(**batch).last_hidden_state
    present = batch["attention_mask"].unsqueeze(-1)
    return functional.normalize((states * present).sum(1) / present.sum(1), dim=-1)


@torch.inference_mode()
def embed_all(encoder: Encoder, words: list[str]) -> Tensor:
    """What `embed` gives, batch by batch; texts of like length go together, which saves padding."""
    order = sorted(range(len(words)), key=lambda index: len(words[index]))
    vectors = torch.empty(len(words), encoder.network.config.hidden_size)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        vectors[chosen] = embed(encoder, [words[index] for index in chosen])
    return vectors


def head(base: Encoder, task: Task) -> Tensor:
    """Class directions of shape (labels, width): class means under the base, centred, unit norm."""
    means = []
    for label in task.labels:
        examples = [text.words for text in task.train if text.label == label][:SHOTS]
        means.append(embed_all(base, examples).mean(0))
    stacked = torch.stack(means)
    return functional.normalize(stacked - stacked.mean(0), dim=-1)


def accuracy(encoder: Encoder, task: Task, directions: Tensor) -> float:
    """The fraction of test texts, of 1, whose nearest class direction is the right one."""
    vectors = embed_all(encoder, [text.words for text in task.test])
    answers = (vectors @ directions.T).argmax(1)
    return (answers == torch.tensor(task.targets(task.test))).float().mean().item()
