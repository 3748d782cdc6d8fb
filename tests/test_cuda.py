"""What a GPU computes is what the processor computes; runs where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor, nn

import merge
from tests.conftest import MakeModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WEIGHT, DENSE = {"weight": 0.4}, {"weight": 0.4, "density": 0.5}
OWN: dict[str, dict[str, float]] = {
    "linear": WEIGHT,
    "task_arithmetic": WEIGHT,
    "ties": DENSE,
    "dare_linear": DENSE,
    "dare_ties": DENSE,
    "breadcrumbs": DENSE,
    "della": DENSE,
    "sce": {},
    "model_stock": {},
    "karcher": {},
    "multislerp": WEIGHT,
    "magmax": {},
    "consensus_ta": {},
    "pcb": {},
    "geometric_median": {},
    "ram": {},
    "tsv": {},
    "iso_c": {},
    "iso_cts": {},
    "cart": {},
    "wudi": {},
}
BASELESS = ("linear", "karcher", "multislerp", "geometric_median")


def written(make_model: MakeModel, method: str, dtype: torch.dtype) -> str:
    """A recipe for the method over a base and three models of it."""
    draw = torch.Generator().manual_seed(3)
    parts = {"up.weight": (96, 40), "down.weight": (40, 96), "norm.weight": (40,)}
    shapes = {f"layers.{i}.{n}": shape for i in range(2) for n, shape in parts.items()}
    base = {n: torch.randn(s, generator=draw) / 6 for n, s in shapes.items()}
    make_model("base", {n: t.to(dtype) for n, t in base.items()})
    folders = []
    for k in range(3):
        tuned = {n: t + torch.randn(t.shape, generator=draw) / 60 for n, t in base.items()}
        folders.append(make_model(f"tuned{k}", {n: t.to(dtype) for n, t in tuned.items()}))
    lines = [f"merge_method: {method}"]
    if method not in BASELESS:
        lines.append(f"base_model: {folders[0].parent / 'base'}")
    lines.append("models:")
    for folder in folders:
        lines += [f"  - model: {folder}", f"    parameters: {json.dumps(OWN[method])}"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", list(OWN))
def test_methods(make_model: MakeModel, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(written(make_model, method, dtype))
    here = load_file(merge.apply(recipe, tmp_path / "cpu") / "model.safetensors")
    there = load_file(merge.apply(recipe, tmp_path / "gpu", device="cuda") / "model.safetensors")
    again = merge.apply(recipe, tmp_path / "again", device="cuda", memory="256MB", threads=3)
    assert here.keys() == there.keys()
    apart = 2e-5 if dtype == torch.float32 else 1e-2  # an ulp of bfloat16 is 2^-8 of the value
    for name, tensor in here.items():
        wrong = (
            there[name].float() - tensor.float()
        ).abs() > apart * tensor.float().abs().clamp_min(0.05)
        assert wrong.float().mean() <= 0.002, name  # a tie of ranks may fall the other way
        assert torch.equal(load_file(again / "model.safetensors")[name], there[name]), name


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


@pytest.mark.parametrize("memory", ["resident", "stream", "int8", "lowrank:4"])
@pytest.mark.parametrize("how", [
    {"preset": "adamerging", "steps": 20}, {"preset": "spectral_gates", "steps": 20},
    {"granularity": "row", "steps": 20}, {"prepare": "ties:0.5", "steps": 20},
], ids=lambda how: str(next(iter(how.values()))))  # fmt: skip
def test_learning(memory: str, how: dict[str, object]) -> None:
    def learned(device: str) -> merge.Learned:
        torch.manual_seed(5)
        base = Net()
        experts = {n: Net() for n in ("a", "b", "c")}
        for expert in experts.values():
            expert.load_state_dict(base.state_dict())
            with torch.no_grad():
                for tensor in expert.parameters():
                    tensor.add_(0.2 * torch.randn_like(tensor))
        tasks = {}
        for name, expert in experts.items():
            x = torch.randn(64, 6)
            labels = expert(x).argmax(1)
            tasks[name] = merge.Task(
                expert.to(device), F.cross_entropy, train=[],
                adapt=[x[i : i + 16].to(device) for i in range(0, 48, 16)],
                validate=[(x[48:].to(device), labels[48:].to(device))], head=["head"],
            )  # fmt: skip
        kept = {n: {k: t.cpu() for k, t in e.state_dict().items()} for n, e in experts.items()}
        return merge.learn(kept, base=base, tasks=tasks, memory=memory, **how)

    here, there = learned("cpu"), learned("cuda")
    assert there.coefficients.blocks.keys() == here.coefficients.blocks.keys()
    ours, theirs = here.checkpoint.state_dict(), there.checkpoint.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name].cpu(), tensor, rtol=2e-2, atol=2e-3)
