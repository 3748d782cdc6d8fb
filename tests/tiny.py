"""Tiny models in memory for tests of recipes: every tensor of every model has values of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merge.checkpoint.memory import open_state_dict
from merge.errors import RecipeError, SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Apply, walk
from merge.ir.reference import Reference
from merge.ir.side import Side
from merge.recipe.compile import Compiled, compile_recipe
from merge.recipe.read import parse_recipe

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ATTENTION, MLP = "self_attn.q_proj", "mlp.up_proj"
Opener = Callable[[Reference], Checkpoint]


def layer(number: int, part: str = MLP) -> str:
    return f"model.layers.{number}.{part}.weight"


def noise(*words: object, shape: tuple[int, ...] = (4, 3)) -> Tensor:
    """Normal values that depend on the words alone."""
    seed = int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(called: str, layers: int = 4) -> dict[str, Tensor]:
    """The tensors of a decoder of ``layers`` layers."""
    parts = [layer(i, p) for i in range(layers) for p in (ATTENTION, MLP)]
    return {n: noise(called, n) for n in (EMBED, *parts, NORM, HEAD)}


def zoo(**layers: int) -> Opener:
    """Opens the models that are named here, with so many layers each, and no others."""

    def opened(reference: Reference) -> Checkpoint:
        called = str(reference)
        if called not in layers:
            raise SourceError("no such model", model=called)
        config = {"num_hidden_layers": layers[called], "of": called}
        return open_state_dict(model(called, layers[called]), called, Side(config=config))

    return opened


def compiled(text: str, opener: Opener, **options: Any) -> Compiled:
    return compile_recipe(parse_recipe(text, **options), opener)


def result(text: str, opener: Opener, **options: Any) -> dict[str, Tensor]:
    """The tensors that the recipe makes."""
    return compiled(text, opener, **options).checkpoint.state_dict()


def error_of(text: str, opener: Opener, **options: Any) -> RecipeError:
    """The error of a recipe that is wrong; it has a line and a column."""
    with pytest.raises(RecipeError) as caught:
        compiled(text, opener, **options)
    assert caught.value.where["recipe"] == "recipe"
    assert min(place(caught.value)) >= 1
    return caught.value


def place(error: RecipeError) -> tuple[int, int]:
    return int(error.where["line"]), int(error.where["column"])


def value_at(made: Compiled, name: str, key: str) -> Any:
    """The argument ``key`` with which the tensor ``name`` is computed."""
    found = next(n for n in walk(made.checkpoint.tensors[name]) if isinstance(n, Apply))
    return found.arguments[key]


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Equal to the bit."""
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Equal to a float64 computation up to the last bits of a float32."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=3e-6, atol=1e-6)
