"""Folders of every layout: what is opened, what is written, what is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge
from merge.inspect import inspect

from .conftest import MakeModel, write_model
from .folders import (
    OURS,
    UNET,
    assert_close,
    error_of,
    files_of,
    mean,
    pipeline,
    read,
    saved,
    state,
    written,
)

# -- sentence-transformers -------------------------------------------------------------------------


def test_a_sentence_model_with_a_dense_module_gives_the_embeddings_of_the_hand_merged_one(
    minilm: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    models = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        body = Transformer(str(minilm))
        dense = Dense(384, 8)
        with torch.no_grad():
            for parameter in body.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model = SentenceTransformer(modules=[body, Pooling(384), dense], device="cpu")
        model.save(str(tmp_path / name), create_model_card=False)
        models.append(model)
    out = merge.average([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    assert (out / "2_Dense" / "model.safetensors").exists()
    assert (out / "config_sentence_transformers.json").exists()
    assert (out / "sentence_bert_config.json").exists()
    found = SentenceTransformer(str(out), device="cpu")
    wanted = models[0]
    wanted.load_state_dict(mean(*(m.state_dict() for m in models)))
    texts = ["a sentence", "another one", "weights are data"]
    assert torch.allclose(
        torch.tensor(found.encode(texts)), torch.tensor(wanted.encode(texts)), atol=1e-5
    )


def test_the_modules_of_a_router_are_components(make_model: MakeModel) -> None:
    root = make_model("a", state())
    written(root / "modules.json", [{"path": ""}, {"path": "1_Router"}])
    written(root / "1_Router" / "router_config.json", {"types": {"query_0_Dense": "x.Dense"}})
    saved(root / "1_Router" / "query_0_Dense" / "model.safetensors", state(1))
    written(root / "1_Router" / "query_0_Dense" / "config.json", {"in_features": 3})
    model = merge.open(root)
    assert set(model) == {*state(), *(f"1_Router/query_0_Dense/{n}" for n in state())}
    names = {f.name for f in model.side.files}
    assert {"1_Router/router_config.json", "1_Router/query_0_Dense/config.json"} <= names


def test_a_config_of_arguments_gains_no_dtype(make_model: MakeModel, tmp_path: Path) -> None:
    """sentence-transformers hands what stands there to the module's class."""
    root = make_model("a", state())
    written(root / "modules.json", [{"path": ""}, {"path": "2_Dense"}])
    saved(root / "2_Dense" / "model.safetensors", state(1))
    written(root / "2_Dense" / "config.json", {"in_features": 3})
    out = merge.open(root).save(tmp_path / "out", dtype="float16")
    assert read(out / "2_Dense" / "config.json") == {"in_features": 3}
    assert read(out / "config.json")["torch_dtype"] == "float16"


# -- timm and open_clip ----------------------------------------------------------------------------

TIMM = '{"architecture":  "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 8, 8]}}'


def test_a_timm_folder_merges_and_its_config_stays_as_it_is(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        saved(tmp_path / name / "model.safetensors", state(seed))
        written(tmp_path / name / "config.json", TIMM)
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"never opened")
    out = merge.average([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out", dtype="float16")
    assert (out / "config.json").read_text() == TIMM
    halves = {n: t.half() for n, t in mean(state(0), state(1)).items()}
    assert_close(load_file(out / "model.safetensors"), halves)
    assert inspect(out)["family"] == "vit_tiny_patch16_224"


def test_an_open_clip_folder_keeps_the_names_that_its_loader_looks_for(tmp_path: Path) -> None:
    config = {"model_cfg": {"embed_dim": 4}, "preprocess_cfg": {"mean": [0.5]}}
    for seed, name in enumerate("ab"):
        saved(tmp_path / name / "open_clip_model.safetensors", state(seed))
        written(tmp_path / name / "open_clip_config.json", config)
        written(tmp_path / name / "tokenizer.json", "{}")
    out = merge.average([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    assert files_of(out) == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
        *OURS,
    }
    assert read(out / "open_clip_config.json") == config
    assert_close(load_file(out / "open_clip_model.safetensors"), mean(state(0), state(1)))
    assert merge.verify(out).ok
    cut = merge.open(out).save(tmp_path / "cut", shard_size=60)
    assert (cut / "open_clip_model.safetensors.index.json").exists()
    assert_close(merge.open(cut).state_dict(), merge.open(out).state_dict())
    assert merge.verify(cut).ok


def test_where_transformers_and_open_clip_share_a_folder_the_former_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "m" / "model.safetensors", state(0))
    saved(tmp_path / "m" / "open_clip_model.safetensors", state(1))
    model = merge.open(tmp_path / "m")
    assert_close(model.state_dict(), state(0))
    assert model.side.left == ("open_clip_model.safetensors",)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "open_clip_model"])
def test_a_lone_file_keeps_a_name_that_loaders_know(stem: str, tmp_path: Path) -> None:
    saved(tmp_path / f"{stem}.safetensors", state())
    merge.open(tmp_path / f"{stem}.safetensors").save(tmp_path / "out")
    assert (tmp_path / "out" / f"{stem}.safetensors").exists()


def test_the_names_of_weight_files_survive_every_operation(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        pipeline(tmp_path / name, UNET)
        saved(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors", state(seed))
    a, b, c = (merge.open(tmp_path / n) for n in "abc")
    for made in (
        a + 0.5 * (b - a),
        2.0 * (a - b),
        merge.ties([b, c], base=a, density=0.5, weight=1.0),
        merge.linear([a, b], weight=[0.3, 0.7]),
        merge.greedy_soup([a, b], lambda _: 1.0).checkpoint,
        a.cast("float16"),
    ):
        assert [f.name for f in made.plan().files] == ["unet/diffusion_pytorch_model.safetensors"]


# -- which file of several -------------------------------------------------------------------------

ONE, TWO = "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"


def sharded(folder: Path, index: str, first: str, second: str, seed: int) -> None:
    """A state dict in two files, and an index of any name."""
    (a, b, c) = state(seed).items()
    saved(folder / first, dict([a, b]))
    saved(folder / second, dict([c]))
    where = {a[0]: first, b[0]: first, c[0]: second}
    written(folder / index, {"metadata": {}, "weight_map": where})


def consolidated(folder: Path) -> None:
    """Mistral's own file beside the shards of transformers."""
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    sharded(folder, "model.safetensors.index.json", first, second, 0)
    saved(folder / "consolidated.safetensors", state(1))


def whole(name: str, seed: int) -> Callable[[Path], None]:
    return lambda folder: saved(folder / name, state(seed))


CHOICES: dict[str, tuple[list[Callable[[Path], None]], set[str]]] = {
    "plain before a variant": (
        [whole("model.safetensors", 0), whole("model.fp16.safetensors", 1)],
        {"model.fp16.safetensors"},
    ),
    "plain shards before a variant": ([consolidated], {"consolidated.safetensors"}),
    "one file before consolidated ones": (
        [
            whole("model.safetensors", 0),
            whole("consolidated-00001-of-00002.safetensors", 1),
            whole("consolidated-00002-of-00002.safetensors", 2),
        ],
        {f"consolidated-0000{i}-of-00002.safetensors" for i in (1, 2)},
    ),
    "a variant alone": ([whole("model.fp16.safetensors", 0)], set()),
    "shards of a variant": (
        [lambda f: sharded(f, "model.safetensors.index.fp16.json", ONE, TWO, 0)],
        set(),
    ),
    "a variant before any other": (
        [whole("model.bf16.safetensors", 0), whole("other.safetensors", 1)],
        {"other.safetensors"},
    ),
    "any other alone": ([whole("sd_toy.safetensors", 0)], set()),
    "an adapter's beside": (
        [whole("model.safetensors", 0), whole("adapter_model.safetensors", 1)],
        {"adapter_model.safetensors"},
    ),
}


@pytest.mark.parametrize(("make", "left"), CHOICES.values(), ids=CHOICES)
def test_the_files_are_those_that_a_loader_would_take_and_others_are_named_as_left(
    make: list[Callable[[Path], None]], left: set[str], tmp_path: Path
) -> None:
    for step in make:
        step(tmp_path / "m")
    model = merge.open(tmp_path / "m")
    assert_close(model.state_dict(), state(0))
    assert set(model.side.left) == left
    assert set(left) <= {
        n for note in model.plan().notes for n in note.removeprefix("not copied: ").split(", ")
    }
    out = model.save(tmp_path / "out")
    assert files_of(out) == {"model.safetensors", *OURS}


def test_several_variants_and_no_plain_file_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m" / "model.fp16.safetensors", state(0))
    saved(tmp_path / "m" / "model.non_ema.safetensors", state(1))
    error = error_of(tmp_path / "m")
    assert error.what == "several variants of the weights and no plain file"
    assert error.found == "model.fp16.safetensors, model.non_ema.safetensors"
    assert "model.safetensors" in str(error.do)


# -- what lies beside ------------------------------------------------------------------------------

SIDE = [
    "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "license.txt", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "qwen.tiktoken", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.json", "vocab.txt",
]  # fmt: skip


def test_every_small_file_that_a_loader_wants_is_copied(
    make_model: MakeModel, tmp_path: Path
) -> None:
    root = make_model("a", state())
    for name in SIDE:
        written(root / name, "{}")
    out = merge.open(root).save(tmp_path / "out")
    assert files_of(out) == {*SIDE, "config.json", "model.safetensors", *OURS}


def test_the_card_of_an_input_is_never_copied(make_model: MakeModel, tmp_path: Path) -> None:
    root = make_model("a", state())
    assert merge.open(root).side.card is None
    written(root / "README.md", "---\nlicense: mit\n---\nwords of the input")
    model = merge.open(root)
    assert model.side.card is not None
    assert Path(model.side.card.path) == root / "README.md"
    assert model.side.left == ()
    out = model.save(tmp_path / "out")
    assert "words of the input" not in (out / "README.md").read_text()


def with_code(root: Path, config: Mapping[str, object]) -> Path:
    """A model that comes with its own program."""
    write_model(root, state(), config=config)
    written(root / "modeling_toy.py", "class Toy: ...\n")
    written(root / "configuration_toy.py", "class ToyConfig: ...\n")
    return root


AUTO = {"model_type": "toy", "auto_map": {"AutoModel": "modeling_toy.Toy"}}


@pytest.mark.parametrize(("config", "needed"), [(AUTO, True), ({"model_type": "toy"}, False)])
def test_programs_are_left_and_named_unless_they_are_asked_for(
    config: dict[str, object], needed: bool, tmp_path: Path
) -> None:
    model = merge.open(with_code(tmp_path / "a", config))
    (note,) = model.plan().notes
    assert note.startswith("not copied: configuration_toy.py, modeling_toy.py: programs")
    assert ("the model needs" in note) == needed
    assert "--copy-code" in note
    out = model.save(tmp_path / "out")
    assert not list(out.glob("*.py"))
    out = model.save(tmp_path / "with", copy_code=True)
    assert (out / "modeling_toy.py").read_text() == "class Toy: ...\n"
    assert merge.verify(out).ok


def test_the_command_line_copies_programs_when_asked(tmp_path: Path) -> None:
    from click.testing import CliRunner
    from merge_cli.app import cli

    root = with_code(tmp_path / "a", AUTO)
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {root}}}]"
    )
    plan = CliRunner().invoke(cli, ["plan", str(recipe), "--copy-code"])
    assert "copied: configuration_toy.py, modeling_toy.py: programs, so read them" in plan.output
    merge.apply(recipe, tmp_path / "out", copy_code=True)
    assert (tmp_path / "out" / "modeling_toy.py").exists()
    done = CliRunner().invoke(cli, ["apply", str(recipe), str(tmp_path / "cli"), "--copy-code"])
    assert done.exit_code == 0, done.output
    shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "cli" / "configuration_toy.py").exists()
