"""The real all-MiniLM-L6-v2 and a fine-tune of it, merged and used by sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch

import merge

PAIRS = [
    ("A man is playing a guitar on stage.", "Someone performs music in front of people."),
    ("The stock market fell sharply today.", "Share prices dropped a lot this afternoon."),
    ("She is baking bread in the kitchen.", "A loaf is being made at home."),
    ("The train was two hours late.", "Passengers waited long for their train."),
]
HELD_OUT = [
    "Two dogs run through the snow.",
    "Interest rates were raised by the central bank.",
    "How do I reset my password?",
    "",
    "Ünïcödé, 数字 and 🙂 in one line",
]


def tuned(minilm: Path) -> Any:
    """MiniLM after two steps that bring the halves of each pair together."""
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    model.eval()
    steps = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for _ in range(2):
        sides = zip(*PAIRS, strict=True)
        a, b = (model(model.preprocess(list(side)))["sentence_embedding"] for side in sides)
        scores = 20 * a @ b.T
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(PAIRS)))
        steps.zero_grad()
        loss.backward()
        steps.step()
    return model


def test_a_merged_encoder_gives_the_embeddings_of_the_model_merged_by_hand(
    minilm: Path, tmp_path: Path
) -> None:
    model, weight = tuned(minilm), 0.3
    model.save_pretrained(str(tmp_path / "tuned"), create_model_card=False)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"""merge_method: linear
models:
  - {{model: {json.dumps(str(minilm))}, parameters: {{weight: {1 - weight}}}}}
  - {{model: {json.dumps(str(tmp_path / "tuned"))}, parameters: {{weight: {weight}}}}}
"""
    )
    out = merge.apply(recipe, tmp_path / "merged")
    merged = sentence_transformers.SentenceTransformer(str(out), device="cpu")

    base = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    before, after = base.state_dict(), model.state_dict()
    by_hand = {
        n: ((1 - weight) * before[n].double() + weight * after[n].double()).to(t.dtype)
        for n, t in after.items()
    }
    base.load_state_dict(by_hand)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, by_hand[name], rtol=1e-6, atol=1e-7)
    found, wanted = (m.encode(HELD_OUT, show_progress_bar=False) for m in (merged, base))
    assert found.shape == (len(HELD_OUT), 384)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert np.abs(found - model.encode(HELD_OUT, show_progress_bar=False)).max() > 1e-3
    assert (out / "modules.json").is_file() and (out / "1_Pooling" / "config.json").is_file()
