"""Models with PEFT adapters: equal to what peft itself makes of them, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, TrainableTokensConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
from merge.errors import PlanError
from tests.adapters import Trained, assert_equal, family, inputs_of, lora, opened, quiet, train

CLASSIFIER = "BertForSequenceClassification"
LINEAR = "all-linear"


def bert(**settings: Any) -> LoraConfig:
    return lora(target_modules=["query", "value"], **settings)


# -- every kind of LoRA, as merge_and_unload -------------------------------------------------------
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
PICTURES = {"target_modules": ["projection", "query"]}
CASES: dict[str, tuple[str, str | None, LoraConfig]] = {
    "linear layers": ("llama", None, lora(target_modules=LINEAR)),
    "stabilised ranks": ("llama", None, lora(use_rslora=True)),
    "ranks and alphas by pattern": (
        "llama", None,
        lora(target_modules=LINEAR, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
             alpha_pattern={"v_proj": 3, "^model.layers.0.self_attn.k_proj": 5}),
    ),
    "turned matrices": ("gpt2", None, lora(**GPT2)),
    "turned matrices whose config does not say so": (
        "gpt2", None, lora(target_modules=["c_attn", "c_proj"]),
    ),
    "turned matrices beside others": (
        "gpt2", "GPT2ForSequenceClassification",
        lora(**{**GPT2, "target_modules": ["c_proj", "score"]}),
    ),
    "embeddings": ("llama", None, lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "positions": ("gpt2", None, lora(**{**GPT2, "target_modules": ["wpe", "c_attn"]})),
    "kernels of two axes": ("vit", None, lora(**PICTURES)),
    "biases of B": ("bert", None, bert(lora_bias=True)),
    "all biases": ("bert", CLASSIFIER, bert(bias="all", task_type="SEQ_CLS")),
    "biases of changed layers": ("bert", CLASSIFIER, bert(bias="lora_only")),
    "a head of its own": ("bert", CLASSIFIER, bert(task_type="SEQ_CLS")),
    "whole modules": (
        "llama", None, lora(modules_to_save=["embed_tokens", "norm", "lm_head"]),
    ),
    "tokens": ("llama", None, lora(trainable_token_indices={"embed_tokens": [1, 7, 3]})),
    "tokens of shared embeddings": ("gpt2", None, lora(**GPT2, trainable_token_indices=[1, 7])),
    "DoRA": ("llama", None, lora(target_modules=LINEAR, use_dora=True)),
    "DoRA of turned matrices": ("gpt2", None, lora(**GPT2, use_dora=True)),
    "DoRA of embeddings": (
        "llama", None, lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    ),
    "DoRA of kernels": ("vit", None, lora(**PICTURES, use_dora=True)),
    "DoRA, stabilised": ("llama", None, lora(use_dora=True, use_rslora=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_lora_is_the_one_that_peft_merges(case: str, tmp_path: Path) -> None:
    name, kind, config = CASES[case]
    it = train(tmp_path, family(name, kind), config, inputs_of(name))
    made = opened(it)
    assert_equal(made.state_dict(), it.merged())
    torch.testing.assert_close(it.says(made.save(tmp_path / "out")), it.output, rtol=0, atol=1e-5)


def test_kernels_of_one_axis(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        conv_dim=(8, 8), conv_kernel=(4, 3), conv_stride=(2, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=12,
    )  # fmt: skip
    torch.manual_seed(0)
    sound = {"input_values": torch.randn(1, 64)}
    wanted = lora(target_modules=r"feature_extractor.*\.conv")
    it = train(tmp_path, transformers.Wav2Vec2Model(config), wanted, sound)
    assert_equal(opened(it).state_dict(), it.merged())


def test_kernels_of_three_axes(tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_frames=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.VideoMAEModel(config)
    pixels = {"pixel_values": torch.randn(1, 4, 3, 8, 8)}
    it = train(tmp_path, model, lora(target_modules=["projection"], use_dora=True), pixels)
    assert_equal(opened(it).state_dict(), it.merged())


def test_the_tokens_tuner(tmp_path: Path) -> None:
    it = train(tmp_path, family("llama"), TrainableTokensConfig(token_indices=[5, 2]))
    assert_equal(opened(it).state_dict(), it.merged())


def exact(base: Mapping[str, Tensor], folder: Path, config: LoraConfig) -> dict[str, Tensor]:
    """W + alpha / r B A in float64, by names, of a plain LoRA on linear layers."""
    own = load_file(folder / "adapter_model.safetensors")
    out = {name: tensor.double() for name, tensor in base.items()}
    for name, right in own.items():
        if name.endswith("lora_A.weight"):
            left = own[name.replace("lora_A", "lora_B")].double()
            place = name.removeprefix("base_model.model.").replace("lora_A.", "")
            out[place] += config.lora_alpha / config.r * left @ right.double()
    return out


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """Each number is the nearest one of bfloat16 to the exact sum, but for ties of float32."""
    config = lora(target_modules=LINEAR)
    it = train(tmp_path, family("llama").bfloat16(), config)
    truth = exact(load_file(it.base / "model.safetensors"), it.adapter, config)
    for name, found in opened(it).state_dict().items():
        assert found.dtype == torch.bfloat16
        step = torch.finfo(torch.bfloat16).eps * truth[name].abs()
        assert ((found.double() - truth[name]).abs() <= 0.5 * step + 1e-7).all(), name


# -- what is tied ----------------------------------------------------------------------------------
TIES: dict[str, Any] = {
    "the embeddings alone": lora(target_modules=["embed_tokens", "q_proj"]),
    "the head alone": lora(target_modules=["lm_head", "q_proj"]),
    "both, tied": lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "both, each its own": lora(target_modules=["embed_tokens", "lm_head"]),
    "tokens of both": lora(trainable_token_indices=[1, 7]),
    "tokens of both by their tuner": TrainableTokensConfig(token_indices=[1, 7]),
    "the embeddings in whole": lora(modules_to_save=["embed_tokens"]),
    "the embeddings in whole, tied": lora(
        modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
}


@pytest.mark.parametrize("case", TIES)
def test_shared_embeddings_do_what_the_adapters_model_does(case: str, tmp_path: Path) -> None:
    """merge_and_unload does not: it changes the head with the embeddings, or changes them twice."""
    it = train(tmp_path, family("llama", tie_word_embeddings=True), TIES[case])
    out = opened(it).save(tmp_path / "out")
    torch.testing.assert_close(it.says(out), it.output, rtol=0, atol=1e-5)
    stays = "tied" in case or "tokens" in case
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is stays
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not stays  # noqa: SIM118


@pytest.mark.parametrize("case", TIES)
def test_shared_embeddings_in_memory_likewise(case: str, tmp_path: Path) -> None:
    from merge.checkpoint.adapter import with_adapter
    from merge.checkpoint.place import LocalFiles

    it = train(tmp_path, family("llama", tie_word_embeddings=True), TIES[case])
    with quiet():
        model = it.kind.from_pretrained(it.base)
    made = with_adapter(merge.open(model), LocalFiles.of(it.adapter))
    plain = opened(it).state_dict()
    found = made.state_dict()
    assert set(found) == {*plain, "lm_head.weight"}
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name
    tied = "lm_head.weight" not in plain
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]) is tied
    assert bool(made.tied) is tied


# -- trees of other names --------------------------------------------------------------------------
def test_an_adapter_of_a_model_with_a_head_fits_the_model_without(tmp_path: Path) -> None:
    """Names begin with ``bert.`` in the one and not in the other; the head is the adapter's own."""
    plain = family("bert", "BertModel")
    it = train(tmp_path, family("bert", CLASSIFIER), bert(task_type="SEQ_CLS"), saved_on=plain)
    made = opened(it)
    assert "encoder.layer.0.attention.self.query.weight" in made
    assert made.side.config["architectures"] == [CLASSIFIER]
    wanted = it.merged()
    for name, found in made.state_dict().items():
        if not name.startswith("pooler."):
            torch.testing.assert_close(found, wanted[name if name in wanted else f"bert.{name}"])


def test_names_that_the_library_has_changed_are_asked_of_it(tmp_path: Path) -> None:
    """``q_proj`` in the model of today is ``attention.attention.query`` in the file."""
    it = train(tmp_path, family("vit"), lora(target_modules=["q_proj"]), inputs_of("vit"))
    made = opened(it)
    assert_equal(made.state_dict(), it.merged())
    assert "vit.encoder.layer.0.attention.attention.query.weight" in made


def test_an_adapter_that_classifies_makes_a_language_model_classify(tmp_path: Path) -> None:
    kind = "LlamaForSequenceClassification"
    model = family("llama", kind, num_labels=5)
    it = train(tmp_path, model, lora(task_type="SEQ_CLS"), saved_on=family("llama"))
    out = opened(it).save(tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [kind]
    assert len(config["id2label"]) == len(config["label2id"]) == 5
    torch.testing.assert_close(it.says(out), it.output, rtol=0, atol=1e-5)


def renamed(it: Trained, names: Callable[[str], str]) -> None:
    """Give the base's tensors other names."""
    file = it.base / "model.safetensors"
    save_file({names(n): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers", "layers"),
        ("model.layers", "text.model.layers"),
        (".self_attn.", ".attention."),
        ("model.layers", "model.decoder.layers"),
    ],
)
def test_names_that_differ_in_one_place_are_found(ours: str, theirs: str, tmp_path: Path) -> None:
    it = train(tmp_path, family("llama"), lora(target_modules=LINEAR))
    wanted = {n.replace(ours, theirs): t for n, t in it.merged().items()}
    renamed(it, lambda n: n.replace(ours, theirs))
    assert_equal(opened(it).state_dict(), wanted)


def test_towers_that_are_called_the_other_way_round(tmp_path: Path) -> None:
    """As older libraries saved them: ``language_model.model`` for ``model.language_model``."""
    model = family("llava text")
    it = train(tmp_path, model, lora(target_modules=r".*language_model.*\.(q_proj|v_proj)"))

    def old(name: str) -> str:
        name = name.replace("model.language_model.", "language_model.model.")
        return name.replace("model.vision_tower.", "vision_tower.")

    wanted = {old(n): t for n, t in it.merged().items()}
    renamed(it, old)
    assert_equal(opened(it).state_dict(), wanted)


def test_what_may_be_one_of_two_towers_is_refused(tmp_path: Path) -> None:
    it = train(tmp_path, family("llama"), lora(target_modules=["q_proj"]))
    file = it.base / "model.safetensors"
    both = {f"{side}.{n}": t.clone() for n, t in load_file(file).items() for side in ("a", "b")}
    save_file(both, file, metadata={"format": "pt"})
    with pytest.raises(PlanError, match="one of several") as caught:
        opened(it)
    assert caught.value.where["tensor"] == "model.layers.0.self_attn.q_proj.weight"


# -- stacks of experts, and layers that are there several times ------------------------------------
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("which", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_experts_that_are_stored_turned(which: list[str], tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=4,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    pattern = {r".*experts\.down_proj": 2}
    it = train(tmp_path, model, lora(target_parameters=which, rank_pattern=pattern))
    assert_equal(opened(it).state_dict(), it.merged())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("which", [EXPERTS, EXPERTS[:1]])
def test_experts_that_the_file_has_one_by_one(name: str, which: list[str], tmp_path: Path) -> None:
    """The adapter knows all of them as one tensor, under the library's names of today."""
    it = train(tmp_path, family(name), lora(target_modules=["q_proj"], target_parameters=which))
    assert_equal(opened(it).state_dict(), it.merged())


def test_experts_in_memory(tmp_path: Path) -> None:
    """A state dict of transformers 5, where a file would have each expert's matrices."""
    from merge.checkpoint.adapter import with_adapter
    from merge.checkpoint.place import LocalFiles

    model = family("qwen3_moe")
    wanted = lora(target_modules=["q_proj"], target_parameters=EXPERTS)
    it = train(tmp_path, model, wanted)
    with quiet():
        plain = it.kind.from_pretrained(it.base)
        merged = peft.PeftModel.from_pretrained(it.kind.from_pretrained(it.base), it.adapter)
        state = merged.merge_and_unload().state_dict()
    found = with_adapter(merge.open(plain), LocalFiles.of(it.adapter)).state_dict()
    assert_equal(found, state)


def test_layers_that_are_repeated_are_changed_each_by_itself(tmp_path: Path) -> None:
    """peft cannot merge these: its repeated layers are one and the same tensor."""
    it = train(tmp_path, family("llama"), lora(layer_replication=[[0, 2], [1, 3], [0, 1]]))
    out = opened(it).save(tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5
    torch.testing.assert_close(it.says(out), it.output, rtol=0, atol=1e-6)


def test_magnitudes_are_applied_a_part_of_a_matrix_at_a_time(tmp_path: Path) -> None:
    """As much memory as for a part, and what the formula says of the whole."""
    name, sizes = "model.layers.0.up_proj", {"lora_A": (2, 1024), "lora_B": (4096, 2)}
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(4096, 1024, generator=draw)
    parts = {k: torch.randn(s, generator=draw) for k, s in sizes.items()}
    magnitude = torch.rand(4096, generator=draw)
    tensors = {f"base_model.model.{name}.{k}.weight": t for k, t in parts.items()}
    (tmp_path / "adapter").mkdir()
    tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "use_dora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "base").mkdir()
    save_file({f"{name}.weight": weight}, tmp_path / "base" / "model.safetensors")
    model = merge.open(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert model.plan(threads=1).budget.buffers < 64 << 20
    changed = weight.double() + 0.5 * parts["lora_B"].double() @ parts["lora_A"].double()
    wanted = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    found = model.state_dict()[f"{name}.weight"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
