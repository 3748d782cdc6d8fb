"""Small tokenizers of each kind, made with the tokenizers library, and the merging of embeddings.

`union_by_hand` and `rows_by_hand` are the rules of a union as loops over tokens and models: the
independent truth that the tests compare with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

Matrix = NDArray[np.float64]
SPECIAL = ("<s>", "</s>", "<unk>")


def byte_level(text: str, size: int, added: Sequence[AddedToken] = ()) -> Tokenizer:
    """A byte-level BPE of ``size`` tokens with <s> and </s>, and what is added to it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([text] * 4, trainer)
    assert made.get_vocab_size() == size
    made.add_tokens(list(added))
    return made


def word_piece(words: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    """A WordPiece of these pieces, lower case, as BERT's."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(pieces[:5])
    made.add_tokens(list(added))
    return made


def unigram(pieces: Sequence[str], added: Sequence[AddedToken] = ()) -> Tokenizer:
    """A Unigram of these pieces after <unk>, as sentencepiece's."""
    scores = [("<unk>", 0.0), *((p, -float(i + 1)) for i, p in enumerate(pieces))]
    made = Tokenizer(models.Unigram(scores, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>"])
    made.add_tokens(list(added))
    return made


def save_tokenizer(made: Tokenizer, folder: Path, **config: Any) -> dict[str, str]:
    """The tokenizer's files in ``folder``, as transformers lays them out; returns their texts."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    texts = {
        "tokenizer.json": made.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts


@dataclass(frozen=True)
class Known:
    """A tokenizer as the loops below see it: ids, added tokens in order, rows of embeddings."""

    ids: Mapping[str, int]
    added: Sequence[str]
    rows: int

    @classmethod
    def of(cls, made: Tokenizer, rows: int) -> Known:
        added = [t.content for _, t in sorted(made.get_added_tokens_decoder().items())]
        return cls(made.get_vocab(), added, rows)

    def row(self, token: str) -> int | None:
        found = self.ids.get(token)
        return found if found is not None and found < self.rows else None


def union_by_hand(known: Sequence[Known], base: int, extra: Sequence[str] = ()) -> dict[str, int]:
    """The ids of a union: the base's, then ordinary tokens, then added ones, then ``extra``."""
    ids = dict(known[base].ids)
    others = [k for i, k in enumerate(known) if i != base]
    for other in others:
        for token, _ in sorted(other.ids.items(), key=lambda item: item[1]):
            if token not in other.added and other.row(token) is not None:
                ids.setdefault(token, len(ids))
    for other in others:
        for token in other.added:
            if other.row(token) is not None:
                ids.setdefault(token, len(ids))
    for token in extra:
        ids.setdefault(token, len(ids))
    return ids


def rows_by_hand(
    known: Sequence[Known],
    matrices: Sequence[Matrix],
    ids: Mapping[str, int],
    base: int,
    ground: int,
    chosen: Mapping[str, Any] | None = None,
) -> list[Matrix]:
    """Every model's matrix in the new vocabulary, a row at a time.

    chosen: token to (model, row), or "zero"; with a "!" as third or last part where it is forced.
    """
    by_id = {i: token for token, i in ids.items()}
    count = max(known[ground].rows, max(ids.values()) + 1)
    width = matrices[0].shape[1]
    out = [np.zeros((count, width)) for _ in known]
    for i in range(count):
        token = by_id.get(i)
        for m, mine in enumerate(known):
            if token is None:  # padding
                free = i not in mine.ids.values()
                if free and i < mine.rows:
                    out[m][i] = matrices[m][i]
                elif i < known[ground].rows:
                    out[m][i] = matrices[ground][i]
                continue
            choice = (chosen or {}).get(token)
            forced = choice is not None and choice[-1] == "!"
            own = mine.row(token)
            if own is not None and not forced:
                out[m][i] = matrices[m][own]
            elif choice is not None:
                if choice[0] != "zero":
                    out[m][i] = matrices[choice[0]][choice[1]]
            else:
                out[m][i] = _default(known, matrices, token, base)
    return out


def _default(
    known: Sequence[Known], matrices: Sequence[Matrix], token: str, base: int
) -> Matrix | float:
    having = [(m, r) for m, k in enumerate(known) if (r := k.row(token)) is not None]
    if not having:
        return 0.0
    if len(having) == 1:
        return matrices[having[0][0]][having[0][1]]
    if (row := known[base].row(token)) is not None:
        return matrices[base][row]
    return np.mean([matrices[m][r] for m, r in having], axis=0)
