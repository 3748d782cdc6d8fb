"""diffusers: pipelines of several models, and one of their parts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merge
from merge.inspect import inspect

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

# -- diffusers, by the library itself --------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny Stable Diffusion pipelines: a UNet, a VAE and a text encoder with weights each."""
    root = tmp_path_factory.mktemp("pipelines")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        _pipeline(root / "vocabulary").save_pretrained(root / name)
    return [root / "a", root / "b"]


def _pipeline(vocabulary: Path) -> Any:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    written(vocabulary / "vocab.json", {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2})
    written(vocabulary / "merges.txt", "#version: 0.2\n")
    unet = UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    text = CLIPTextConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(vocabulary),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PARTS = ("unet", "vae", "text_encoder")


def loaded(folder: Path, **options: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)


def test_a_merged_pipeline_loads_in_diffusers_and_is_the_mean_of_every_part(
    pipelines: list[Path], tmp_path: Path
) -> None:
    out = merge.average(pipelines).save(tmp_path / "out")
    a, b, found = (loaded(p) for p in (*pipelines, out))
    for part in PARTS:
        states = [getattr(p, part).state_dict() for p in (found, a, b)]
        assert_close(states[0], mean(*states[1:]))
    assert files_of(out) == files_of(pipelines[0]) | OURS
    for name in files_of(pipelines[0]):
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (pipelines[0] / name).read_bytes(), name
    assert merge.verify(out).ok
    assert merge.verify(out).tensors == sum(len(getattr(a, p).state_dict()) for p in PARTS)


def test_a_pipeline_by_recipe_and_in_shards(pipelines: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {pipelines[0]}\nparameters: {{t: 0.5}}\n"
        f"models: [{{model: {pipelines[1]}}}]\n"
    )
    out = merge.apply(recipe, tmp_path / "out", shard_size="6KB")
    index = read(out / "unet" / "diffusion_pytorch_model.safetensors.index.json")
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert "diffusion_pytorch_model-00001-of-" in min(shards)
    assert shards < {p.name for p in (out / "unet").iterdir()}
    assert (out / "text_encoder" / "model.safetensors").exists()
    assert (out / "vae" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert merge.verify(out).ok
    merge.slerp(pipelines, base=pipelines[0], t=0.5).save(tmp_path / "whole")
    sharded, whole = loaded(out), loaded(tmp_path / "whole")
    for part in PARTS:
        states = [getattr(p, part).state_dict() for p in (sharded, whole)]
        assert_close(*states)


def test_a_part_is_a_module_of_a_recipe(pipelines: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    a, b = pipelines
    recipe.write_text(
        f"merge_method: linear\nbase_model: {a}\nparameters: {{weight: 1}}\n"
        f"modules: {{unet: {{models: [{{model: {a}}}, {{model: {b}}}]}}}}\n"
    )
    found, first, second = (loaded(p) for p in (merge.apply(recipe, tmp_path / "out"), a, b))
    unets = [p.unet.state_dict() for p in (first, second)]
    assert_close(found.unet.state_dict(), mean(*unets))
    for part in ("vae", "text_encoder"):
        assert_close(*(getattr(p, part).state_dict() for p in (found, first)))


def test_the_configs_of_parts_follow_a_new_dtype_where_they_name_one(
    pipelines: list[Path], tmp_path: Path
) -> None:
    out = merge.average(pipelines).save(tmp_path / "out", dtype="bfloat16")
    before, after = (read(p / "text_encoder" / "config.json") for p in (pipelines[0], out))
    assert before["dtype"] == "float32"
    assert after == before | {"dtype": "bfloat16"}
    for part in ("unet", "vae"):
        config = Path(part) / "config.json"
        assert (out / config).read_bytes() == (pipelines[0] / config).read_bytes()
        stored = load_file(out / part / "diffusion_pytorch_model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert loaded(out).components.keys() == loaded(pipelines[0]).components.keys()


def test_a_variant_is_read_where_there_is_no_plain_file_and_written_plain(
    pipelines: list[Path], tmp_path: Path
) -> None:
    pipeline = loaded(pipelines[0])
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    model = merge.open(tmp_path / "fp16")
    assert (tmp_path / "fp16/unet/diffusion_pytorch_model.fp16.safetensors").exists()
    assert (
        "unet/diffusion_pytorch_model.fp16.safetensors: the fp16 variant is read, as there is no"
        " other" in model.plan().notes
    )
    model.save(tmp_path / "out")
    found = loaded(tmp_path / "out")
    for part in PARTS:
        assert_close(getattr(found, part).state_dict(), getattr(pipeline, part).state_dict())


def test_a_part_alone_is_a_checkpoint(pipelines: list[Path], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    out = merge.average([p / "unet" for p in pipelines]).save(tmp_path / "unet", dtype="float16")
    assert files_of(out) == {"config.json", "diffusion_pytorch_model.safetensors", *OURS}
    assert (out / "config.json").read_bytes() == (pipelines[0] / "unet/config.json").read_bytes()
    states = [loaded(p).unet.half().state_dict() for p in pipelines]
    found = UNet2DConditionModel.from_pretrained(out, torch_dtype=torch.float16).state_dict()
    for name, tensor in mean(*(loaded(p).unet.state_dict() for p in pipelines)).items():
        assert torch.equal(found[name], tensor.half()), name
    assert found.keys() == states[0].keys()


def test_a_pipeline_and_a_part_of_one_do_not_go_together(pipelines: list[Path]) -> None:
    with pytest.raises(merge.PlanError, match="do not hold the same tensors"):
        merge.average([pipelines[0], pipelines[1] / "unet"])


def test_inspect_names_the_parts(pipelines: list[Path]) -> None:
    assert set(inspect(pipelines[0])["components"]) == set(PARTS)
    assert inspect(pipelines[0])["family"] == "StableDiffusionPipeline"
    assert inspect(pipelines[0] / "unet")["family"] == "UNet2DConditionModel"


# -- diffusers, by hand ----------------------------------------------------------------------------


def test_only_parts_that_the_pipeline_lists_are_opened(tmp_path: Path) -> None:
    index = {**UNET, "safety_checker": [None, None], "requires_safety_checker": False, "size": 4}
    root = pipeline(tmp_path / "p", index)
    saved(root / "safety_checker" / "model.safetensors", state(1))
    saved(root / "other" / "model.safetensors", state(2))
    saved(root / "toy-pruned.safetensors", state(3))
    model = merge.open(root)
    assert set(model) == {f"unet/{n}" for n in state()}
    assert dict(model.stems) == {"unet": "diffusion_pytorch_model"}
    assert [f.name for f in model.side.files] == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
    ]
    assert model.side.left == ("toy-pruned.safetensors", "other/", "safety_checker/")
    assert "not copied: toy-pruned.safetensors, other/, safety_checker/" in model.plan().notes


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b", "..", "a\\b", "C:a", "%2e"])
def test_a_pipeline_cannot_point_outside(name: str, tmp_path: Path) -> None:
    error = error_of(pipeline(tmp_path / "p", {name: ["diffusers", "UNet"]}))
    assert error.what == "model_index.json points outside the folder"
    assert error.found == repr(name)


def test_a_part_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "p", UNET)
    (root / "unet").rename(tmp_path / "outside")
    (root / "unet").symlink_to(tmp_path / "outside")
    assert "leads out of its folder" in error_of(root).what


def test_a_pipeline_without_weights_is_refused(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "p", {"scheduler": ["diffusers", "Scheduler"]})
    assert "no safetensors weights" in error_of(root).what


def test_a_part_in_a_hub_cache_is_followed_to_its_blobs(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "models--org--p" / "snapshots" / "0123", UNET)
    blobs = tmp_path / "models--org--p" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in root.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert set(merge.open(root)) == {f"unet/{n}" for n in state()}
    assert set(merge.open(root / "unet")) == set(state())
    (root / "unet" / "config.json").unlink()
    (root / "unet" / "config.json").symlink_to(root / "scheduler" / "scheduler_config.json")
    assert merge.open(root).side.configs  # a link to a blob of the same model, however it goes


@pytest.mark.parametrize("entry", ["diffusers", ["diffusers"], {}, None, ["a", "b", "c"]], ids=str)
def test_a_folder_that_the_index_does_not_explain_is_refused(entry: object, tmp_path: Path) -> None:
    error = error_of(pipeline(tmp_path / "p", {**UNET, "unet": entry}))
    assert error.where == {"file": str(tmp_path / "p" / "model_index.json"), "key": "unet"}
