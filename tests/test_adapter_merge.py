"""Adapters merged as adapters: what comes out is an adapter, and says what a dense merge says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import merge
from merge.applying import plan_recipe
from merge.checkpoint.files import FileSource
from merge.errors import OutputRefused, PlanError, RecipeError
from merge.recipe.schema import json_schema
from merge.verify import verify
from tests.adapters import Trained, assert_equal, family, lora, quiet, spoken, train

LINEAR = "all-linear"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One base and three adapters of other ranks and scales on it."""
    root = tmp_path_factory.mktemp("zoo")
    found: dict[str, Any] = {}
    base = None
    for seed, (name, settings) in enumerate(
        {
            "a": {"target_modules": LINEAR, "r": 2},
            "b": {"target_modules": LINEAR, "r": 3, "use_rslora": True,
                  "rank_pattern": {"q_proj": 1}},
            "c": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 20},
        }.items()
    ):  # fmt: skip
        model = family("llama", num_hidden_layers=2)
        found[name] = train(root, model, lora(**settings), base=base, name=name, seed=seed)
        base = found[name].base
    found["base"] = base
    return found


def recipe(zoo: dict[str, Any], method: str = "task_arithmetic", **keys: Any) -> str:
    """Two adapters merged, as text of JSON, which is YAML."""
    models = [
        {"model": f"{zoo['base']}+{zoo[name].adapter}", "parameters": {"weight": weight}}
        for name, weight in (("a", 0.7), ("b", -0.4), ("c", 0.5))
    ]
    if method in ("tsv", "knots"):
        models = [{"model": m["model"]} for m in models]
    data = {"merge_method": method, "base_model": str(zoo["base"]), "models": models, **keys}
    return json.dumps(data)


def apply(folder: Path, text: str, name: str = "out", **work: Any) -> Path:
    (folder / "recipe.yml").write_text(text)
    return merge.apply(folder / "recipe.yml", folder / name, **work)


@contextmanager
def read_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """The tensors that are read meanwhile, each with the folder it is in."""
    seen: set[tuple[str, str]] = set()
    original = FileSource.open

    def noted(self: FileSource, name: str) -> Any:
        seen.add((self.identity, name))
        return original(self, name)

    monkeypatch.setattr(FileSource, "open", noted)
    yield seen
    monkeypatch.undo()


# -- linear merges ---------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", ["adapter", {"adapter": None}, {"adapter": {"energy": 1.0}}])
def test_a_linear_merge_of_adapters_is_the_dense_merge(
    settings: Any, zoo: dict[str, Any], tmp_path: Path
) -> None:
    out = apply(tmp_path, recipe(zoo, output=settings))
    dense = load_file(apply(tmp_path, recipe(zoo), "dense") / "model.safetensors")
    found = merge.open(f"{zoo['base']}+{out}").state_dict()
    assert found.keys() == dense.keys()
    for name, tensor in dense.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    assert verify(out).ok
    config = json.loads((out / "adapter_config.json").read_text())
    report = json.loads((out / "extract_report.json").read_text())
    assert {m["how"] for m in report["modules"]} == {"product"}
    ranks = {m["module"]: m["rank"] for m in report["modules"]}
    assert ranks["model.layers.0.mlp.down_proj.weight"] == 2 + 3 + 4
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 2 + 1 + 4
    assert ranks["model.layers.0.self_attn.k_proj.weight"] == 2 + 3
    assert config["base_model_name_or_path"] == str(zoo["base"])


def test_neither_base_nor_models_are_read_for_it(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with read_names(monkeypatch) as seen:
        apply(tmp_path, recipe(zoo, output="adapter"))
    folders = {Path(identity).name for identity, _ in seen}
    assert folders == {"a", "b", "c"}
    planned = plan_recipe(tmp_path / "recipe.yml").plan
    assert {Path(f.path).parent.name for f in planned.inputs} == {"a", "b", "c"}


def test_peft_loads_what_comes_out(zoo: dict[str, Any], tmp_path: Path) -> None:
    it: Trained = zoo["a"]
    out = apply(tmp_path, recipe(zoo, output={"adapter": {"rank": 4}}))
    dense = merge.open(f"{zoo['base']}+{out}").save(tmp_path / "dense")
    with quiet():
        loaded = peft.PeftModel.from_pretrained(it.kind.from_pretrained(it.base), out)
    torch.testing.assert_close(spoken(loaded, it.inputs), it.says(dense), rtol=0, atol=1e-6)


def test_one_adapter_comes_out_as_it_went_in(zoo: dict[str, Any], tmp_path: Path) -> None:
    """Other factors, of the same product and the same rank."""
    it: Trained = zoo["b"]
    models = [{"model": f"{it.base}+{it.adapter}", "parameters": {"weight": 1}}]
    text = {"merge_method": "linear", "base_model": str(it.base), "models": models}
    out = apply(tmp_path, json.dumps({**text, "output": "adapter"}))
    found = merge.open(f"{it.base}+{out}").state_dict()
    for name, tensor in merge.open(f"{it.base}+{it.adapter}").state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert load_file(out / "adapter_model.safetensors")[q].shape == (1, 16)


def test_a_mean_whose_weights_do_not_quite_add_up_reads_no_base(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 0.1, 0.2 and so on, normalised, are 1 but for their rounding."""
    text = recipe(zoo, "linear", output="adapter").replace("-0.4", "0.1").replace("0.7", "0.2")
    with read_names(monkeypatch) as seen:
        apply(tmp_path, text)
    assert str(zoo["base"].resolve()) not in {identity for identity, _ in seen}


def test_the_base_is_read_once_for_several_adapters(zoo: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(recipe(zoo))
    for step in plan_recipe(tmp_path / "recipe.yml").plan.steps:
        of_base = [r for r in step.reads if r.source.identity == str(zoo["base"].resolve())]
        assert len(of_base) == 1


def test_adapters_are_named_in_a_mapping_too(zoo: dict[str, Any], tmp_path: Path) -> None:
    """As recipes of mergekit have it, with an architecture that outlives the adapter."""
    name = {"model": {"path": str(zoo["base"])}, "lora": str(zoo["a"].adapter),
            "override_architecture": "Other"}  # fmt: skip
    out = apply(tmp_path, json.dumps({"merge_method": "passthrough", "models": [{"model": name}]}))
    found = load_file(out / "model.safetensors")
    wanted = merge.open(f"{zoo['base']}+{zoo['a'].adapter}").state_dict()
    assert_equal(found, wanted)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Other"]


def test_two_adapters_whose_weights_cancel_are_added_exactly(
    zoo: dict[str, Any], tmp_path: Path
) -> None:
    """W + a - b, whose coefficients add up to 1, is no mean of weights."""
    text = {"merge_method": "task_arithmetic", "base_model": str(zoo["base"]), "models": [
        {"model": f"{zoo['base']}+{zoo[n].adapter}", "parameters": {"weight": w}}
        for n, w in (("a", 0.5), ("c", -0.2))
    ]}  # fmt: skip
    found = load_file(apply(tmp_path, json.dumps(text)) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    truth = load_file(zoo["base"] / "model.safetensors")[name].double()
    for adapter, scale in (("a", 0.5 * 8 / 2), ("c", -0.2 * 20 / 4)):
        own = load_file(zoo[adapter].adapter / "adapter_model.safetensors")
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        left, right = (own[f"{stem}.lora_{x}.weight"].double() for x in "BA")
        truth += scale * left @ right
    assert (found[name].double() - truth).abs().max() < 1e-7


def test_the_library_does_the_same(zoo: dict[str, Any], tmp_path: Path) -> None:
    models = [merge.open(f"{zoo['base']}+{zoo[n].adapter}") for n in "abc"]
    merged = merge.task_arithmetic(models, base=zoo["base"], weight=[0.7, -0.4, 0.5])
    made = merge.extract_lora(merged, zoo["base"])
    out = apply(tmp_path, recipe(zoo, output="adapter"))
    wanted = load_file(out / "adapter_model.safetensors")
    assert_equal(made.checkpoint.state_dict(), wanted)


def test_convolutions_and_embeddings_stay_factors(tmp_path: Path) -> None:
    from tests.adapters import inputs_of

    for name, targets in (("vit", ["projection"]), ("llama", ["embed_tokens", "q_proj"]),
                          ("gpt2", ["c_attn", "wpe"])):  # fmt: skip
        folder = tmp_path / name
        it = train(folder, family(name), lora(target_modules=targets), inputs_of(name))
        tuned = merge.open(f"{it.base}+{it.adapter}")
        made = merge.extract_lora(tuned, it.base)
        out = made.save(folder / "again")
        again = merge.open(f"{it.base}+{out}").state_dict()
        for tensor, found in tuned.state_dict().items():
            torch.testing.assert_close(again[tensor], found, rtol=0, atol=1e-6)
        with quiet():
            loaded = peft.PeftModel.from_pretrained(it.kind.from_pretrained(it.base), out)
        torch.testing.assert_close(spoken(loaded, it.inputs), it.output, rtol=0, atol=2e-6)
        if name != "llama":  # peft stores the embeddings themselves beside their factors
            assert {row.how for row in made.report.modules} == {"product"}


# -- other methods ---------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["ties", "dare_linear", "tsv", "knots", "model_stock"])
def test_methods_that_are_not_linear_work_on_adapters_too(
    method: str, zoo: dict[str, Any], tmp_path: Path
) -> None:
    text = json.loads(recipe(zoo, method))
    if method in ("ties", "dare_linear"):
        text["parameters"] = {"density": 0.5}
    if method == "model_stock":
        for entry in text["models"]:
            entry.pop("parameters")
    out = apply(tmp_path, json.dumps({**text, "output": "adapter"}))
    dense = load_file(apply(tmp_path, json.dumps(text), "dense") / "model.safetensors")
    for name, found in merge.open(f"{zoo['base']}+{out}").state_dict().items():
        torch.testing.assert_close(found, dense[name], rtol=0, atol=1e-5)


def test_a_fine_tune_merged_with_an_adapter_is_an_adapter(
    zoo: dict[str, Any], tmp_path: Path
) -> None:
    it: Trained = zoo["a"]
    tuned = merge.open(f"{it.base}+{it.adapter}").save(tmp_path / "tuned")
    made = merge.extract_lora(
        merge.task_arithmetic([tuned, f"{it.base}+{zoo['c'].adapter}"], base=it.base, weight=0.5),
        it.base,
        energy=0.999999,
    )
    rows = {r.module: r for r in made.report.modules}
    assert rows["model.layers.0.mlp.up_proj.weight"].rank == 2  # of the adapter in it


# -- the recipe's words ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("output", "said", "key"),
    [
        ("model", "output", "output"),
        ({"adaptor": {}}, "unknown key 'adaptor'", "adaptor"),
        ({"adapter": {"rnk": 4}}, "unknown key 'rnk'", "rnk"),
        ({"adapter": {"rank": 0}}, "greater than or equal to 1", "rank"),
        ({"adapter": {"energy": 1.5}}, "less than or equal to 1", "energy"),
    ],
)
def test_words_that_are_wrong_have_their_place(
    output: Any, said: str, key: str, zoo: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yml").write_text(recipe(zoo, output=output))
    with pytest.raises(RecipeError, match=said) as caught:
        plan_recipe(tmp_path / "recipe.yml")
    assert caught.value.where["key"] == key and caught.value.where["line"] == "1"


def test_an_adapter_needs_a_base(zoo: dict[str, Any], tmp_path: Path) -> None:
    text = json.loads(recipe(zoo, "linear", output="adapter"))
    del text["base_model"]
    (tmp_path / "recipe.yml").write_text(json.dumps(text))
    with pytest.raises(RecipeError, match="needs a base_model"):
        plan_recipe(tmp_path / "recipe.yml")


def test_only_the_result_is_an_adapter(zoo: dict[str, Any], tmp_path: Path) -> None:
    first = json.dumps({**json.loads(recipe(zoo, output="adapter")), "name": "first"})
    models = [{"model": "first", "parameters": {"weight": 1}}]
    last = json.dumps({"merge_method": "linear", "models": models})
    (tmp_path / "recipe.yml").write_text(f"---\n{first}\n---\n{last}\n")
    with pytest.raises(RecipeError, match="only the result") as caught:
        plan_recipe(tmp_path / "recipe.yml")
    assert caught.value.where["line"] == "2"


def test_a_result_that_is_its_base_is_refused_when_it_is_planned(
    zoo: dict[str, Any], tmp_path: Path
) -> None:
    text = {"merge_method": "passthrough", "models": [{"model": str(zoo["base"])}],
            "base_model": str(zoo["base"]), "output": "adapter"}  # fmt: skip
    (tmp_path / "recipe.yml").write_text(json.dumps(text))
    with pytest.raises(PlanError, match="the model is its base"):
        plan_recipe(tmp_path / "recipe.yml")


def test_the_output_is_looked_at_before_the_work(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with read_names(monkeypatch) as seen, pytest.raises(OutputRefused, match="not empty"):
        apply(tmp_path, recipe(zoo, output="adapter"))
    assert not seen


def test_a_recipes_dtype_is_that_of_the_factors(zoo: dict[str, Any], tmp_path: Path) -> None:
    out = apply(tmp_path, recipe(zoo, dtype="bfloat16", output={"adapter": {"rank": 2}}))
    stored = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_the_schema_knows_the_word() -> None:
    properties: Mapping[str, Any] = json_schema()["properties"]["output"]
    assert "adapter" in json.dumps(properties)


# -- the command -----------------------------------------------------------------------------------
@dataclass
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run_merge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: `run_merge("plan", "r.yml")`."""
    from merge_cli.app import main

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["merge", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return Done(int(stopped.value.code or 0), said.out, said.err)

    return run


def test_the_command_writes_an_adapter_and_prints_its_report(
    zoo: dict[str, Any], tmp_path: Path, run_merge: Run
) -> None:
    tuned = merge.open(f"{zoo['base']}+{zoo['a'].adapter}").save(tmp_path / "tuned")
    words = ("extract-lora", tuned, "--base", zoo["base"], "-o", tmp_path / "lora")
    done = run_merge(*words, "--energy", 0.9999, "--exclude", "lm_head")
    assert done.code == 0, done.err
    assert done.out.strip() == str(tmp_path / "lora")
    assert "model.layers.1.mlp.up_proj.weight" in done.err and "of the energy" in done.err
    again = run_merge(*words, "--replace", "--full", "--json", "-q")
    data = json.loads(again.out)
    assert data["relative_error"] < 1e-5 and data["output"] == str(tmp_path / "lora")
    assert again.err == ""
    assert run_merge("verify", tmp_path / "lora").code == 0
    for wrong, code in (
        ((), 2),  # the folder is there
        (("--full", "--rank", 2), 2),
        (("--energy", 2), 2),
        (("--replace", "--include", "("), 2),
    ):
        assert run_merge(*words, *wrong).code == code
    assert run_merge("extract-lora", tuned, "--base", tuned, "-o", tmp_path / "x").code == 3


def test_the_command_keeps_a_low_rank_unless_told(
    zoo: dict[str, Any], tmp_path: Path, run_merge: Run
) -> None:
    done = run_merge("extract-lora", "--help")
    assert "default: 32" in done.out


def test_plan_and_apply_tell_of_the_adapter(
    zoo: dict[str, Any], tmp_path: Path, run_merge: Run
) -> None:
    (tmp_path / "r.yml").write_text(recipe(zoo, output={"adapter": {"rank": 2}}))
    shown = run_merge("plan", tmp_path / "r.yml")
    assert shown.code == 0 and "an adapter is written, not a model" in shown.out
    done = run_merge("apply", tmp_path / "r.yml", tmp_path / "out", "--json", "-q")
    assert done.code == 0, done.err
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "extract_report.json",
        "merge.lock.yml", "merge_manifest.json", "merge_recipe.yml",
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "task_arithmetic" in card


def test_neither_torch_nor_transformers_is_loaded_to_plan_it(
    zoo: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "r.yml").write_text(recipe(zoo, output="adapter"))
    code = (
        "import sys; from merge.applying import plan_recipe; plan_recipe(sys.argv[1]);"
        "print(*{'torch', 'transformers', 'peft', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.yml")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == ""
