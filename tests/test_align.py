"""`merge.align` and `merge align`: folders, state dicts, modules in one another's coordinates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import transformers
from merge_cli.app import cli
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merge
from merge.errors import MergeError, PlanError, RecipeError, SourceError
from merge.symmetry.action import apply

from .networks import (
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    symmetry_of,
)
from .symmetries import LLAMA, randomised

CONFIG = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "head_dim": 8,
}  # fmt: skip
Tensors = dict[str, Tensor]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, attn_implementation="eager")
    return randomised(transformers.LlamaForCausalLM(config)).bfloat16()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama in bfloat16, and the same in other coordinates, as folders."""
    root = tmp_path_factory.mktemp("pair")
    model = llama()
    model.save_pretrained(root / "a")
    state = model.state_dict()
    moved, _ = planted(symmetry_of(LLAMA, state, CONFIG), state)
    model.load_state_dict(moved)
    model.save_pretrained(root / "b")
    return root / "a", root / "b"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spec") / "llama.json"
    file.write_text(json.dumps(LLAMA))
    return file


def small(seed: int = 0) -> Tensors:
    model = randomised(mlp([6, 12, 9, 3]), seed)
    return {n: t.float().clone() for n, t in model.state_dict().items()}


MLP_SPEC = mlp_spec(3)


# -- the library -----------------------------------------------------------------------------------
@pytest.mark.parametrize("as_what", [str, Path, merge.open])
def test_a_folder_comes_back_to_the_bit(
    pair: tuple[Path, Path], spec: Path, as_what: Callable[[Path], Any], tmp_path: Path
) -> None:
    a, b = pair
    aligned = merge.align(as_what(b), to=as_what(a), symmetry=spec)
    aligned.save(tmp_path / "out")
    wanted = load_file(a / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, wanted[name])
    report = merge.alignment_report(aligned)
    assert report.after == pytest.approx(1.0, abs=1e-6) and report.moved > 0.5
    size = sum(t.numel() * t.element_size() for t in wanted.values())
    assert report.bytes_read == 2 * size


def test_an_aligned_model_does_what_it_did(pair: tuple[Path, Path], spec: Path) -> None:
    """Aligned to another network altogether, its function is its own."""
    b = pair[1]
    state = load_file(b / "model.safetensors")
    torch.manual_seed(1)
    other = {n: torch.randn_like(t) for n, t in state.items()}
    config = json.loads((b / "config.json").read_text())
    aligned = merge.align(state, to=other, symmetry=symmetry_of(LLAMA, state, config))
    assert merge.alignment_report(aligned).moved > 0.5
    model = transformers.LlamaForCausalLM.from_pretrained(b, dtype=torch.float64)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        wanted = model(tokens).logits
        model.load_state_dict({n: t.double() for n, t in aligned.state_dict().items()})
        found = model(tokens).logits
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_modules_and_state_dicts_are_aligned_in_memory() -> None:
    one = mlp([6, 12, 9, 3])
    a = one.state_dict()
    b, _ = planted(symmetry_of(MLP_SPEC, a), a)
    two = mlp([6, 12, 9, 3], seed=1)
    two.load_state_dict(b)
    for source in (two, b):
        found = merge.align(source, to=one, symmetry=MLP_SPEC).state_dict()
        assert all(torch.equal(found[n], a[n]) for n in a)


def test_an_aligned_model_merges_like_any_other() -> None:
    a = small()
    b, _ = planted(symmetry_of(MLP_SPEC, a), a)
    mean = merge.average([a, merge.align(b, to=a, symmetry=MLP_SPEC)])
    assert "reordered" in str(mean.plan().to_json(tensors=True)["steps"][0]["formula"])
    found = mean.state_dict()
    for name in a:
        torch.testing.assert_close(found[name], a[name], rtol=0, atol=1e-6)


def test_a_model_that_is_yet_to_be_computed_is_aligned_too() -> None:
    a = small()
    b, _ = planted(symmetry_of(MLP_SPEC, a), a)
    noise = {n: 0.01 * torch.randn_like(t) for n, t in b.items()}
    lazy = merge.open({n: b[n] + noise[n] for n in b}) - merge.open(noise) + merge.open(noise)
    found = merge.align(lazy, to=a, symmetry=MLP_SPEC).state_dict()
    for name in a:
        torch.testing.assert_close(found[name], a[name], rtol=0, atol=0.1)


def test_signs_are_aligned_where_they_are_asked_for() -> None:
    a = {n: t.float() for n, t in randomised(mlp([6, 12, 9, 3], nn.Tanh)).state_dict().items()}
    spec = mlp_spec(3, "PS")
    b, _ = planted(symmetry_of(spec, a), a, kinds="PS")
    found = merge.align(b, to=a, symmetry=spec, signed=True).state_dict()
    assert all(torch.equal(found[n], a[n]) for n in a)


def test_experts_of_one_file_change_places_with_their_names() -> None:
    from .networks import APART, apart, stacked

    a = apart(stacked())
    b, _ = planted(symmetry_of(APART, a), a)
    found = merge.align(b, to=a, symmetry=APART).state_dict()
    assert list(found) == list(b) and all(torch.equal(found[n], a[n]) for n in a)


def test_vocabularies_of_different_sizes_are_left_out_of_the_cost(
    pair: tuple[Path, Path], spec: Path
) -> None:
    a, b = (load_file(p / "model.safetensors") for p in pair)
    config = json.loads((pair[0] / "config.json").read_text())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        b[name] = torch.cat([b[name], b[name][:4]])
    side = merge.open(pair[0]).side
    one, two = (merge.open(t) for t in (a, b))
    object.__setattr__(one, "side", side)
    object.__setattr__(two, "side", side)
    found = merge.align(two, to=one, symmetry=spec).state_dict()
    assert torch.equal(found["model.norm.weight"], a["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"][:60], a["lm_head.weight"])
    assert config["num_key_value_heads"] == 2


def test_a_checkpoint_that_was_not_aligned_has_no_report() -> None:
    with pytest.raises(PlanError, match="no alignment report"):
        merge.alignment_report(merge.open(small()))


# -- on data ---------------------------------------------------------------------------------------
def task(seed: int = 0) -> merge.Task:
    torch.manual_seed(seed)
    x = torch.randn(200, 6)
    batches = [(x[:100], torch.arange(100) % 3), (x[100:], torch.arange(100) % 3)]
    module = mlp([6, 12, 9, 3])
    return merge.Task(module, nn.functional.cross_entropy, train=batches)


@pytest.mark.parametrize("method", ["activation", "ste"])
def test_data_finds_what_was_planted(method: str) -> None:
    a = small()
    b, _ = planted(symmetry_of(MLP_SPEC, a), a)
    given = task()
    before = {n: t.clone() for n, t in given.module.state_dict().items()}
    aligned = merge.align(b, to=a, method=method, symmetry=MLP_SPEC, data=given)
    found = aligned.state_dict()
    assert all(torch.equal(found[n], a[n]) for n in a)
    assert all(torch.equal(t, given.module.state_dict()[n]) for n, t in before.items())
    assert merge.alignment_report(aligned).method.startswith(("activation", "straight"))


def test_a_folder_of_transformers_is_run_by_its_own_class(
    pair: tuple[Path, Path], spec: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(0, 60, (16, 20))

    def load(place: Any) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(
            place, dtype=torch.float32
        ).state_dict()

    given = merge.Task(
        llama().float(),
        lambda out, _: out.logits.square().mean(),
        [({"input_ids": tokens}, None)],
        load=load,
    )
    found = merge.align(pair[1], to=pair[0], method="activation", symmetry=spec, data=given)
    wanted = load_file(pair[0] / "model.safetensors")
    assert all(torch.equal(t, wanted[n]) for n, t in found.state_dict().items())


# -- what is refused -------------------------------------------------------------------------------
def error_of(call: Callable[[], object]) -> MergeError:
    with pytest.raises(MergeError) as caught:
        call()
    return caught.value


def test_networks_of_different_heads_are_refused_though_their_shapes_agree(
    pair: tuple[Path, Path], spec: Path, tmp_path: Path
) -> None:
    """Six heads of eight are not twelve of four."""
    config = {**CONFIG, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(
        tmp_path / "c"
    )
    error = error_of(lambda: merge.align(tmp_path / "c", to=pair[0], symmetry=spec))
    assert isinstance(error, PlanError) and error.where["group"] == "kv0"
    assert (error.found, error.expected) == ("4 coordinates", "2 coordinates") and error.do


def test_networks_of_different_tensors_are_refused() -> None:
    a, b = small(), small()
    spec = {**MLP_SPEC, "tensors": {**MLP_SPEC["tensors"], "extra": ["_"]}}
    b["extra"] = torch.zeros(3)
    error = error_of(lambda: merge.align(b, to=a, symmetry=spec))
    assert error.where["tensor"] == "extra" and error.expected == "no such tensor"


def test_a_tensor_that_the_spec_does_not_know_is_named() -> None:
    a = {**small(), "6.weight": torch.zeros(2, 3)}
    error = error_of(lambda: merge.align(a, to=a, symmetry=MLP_SPEC))
    assert error.where["tensor"] == "6.weight" and "spec" in error.what


def test_a_model_of_an_unknown_type_wants_a_spec() -> None:
    error = error_of(lambda: merge.align(small(), to=small()))
    assert "may be exchanged" in error.what and "spec" in str(error.do)


@pytest.mark.parametrize(
    ("options", "what", "near"),
    [
        ({"method": "weigth"}, "no alignment method", "weight"),
        ({"keep": ["f00"]}, "no group 'f00'", "f0"),
    ],
)
def test_misspelt_words_are_told_their_nearest(
    options: dict[str, Any], what: str, near: str
) -> None:
    error = error_of(lambda: merge.align(small(), to=small(), symmetry=MLP_SPEC, **options))
    assert isinstance(error, RecipeError) and what in error.what and near in str(error.do)


def test_methods_on_data_want_data() -> None:
    error = error_of(
        lambda: merge.align(small(), to=small(), symmetry=MLP_SPEC, method="activation")
    )
    assert "needs data" in error.what and "module:function" in str(error.expected)


def test_a_module_of_another_architecture_is_refused() -> None:
    a = small()
    other = merge.Task(mlp([6, 7, 9, 3]), nn.functional.cross_entropy, train=task().train)
    error = error_of(
        lambda: merge.align(a, to=a, symmetry=MLP_SPEC, method="activation", data=other)
    )
    assert error.where["tensor"] == "0.weight" and "(7, 6)" in str(error.expected)


def test_a_spec_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text("{")
    for name in ("spec.json", "none.json"):
        error = error_of(lambda n=name: merge.align(small(), to=small(), symmetry=tmp_path / n))
        assert isinstance(error, RecipeError) and error.where["file"].endswith(name)


# -- the command -----------------------------------------------------------------------------------
def command(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, [str(a) for a in arguments])


def test_the_command_writes_and_reports(
    pair: tuple[Path, Path], spec: Path, tmp_path: Path
) -> None:
    a, b = pair
    out = tmp_path / "out"
    done = command("align", b, "--to", a, "-o", out, "--symmetry", spec, "--report", "-q")
    assert done.exit_code == 0, done.output
    assert "cosine of the weights" in done.output and str(out) in done.output
    wanted = load_file(a / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert (out / "config.json").is_file()


def test_the_command_reports_as_data(pair: tuple[Path, Path], spec: Path) -> None:
    done = command("align", pair[1], "--to", pair[0], "--symmetry", spec, "--json", "-q")
    data = json.loads(done.output)
    assert data["output"] is None and data["report"]["after"] == pytest.approx(1.0, abs=1e-6)
    assert {g["group"] for g in data["report"]["groups"]} >= {"d", "kv0", "slot0", "v0", "f0"}


def test_the_command_takes_data_from_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a = small()
    b, _ = planted(symmetry_of(MLP_SPEC, a), a)
    save_file(a, tmp_path / "a.safetensors")
    save_file({n: t.contiguous() for n, t in b.items()}, tmp_path / "b.safetensors")
    (tmp_path / "spec.json").write_text(json.dumps(MLP_SPEC))
    (tmp_path / "align_task.py").write_text(
        "import merge, torch\nfrom torch import nn\n\n\ndef data():\n"
        "    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(),"
        " nn.Linear(9, 3))\n"
        "    batches = [(torch.randn(99, 6), None)]\n"
        "    return merge.Task(net, nn.functional.cross_entropy, train=batches)\n"
    )
    done = command(
        "align", "b.safetensors", "--to", "a.safetensors", "--symmetry", "spec.json",
        "--method", "activation", "--data", "align_task:data", "-q", "-o", "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], a[n]) for n in a)


@pytest.mark.parametrize(
    ("data", "error", "what"),
    [
        ("nowhere.npz", SourceError, "no such data"),
        ("picture.jpg", RecipeError, "no data that is known"),
        ("no_such_module_here:data", SourceError, "cannot be imported"),
        ("json:no_such", SourceError, "no such function"),
        ("tempfile:gettempdir", SourceError, "does not return a task"),
    ],
)
def test_data_that_is_none_is_refused(data: str, error: type[MergeError], what: str) -> None:
    found = error_of(
        lambda: merge.align(small(), to=small(), symmetry=MLP_SPEC, method="ste", data=data)
    )
    assert type(found) is error and what in found.what


def test_an_apply_of_the_found_element_is_what_align_returns() -> None:
    """Two ways to the same tensors: the lazy checkpoint, and the element's own action."""
    from merge.alignment.ste import InMemory
    from merge.alignment.weight import match_weights

    a, b = small(0), small(1)
    symmetry = symmetry_of(MLP_SPEC, a)
    wanted = apply(symmetry, b, match_weights(symmetry, InMemory(a), InMemory(b)).element)
    found = merge.align(b, to=a, symmetry=MLP_SPEC).state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
