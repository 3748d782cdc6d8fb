"""Tiny classifiers of texts in folders, and texts for them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

__all__ = ["saved_classifier", "written_texts"]

WORDS = 60


def saved_classifier(
    folder: str | Path, names: Sequence[str], seed: int, base: str | Path | None = None
) -> None:
    """A BERT for these classes with its tokenizer; its body a change of ``base``'s, if given."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]"
    )
    config = transformers.BertConfig(
        vocab_size=WORDS + 2,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(config)
    if base is not None:
        body = transformers.BertForSequenceClassification.from_pretrained(base).bert
        with torch.no_grad():
            for own, theirs in zip(model.bert.parameters(), body.parameters(), strict=True):
                own.copy_(theirs + 0.3 * torch.randn_like(own) * (own.std() + 0.02))
            model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def written_texts(file: str | Path, field: str, names: Sequence[str], seed: int) -> None:
    """Rows of eight words, the class told by the first."""
    draw = random.Random(seed)
    rows = []
    for _ in range(80):
        words = [draw.randrange(WORDS) for _ in range(8)]
        text = " ".join(f"w{i}" for i in words)
        rows.append({"text": text, field: names[words[0] % len(names)]})
    Path(file).write_text("\n".join(map(json.dumps, rows)))
