"""Small adapters trained (well, shaken) by peft on small models, and what peft makes of them.

Shared by the tests of adapters; nothing here is a test.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
from tests.architectures import DECODERS, PARTS, Family, new_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
TOKENS = {"input_ids": torch.arange(3, 9)[None]}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of peft and transformers, which are about other things than ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Trained:
    """A base and an adapter on disk. output: what the model with the adapter says to ``inputs``."""

    base: Path
    adapter: Path
    kind: Any
    inputs: Mapping[str, Tensor]
    output: Tensor
    tuned: Any

    def merged(self) -> dict[str, Tensor]:
        """The weights by merge_and_unload, as transformers saves them; to be asked for once."""
        folder = self.adapter.parent / "by_peft"
        with quiet():
            self.tuned.merge_and_unload().save_pretrained(folder)
        return load_file(folder / "model.safetensors")

    def says(self, folder: Path) -> Tensor:
        """What the model in ``folder`` says to the same inputs; all its weights are in place."""
        with quiet():
            model, info = self.kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "mismatched_keys")), info
        return spoken(model, self.inputs)


def spoken(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad(), quiet():
        out = model.eval()(**inputs)
    found: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return found


def family(name: str, kind: str | None = None, **changes: Any) -> Any:
    """A small model by its name in `tests.architectures`, or another class of that family."""
    found = {**DECODERS, **PARTS}[name]
    return new_model(Family(kind or found.model, found.config, {}, kind=found.kind), changes)


def inputs_of(name: str) -> Mapping[str, Tensor]:
    return {**DECODERS, **PARTS}[name].inputs or TOKENS


def shaken(model: Any, *, by: float = 0.05, seed: int = 1) -> None:
    """Change all that is trained by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator).to(p))


def train(
    folder: Path,
    model: Any,
    config: Any,
    inputs: Mapping[str, Tensor] = TOKENS,
    *,
    base: Path | None = None,
    name: str = "adapter",
    seed: int = 1,
    saved_on: Any = None,
) -> Trained:
    """The model with an adapter of that config, both written below ``folder``.

    base: where the base lies already. saved_on: the model that is written as the base, where it is
    another one than that which is trained.
    """
    with quiet():
        if base is None:
            base = folder / "base"
            (model if saved_on is None else saved_on).save_pretrained(base)
        model.name_or_path = str(base)
        tuned = peft.get_peft_model(model, config)
        shaken(tuned, seed=seed)
        tuned.save_pretrained(folder / name)
    return Trained(base, folder / name, type(model), inputs, spoken(tuned, inputs), tuned)


def lora(**settings: Any) -> peft.LoraConfig:
    """A LoRA of rank 4 on two layers, if nothing else is said."""
    return peft.LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "r": 4, **settings})


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """All of the same tensors, to a millionth."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def opened(it: Trained) -> merge.Checkpoint:
    """The base with the adapter on it."""
    return merge.open(f"{it.base}+{it.adapter}")


def edit(it: Trained, changes: Mapping[str, Any]) -> None:
    """Change the adapter's config."""
    file = it.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def retensor(it: Trained, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the adapter's tensors."""
    file = it.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
