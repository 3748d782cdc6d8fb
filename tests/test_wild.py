"""Recipes as people publish them compile, and mean what their authors meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge.errors import RecipeError
from merge.ir.reference import Reference
from merge.recipe.compile import compile_recipe
from merge.recipe.document import read_documents
from merge.recipe.read import parse_recipe, read_recipe
from merge.recipe.schema import json_schema

from .tiny import model, zoo
from .wild import WILD, Wild

DEPTH = 8


every_recipe = pytest.mark.parametrize("wild", WILD.values(), ids=WILD.keys())


def weights(called: str, tensor: str) -> Tensor:
    return model(called, DEPTH)[tensor].double()


@every_recipe
def test_it_means_what_its_author_meant(wild: Wild, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_bytes(wild.text.encode())
    recipe = read_recipe(tmp_path / "r.yml")

    def anyone(reference: Reference) -> Any:
        return zoo(**{str(reference): DEPTH})(reference)

    made = compile_recipe(recipe, anyone)
    for (tensor, parameter, owner), value in wild.values.items():
        reasons = made.explain(tensor)[0].reasons
        found = [r.value for r in reasons if (r.parameter, r.model) == (parameter, owner)]
        assert found == [pytest.approx(value)], (tensor, parameter, owner)
        assert [type(v) for v in found] == [type(value)]
    assert len(made.notes) == len(wild.notes), made.notes
    for part in wild.notes:
        assert any(part in n for n in made.notes), part
    assert made.checkpoint.side.config["num_hidden_layers"] == wild.layers
    state = made.checkpoint.state_dict()
    assert all(t.isfinite().all() for t in state.values())
    for tensor, formula in wild.tensors.items():
        wanted = formula(weights)
        if wanted.dtype != torch.float64:
            assert torch.equal(state[tensor], wanted)
        else:
            close = 1e-2 if state[tensor].dtype != torch.float32 else 3e-6
            torch.testing.assert_close(state[tensor].double(), wanted, rtol=close, atol=close)


# -- the schema for editors ------------------------------------------------------------------------


def fits(value: object, schema: Any, whole: dict[str, Any]) -> bool:
    """Whether a JSON schema allows the value: the few keywords that ours uses."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return fits(value, whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, KINDS[k]) and is_kind(value, k) for k in kinds):
        return False
    checks = [
        value in schema.get("enum", [value]),
        value == schema.get("const", value),
        all(fits(value, s, whole) for s in schema.get("allOf", [])),
        not schema.get("anyOf") or any(fits(value, s, whole) for s in schema["anyOf"]),
        not schema.get("oneOf") or sum(fits(value, s, whole) for s in schema["oneOf"]) == 1,
        "if" not in schema
        or not fits(value, schema["if"], whole)
        or fits(value, schema["then"], whole),
    ]
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        checks += [k in value for k in schema.get("required", [])]
        checks += [fits(v, known.get(k, more), whole) for k, v in value.items()]
        checks += [fits(k, schema.get("propertyNames", True), whole) for k in value]
    if isinstance(value, list):
        checks += [fits(v, schema.get("items", True), whole) for v in value]
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9))
    if isinstance(value, str):
        checks.append(len(value) >= schema.get("minLength", 0))
    if isinstance(value, int | float):
        checks.append(value >= schema.get("minimum", value))
    return all(checks)


KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def is_kind(value: object, kind: str) -> bool:
    return not (kind in ("number", "integer") and isinstance(value, bool))


@every_recipe
def test_the_schema_allows_it(wild: Wild) -> None:
    """All but parameters of other methods, at which an editor had better frown."""
    schema = json_schema()
    foreign = any("no such parameter" in n or "embed_slerp" in n for n in wild.notes)
    for document in read_documents(wild.text.lstrip("\ufeff"), "wild"):
        assert fits(document.data, schema, schema) is not foreign


def valid(text: str) -> bool:
    schema = json_schema()
    return fits(read_documents(text, "x")[0].data, schema, schema)


def test_the_schema_refuses_what_is_wrong() -> None:
    good = "merge_method: linear\nmodels: [{model: a}]\n"
    assert valid(good)
    for extra in ("dtyp: x", "slices: []", "seed: -1", "name: ''", "parameters: {t: 1}"):
        assert not valid(f"{good}{extra}\n"), extra
    for bad in ("[{modle: a}]", "[a]", "[]", "[{model: {pth: a}}]", "[{model: 3}]", "{}"):
        assert not valid(f"merge_method: linear\nmodels: {bad}\n"), bad
    slices = "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: %s}]\n"
    assert valid(slices % "[0, 1]")
    for bad in ("[0]", "[0, 1, 2]", "[-1, 2]", "[0, 1.5]", "3"):
        assert not valid(slices % bad), bad


def test_expert_mixtures_are_not_recipes() -> None:
    with pytest.raises(RecipeError, match="unknown key 'gate_mode'") as caught:
        parse_recipe(
            "base_model: a\ngate_mode: hidden\ndtype: bfloat16\nexperts:\n"
            "  - source_model: b\n    positive_prompts: [code]\n"
        )
    assert (caught.value.where["line"], caught.value.where["column"]) == ("2", "1")
