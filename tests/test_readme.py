"""What README.md shows is run, and its table of methods is the registry's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import merge
from tests.readme import README, with_table

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.fixture
def workplace(
    tmp_path: Path, llamas: Callable[[str], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the models that README.md speaks of, as the current one."""
    base, first, second, third = llamas("float32")
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(first, tmp_path / "math")
    shutil.copytree(second, tmp_path / "code")
    for step, folder in zip((100, 200, 300, 400), (base, first, second, third), strict=True):
        shutil.copytree(folder, tmp_path / "run" / f"checkpoint-{step}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run(code: str, workplace: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(workplace / "base")
    exec(code, {"model": model, "score": lambda checkpoint: -len(checkpoint.label)})


def test_the_recipe_runs_and_equals_its_python_form(workplace: Path) -> None:
    (recipe,) = (code for language, code in BLOCKS if language == "yaml")
    Path("recipe.yml").write_text(recipe)
    merge.apply("recipe.yml", "from-yaml")
    exec(PYTHON[0], {})
    weights = [
        {f.name: f.read_bytes() for f in (workplace / folder).glob("*.safetensors")}
        for folder in ("from-yaml", "merged")
    ]
    assert weights[0] == weights[1]


def test_the_average_of_the_last_checkpoints_is_their_mean(workplace: Path) -> None:
    (code,) = (c for c in PYTHON if "average(" in c)
    exec(code, {})
    states = [
        LlamaForCausalLM.from_pretrained(f"run/checkpoint-{n}").state_dict()
        for n in (200, 300, 400)
    ]
    averaged = LlamaForCausalLM.from_pretrained("averaged").state_dict()
    for name, tensor in averaged.items():
        mean = sum(s[name].double() for s in states) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_a_task_vector_is_applied_to_the_live_module(workplace: Path) -> None:
    (code,) = (c for c in PYTHON if "live" in c)
    model = LlamaForCausalLM.from_pretrained("code")
    before = {k: v.double().clone() for k, v in model.state_dict().items()}
    exec(code, {"model": model})
    tuned = LlamaForCausalLM.from_pretrained("math").state_dict()
    base = LlamaForCausalLM.from_pretrained("base").state_dict()
    for name, tensor in model.state_dict().items():
        wanted = before[name] + 0.5 * (tuned[name].double() - base[name].double())
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_table_of_methods_is_current() -> None:
    text = README.read_text()
    assert with_table(text) == text, "run `python -m tests.readme`"
