"""`merge.fuse`: other widths and depths, by weights and by activations; models in folders."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import scipy.spatial.distance
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from safetensors.torch import load_file

import merge
from merge import symmetries
from merge.errors import MergeError, PlanError, RecipeError
from merge.transport.depth import align_layers, debiased_cka, size_costs
from merge.transport.features import Term, cost_of
from merge.transport.mapped import carried, roles_of
from merge.transport.scales import rescaled

from .networks import (
    APART,
    STACKED,
    ResNet20,
    apart,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    resnet_spec,
    stacked,
    symmetry_of,
)
from .symmetries import distance, randomised
from .test_transport import CASES, TINY, copies, inputs_for


def net(sizes: list[int], seed: int = 0) -> Any:
    return randomised(mlp(sizes), seed).float()


def task(module: Any, seed: int = 0, samples: int = 200) -> merge.Task:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
    return merge.Task(module, F.cross_entropy, train=[(x, torch.zeros(samples, dtype=torch.long))])


def run(state: Any, sizes: list[int], x: Any) -> Any:
    module = mlp(sizes)
    module.load_state_dict(state)
    return module(x)


SMALL, WIDE = [6, 12, 9, 3], [6, 24, 27, 3]


def widened(base: Any, seed: int = 0) -> tuple[Any, Any]:
    """A network with its units copied and shuffled: the same function."""
    symmetry = symmetry_of(mlp_spec(3), base.state_dict())
    couplings, wide = copies(symmetry, {"f0": 2, "f1": 3}, seed)
    state = carried(merge.open(base), symmetry, wide, couplings).state_dict()
    module = mlp(WIDE)
    module.load_state_dict(state)
    return module, state


# -- widths ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("direction", ["narrow", "widen"])
def test_copies_are_found_in_either_direction(by: str, direction: str) -> None:
    """What was widened by copies fuses with the original into that very function."""
    base = net(SMALL)
    wide, _ = widened(base, 3)
    models = [wide, base] if direction == "narrow" else [base, wide]
    data = None if by == "weights" else [task(m) for m in models]
    fused = merge.fuse(models, into=models[1], by=by, data=data, symmetry=mlp_spec(3))
    x = torch.randn(30, 6)
    sizes = SMALL if direction == "narrow" else WIDE
    assert distance(run(fused.state_dict(), sizes, x), base(x)) < 1e-5
    (report,) = merge.fusion_reports(fused)
    assert all(g.score is not None and g.score > 0.999 for g in report.groups)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_equal_widths_give_the_permutation_of_weight_matching(by: str) -> None:
    base = net(SMALL)
    moved, _ = planted(symmetry_of(mlp_spec(3), base.state_dict()), base.state_dict())
    other = mlp(SMALL)
    other.load_state_dict(moved)
    data = None if by == "weights" else task(base)
    found = merge.align(
        other, to=base, method="transport", symmetry=mlp_spec(3), data=data, transport={"by": by}
    )
    state = found.state_dict()
    assert all(torch.equal(state[n], t) for n, t in base.state_dict().items())
    assert merge.alignment_report(found).moved > 0.5


def test_a_network_with_itself_is_itself() -> None:
    base = net(SMALL)
    fused = merge.fuse([base, base.state_dict()], symmetry=mlp_spec(3)).state_dict()
    assert all(torch.allclose(fused[n], t, atol=1e-7) for n, t in base.state_dict().items())


@pytest.mark.parametrize("options", [
    {"regularisation": 0.05}, {"marginals": "l2"}, {"marginals": "l1"}, {"metric": "euclidean"},
    {"metric": "cosine"}, {"features": "incoming"}, {"sweeps": 1},
])  # fmt: skip
def test_every_manner_finds_what_was_moved(options: dict[str, Any]) -> None:
    base = net(SMALL)
    moved, _ = planted(symmetry_of(mlp_spec(3), base.state_dict()), base.state_dict())
    if "regularisation" in options:
        options = {"regularisation": 1e-4}
    fused = merge.fuse([base, moved], weights=[0, 1], symmetry=mlp_spec(3), **options)
    x = torch.randn(30, 6)
    assert distance(run(fused.state_dict(), SMALL, x), base(x)) < 1e-3


def test_soft_plans_mix_units() -> None:
    base, other = net(SMALL), net(SMALL, 1)
    exact, soft = (
        merge.fuse([base, other], weights=[0, 1], symmetry=mlp_spec(3), regularisation=r)
        for r in (0.0, 0.5)
    )
    one, two = exact.state_dict(), soft.state_dict()
    assert set(one["0.bias"].tolist()) == set(other.state_dict()["0.bias"].tolist())
    spread = [float(s["0.bias"].std()) for s in (one, two)]
    assert spread[1] < 0.7 * spread[0]  # means of many units are alike


def test_a_residual_network_with_batch_norms_is_fused_into_one_half_as_wide() -> None:
    small = randomised(ResNet20(4)).float()
    spec = resnet_spec()
    symmetry = symmetry_of(spec, small.state_dict())
    couplings, wide = copies(symmetry, dict.fromkeys(symmetry.groups, 2))
    large = ResNet20(8).eval()
    large.load_state_dict(carried(merge.open(small), symmetry, wide, couplings).state_dict())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert distance(large(x), small(x)) < 1e-5
        fused = merge.fuse([large, small], into=small, symmetry=spec)
        again = ResNet20(4).eval()
        again.load_state_dict(fused.state_dict())
        assert distance(again(x), small(x)) < 1e-4


def test_experts_are_chosen_among_and_their_units_coupled() -> None:
    tensors = stacked(seed=1)
    for spec, own in ((STACKED, tensors), (APART, apart(tensors))):
        symmetry = symmetry_of(spec, own)
        moved, _ = planted(symmetry, own, 2)
        found = merge.align(moved, to=own, method="transport", symmetry=symmetry).state_dict()
        assert all(torch.equal(found[n], own[n]) for n in own)


@pytest.mark.parametrize(("kind", "config", "small", "times", "large"), CASES[:6])
def test_copies_in_transformers_are_found(
    kind: str, config: Any, small: Any, times: dict[str, int], large: Any
) -> None:
    """A transformer fused with itself, widened by copies, is itself: both ways."""
    base = randomised(getattr(transformers, kind)(config(**small)))
    symmetry = symmetries.symmetry_of(base, outputs="free")
    factors = {
        g: f for stem, f in times.items() for g in symmetry.groups if g.rstrip("0123456789") == stem
    }
    couplings, wide = copies(symmetry, factors)
    other = getattr(transformers, kind)(config(**{**small, **large})).double().eval()
    configs = base.config.to_dict(), other.config.to_dict()
    tied = bool(merge.open(base).tied)
    scales = rescaled(symmetry, wide, couplings, roles_of(symmetry), configs, tied=tied)
    other.load_state_dict(carried(merge.open(base), symmetry, wide, couplings, scales).state_dict())
    inputs = inputs_for(base)
    for models in ([base, other], [other, base]):
        fused = merge.fuse(models, into=models[1], weights=[1, 0])
        result = type(base)(models[1].config).double().eval()
        result.load_state_dict(fused.state_dict())
        with torch.no_grad():
            assert distance(result(**inputs).logits, base(**inputs).logits) < 1e-4


# -- depths ----------------------------------------------------------------------------------------
def brute(cost: Any) -> float:
    n, m = cost.shape
    return min(
        float(sum(cost[k, c] for k, c in enumerate(chosen)))
        for chosen in itertools.combinations(range(m), n)
    )


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), more=st.integers(0, 3), seed=st.integers(0, 99))
def test_layers_are_aligned_at_the_least_cost_in_order(n: int, more: int, seed: int) -> None:
    cost = np.random.default_rng(seed).random((n, n + more))
    found = align_layers(cost)
    assert found == sorted(set(found)) and len(found) == n
    assert sum(cost[k, c] for k, c in enumerate(found)) == pytest.approx(brute(cost))
    if n > 1:
        ends = align_layers(cost, first=True, last=True)
        assert (ends[0], ends[-1]) == (0, n + more - 1) and ends == sorted(set(ends))


def test_layers_are_aligned_from_the_shallower() -> None:
    with pytest.raises(PlanError, match="from the shallower"):
        align_layers(np.zeros((3, 2)))
    assert align_layers(size_costs([8, 8], [8, 8, 8, 8])) == [0, 3]
    assert align_layers(size_costs([8, 16], [8, 8, 16, 16])) == [0, 3]


def test_debiased_cka_knows_rotations_and_unrelated_answers() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=draw)
    turn = torch.linalg.qr(torch.randn(30, 30, generator=draw))[0]
    assert debiased_cka(x, 3 * x @ turn + 1) == pytest.approx(1.0, abs=1e-6)
    unrelated = [debiased_cka(x, torch.randn(40, 30, generator=draw)) for _ in range(20)]
    assert abs(float(np.mean(unrelated))) < 0.05  # the biased one is above 0.4 here
    with pytest.raises(PlanError, match="several samples"):
        debiased_cka(x[:3], x[:3])


def deep_pair() -> tuple[Any, Any]:
    return net([6, 12, 12, 3]), net([6, 12, 12, 12, 12, 3], 1)


def test_identity_layers_keep_an_mlp() -> None:
    shallow, deep = deep_pair()
    x = torch.randn(50, 6)
    moved = merge.fuse([shallow, deep], into=deep, weights=[1, 0], symmetry=mlp_spec(5))
    assert distance(run(moved.state_dict(), [6, 12, 12, 12, 12, 3], x), shallow(x)) < 1e-6
    (report,) = merge.fusion_reports(moved)
    assert any(n.startswith("layers of") and "put in" in n for n in report.notes)


def test_layers_of_an_mlp_are_composed_by_the_share_of_active_samples() -> None:
    """Exact where ReLU is always on: the layer that goes is then a linear map."""
    shallow, deep = deep_pair()
    with torch.no_grad():
        for k in (2, 4):
            deep[k].weight.mul_(0.1)
            deep[k].bias.fill_(20.0)
    x = torch.randn(50, 6)
    tasks = [task(deep), task(shallow)]
    moved = merge.fuse(
        [deep, shallow], into=shallow, weights=[1, 0], symmetry=mlp_spec(3), data=tasks
    )
    found = run(moved.state_dict(), [6, 12, 12, 3], x)
    assert distance(found, deep(x)) < 1e-5
    blind = merge.fuse([deep, shallow], into=shallow, weights=[1, 0], symmetry=mlp_spec(3))
    assert distance(run(blind.state_dict(), [6, 12, 12, 3], x), deep(x)) > 1e-2


def test_data_decides_which_layers_are_alike() -> None:
    """A deep network that repeats itself: the copied layers are found by what they answer."""
    base = net([6, 12, 12, 12, 3])
    deep = net([6, 12, 12, 12, 12, 12, 3])
    state = dict(base.state_dict())
    eye = {"weight": torch.eye(12), "bias": torch.zeros(12)}
    source = {0: 0, 2: 2, 4: None, 6: 4, 8: None, 10: 6}
    for k, like in source.items():
        for part in ("weight", "bias"):
            deep.state_dict()[f"{k}.{part}"].copy_(
                eye[part] if like is None else state[f"{like}.{part}"]
            )
    x = torch.randn(50, 6)
    assert distance(deep(x), base(x)) < 1e-6
    for kind in ("cka", "wasserstein"):
        found = merge.fuse(
            [deep, base], into=base, weights=[1, 0], symmetry=mlp_spec(4),
            data=[task(deep), task(base)], depth=kind,
        )  # fmt: skip
        note = merge.fusion_reports(found)[0].notes[0]
        assert "2 -> 2" in note or "4 -> 2" in note
        assert "6 -> 4" in note or "8 -> 4" in note


DEEP: list[tuple[str, Any, dict[str, Any], str]] = [
    ("LlamaForCausalLM", transformers.LlamaConfig,
     {**TINY, "num_key_value_heads": 1, "vocab_size": 20, "attention_bias": True},
     "num_hidden_layers"),
    ("GPT2LMHeadModel", transformers.GPT2Config,
     {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 20, "n_positions": 12,
      "bos_token_id": 0, "eos_token_id": 0}, "n_layer"),
    ("ViTForImageClassification", transformers.ViTConfig,
     {**TINY, "image_size": 8, "patch_size": 4}, "num_hidden_layers"),
    ("T5ForConditionalGeneration", transformers.T5Config,
     {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2,
      "num_decoder_layers": 2, "decoder_start_token_id": 0}, "num_layers"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "small", "key"), DEEP)
def test_blocks_that_do_nothing_keep_a_transformer(
    kind: str, config: Any, small: dict[str, Any], key: str
) -> None:
    shallow = randomised(getattr(transformers, kind)(config(**small)))
    deep = randomised(getattr(transformers, kind)(config(**{**small, key: 4})), 1)
    inputs = inputs_for(shallow)
    result = type(deep)(deep.config).double().eval()
    with torch.no_grad():
        moved = merge.fuse([shallow, deep], into=deep, weights=[1, 0])
        result.load_state_dict(moved.state_dict())
        assert distance(result(**inputs).logits, shallow(**inputs).logits) < 1e-6
        half = merge.fuse([shallow, deep], into=deep)
        result.load_state_dict(half.state_dict())
        assert bool(result(**inputs).logits.isfinite().all())
        # the other way layers are left out: those that do nothing leave no gap
        deep.load_state_dict(moved.state_dict())
        back = merge.fuse([deep, shallow], into=shallow, weights=[1, 0])
        short = type(shallow)(shallow.config).double().eval()
        short.load_state_dict(back.state_dict())
        assert distance(short(**inputs).logits, shallow(**inputs).logits) < 1e-6


def test_residual_blocks_that_do_nothing_keep_a_network_with_batch_norms() -> None:
    config = {"embedding_size": 4, "hidden_sizes": [8, 12, 16, 20], "layer_type": "basic"}
    shallow, deep = (
        randomised(
            transformers.ResNetForImageClassification(
                transformers.ResNetConfig(**config, depths=depths)
            ),
            seed,
        )
        for seed, depths in enumerate(([1, 2, 1, 1], [3, 3, 1, 1]))
    )
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    moved = merge.fuse([shallow, deep], into=deep, weights=[1, 0])
    result = type(deep)(deep.config).double().eval()
    result.load_state_dict(moved.state_dict())
    with torch.no_grad():
        assert distance(result(x).logits, shallow(x).logits) < 1e-6


def test_no_block_does_nothing_behind_a_norm() -> None:
    shallow, deep = (
        transformers.BertForMaskedLM(
            transformers.BertConfig(**{**TINY, "num_hidden_layers": n}, vocab_size=20)
        )
        for n in (2, 3)
    )
    with pytest.raises(PlanError, match=r"does nothing(.|\n)*norm that may follow(.|\n)*fuse into"):
        merge.fuse([shallow, deep], into=deep)
    assert len(merge.fuse([shallow, deep], into=shallow)) == len(merge.open(shallow))


def test_tanh_has_no_identity() -> None:
    shallow, deep = deep_pair()
    with pytest.raises(PlanError, match=r"odd activation"):
        merge.fuse([shallow, deep], into=deep, symmetry=mlp_spec(5, "PS"))


# -- recipes and the command line ------------------------------------------------------------------
LLAMA = {**TINY, "num_key_value_heads": 2, "vocab_size": 20, "head_dim": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow model, a wide one, a deep one, and an encoder, as folders."""
    root = tmp_path_factory.mktemp("models")
    for name, change in (
        ("narrow", {}),
        ("wide", {"hidden_size": 32, "intermediate_size": 20, "num_attention_heads": 4}),
        ("deep", {"num_hidden_layers": 3}),
    ):
        config = transformers.LlamaConfig(**{**LLAMA, **change})
        randomised(transformers.LlamaForCausalLM(config)).bfloat16().save_pretrained(root / name)
    config = transformers.BertConfig(**TINY, vocab_size=20)
    transformers.BertForMaskedLM(config).save_pretrained(root / "bert")
    return root


def run_cli(*args: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)


def test_the_command_line_fuses_folders(folders: Path, tmp_path: Path) -> None:
    args = ("fuse", folders / "wide", folders / "deep", "--into", folders / "deep", "-q")
    out = tmp_path / "out"
    shown = run_cli(*args, "-o", out, "--report", "--weights", "0.3,0.7")
    assert "16 -> " not in shown.stdout and "exact transport by weights" in shown.stdout
    assert "d: 32 units become 16" in shown.stdout and "1 put in" in shown.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 3
    assert run_cli("verify", out).exit_code == 0
    told = json.loads(run_cli(*args, "--regularisation", "0.05", "--json").stdout)
    assert told["output"] is None
    assert told["reports"][0]["method"] == "entropic transport by weights"
    again = run_cli(*args, "-o", tmp_path / "again", "--weights", "0.3,0.7")
    assert again.exit_code == 0
    wanted = (out / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == wanted


def test_aligning_by_transport_carries_a_model_over(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cli("align", folders / "wide", "--to", folders / "narrow", "--method", "transport",
            "--marginals", "l2", "-o", out, "-q")  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.hidden_size == 16
    found = merge.align(
        folders / "wide", to=folders / "narrow", method="transport", transport={"marginals": "l2"}
    ).state_dict()
    state = load_file(out / "model.safetensors")
    assert all(torch.equal(found[n], t) for n, t in state.items())


def test_a_recipe_carries_models_over(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    text = """
merge_method: linear
models:
  - {model: narrow, parameters: {weight: 0.5}}
  - {model: wide, parameters: {weight: 0.5}}
align: {method: transport, metric: euclidean, sweeps: 1}
"""
    file = folders / "recipe.yml"
    file.write_text(text)
    found = merge.load_recipe(file).state_dict()
    wanted = merge.fuse(["narrow", "wide"], metric="euclidean", sweeps=1).state_dict()
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    with pytest.raises(RecipeError, match=r"different sizes until(.|\n)*--align"):
        run_cli("plan", file)
    assert run_cli("plan", file, "--align").exit_code == 0


@pytest.mark.parametrize(("args", "message"), [
    (("--by", "activations"), "needs data"),
    (("--regularisation", "-1"), "relative to the largest cost"),
    (("--weights", "1,2,3"), "do not fit its models"),
    (("--keep", "dd"), "no group 'dd'"),
    (("--keep", "d"), "cannot be moved differ in number"),
    (("--depth", "cka"), "there is no data"),
])  # fmt: skip
def test_the_command_line_says_what_is_wrong(
    folders: Path, args: tuple[str, ...], message: str
) -> None:
    models = [folders / "narrow", folders / ("deep" if "cka" in args else "wide")]
    with pytest.raises(MergeError, match=message):
        run_cli("fuse", *models, *args, "-q")


def test_models_of_other_architectures_are_refused(folders: Path) -> None:
    with pytest.raises(PlanError):
        merge.fuse([folders / "narrow", folders / "bert"])
    with pytest.raises(RecipeError, match="did you mean 'weights'"):
        merge.fuse([folders / "narrow", folders / "wide"], by="weight")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no option 'metrc'"):
        merge.align(
            folders / "wide", to=folders / "narrow", method="transport", transport={"metrc": 1}
        )
    with pytest.raises(RecipeError, match="the method is another"):
        merge.align(folders / "narrow", to=folders / "narrow", transport={"sweeps": 1})
    with pytest.raises(RecipeError, match="changes no signs"):
        merge.align(folders / "wide", to=folders / "narrow", method="transport", signed=True)
    with pytest.raises(RecipeError, match="nothing to fuse"):
        merge.fuse([])
    with pytest.raises(PlanError, match="no report of a fusion"):
        merge.fusion_reports(merge.open(folders / "narrow"))


# -- activations -----------------------------------------------------------------------------------
def language_task(model: Any) -> merge.Task:
    tokens = torch.randint(0, 20, (16, 12), generator=torch.Generator().manual_seed(0))
    return merge.Task(model, lambda out, _: out.logits.mean(), [({"input_ids": tokens}, None)])


@pytest.mark.parametrize("residual", [
    "mean", "no_resid", "only_resid", "weighted_scalar", "weighted_matrix",
])  # fmt: skip
def test_every_policy_of_the_stream_finds_a_planted_order(residual: str) -> None:
    base = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    symmetry = symmetries.symmetry_of(base, outputs="free")
    moved = type(base)(base.config).double().eval()
    moved.load_state_dict(planted(symmetry, base.state_dict(), 4)[0])
    tasks = [language_task(m) for m in (base, moved)]
    found = merge.fuse(
        [base, moved], weights=[0, 1], by="activations", data=tasks, residual=residual
    ).state_dict()
    assert all(torch.equal(found[n], t) for n, t in base.state_dict().items())


def test_policies_weigh_the_places_of_a_stream() -> None:
    """On unlike networks they give different plans; what is inside heads they leave alone."""
    models = [
        randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), seed)
        for seed in (0, 1)
    ]
    tasks = [language_task(m) for m in models]
    scores = {}
    for residual in ("mean", "no_resid", "only_resid", "weighted_scalar", "weighted_matrix"):
        fused = merge.fuse(models, by="activations", data=tasks, residual=residual)
        groups = merge.fusion_reports(fused)[0].groups
        scores[residual] = {g.group: g.score for g in groups}
    assert len({s["d"] for s in scores.values()}) == 5
    assert all(s["kv0"] == scores["mean"]["kv0"] for s in scores.values())


def test_activations_fuse_transformers_of_other_widths() -> None:
    base = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    wider = {**LLAMA, "hidden_size": 32, "intermediate_size": 24}
    symmetry = symmetries.symmetry_of(base, outputs="free")
    factors = {g: 2 for g in symmetry.groups if g == "d" or g.startswith("f")}
    couplings, wide = copies(symmetry, factors)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wider)).double().eval()
    other.load_state_dict(carried(merge.open(base), symmetry, wide, couplings).state_dict())
    inputs = inputs_for(base)
    for models in ([base, other], [other, base]):
        fused = merge.fuse(
            models, into=models[1], weights=[1, 0], by="activations",
            data=[language_task(m) for m in models],
        )  # fmt: skip
        result = type(base)(models[1].config).double().eval()
        result.load_state_dict(fused.state_dict())
        with torch.no_grad():
            assert distance(result(**inputs).logits, base(**inputs).logits) < 1e-5


def test_activations_say_what_is_missing() -> None:
    base = net(SMALL)
    nothing = merge.Task(base, F.cross_entropy, [])
    with pytest.raises(PlanError, match="no data to couple"):
        merge.fuse([base, net(SMALL, 1)], by="activations", data=nothing, symmetry=mlp_spec(3))
    with pytest.raises(RecipeError, match="not one source of data"):
        merge.fuse([base, base, base], data=[task(base)] * 2, symmetry=mlp_spec(3))


def test_a_network_without_a_spec_is_traced_by_its_data() -> None:
    base = net(SMALL)
    wide, _ = widened(base)
    fused = merge.fuse([wide, base], into=base, data=[task(wide), task(base)], weights=[1, 0])
    x = torch.randn(30, 6)
    assert distance(run(fused.state_dict(), SMALL, x), base(x)) < 1e-5


def test_constants_that_a_model_rebuilds_may_be_in_one_file_only() -> None:
    """Older files of BERT hold its position numbers."""
    models = [
        randomised(transformers.BertForMaskedLM(transformers.BertConfig(**TINY, vocab_size=20)), k)
        for k in range(2)
    ]
    numbers = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    old = replace(
        merge.open({**models[0].state_dict(), **numbers}), side=merge.open(models[0]).side
    )
    found = merge.fuse([old, models[1]], into=models[1]).state_dict()
    assert found.keys() == models[1].state_dict().keys()


def test_costs_are_squared_distances() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, 3, generator=draw) for n in (40, 30))
    terms = [
        Term(x, y, ("f", None, None), (False,) * 3),
        Term(x.movedim(0, 1), y.movedim(0, 1), (None, "f", None), (False,) * 3),
    ]
    flat = [z.reshape(len(z), -1).double().numpy() for z in (x, y)]
    for metric, kind, factor in (("squared", "sqeuclidean", 2), ("euclidean", "euclidean", 2**0.5),
                                 ("cosine", "cosine", 1)):  # fmt: skip
        found = cost_of(terms, "f", (40, 30), metric)  # type: ignore[arg-type]
        wanted = scipy.spatial.distance.cdist(*flat, metric=kind)
        np.testing.assert_allclose(found, factor * wanted, rtol=1e-4)
