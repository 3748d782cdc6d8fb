"""Differences of models: against numpy in float64, by name, on the Hub, and on the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import merge
from merge.analysis.difference import Distance, sums_of
from merge.errors import PlanError
from tests.conftest import MakeModel
from tests.hub import Hub


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    names = [f"model.layers.{i}.mlp.w" for i in range(3)] + ["model.embed.weight"]
    return {n: scale * torch.randn(50, 40) for n in names}


@pytest.fixture
def three(make_model: MakeModel) -> list[Path]:
    base, move = tensors(0), tensors(1, 0.1)
    tuned = {n: t + move[n] for n, t in base.items()}
    other = {n: t + 0.5 * move[n] + 0.1 * tensors(2)[n] for n, t in base.items()}
    tuned["model.embed.weight"] = base["model.embed.weight"].clone()
    return [make_model(n, t) for n, t in (("base", base), ("tuned", tuned), ("other", other))]


def test_figures_are_those_of_float64(three: list[Path]) -> None:
    base, a, b = (
        {n: t.double().numpy() for n, t in merge.open(p).state_dict().items()} for p in three
    )
    found = merge.diff(three[1], three[2], base=three[0])
    assert [row.name for row in found.tensors] == list(merge.open(three[1]))
    for row in found.tensors:
        x, y = a[row.name], b[row.name]
        u, v = (x - base[row.name]).ravel(), (y - base[row.name]).ravel()
        assert row.distance == pytest.approx(np.linalg.norm(x - y), rel=1e-12)
        assert row.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
        assert row.equal == np.mean(x == y)
        if not u.any():
            assert math.isnan(row.cosine) and math.isnan(row.signs)
            continue
        assert row.cosine == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v), rel=1e-9)
        assert row.signs == pytest.approx(np.mean(np.sign(u) == np.sign(v)))
    whole = np.concatenate([(a[n] - b[n]).ravel() for n in a])
    assert found.whole.distance == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    names = {row.name for row in found.layers}
    assert names == {"(no layer)", *(f"model.layers.{i}" for i in range(3))}


def test_a_model_is_itself_and_the_opposite_of_its_opposite(three: list[Path]) -> None:
    same = merge.diff(three[0], three[0]).whole
    assert (same.distance, same.relative, same.equal, same.signs) == (0.0, 0.0, 1.0, 1.0)
    assert same.cosine == pytest.approx(1.0, abs=1e-12)
    opened = merge.open(three[0])
    against = merge.diff(opened, {n: -t for n, t in opened.state_dict().items()}).whole
    assert against.cosine == pytest.approx(-1.0, abs=1e-12)
    assert against.signs == 0.0 and against.relative == pytest.approx(2.0)


def test_the_same_for_any_threads_and_memory(three: list[Path]) -> None:
    big = {"l.0.w": torch.randn(1500, 1000), "l.1.w": torch.randn(900, 1000)}
    less = {n: t + 0.1 for n, t in big.items()}
    one = merge.diff(big, less, threads=1).whole
    assert one.distance == merge.diff(big, less, threads=4, memory="64MiB").whole.distance


def test_what_cannot_be_compared_is_named() -> None:
    a = {"x": torch.ones(2), "only": torch.ones(1), "s": torch.ones(2), "n": torch.ones(2).int()}
    b = {"x": torch.zeros(2), "s": torch.ones(3), "n": torch.ones(2).int()}
    found = merge.diff(a, b)
    assert [row.name for row in found.tensors] == ["x"]
    assert set(found.left_out) == {"only", "s", "n"}
    assert "shapes [2], [3]" in found.left_out["s"] and "int32" in found.left_out["n"]
    with pytest.raises(PlanError, match="no tensor in common"):
        merge.diff({"x": torch.ones(1)}, {"y": torch.ones(1)})


def test_numbers_that_are_none_pass() -> None:
    row = Distance.of("x", [sums_of([torch.tensor([math.nan]), torch.tensor([1.0])])])
    assert math.isnan(row.distance)
    found = merge.diff({"x": torch.tensor([math.inf, 1.0])}, {"x": torch.ones(2)})
    assert json.loads(json.dumps(found.to_json()))["whole"]["relative"] is None


def test_a_diff_on_the_hub_reads_each_tensor_once(hub: Hub, make_model: MakeModel) -> None:
    folders = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        folders.append(make_model(name, {f"l.{i}.w": torch.randn(500, 500) for i in range(8)}))
        hub.upload(f"org/{name}", folders[-1])
    near = merge.diff(*folders)
    far = merge.diff("org/a", "org/b", threads=2)
    assert far.tensors == near.tensors
    assert hub.sent("/blob/") < 1.02 * 2 * 8 * 1_000_000 + 2 * 100_000
    assert len(hub.seen("HEAD .*safetensors")) == 2


def test_the_command(three: list[Path], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "merge_cli", "diff", *map(str, three[1:]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    done = run("--base", str(three[0]), "--plot", "d.png")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["distance", "relative", "cosine", "signs", "equal"]
    assert lines[-1].startswith("all ") and len(lines) == 6
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(run("--json", "--tensors").stdout)
    assert len(data["tensors"]) == 4 and data["whole"]["parameters"] == 8000
    assert run("--plot", "d.doc").returncode == 2
