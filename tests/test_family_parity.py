"""Every family merged from folders gives the outputs of the same model merged by hand in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge

from .architectures import DECODERS, PARTS, TOKENS, Family, loaded_model, new_model

State = Mapping[str, Tensor]
WEIGHTS = (0.25, 0.75)
PICTURE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Stack:
    """A list of three layers in a model, what config holds when they are four, and its module.

    module: what a recipe calls it. part: how the names of the module's weights begin.
    """

    layers: str
    config: dict[str, Any]
    module: str = ""
    part: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Case:
    """A family, its stacks of layers, and what the models are given."""

    family: Family
    stacks: tuple[Stack, ...]
    inputs: dict[str, Any] = field(default_factory=lambda: {"input_ids": TOKENS})


def case(name: str, layers: str, count: str = "num_hidden_layers", **lists: Any) -> Case:
    return Case(DECODERS[name], (Stack(layers, {count: 4, **lists}),))


TEXT, VISION = ({f"{p}_config": {"num_hidden_layers": 4}} for p in ("text", "vision"))
SLIDING, FULL = "sliding_attention", "full_attention"
CASES = {
    "llama": case("llama", "model.layers"),
    "mistral": case("mistral", "model.layers"),
    "qwen2": case("qwen2", "model.layers", layer_types=[FULL, SLIDING, SLIDING, FULL]),
    "qwen3": case("qwen3", "model.layers"),
    "gemma2": case("gemma2", "model.layers", layer_types=[SLIDING, FULL, FULL, SLIDING]),
    "phi3": case("phi3", "model.layers"),
    "gpt2": case("gpt2", "transformer.h", "n_layer"),
    "gpt_neox": case("gpt_neox", "gpt_neox.layers"),
    "bert": case("bert", "bert.encoder.layer"),
    "roberta": case("roberta", "roberta.encoder.layer"),
    "distilbert": case("distilbert", "distilbert.transformer.layer", "n_layers"),
    "mixtral": case("mixtral", "model.layers"),
    "qwen3_moe": case("qwen3_moe", "model.layers", mlp_only_layers=[1, 2]),
    "vit": replace(case("vit", "vit.layers"), inputs={"pixel_values": PICTURE}),
    "clip": Case(
        PARTS["clip text"],
        (
            Stack("text_model.encoder.layers", TEXT, "text_model", ("text_model.",)),
            Stack("vision_model.encoder.layers", VISION, "vision_model", ("vision_model.",)),
        ),
        {"input_ids": TOKENS, "pixel_values": PICTURE},
    ),
    "t5": Case(
        PARTS["t5 encoder"],
        (
            Stack("encoder.block", {"num_layers": 4}, "encoder", ("encoder.",)),
            Stack("decoder.block", {"num_decoder_layers": 4}, "decoder", ("decoder.",)),
        ),
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS + 1},
    ),
    "whisper": Case(
        PARTS["whisper decoder"],
        (
            Stack("model.encoder.layers", {"encoder_layers": 4}, "encoder", ("model.encoder.",)),
            Stack("model.decoder.layers", {"decoder_layers": 4}, "decoder", ("model.decoder.",)),
        ),
        {"input_features": PICTURE.reshape(1, 4, 48)[..., :16], "decoder_input_ids": TOKENS},
    ),
    "llava": Case(
        PARTS["llava text"],
        (
            Stack(
                "model.language_model.layers",
                TEXT,
                "text_decoder",
                ("model.language_model.", "lm_head."),
            ),
            Stack(
                "model.vision_tower.encoder.layers",
                VISION,
                "vision_tower",
                ("model.vision_tower.",),
            ),
        ),
        {"input_ids": torch.cat([torch.full((1, 4), 39), TOKENS], 1), "pixel_values": PICTURE},
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two fine-tunes, in memory and in folders."""

    case: Case
    models: tuple[Any, Any]
    folders: tuple[Path, Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models so small lose more by handing out their work than by doing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    known: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            case, folders = CASES[name], (root / "a", root / "b")
            models = (new_model(case.family), new_model(case.family))
            for model, folder in zip(models, folders, strict=True):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
                model.save_pretrained(folder)
            known[name] = Pair(case, models, folders)
        return known[name]

    return pair


def mean(states: Sequence[State], weights: Sequence[float] = WEIGHTS) -> dict[str, Tensor]:
    """The weighted mean of what all hold, in float64, rounded once; whole numbers as they are."""
    out = {}
    for name, first in states[0].items():
        if all(name in s for s in states):
            sums = [w * s[name].double() for w, s in zip(weights, states, strict=True)]
            out[name] = sum(sums[1:], sums[0]).float() if first.is_floating_point() else first
    return out


def averaged(pair: Pair) -> Any:
    """The mean of both models, by their state dicts."""
    made = new_model(pair.case.family)
    made.load_state_dict(mean([m.state_dict() for m in pair.models]))
    return made


def restacked(pair: Pair) -> Any:
    """The model of four layers, put together module by module.

    They are layer 0 merged, layer 1 of b twice, and layer 0 of a merged with layer 2 of b. What is
    in no layer is merged; what is in no module of the recipe is that of a.
    """
    changes: dict[str, Any] = {}
    for stack in pair.case.stacks:
        for key, value in stack.config.items():
            inner = pair.case.family.config.get(key) if isinstance(value, dict) else None
            changes[key] = value if inner is None else {**inner, **value}
    made, (a, b) = new_model(pair.case.family, changes), pair.models
    both, own = mean([a.state_dict(), b.state_dict()]), a.state_dict()
    parts = tuple(p for s in pair.case.stacks for p in s.part)
    for name, parameter in made.named_parameters():
        if not name.startswith(tuple(f"{s.layers}." for s in pair.case.stacks)):
            parameter.data.copy_((both if name.startswith(parts) else own)[name])
    for stack in pair.case.stacks:
        layers, of_a, of_b = (m.get_submodule(stack.layers) for m in (made, a, b))
        layers[0].load_state_dict(mean([of_a[0].state_dict(), of_b[0].state_dict()]))
        layers[1].load_state_dict(of_b[1].state_dict())
        layers[2].load_state_dict(of_b[1].state_dict())
        layers[3].load_state_dict(mean([of_a[0].state_dict(), of_b[2].state_dict()]))
    return made


def linear_recipe(pair: Pair) -> str:
    return "merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: {folder}, parameters: {{weight: {weight}}}}}\n"
        for folder, weight in zip(pair.folders, WEIGHTS, strict=True)
    )


def slice_recipe(pair: Pair) -> str:
    """What `restacked` does by hand, for each stack."""
    a, b = pair.folders
    slices = [[(a, 0), (b, 0)], [(b, 1)], [(b, 1)], [(a, 0), (b, 2)]]
    entries = [
        "- sources:\n"
        + "".join(
            f"  - {{model: {m}, layer_range: [{i}, {i + 1}], parameters: {{weight: {w}}}}}\n"
            for (m, i), w in zip(sources, WEIGHTS, strict=False)
        )
        for sources in slices
    ]
    text = "slices:\n" + "".join(entries)
    if modules := [s.module for s in pair.case.stacks if s.module]:
        inner = "".join(f"    {line}\n" for line in text.splitlines())
        text = "modules:\n" + "".join(f"  {m}:\n{inner}" for m in modules)
    return f"merge_method: linear\nbase_model: {a}\n{text}"


def outputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All that a forward pass returns: logits, embeddings, hidden states of every layer."""
    flat: dict[str, Tensor] = {}

    def collect(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            flat[name] = value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                collect(f"{name} {key}", inner)
        elif isinstance(value, tuple):
            for i, inner in enumerate(value):
                collect(f"{name} {i}", inner)

    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    model.set_experts_implementation("eager")  # the others compute in float32 at most
    with torch.no_grad():
        collect("", model.double()(**wide, output_hidden_states=True))
    return flat


def assert_merged(pair: Pair, recipe: str, by_hand: Any, tmp_path: Path) -> None:
    """The recipe's output is what transformers itself would save of the model made by hand."""
    (tmp_path / "r.yml").write_text(recipe)
    merge.apply(tmp_path / "r.yml", tmp_path / "out")
    by_hand.save_pretrained(tmp_path / "by_hand")
    saved, by_transformers = merge.open(tmp_path / "out"), merge.open(tmp_path / "by_hand")
    assert set(saved) == set(by_transformers)  # so a tied head is there once
    assert saved.side.config == by_transformers.side.config
    loaded = loaded_model(pair.case.family, tmp_path / "out")
    found, wanted = (outputs(m, pair.case.inputs) for m in (loaded, by_hand))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max().clip(1), name
    first = next(iter(wanted))
    for model in pair.models:
        assert (outputs(model, pair.case.inputs)[first] - wanted[first]).abs().max() > 0.01


WAYS = {"average": (linear_recipe, averaged), "slices": (slice_recipe, restacked)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("recipe", "by_hand"), WAYS.values(), ids=WAYS)
def test_a_merge_of_folders_is_the_same_merge_in_memory(
    recipe: Callable[[Pair], str],
    by_hand: Callable[[Pair], Any],
    name: str,
    pairs: Callable[[str], Pair],
    tmp_path: Path,
) -> None:
    pair = pairs(name)
    assert_merged(pair, recipe(pair), by_hand(pair), tmp_path)
