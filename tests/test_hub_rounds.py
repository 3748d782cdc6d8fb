"""In which commits a model is published: few files in each, and never half a model to be seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from merge.write.rounds import MOST_FILES, plan_rounds, stale_files

SIDE = ["config.json", "model.safetensors.index.json", "README.md"]


def shards(count: int, of: int | None = None) -> list[str]:
    return [f"model-{i:05d}-of-{of or count:05d}.safetensors" for i in range(1, count + 1)]


@given(
    count=st.integers(0, 300),
    there=st.sets(st.sampled_from(["config.json", "model.safetensors", "README.md", "x.gguf"])),
    apart=st.booleans(),
)
def test_every_file_comes_once_and_few_come_together(
    count: int, there: set[str], apart: bool
) -> None:
    weights = shards(count)
    found = plan_rounds(weights, SIDE, sorted(there), apart=apart)
    together = [name for names in found.rounds for name in names]
    assert all(len(names) <= MOST_FILES for names in found.rounds)
    assert bool(found.rounds) == (count > MOST_FILES)
    if found.staging:  # the bytes come in rounds, the last commit names them all
        assert together == weights == list(found.last)
        assert there & {"config.json", "model.safetensors"} and not apart
    else:
        assert [*together, *found.last] == weights
    if found.rounds and not apart and there & {"config.json", "model.safetensors"}:
        assert found.staging


def test_a_model_of_few_files_is_one_commit() -> None:
    found = plan_rounds(shards(50), SIDE, ["config.json", *shards(3)])
    assert not found.rounds and not found.staging
    assert list(found.last) == shards(50)
    assert list(found.removed) == shards(3)


def test_what_is_left_of_another_model_goes_and_what_is_not_ours_stays() -> None:
    there = [
        "model.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "adapter_model.safetensors",
        "adapter_config.json",
        "open_clip_pytorch_model.bin",
    ]
    kept = [
        "README.md",
        "config.json",
        "model.gguf",
        "onnx/model.onnx",
        "unet/diffusion_pytorch_model.safetensors",
        "picture.png",
        "training_args.bin",
        "tokenizer.json",
    ]
    assert list(stale_files(shards(2), SIDE, [*there, *kept])) == there
    pipeline = ["unet/diffusion_pytorch_model.safetensors"]
    old = ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"]
    assert stale_files(pipeline, SIDE, old) == ("unet/diffusion_pytorch_model.bin",)


def test_what_is_written_is_never_removed() -> None:
    both = [*shards(2), "adapter_config.json"]
    assert stale_files(shards(2), [*SIDE, "adapter_config.json"], [*both, *SIDE]) == ()
