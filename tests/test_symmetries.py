"""The way to a model's symmetry: templates, twins, modules, a user's spec; and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from merge_cli.app import cli
from torch import nn

import merge
from merge.axes import axes_of, explained
from merge.errors import PlanError, RecipeError, SourceError
from merge.symmetry.elements import random_element
from merge.symmetry.templates import template_of
from merge.tracing import fallback

from .architectures import DECODERS, new_model
from .symmetries import MLP
from .zoo import NETWORKS, mlp, rows

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is derived is kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def stablelm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of a type that no template is shipped for."""
    folder = tmp_path_factory.mktemp("stablelm")
    new_model(DECODERS["stablelm"], {**SMALL, "num_key_value_heads": 2}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    new_model(DECODERS["llama"], {**SMALL, "num_key_value_heads": 2}).save_pretrained(folder)
    return folder


def test_a_known_type_takes_its_template(llama: Path, own_cache: Path) -> None:
    symmetry = merge.symmetry_of(llama)
    assert {n: g.size for n, g in symmetry.groups.items() if n in ("d", "kv1", "slot1", "v1")} == {
        "d": 32, "kv1": 2, "slot1": 2, "v1": 8,
    }  # fmt: skip
    assert list(symmetry.tensors) == list(merge.open(llama))
    assert not own_cache.exists()


def test_an_unknown_type_is_derived_once_and_remembered(
    stablelm: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = merge.symmetry_of(stablelm)
    assert first.groups["slot0"].size == 2 and first.groups["slot0"].per == ("kv0",)
    (file,) = own_cache.rglob("stablelm-*.json")
    assert json.loads(file.read_text())["model"] == "stablelm"
    monkeypatch.setattr(fallback, "spec_of_class", None)  # it is not called again
    assert merge.symmetry_of(stablelm) == first


def test_a_cache_that_cannot_be_written_to_only_costs_time(
    stablelm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert merge.symmetry_of(stablelm).groups


def test_layers_that_differ_are_told_from_a_twin_of_all_layers(tmp_path: Path) -> None:
    """Layers without rotary positions have free coordinates where others have frozen ones."""
    layers = {"num_hidden_layers": 10, "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0, 0, 1]}
    new_model(DECODERS["smollm3"], {**SMALL, **layers}).save_pretrained(tmp_path)
    symmetry = merge.symmetry_of(tmp_path)
    free = []
    for number in range(10):
        layout = symmetry.tensors[f"model.layers.{number}.self_attn.k_proj.weight"]
        free.append(any("R" in symmetry.groups[g].flags for g in layout.groups()))
    assert free == [not rotary for rotary in layers["no_rope_layers"]]


def test_a_module_is_run_with_its_inputs() -> None:
    symmetry = merge.symmetry_of(mlp(), (rows(5, 3),))
    assert [g.size for g in symmetry.groups.values()] == [8, 6]
    free = merge.symmetry_of(mlp(), (rows(5, 3),), outputs="free")
    assert [g.size for g in free.groups.values() if g.output] == [2]


def test_named_inputs_of_a_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.out(torch.tanh(self.map(x)) * scale)}

    inputs = {"x": rows(4, 3), "scale": torch.tensor(2.0)}
    assert [g.flags for g in merge.symmetry_of(Two(), inputs).groups.values()] == ["PS"]


def test_a_module_of_transformers_needs_no_inputs() -> None:
    model = new_model(DECODERS["llama"], SMALL)
    assert "kv0" in merge.symmetry_of(model).groups


def test_the_outputs_of_a_model_without_a_head_stay_unless_they_are_freed() -> None:
    body = new_model(DECODERS["bert"], SMALL).bert
    fixed, free = (merge.symmetry_of(body, outputs=o) for o in ("fixed", "free"))  # type: ignore[arg-type]
    assert fixed.groups["d"].flags == "" and "no head" in fixed.groups["d"].reason
    assert free.groups["d"].flags == "P"
    assert "d" not in random_element(fixed) and "d" in random_element(free)


@pytest.mark.parametrize("kind", ["file", "data"])
def test_a_spec_that_is_given_goes_before_all_else(kind: str, tmp_path: Path) -> None:
    spec: Any = {**MLP, "groups": {"a": {"flags": "P"}, "b": {"flags": "P"}}}
    if kind == "file":
        (tmp_path / "mine.json").write_text(json.dumps(spec))
        spec = tmp_path / "mine.json"
    symmetry = merge.symmetry_of(mlp(), spec=spec)
    assert {n: g.flags for n, g in symmetry.groups.items()} == {"a": "P", "b": "P"}


def test_integers_that_a_spec_does_not_know_are_fixed() -> None:
    state = {**mlp().state_dict(), "position_ids": torch.arange(6)[None]}
    layout = merge.symmetry_of(state, spec=MLP).tensors["position_ids"]
    assert list(map(str, layout.axes)) == ["_1", "_6"]


# -- errors --------------------------------------------------------------------------------------


def test_a_model_of_no_known_type_asks_for_a_spec_or_inputs() -> None:
    with pytest.raises(PlanError, match="give a symmetry spec, or the module itself"):
        merge.symmetry_of(mlp())


def test_a_class_that_transformers_does_not_have(llama: Path, tmp_path: Path) -> None:
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(SourceError, match="does not have the model's class") as caught:
        merge.symmetry_of(tmp_path)
    assert "MineForCausalLM" in str(caught.value) and str(tmp_path) in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    with pytest.raises(SourceError, match="names no class"):
        merge.symmetry_of(tmp_path)


def test_a_twin_that_does_not_run_says_what_went_wrong(tmp_path: Path, stablelm: Path) -> None:
    config = json.loads((stablelm / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "nonsense"}))
    (tmp_path / "model.safetensors").write_bytes((stablelm / "model.safetensors").read_bytes())
    with pytest.raises(SourceError, match=r"a tiny twin of the model does not run(.|\n)*nonsense"):
        merge.symmetry_of(tmp_path)


def test_a_tensor_of_another_shape_than_the_spec_says() -> None:
    state = dict(new_model(DECODERS["llama"], SMALL).state_dict())
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(25, 32)
    template = template_of("llama")
    assert template is not None
    with pytest.raises(PlanError, match="another length") as caught:
        merge.symmetry_of(state, spec=_sized(template.variants[0].spec))
    assert caught.value.where["tensor"] == "model.layers.1.mlp.up_proj.weight"
    assert caught.value.found == "25"


def _sized(spec: Any) -> Any:
    """The spec with numbers for what the config would say."""
    data = spec.to_json()
    sizes = {"kv{i}": "1", "slot{i}": "4", "v{i}": "8", "qk{i}": "8", "f{i}": "24", "d": "32"}
    for name, group in data["groups"].items():
        group["size"] = sizes[name]
    return data


def test_a_spec_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            merge.symmetry_of(mlp(), spec=tmp_path / name)
        assert name in caught.value.where["file"]


def test_inputs_are_for_modules(llama: Path) -> None:
    with pytest.raises(RecipeError, match="example inputs are for a module"):
        merge.symmetry_of(llama, (rows(2, 3),))


# -- as it is shown ------------------------------------------------------------------------------


def shown(*arguments: object) -> str:
    done = CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_axes_are_listed_by_pattern(llama: Path) -> None:
    text = shown(llama, "--axes")
    assert "slot#             2 P      x 2 for each index of kv#" in text
    assert "v#                8 PSDR   x 2 for each index of kv#" in text
    assert "frozen x 2: the buffer inv_freq" in text
    assert "layers.{i}.self_attn.o_proj.weight  d, kv#.slot#.v#*  x 2" in text
    assert "_token: rows are looked up by number" in text
    data = json.loads(shown(llama, "--axes", "--json"))
    assert data == axes_of(llama)
    assert sum(row["tensors"] for row in data["tensors"]) == len(merge.open(llama))


def test_an_axis_is_explained(llama: Path) -> None:
    text = shown(llama, "--explain", "model.layers.1.self_attn.q_proj.weight")
    assert "axis 0, length 32: kv1.slot1.qk1" in text
    assert "qk1: frozen, 8 coordinates: the buffer inv_freq" in text
    assert "slot1: 2 coordinates that may be permuted, in another way for each index of kv1" in text
    text = shown(llama, "--explain", "model.embed_tokens.weight")
    assert "_40token: fixed, 40 places: rows are looked up by number" in text


def test_a_group_is_explained_with_its_places(llama: Path) -> None:
    lines = explained(llama, "v0")
    assert "any invertible matrix" in lines[0]
    assert lines[1:] == [
        f"  in [model.]layers.{{i}}.self_attn.{p}_proj.weight, 1 tensors" for p in ("o", "v")
    ]


def test_an_unknown_name_suggests_the_nearest(llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'model\.norm\.weight'"):
        explained(llama, "model.norn.weight")


def test_the_networks_of_the_other_tests_can_be_shown() -> None:
    make, inputs = NETWORKS["encoder"]
    symmetry = merge.symmetry_of(make(), inputs)
    assert all(str(axis) for layout in symmetry.tensors.values() for axis in layout.axes)
