"""Differences of models as adapters: laws of the factors, and what peft makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import merge
from merge.adapters.factors import Spectrum, of_matrix, of_products, rank_for
from merge.errors import OutputRefused, PlanError, RecipeError
from merge.verify import verify
from tests.adapters import family, inputs_of, quiet, shaken, spoken

seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- sums of products ------------------------------------------------------------------------------
@st.composite
def sums(draw: st.DrawFn) -> list[tuple[float, Tensor, Tensor]]:
    """One to four products of any ranks, some of them of less rank than they seem."""
    m, n, seed = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(seeds)
    terms = []
    for i in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(1, 6))
        left, right = normal(m, rank, seed=seed + 2 * i), normal(rank, n, seed=seed + 2 * i + 1)
        if draw(st.booleans()):
            left[:, -1] = left[:, 0]  # of one rank less
        terms.append((draw(st.floats(-3, 3, allow_subnormal=False)), left, right))
    return terms


def dense(terms: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """The sum itself in float64."""
    return sum((w * (b.double() @ a.double()) for w, b, a in terms), torch.zeros(1).double())


def product(spectrum: Spectrum, rank: int) -> Tensor:
    left, right = spectrum.factors(rank)
    return left.double() @ right.double()


@settings(max_examples=150, deadline=None)
@given(sums())
def test_factors_of_a_sum_of_products_are_that_sum(
    terms: list[tuple[float, Tensor, Tensor]],
) -> None:
    found, truth = of_products(terms), dense(terms)
    size = max(1.0, float(truth.abs().max()))
    whole = product(found, len(found.values))
    torch.testing.assert_close(whole, truth, rtol=0, atol=1e-5 * size)
    assert len(found.values) <= min(*truth.shape, sum(b.shape[1] for _, b, _ in terms))
    assert found.total == pytest.approx(float(truth.square().sum()), rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(sums(), st.integers(1, 8))
def test_truncated_they_are_the_best_approximation_of_that_rank(
    terms: list[tuple[float, Tensor, Tensor]], rank: int
) -> None:
    """Eckart and Young: no matrix of that rank is nearer than the SVD's first terms."""
    found, truth = of_products(terms), dense(terms)
    u, s, v = torch.linalg.svd(truth, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    lost = (truth - product(found, rank)).norm()
    assert float(lost) <= float((truth - best).norm()) + 1e-5 * max(1.0, float(truth.norm()))


def test_two_adapters_that_cancel_leave_nothing() -> None:
    b, a = normal(5, 2), normal(2, 7)
    found = of_products([(1.5, b, a), (-1.5, b, a)])
    assert len(found.values) == 0 and found.total == 0.0


# -- dense matrices --------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), seeds)
def test_a_small_matrix_is_decomposed_exactly(m: int, n: int, seed: int) -> None:
    matrix = normal(m, n, seed=seed)
    found = of_matrix(matrix, most=min(m, n), seed=0)
    values = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(found.values, values, rtol=1e-6, atol=1e-6)
    whole = product(found, min(m, n))
    torch.testing.assert_close(whole, matrix.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(400, 900), (900, 400)])
def test_the_leading_part_of_a_large_one_is_nearly_the_best(shape: tuple[int, int]) -> None:
    """Of a falling spectrum: within a thousandth of the best error; at random, but the same."""
    u, _ = torch.linalg.qr(normal(shape[0], 400, seed=1))
    v, _ = torch.linalg.qr(normal(shape[1], 400, seed=2))
    values = 0.97 ** torch.arange(400.0)
    matrix = (u * values) @ v.T
    found = of_matrix(matrix, most=40, seed=3)
    assert len(found.values) == 40
    lost = float((matrix.double() - product(found, 40)).norm())
    assert lost <= 1.001 * float(values[40:].norm())
    again = of_matrix(matrix, most=40, seed=3)
    assert torch.equal(found.left, again.left) and torch.equal(found.right, again.right)


def test_as_many_values_are_computed_as_are_enough() -> None:
    values = 0.9 ** torch.arange(400.0)
    u, _ = torch.linalg.qr(normal(400, 400, seed=1))
    asked: list[int] = []

    def enough(squares: Tensor, total: float) -> bool:
        asked.append(len(squares))
        return float(squares.sum()) >= 0.9999 * total

    found = of_matrix(u * values, most=400, seed=0, enough=enough)
    assert asked == [32, 64] and len(found.values) == 64


def test_a_rank_holds_its_share() -> None:
    squares = torch.tensor([9.0, 4.0, 2.0, 1.0])
    assert [rank_for(squares, e, 16.0) for e in (0.1, 0.5625, 0.6, 1.0)] == [1, 1, 2, 4]


# -- from a fine-tune to an adapter and back -------------------------------------------------------
Pair = tuple[Path, Path, Any]


def pair(folder: Path, name: str, kind: str | None = None, **changes: Any) -> Pair:
    """A base, a fine-tune of all its weights, and the fine-tune in memory."""
    model = family(name, kind, **changes)
    with quiet():
        model.save_pretrained(folder / "base")
        shaken(model)
        model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", model


def assert_near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", None, {}),
    "tied embeddings": ("llama", None, {"tie_word_embeddings": True}),
    "turned matrices": ("gpt2", None, {}),
    "a classifier with biases": ("bert", "BertForSequenceClassification", {}),
    "a head of parameters": ("bert", None, {}),
    "biases everywhere": ("opt", None, {}),
    "pictures": ("vit", None, {}),
    "single experts": ("mixtral", None, {"num_hidden_layers": 1}),
    "experts and dense layers": ("qwen3_moe", None, {}),
    "encoder and decoder": ("t5 decoder", None, {}),
    "two towers": ("llava text", None, {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_at_full_rank_the_fine_tune_comes_back(case: str, tmp_path: Path) -> None:
    """By our own reading of the adapter, and by peft's."""
    name, kind, changes = MODELS[case]
    base, tuned, model = pair(tmp_path, name, kind, **changes)
    made = merge.extract_lora(tuned, base)
    out = made.save(tmp_path / "adapter")
    wanted = load_file(tuned / "model.safetensors")
    assert_near(merge.open(f"{base}+{out}").state_dict(), wanted)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), out)
    inputs = inputs_of(name)
    torch.testing.assert_close(spoken(loaded, inputs), spoken(model, inputs), rtol=0, atol=2e-6)
    assert made.report.energy == pytest.approx(1.0) and made.report.error < 1e-6
    assert verify(out).ok


def test_peft_finds_all_that_it_looks_for(tmp_path: Path) -> None:
    """It warns of tensors that are missing, and of patterns that match nothing."""
    base, tuned, model = pair(tmp_path, "llama")
    out = merge.extract_lora(tuned, base, energy=0.5).save(tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(type(model).from_pretrained(base), out)
    assert not [w for w in caught if "adapter" in str(w.message) or "pattern" in str(w.message)]


def test_alpha_is_the_rank_of_every_module(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, "llama")
    made = merge.extract_lora(tuned, base, energy=0.6)
    config = made.config
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"] != {}
    ranks = {row.rank for row in made.report.modules if row.how == "svd"}
    assert ranks - {0} == {config["r"], *config["rank_pattern"].values()}
    assert config["base_model_name_or_path"] == str(base)
    assert (config["task_type"], config["bias"]) == ("CAUSAL_LM", "none")


def test_names_are_short_where_they_mean_no_others(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, "llama", num_hidden_layers=2)
    some = merge.extract_lora(tuned, base, include=[r"\.0\..*proj"])
    assert some.config["target_modules"] == sorted(
        f"model.layers.0.{part}.{x}_proj"
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for x in names
    )
    every = merge.extract_lora(tuned, base, include=["proj"])
    assert every.config["target_modules"] == sorted(
        f"{x}_proj" for x in (*"qkvo", "gate", "up", "down")
    )


# -- budgets ---------------------------------------------------------------------------------------
def test_a_rank_is_kept_to_and_errors_are_told(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, "llama")
    made = merge.extract_lora(tuned, base, rank=3)
    out = made.save(tmp_path / "adapter")
    after = merge.open(f"{base}+{out}").state_dict()
    first, last = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert {r.rank for r in made.report.modules if r.how == "svd"} == {3}
    for row in made.report.modules:
        if row.how == "svd":
            delta = (last[row.module] - first[row.module]).double()
            lost = (last[row.module] - after[row.module]).double().norm() / delta.norm()
            assert row.error == pytest.approx(float(lost), rel=1e-4)
            values = torch.linalg.svdvals(delta).square()
            assert row.energy == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-5)
    written = json.loads((out / "extract_report.json").read_text())
    assert written == json.loads(json.dumps(made.report.to_json()))


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_an_energy_is_shared_out_over_all_matrices(energy: float, tmp_path: Path) -> None:
    """The pooled singular values that are kept are the largest, and no more than it takes."""
    base, tuned, _ = pair(tmp_path, "llama", num_hidden_layers=1)
    made = merge.extract_lora(tuned, base, energy=energy, include=["proj"])
    first, last = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    rows = [r for r in made.report.modules if r.how == "svd"]
    pool = {r.module: torch.linalg.svdvals((last[r.module] - first[r.module]).double()).square()
            for r in rows}  # fmt: skip
    every = torch.cat(list(pool.values())).sort(descending=True).values
    count = rank_for(every, energy, float(every.sum()))
    assert sum(r.rank or 0 for r in rows) == count
    for row in rows:
        assert row.rank == int((pool[row.module] >= every[count - 1] * (1 - 1e-6)).sum())


def test_both_budgets_hold(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, "llama", num_hidden_layers=1)
    made = merge.extract_lora(tuned, base, energy=0.99, rank=5)
    assert max(r.rank or 0 for r in made.report.modules) == 5


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"rank": 0}, "rank"), ({"energy": 0.0}, "energy"), ({"energy": 1.5}, "energy"),
     ({"include": ["("]}, "include"), ({"exclude": ["*"]}, "exclude")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        merge.extract_lora(small(), small(), **settings)
    assert caught.value.where["key"] == key


# -- what is no matrix -----------------------------------------------------------------------------
def small(**tensors: Tensor) -> dict[str, Tensor]:
    start = {
        "block.up.weight": normal(6, 4),
        "block.up.bias": normal(6),
        "norm.weight": normal(4),
        "embed.weight": normal(9, 4),
        "other.bias": normal(3),
        "other.weight": normal(3, 4),
    }
    return {n.replace("_", "."): t for n, t in {**start, **tensors}.items()}  # fmt: skip


def kept(made: merge.Extraction) -> set[str]:
    return {n.removeprefix("base_model.model.") for n in made.checkpoint}


def test_norms_are_stored_whole_and_only_where_they_differ() -> None:
    made = merge.extract_lora(small(norm_weight=normal(4, seed=1)), small())
    assert kept(made) == {"norm.weight"}
    assert made.config["modules_to_save"] == ["norm"]
    assert made.config["target_modules"] == "dummy-target-modules"


@pytest.mark.parametrize("embeddings", ["full", "lora", "skip", None])
def test_embeddings_are_kept_as_is_asked(embeddings: Any) -> None:
    tuned = small(embed_weight=normal(9, 4, seed=1), block_up_weight=normal(6, 4, seed=1))
    made = merge.extract_lora(tuned, small(), embeddings=embeddings)
    factors = {"block.up.lora_A.weight", "block.up.lora_B.weight"}
    wanted = {"lora": {"embed.lora_embedding_A", "embed.lora_embedding_B"}, "skip": set()}
    assert kept(made) == factors | wanted.get(embeddings, {"embed.weight"})
    row = next(r for r in made.report.modules if r.module.startswith("embed"))
    assert (row.energy == 0.0) is (embeddings == "skip")
    assert bool(made.report.notes) is (embeddings == "skip")


def test_biases_are_stored_beside_factors_or_alone() -> None:
    bias = normal(6, seed=1)
    weight = normal(6, 4, seed=1)
    both = merge.extract_lora(small(block_up_bias=bias, block_up_weight=weight), small())
    assert both.config["bias"] == "lora_only" and "block.up.base_layer.bias" in kept(both)
    alone = merge.extract_lora(small(block_up_bias=bias), small())
    assert alone.config["bias"] == "all" and kept(alone) == {"block.up.bias"}
    found = alone.checkpoint.state_dict()["base_model.model.block.up.bias"]
    assert torch.equal(found, bias)


def test_what_is_left_out_is_told() -> None:
    tuned = small(block_up_weight=normal(6, 4, seed=1), other_weight=normal(3, 4, seed=1))
    made = merge.extract_lora(tuned, small(), exclude=["^other"])
    assert kept(made) == {"block.up.lora_A.weight", "block.up.lora_B.weight"}
    row = next(r for r in made.report.modules if r.module == "other.weight")
    assert (row.rank, row.energy, row.how) == (0, 0.0, "left out, as was asked")
    assert made.report.energy < 1.0
    assert made.report.notes == ("not in the adapter, though they differ: other.weight",)


def test_what_no_adapter_can_hold_is_refused() -> None:
    scale = {"logit_scale": torch.ones(())}
    other = {"logit_scale": torch.full((), 2.0)}
    with pytest.raises(PlanError, match="belongs to no module") as caught:
        merge.extract_lora({**small(), **other}, {**small(), **scale})
    assert caught.value.where["tensor"] == "logit_scale"
    with pytest.raises(PlanError, match="the model is its base"):
        merge.extract_lora(small(), small())
    with pytest.raises(PlanError, match="lacks tensors"):
        merge.extract_lora({"norm.weight": normal(4)}, small())


def test_a_head_that_the_base_does_not_have_is_stored_whole(tmp_path: Path) -> None:
    made = merge.extract_lora({**small(), "score.weight": normal(2, 4)}, small())
    assert kept(made) == {"score.weight"} and made.config["modules_to_save"] == ["score"]


# -- the same whatever the machine -----------------------------------------------------------------
def test_neither_threads_nor_memory_change_a_byte(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, "llama", num_hidden_layers=1)
    for name, work in (("a", {"threads": 1, "memory": "12MiB"}), ("b", {"threads": 4})):
        merge.extract_lora(tuned, base, energy=0.9, **work).save(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json", "extract_report.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_half_precision_is_told_in_the_errors(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, "llama", num_hidden_layers=1)
    made = merge.extract_lora(tuned, base, dtype="bfloat16")
    out = made.save(tmp_path / "adapter")
    stored = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    rows = [r for r in made.report.modules if r.how == "svd"]
    assert all(1e-4 < r.error < 2e-2 and r.energy > 1 - 1e-9 for r in rows)


def test_the_folder_is_not_written_over(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path, "llama", num_hidden_layers=1)
    made = merge.extract_lora(tuned, base, rank=1)
    out = made.save(tmp_path / "adapter")
    with pytest.raises(OutputRefused, match="not empty"):
        made.save(out)
    with pytest.raises(OutputRefused, match="is an input"):
        made.save(base, replace=True)
    assert made.save(out, replace=True) == out
    text = (out / "README.md").read_text()
    assert "library_name: peft" in text and "# Adapter of `tuned` and `base`" in text
    (out / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert not verify(out).ok
