"""Quantised models are read as the numbers that their codes and scales stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import merge
from merge import applying
from merge.checkpoint.files import FileSource
from merge.checkpoint.mxfp4 import expert_values
from merge.errors import MergeError, SourceError
from merge.inspect import inspect

from .conftest import MakeModel, write_model

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
X, X_SCALES = "layers.0.x.weight", "layers.0.x.weight_scale_inv"
UP = "layers.0.experts.gate_up_proj"


def fp8(rows: int, columns: int) -> dict[str, Any]:
    return {**FP8, "weight_block_size": [rows, columns]}


def config(quantisation: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    found = {"quantization_config": quantisation} if quantisation else {}
    return {"model_type": "toy", "num_hidden_layers": 3, **found, **more}


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes_of(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = E4M3) -> Tensor:
    """Every finite code of the type, at random."""
    found = torch.randint(0, 256, shape, dtype=torch.uint8, generator=numbers(seed)).view(dtype)
    return found.float().nan_to_num(1.0, 2.0, -2.0).to(dtype)


def scales_of(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=numbers(seed)) + 0.01


def truth(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Element by element in float64: the code times the scale of the block that it lies in."""
    rows, columns = codes.shape[-2:]
    i, j = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    return codes.double() * scales.double()[..., i[:, None], j]


def opened(folder: Path) -> dict[str, Tensor]:
    return merge.open(folder).state_dict()


# -- eight-bit floats ------------------------------------------------------------------------------


def test_an_example_by_hand(make_model: MakeModel) -> None:
    codes = torch.tensor([[1.0, 2.0, 8.0], [-0.5, 4.0, 16.0]]).to(E4M3)
    scales = torch.tensor([[0.5, 0.25]])
    folder = make_model("a", {X: codes, X_SCALES: scales}, config=config(fp8(2, 2)))
    assert opened(folder)[X].tolist() == [[0.5, 1.0, 2.0], [-0.25, 2.0, 4.0]]


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    experts=st.integers(0, 3),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    of=st.sampled_from(["float32", "bfloat16", "float8_e8m0fnu", "uint8"]),
    kind=st.sampled_from([E4M3, E5M2]),
    seed=st.integers(0, 99),
)
def test_each_code_is_multiplied_by_the_scale_of_its_block(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    experts: int,
    block: tuple[int, int],
    of: str,
    kind: torch.dtype,
    seed: int,
) -> None:
    lead = (experts,) if experts else ()
    codes = codes_of((*lead, *shape), seed, kind)
    grid = (*lead, *(math.ceil(n / b) for n, b in zip(shape, block, strict=True)))
    if of in ("float32", "bfloat16"):
        scales = stored = scales_of(grid, seed + 1).to(getattr(torch, of))
    else:
        powers = torch.randint(120, 134, grid, dtype=torch.uint8, generator=numbers(seed))
        scales, stored = torch.exp2(powers.double() - 127), powers.view(getattr(torch, of))
    folder = tmp_path_factory.mktemp("q") / "a"
    write_model(folder, {X: codes, X_SCALES: stored}, config=config(fp8(*block)))
    found = opened(folder)
    assert list(found) == [X]
    wanted = truth(codes, scales, block).float().bfloat16()  # a product of both has few bits
    assert found[X].dtype == torch.bfloat16 and torch.equal(found[X], wanted)


WHOLE: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]] = {
    "one for all": ((5, 7), (), (5, 7)),
    "one, in a vector": ((5, 7), (1,), (5, 7)),
    "one for all experts": ((3, 5, 7), (1,), (15, 7)),
    "one a row": ((5, 7), (5, 1), (1, 7)),
    "one a row, in a vector": ((5, 7), (5,), (1, 7)),
    "one a row of each expert": ((3, 5, 7), (3, 5, 1), (1, 7)),
    "one a column of each expert": ((3, 5, 7), (3, 1, 7), (5, 1)),
    "one an expert": ((3, 5, 7), (3, 1, 1), (5, 7)),
    "one for a vector": ((7,), (1,), (1, 7)),
}


@pytest.mark.parametrize(("shape", "grid", "block"), WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("method", ["fbgemm_fp8", "compressed-tensors"])
def test_scales_of_tensors_rows_and_columns(
    method: str,
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    block: tuple[int, int],
    make_model: MakeModel,
) -> None:
    entry = {"fbgemm_fp8": {"quant_method": "fbgemm_fp8"}, "compressed-tensors": COMPRESSED}[method]
    codes, scales = codes_of(shape), scales_of(grid)
    folder = make_model("a", {X: codes, f"{X}_scale": scales}, config=config(entry))
    if scales.numel() == 1:
        wanted = codes.double() * scales.double().item()
    else:
        wanted = truth(
            codes, scales.view(*scales.shape, *[1] * (codes.dim() - scales.dim())), block
        )
    assert torch.equal(opened(folder)[X], wanted.float().bfloat16())


def group(**weights: Any) -> dict[str, Any]:
    known = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return {"targets": ["Linear"], "weights": {**known, **weights}, "input_activations": {}}


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": group()},
}


@pytest.mark.parametrize(
    ("weights", "block"),
    [
        ({"strategy": "block", "block_structure": [4, 2]}, (4, 2)),
        ({"strategy": "group", "group_size": 3}, (1, 3)),
    ],
    ids=["blocks", "groups"],
)
def test_compressed_tensors_say_how_large_their_blocks_are(
    weights: dict[str, Any], block: tuple[int, int], make_model: MakeModel
) -> None:
    entry = {**COMPRESSED, "config_groups": {"a": group(), "b": group(**weights)}}
    codes, scales = codes_of((6, 7)), scales_of((math.ceil(6 / block[0]), math.ceil(7 / block[1])))
    folder = make_model("a", {X: codes, f"{X}_scale": scales}, config=config(entry))
    assert torch.equal(opened(folder)[X], truth(codes, scales, block).float().bfloat16())


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_scales_have_several_names(end: str, make_model: MakeModel) -> None:
    codes, scales = codes_of((4, 4)), scales_of((2, 2))
    folder = make_model(
        "a", {X: codes, f"layers.0.x.{end}": scales}, config=config(fp8(2, 2), dtype="float32")
    )
    found = opened(folder)
    assert list(found) == [X] and found[X].dtype == torch.float32
    assert torch.equal(found[X], truth(codes, scales, (2, 2)).float())


def test_a_lone_file_is_read_too(make_model: MakeModel) -> None:
    """It has no config: scales beside codes say enough."""
    codes, scales = codes_of((130, 4)), scales_of((2, 1))
    plain = codes_of((3, 3))
    folder = make_model("a", {X: codes, X_SCALES: scales, "plain.weight": plain}, config={})
    for source in (folder, folder / "model.safetensors"):
        found = opened(source)
        assert torch.equal(found[X], truth(codes, scales, (128, 128)).float().bfloat16())
        assert torch.equal(found["plain.weight"].view(torch.uint8), plain.view(torch.uint8))


@settings(max_examples=20, deadline=None)
@given(grid=SHAPES, block=SHAPES, seed=st.integers(0, 99))
def test_it_is_what_transformers_makes_of_them(
    tmp_path_factory: pytest.TempPathFactory,
    grid: tuple[int, int],
    block: tuple[int, int],
    seed: int,
) -> None:
    codes = codes_of((grid[0] * block[0], grid[1] * block[1]), seed)
    scales = scales_of(grid, seed)
    folder = tmp_path_factory.mktemp("q") / "a"
    write_model(folder, {X: codes, X_SCALES: scales}, config=config(fp8(*block), dtype="float32"))
    theirs = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scales})["weight"]
    assert torch.equal(opened(folder)[X], theirs)


# -- MXFP4 -----------------------------------------------------------------------------------------


def packed(experts: int, outputs: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random bytes of blocks, and scales from 2**-12 to 2**5."""
    blocks = torch.randint(
        0, 256, (experts, outputs, groups, 16), dtype=torch.uint8, generator=numbers(seed)
    )
    powers = torch.randint(
        115, 133, (experts, outputs, groups), dtype=torch.uint8, generator=numbers(seed + 1)
    )
    return blocks, powers


def test_mxfp4_by_hand(make_model: MakeModel) -> None:
    """A byte holds two codes, the low half first; 128 stands for a scale of 2."""
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :2] = torch.tensor([0x21, 0xF7])  # 0.5 1, 6 -6
    blocks[0, 1, 0, 0] = 0x0B  # -1.5 0
    powers = torch.tensor([[[128], [126]]], dtype=torch.uint8)
    tensors = {f"{UP}_blocks": blocks, f"{UP}_scales": powers}
    found = opened(make_model("a", tensors, config=config({"quant_method": "mxfp4"})))
    assert list(found) == [UP] and found[UP].shape == (1, 32, 2)
    assert found[UP][0, :5].tolist() == [[1, -0.75], [2, 0], [12, 0], [-12, 0], [0, 0]]


@settings(max_examples=30, deadline=None)
@given(
    experts=st.integers(1, 4),
    outputs=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_mxfp4_is_what_transformers_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, experts: int, outputs: int, groups: int, seed: int
) -> None:
    blocks, powers = packed(experts, outputs, groups, seed)
    tensors = {f"{UP}_blocks": blocks, f"{UP}_scales": powers}
    folder = tmp_path_factory.mktemp("q") / "a"
    write_model(folder, tensors, config=config({"quant_method": "mxfp4"}))
    assert torch.equal(opened(folder)[UP], convert_moe_packed_tensors(blocks, powers))


def test_every_code_and_scale_is_exact() -> None:
    """All 256 bytes with all 254 scales that stay finite, in pieces of an expert."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(252, 1, 1)
    powers = torch.arange(252, dtype=torch.uint8).view(252, 1).repeat(1, 16)
    found = expert_values(blocks, powers)
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).view(252, 16, 32).long()
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    exact = torch.cat([sizes, -sizes])[halves] * torch.exp2(powers.double() - 127)[..., None]
    assert torch.equal(found.double(), exact.view(252, -1).T)


def test_a_merge_of_a_whole_stack_of_experts_holds_one(tmp_path: Path) -> None:
    """As large as gpt-oss-120b's, in a file that is a hole; the plan reads its header alone."""
    experts, outputs, groups = 128, 5760, 90
    shapes = {"_blocks": [experts, outputs, groups, 16], "_scales": [experts, outputs, groups]}
    for name in "ab":
        at, header = 0, {}
        for end, shape in shapes.items():
            size = math.prod(shape)
            header[UP + end] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config({"quant_method": "mxfp4"})))
        with (tmp_path / name / "model.safetensors").open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + at)
    plan = merge.linear([tmp_path / "a", tmp_path / "b"], weight=0.5).plan()
    expert = outputs * groups * 32 * 4
    assert plan.steps[0].chunk == outputs * groups * 32
    assert 4 * expert < plan.budget.buffers < 14 * expert


# -- models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantised:
    """A model as transformers saves it, and the same with its large weights in codes."""

    kind: Any
    plain: Path
    folder: Path
    weights: dict[str, Tensor]  # that the second one stands for


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """A tiny Llama, its projections in blocks of eight-bit floats."""
    made = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
    )

    def coded(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scales = 1e-3 * scales_of((tensor.shape[0] // 8, tensor.shape[1] // 8))
        ones = truth(torch.ones(tensor.shape), scales, (8, 8))
        codes = (tensor.double() / ones).float().clamp(-448, 448).to(E4M3)
        return {name: codes, f"{name}_scale_inv": scales}, truth(codes, scales, (8, 8))

    return saved(LlamaForCausalLM, made, "proj.weight", coded, fp8(8, 8), tmp_path_factory)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """A tiny gpt-oss, its experts in MXFP4."""
    made = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        num_local_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
    )

    def coded(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        experts, inputs, outputs = tensor.shape
        blocks, powers = packed(experts, outputs, inputs // 32, len(name))
        powers -= 8
        weights = convert_moe_packed_tensors(blocks, powers).double()
        return {f"{name}_blocks": blocks, f"{name}_scales": powers}, weights

    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return saved(GptOssForCausalLM, made, "_proj", coded, entry, tmp_path_factory)


Coded = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def saved(
    kind: Any, made: Any, end: str, coded: Coded, entry: dict[str, Any], root: Any
) -> Quantised:
    """The model with every weight whose name ends so in codes."""
    folder = root.mktemp(kind.__name__)
    torch.manual_seed(0)
    kind(made).bfloat16().save_pretrained(folder / "plain")
    tensors, weights = {}, {}
    for name, tensor in load_file(folder / "plain" / "model.safetensors").items():
        if name.endswith(end):
            codes, weights[name] = coded(name, tensor)
            tensors.update(codes)
        else:
            tensors[name], weights[name] = tensor, tensor.double()
    described = json.loads((folder / "plain" / "config.json").read_text())
    described["quantization_config"] = entry
    write_model(folder / "quantised", tensors, config=described, shards=2)
    return Quantised(kind, folder / "plain", folder / "quantised", weights)


@pytest.fixture(params=["llama", "gpt_oss"])
def quantised(request: pytest.FixtureRequest) -> Quantised:
    found: Quantised = request.getfixturevalue(request.param)
    return found


def recipe(folder: Path, text: str) -> applying.Planned:
    (folder / "r.yml").write_text(text)
    planned = applying.plan_recipe(folder / "r.yml")
    applying.apply_plan(planned, folder / "out")
    return planned


def loaded(kind: Any, folder: Path) -> Any:
    """The model as transformers loads it, which undoes the quantisation where there is no GPU."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def test_a_model_saved_anew_is_the_one_that_transformers_loads(
    quantised: Quantised, tmp_path: Path
) -> None:
    merge.open(quantised.folder).save(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described == json.loads((quantised.plain / "config.json").read_text())
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == quantised.weights.keys()
    for name, tensor in quantised.weights.items():
        assert torch.equal(found[name], tensor.float().bfloat16()), name
    ours, theirs = (loaded(quantised.kind, f) for f in (tmp_path / "out", quantised.folder))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_quantised_model_merges_with_a_plain_one(quantised: Quantised, tmp_path: Path) -> None:
    planned = recipe(
        tmp_path,
        f"merge_method: linear\ndtype: float32\nmodels:\n"
        f"- {{model: {quantised.folder}, parameters: {{weight: 0.25}}}}\n"
        f"- {{model: {quantised.plain}, parameters: {{weight: 0.75}}}}\n",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(quantised.plain / "model.safetensors")
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        wanted = 0.25 * quantised.weights[name] + 0.75 * tensor.double()
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-9)
    assert sum("is quantised" in n for n in planned.plan.notes) == 1
    assert not any("mix element types" in n for n in planned.plan.notes)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in described and described["dtype"] == "float32"


def test_layers_of_a_quantised_model_are_stacked_anew(quantised: Quantised, tmp_path: Path) -> None:
    recipe(
        tmp_path,
        f"merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {quantised.folder}, layer_range: [1, 3]}}]\n"
        f"- sources: [{{model: {quantised.folder}, layer_range: [0, 2]}}]\n",
    )
    model = loaded(quantised.kind, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for new, old in enumerate((1, 2, 0, 1)):
        for name, tensor in quantised.weights.items():
            if f".layers.{old}." in name:
                mine = found[name.replace(f".layers.{old}.", f".layers.{new}.")]
                assert torch.equal(mine, tensor.float().bfloat16())
    assert model.config.num_hidden_layers == 4


def test_bytes_do_not_depend_on_threads_and_memory(quantised: Quantised, tmp_path: Path) -> None:
    merged = merge.ties(
        [quantised.folder, quantised.plain], base=quantised.plain, density=0.5, weight=1.0
    )
    written = set()
    for i, (threads, memory) in enumerate(product((1, 2), ("48MiB", "1GiB"))):
        merged.save(tmp_path / f"{i}", threads=threads, memory=memory)
        written.add((tmp_path / f"{i}" / "model.safetensors").read_bytes())
    assert len(written) == 1


# -- what is said of them --------------------------------------------------------------------------


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileSource, "open", refuse)


@pytest.mark.usefixtures("no_weight_is_read")
def test_inspect_and_plan_say_how_a_model_is_read_from_headers_alone(
    llama: Quantised, gpt_oss: Quantised
) -> None:
    assert inspect(llama.plain)["quantised"] == {}
    assert inspect(llama.folder)["quantised"] == {"float8_e4m3fn in blocks of 8x8": 21}
    assert inspect(gpt_oss.folder)["quantised"] == {"mxfp4 in blocks of 32": 6}
    assert inspect(gpt_oss.folder)["dtypes"] == inspect(gpt_oss.plain)["dtypes"]
    notes = merge.linear([llama.folder, llama.plain], weight=1.0).plan().notes
    assert notes == (
        f"{llama.folder} is quantised (fp8): 21 tensors are read as the bfloat16 that their codes"
        " and scales stand for",
    )


def test_the_command_line_says_it_too(gpt_oss: Quantised) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(gpt_oss.folder)])
    assert "quantised   6 mxfp4 in blocks of 32" in result.stdout


def test_scales_of_activations_are_dropped_and_named(make_model: MakeModel) -> None:
    unused = ["x.input_scale", "x.activation_scale", "a.k_scale", "a.v_scale", "q.output_scale"]
    tensors = {X: codes_of((4, 4)), X_SCALES: scales_of((1, 1))}
    scalars = {name: torch.ones(()) for name in (*unused, "logit_scale")}
    model = merge.open(make_model("a", {**tensors, **scalars}, config=config(FP8)))
    assert set(model) == {X, "logit_scale"}
    assert set(model.dropped) == set(unused)
    (note,) = (n for n in model.plan().notes if "dropped" in n)
    assert "it scales activations" in note and "a.k_scale" in note


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "silent of a type": ({}, {"torch_dtype": "bfloat16"}),
    "of half precision": ({"torch_dtype": "float16"}, {"torch_dtype": "float16"}),
    "of a type of eight bits": ({"dtype": "float8_e4m3fn"}, {"dtype": "bfloat16"}),
    "with a part": (
        {"text_config": {"dtype": "float16", "n": 1}},
        {"text_config": {"dtype": "float16", "n": 1}, "torch_dtype": "float16"},
    ),
}


@pytest.mark.parametrize(("before", "after"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "in a part"])
def test_the_new_config_names_a_type_and_no_quantisation(
    key: str, before: dict[str, Any], after: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    described = {"model_type": "toy", **before}
    inside = {**before.get("text_config", {}), "quantization_config": FP8}
    described |= {"text_config": inside} if key == "in a part" else {key: FP8}
    folder = make_model("a", {X: codes_of((4, 4)), X_SCALES: scales_of((1, 1))}, config=described)
    merge.open(folder).save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    if key == "in a part" and not before.get("text_config"):
        assert found.pop("text_config") == {}
    assert found == {"model_type": "toy", **after}


# -- what is wrong ---------------------------------------------------------------------------------

CODES, SCALES = torch.ones(130, 4).to(E4M3), torch.ones(2, 1)
BYTES, POWERS = packed(2, 4, 3)
HALF = BYTES[..., :8].contiguous()
MXFP4 = {"quant_method": "mxfp4"}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Tensor], str, str]] = {
    "codes without scales": (FP8, {X: CODES}, X, "codes have no scales"),
    "scales without codes": (FP8, {X_SCALES: SCALES}, X_SCALES, "scales have no codes"),
    "scales of what is no code": (
        FP8, {X: CODES.float(), X_SCALES: SCALES}, X_SCALES, "scales have no codes",
    ),
    "too few scales": (FP8, {X: CODES, X_SCALES: SCALES[:1, [0, 0, 0]]}, X_SCALES, "do not fit"),
    "too many scales": (FP8, {X: CODES, X_SCALES: torch.ones(3, 1)}, X_SCALES, "do not fit"),
    "scales of other blocks": (
        fp8(64, 128), {X: CODES, X_SCALES: SCALES}, X_SCALES, "do not fit",
    ),
    "scales of experts for a matrix": (
        FP8, {X: CODES, X_SCALES: torch.ones(2, 2, 1)}, X_SCALES, "do not fit",
    ),
    "scales for a vector": (
        FP8, {X: CODES[0], X_SCALES: torch.ones(4)}, X_SCALES, "do not fit",
    ),
    "scales of whole numbers": (
        FP8, {X: CODES, X_SCALES: SCALES.int()}, X_SCALES, "of a type that scales are not",
    ),
    "blocks without scales": (
        MXFP4, {f"{UP}_blocks": BYTES}, f"{UP}_blocks", "codes have no scales",
    ),
    "scales without blocks": (
        MXFP4, {f"{UP}_scales": POWERS}, f"{UP}_scales", "scales have no codes",
    ),
    "scales of other experts": (
        MXFP4, {f"{UP}_blocks": BYTES, f"{UP}_scales": POWERS[:1]}, f"{UP}_scales", "do not fit",
    ),
    "scales that are no bytes": (
        MXFP4, {f"{UP}_blocks": BYTES, f"{UP}_scales": POWERS.float()}, f"{UP}_scales",
        "do not fit",
    ),
    "groups of another size": (
        MXFP4, {f"{UP}_blocks": HALF, f"{UP}_scales": POWERS}, f"{UP}_blocks",
        "not in groups of 32",
    ),
    "a weight in two ways": (
        MXFP4, {f"{UP}_blocks": BYTES, f"{UP}_scales": POWERS, UP: torch.ones(2)}, UP,
        "a weight is there twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "tensors", "name", "what"), WRONG.values(), ids=WRONG)
def test_codes_and_scales_that_do_not_belong_together_are_named(
    entry: dict[str, Any],
    tensors: dict[str, Tensor],
    name: str,
    what: str,
    make_model: MakeModel,
) -> None:
    with pytest.raises(SourceError) as caught:
        merge.open(make_model("a", tensors, config=config(entry)))
    assert what in caught.value.what
    assert caught.value.where["tensor"] == name
    assert str(list(tensors[name].shape)) in str(caught.value.found)
    assert "model.safetensors" in caught.value.where["file"]


def test_a_scale_that_is_not_a_number_is_found_when_it_is_used(make_model: MakeModel) -> None:
    blocks, powers = packed(1, 2, 1)
    powers[0, 1, 0] = 255
    tensors = {f"{UP}_blocks": blocks, f"{UP}_scales": powers}
    with pytest.raises(MergeError, match="not finite") as caught:
        opened(make_model("a", tensors, config=config(MXFP4)))
    assert caught.value.where["tensor"] == UP


INT4 = {
    **COMPRESSED,
    "format": "pack-quantized",
    "config_groups": {"a": group(num_bits=4, type="int")},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "integers of compressed-tensors": (INT4, "compressed-tensors, pack-quantized"),
    "NVFP4 of compressed-tensors": (
        {**COMPRESSED, "format": "nvfp4-pack-quantized",
         "config_groups": {"a": group(num_bits=4)}},
        "compressed-tensors, nvfp4-pack-quantized",
    ),
    "one group of another kind": (
        {**COMPRESSED, "config_groups": {"a": group(), "b": group(type="int")}},
        "compressed-tensors, float-quantized",
    ),
    "weights left out where they are 0": (
        {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}},
        "compressed-tensors, float-quantized",
    ),
    "experts of four bits": ({**FP8, "expert_dtype": "fp4"}, "fp8"),
    "blocks of no size": ({**FP8, "weight_block_size": [128]}, "fp8"),
    "blocks of size 0": (fp8(0, 128), "fp8"),
    "four bits of bitsandbytes": ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "told"), REFUSED.values(), ids=REFUSED)
def test_other_ways_are_refused_by_name(
    entry: dict[str, Any], told: str, make_model: MakeModel
) -> None:
    folder = make_model("a", {"w": torch.ones(2)}, config=config(entry))
    with pytest.raises(SourceError) as caught:
        merge.open(folder)
    assert caught.value.found == f"quantization_config: {told}"
    assert "the model that this one was quantised from" in str(caught.value.do)


def test_two_ways_at_once_are_refused(make_model: MakeModel) -> None:
    entries = {"compression_config": COMPRESSED}
    folder = make_model("a", {"w": torch.ones(2)}, config=config(FP8, **entries))
    with pytest.raises(SourceError, match="quantised"):
        merge.open(folder)


def test_a_component_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    """Only the config at the top of a checkpoint is written anew."""
    root = make_model("a", {"w": torch.ones(2)})
    (root / "modules.json").write_text(json.dumps([{"path": "1_Dense"}]))
    write_model(root / "1_Dense", {X: CODES, X_SCALES: SCALES}, config=config(FP8))
    with pytest.raises(SourceError) as caught:
        merge.open(root)
    assert "1_Dense" in caught.value.where["model"]
