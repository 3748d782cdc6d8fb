"""Writes Llama-shaped models whose weights are the same, bit for bit, on every machine.

    python benchmarks/models.py OUT --size tiny|quarter|b1-slice|b1 --finetunes K

OUT/base and OUT/ft1 to OUT/ftK are Hugging Face folders: config.json, bfloat16 weights in
sharded safetensors files with their index, and a tokenizer of single bytes. A model that is
already there is kept. Needs numpy and tokenizers.

No library's normal distribution takes part: each tensor adds up the 16-bit parts of Philox's
raw words, a documented stream, and everything after that is one correctly rounded float32
operation at a time. So neither numpy's version nor the processor can change a bit.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

Floats = npt.NDArray[np.float32]

BASE_STD = np.float32(0.02)
FINETUNE_STD = np.float32(0.002)
PROCESSES = 2
CHUNK = 1 << 18  # elements: every temporary of a chunk fits in the processor's cache


@dataclass(frozen=True, slots=True)
class Size:
    """The numbers of a Llama config, and the size at which a shard is full."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    shard_bytes: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: the same file name and offset, in bytes, in every model."""

    name: str
    shape: tuple[int, ...]
    file: str
    offset: int


SIZES = {
    "tiny": Size(64, 4, 256, 4, 2, 8192, 1_500_000),
    "quarter": Size(1024, 8, 3072, 16, 4, 16000, 40_000_000),
    "b1-narrow": Size(1024, 8, 4096, 16, 4, 32000, 1_000_000_000),
    "b1-slice": Size(2048, 2, 8192, 32, 8, 32000, 1_000_000_000),
    "b1": Size(2048, 16, 8192, 32, 8, 32000, 1_000_000_000),
}


def make(out: Path, size: str, finetunes: int) -> list[Path]:
    """The folders of the base model and its fine-tunes, in that order, written where missing."""
    config = _config(SIZES[size])
    folders = [out / name for name in ("base", *(f"ft{k + 1}" for k in range(finetunes)))]
    missing = [folder for folder in folders if not _complete(folder, config)]
    if not missing:
        return folders
    shards = _shards(SIZES[size])
    for folder in missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config)
        _write_tokenizer(folder)
    slots = [slot for file, shapes in shards.items() for slot in _begin(missing, file, shapes)]
    # Largest first, so that the two processes finish together.
    slots.sort(key=lambda slot: math.prod(slot.shape), reverse=True)
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(partial(_fill, missing), slots):
            pass
    index = {
        "metadata": {"total_size": sum(2 * math.prod(slot.shape) for slot in slots)},
        "weight_map": {name: file for file, shapes in shards.items() for name in shapes},
    }
    for folder in missing:  # last: an index means that the weights are complete
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folders


def _complete(folder: Path, config: str) -> bool:
    """Whether the folder holds a finished model of this configuration."""
    written = folder / "config.json"
    index = folder / "model.safetensors.index.json"
    return index.exists() and written.exists() and written.read_text() == config


def _config(size: Size) -> str:
    """The text of config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return json.dumps(config, indent=2) + "\n"


def _shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in file order."""
    hidden, inter = size.hidden, size.intermediate
    kv = hidden // size.heads * size.kv_heads
    yield "model.embed_tokens.weight", (size.vocabulary, hidden)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inter, hidden)
        yield prefix + "mlp.up_proj.weight", (inter, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inter)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (size.vocabulary, hidden)


def _shards(size: Size) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name to the names and shapes in it; a new file starts where the next is too much."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in _shapes(size):
        nbytes = 2 * math.prod(shape)
        if shards[-1] and filled + nbytes > size.shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    count = len(shards)
    return {f"model-{k:05d}-of-{count:05d}.safetensors": s for k, s in enumerate(shards, 1)}


def _begin(folders: list[Path], file: str, shapes: dict[str, tuple[int, ...]]) -> list[Slot]:
    """Write one shard's header and give the file its length; return where its tensors go."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    starts = {}
    for name, shape in shapes.items():
        starts[name], end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    for folder in folders:
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(first + end)
    return [Slot(name, shape, file, first + starts[name]) for name, shape in shapes.items()]


def _fill(folders: list[Path], slot: Slot) -> None:
    """Write one tensor of every model: the base is drawn once and each fine-tune adds to it."""
    count = math.prod(slot.shape)
    base = _stream("base", slot.name)
    noise = {folder: _stream(folder.name, slot.name) for folder in folders if folder.name != "base"}
    centre = np.float32(1 if "norm" in slot.name else 0)
    with ExitStack() as stack:
        files = {f: stack.enter_context((f / slot.file).open("r+b")).fileno() for f in folders}
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            weights = centre + BASE_STD * _near_gaussian(base, size)
            for folder, file in files.items():
                values = weights
                if folder in noise:
                    values = weights + FINETUNE_STD * _near_gaussian(noise[folder], size)
                os.pwrite(file, _bfloat16(values).data, slot.offset + 2 * start)


def _stream(model: str, tensor: str) -> np.random.Philox:
    """A stream of its own for each tensor of each model, so that no order of work matters."""
    digest = hashlib.sha256(f"{model}/{tensor}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _near_gaussian(stream: np.random.Philox, count: int) -> Floats:
    """Values of mean 0 and variance 1: each is the sum of the four 16-bit parts of one word."""
    words = stream.random_raw(count)
    parts = np.uint64(0x0000FFFF0000FFFF)
    pairs = ((words & parts) + ((words >> np.uint64(16)) & parts)).view(np.int32)
    sums = pairs[0::2] + pairs[1::2]
    deviation = math.sqrt((65536**2 - 1) / 3)
    return (sums - np.int32(2 * 65535)).astype(np.float32) * np.float32(1 / deviation)


def _bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges; the remaining rows of the embedding are padding."""
    special = ["<unk>", "<s>", "</s>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({word: k for k, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write synthetic models for the benchmarks.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--finetunes", type=int, default=3)
    args = parser.parse_args()
    start = time.perf_counter()
    folders = make(args.out, args.size, args.finetunes)
    nbytes = sum(file.stat().st_size for f in folders for file in f.glob("*.safetensors"))
    seconds = time.perf_counter() - start
    print(f"{len(folders)} models, {nbytes / 1e9:.3f} GB, {seconds:.1f} seconds")


if __name__ == "__main__":
    main()
