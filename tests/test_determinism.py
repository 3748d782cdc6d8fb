"""The bytes of an output depend on the recipe and its inputs, and on nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import merge
from merge import methods, run
from merge.ir.checkpoint import Checkpoint
from merge.ir.merging import merge_checkpoints
from merge.plan.model import Plan

METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "model_stock": {},
    "ties": {"weight": [0.5, 1.5, -0.3], "density": 0.3},
    "dare_ties": {"weight": [0.5, 1.5, -0.3], "density": 0.3, "seed": 3},
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes: one tensor of several chunks, one of several tiles, small ones.

    Half of each is bfloat16, whose differences often tie; no size is a whole number of tiles.
    """
    root = tmp_path_factory.mktemp("models")
    draw = torch.Generator().manual_seed(11)
    base = {
        "wide": torch.randn(3_000_001, generator=draw).bfloat16(),
        "matrix": torch.randn(1500, 1000, generator=draw),
        "layers.0.norm": torch.ones(129),
        "layers.1.bias": torch.randn(33, generator=draw).bfloat16(),
    }
    folders = []
    for name in ("base", "a", "b", "c"):
        state = base
        if name != "base":
            state = {
                n: t + 0.05 * torch.randn(t.shape, generator=draw).to(t.dtype)
                for n, t in base.items()
            }
        (root / name).mkdir()
        save_file(state, root / name / "model.safetensors", metadata={"format": "pt"})
        (root / name / "config.json").write_text('{"model_type": "toy"}')
        folders.append(root / name)
    return folders


def lazy(method: str, models: list[Path]) -> Checkpoint:
    base, *tuned = models
    checkpoint = (
        merge.slerp([base, tuned[0]], **METHODS[method])
        if method == "slerp"
        else getattr(merge, method)(tuned, base=base, **METHODS[method])
    )
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def weights(folder: Path) -> dict[str, bytes]:
    """The weight files by name."""
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of each tensor, wherever it lies."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def saved(plan: Plan, out: Path) -> dict[str, bytes]:
    """The weight files of one run of ``plan``, which is not left lying about."""
    files = weights(run.save_plan(plan, out).path)
    for path in out.iterdir():
        path.unlink()
    return files


def least_memory(checkpoint: Checkpoint) -> int:
    """The bytes without which one worker cannot work, as the refusal of too few states them."""
    with pytest.raises(merge.PlanError) as caught:
        checkpoint.plan(memory=1)
    return int(re.findall(r"\d+", caught.value.expected or "")[0])


@every_method
def test_threads_and_memory_do_not_change_a_byte(
    method: str, models: list[Path], tmp_path: Path
) -> None:
    checkpoint = lazy(method, models)
    reference = checkpoint.plan(threads=1, memory="1GiB")
    expected = saved(reference, tmp_path / "out")
    cut = {reference.budget.tile}
    least = least_memory(checkpoint)
    for threads, memory in ((1, least), (2, 3 * least), (2, "64MiB"), (4, "64MiB"), (4, "1GiB")):
        plan = checkpoint.plan(threads=threads, memory=memory)
        cut.add(plan.budget.tile)
        assert saved(plan, tmp_path / "out") == expected, (threads, memory)
    assert len(cut) > 1, "the tiles of all runs were alike, so nothing was tested"


@pytest.mark.parametrize("name", ["ties", "della"])
def test_a_measure_that_may_hold_nothing_finds_the_same(models: list[Path], name: str) -> None:
    """Thresholds are then counted instead of guessed, and masks drawn again."""
    method = methods.get(name)
    base, *tuned = (merge.open(folder) for folder in models)
    allowances = []

    def stingy(tiles: Any, **parameters: Any) -> object:
        allowances.append(tiles.allowance)
        tiles.allowance = 0
        return method.measure(tiles, **parameters) if method.measure else None

    bound = method.bind(3, METHODS["ties"])
    expected, found = (
        tensors_in_memory(merge_checkpoints(m, tuned, base, lambda _: bound))
        for m in (method, replace(method, measure=stingy))
    )
    assert min(allowances) > 0
    assert found == expected


def tensors_in_memory(checkpoint: Checkpoint) -> dict[str, bytes]:
    state = checkpoint.state_dict()
    return {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in state.items()}


@every_method
def test_shards_hold_the_same_tensors_in_other_files(
    method: str, models: list[Path], tmp_path: Path
) -> None:
    checkpoint = lazy(method, models)
    whole = checkpoint.save(tmp_path / "whole")
    parts = checkpoint.save(tmp_path / "parts", shard_size="2MB")
    assert len(weights(whole)) == 1
    assert len(weights(parts)) > 1
    assert tensors(parts) == tensors(whole)


@every_method
def test_memory_and_disk_get_the_same_tensors(
    method: str, models: list[Path], tmp_path: Path
) -> None:
    checkpoint = lazy(method, models)
    assert tensors_in_memory(checkpoint) == tensors(checkpoint.save(tmp_path / "out"))


class Interrupted(Exception):
    """What stops the runs below."""


@every_method
@pytest.mark.parametrize("moves", [1, 3, 5])
def test_a_run_that_was_interrupted_and_resumed_ends_bit_equal(
    method: str, moves: int, models: list[Path], tmp_path: Path
) -> None:
    plan = lazy(method, models).plan(threads=1, memory="64MiB")
    expected = saved(plan, tmp_path / "calm")
    left = iter(range(moves))

    def interrupt(_moved: int) -> None:
        if next(left, None) is None:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.save_plan(plan, tmp_path / "out", run.WriteOptions(progress=interrupt))
    assert not (tmp_path / "out").exists()
    again = lazy(method, models).plan(threads=2, memory="1GiB")
    report = run.save_plan(again, tmp_path / "out").report
    assert report is not None
    assert report.resumed_chunks > 0
    assert weights(tmp_path / "out") == expected


RECIPE = """
merge_method: dare_ties
base_model: {base}
models:
  - model: {a}
    parameters: {{weight: 0.5, density: [0.2, 0.9]}}
  - model: {b}
    parameters: {{weight: 0.7, density: [{{filter: mlp, value: 0.3}}, {{value: 0.6}}]}}
  - model: {c}
    parameters: {{weight: -0.2, density: 0.5}}
parameters: {{normalize: true, lambda: 0.8}}
seed: 7
"""


def test_the_hash_seed_of_python_does_not_change_a_byte(
    llamas: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    base, a, b, c = llamas("bfloat16")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPE.format(base=base, a=a, b=b, c=c))
    command = [sys.executable, "-m", "merge_cli", "apply", str(recipe)]
    runs = {
        seed: subprocess.Popen(
            [*command, str(tmp_path / f"out{seed}"), "--shard-size", "20KB", "-q"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1", "random")
    }
    for seed, process in runs.items():
        out, err = process.communicate()
        assert (process.returncode, out, err) == (0, f"{tmp_path / f'out{seed}'}\n", "")
    folders = [
        {p.name: p.read_bytes() for p in (tmp_path / f"out{seed}").iterdir()} for seed in runs
    ]
    assert len(folders[0]) > 3
    assert folders[0] == folders[1] == folders[2]
