"""Opening: what is a checkpoint, what is refused and why, and that only headers are read."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import merge
from merge import run
from merge.errors import MergeError, SourceError
from merge.ir.dtypes import BF16, F32
from merge.ir.expr import Read
from merge.ir.spec import TensorSpec

from .conftest import MakeModel, write_model

INDEX = "model.safetensors.index.json"
PACKED = torch.contiguous_format
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    """Three small tensors: one of each kind that models have."""
    return {
        "embed.weight": torch.arange(6.0).reshape(3, 2),
        "layers.0.w": torch.ones(2, 2, dtype=torch.bfloat16),
        "norm": torch.full((2,), 0.5),
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_of(source: object) -> SourceError:
    """The error of opening ``source``."""
    with pytest.raises(SourceError) as caught:
        merge.open(source)
    return caught.value


def assert_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Names, types, shapes and bytes."""
    assert dict(found).keys() == dict(wanted).keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        mine, theirs = (t.flatten().clone(memory_format=PACKED) for t in (found[name], tensor))
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name


# -- what a checkpoint is ------------------------------------------------------------------------


def test_a_checkpoint_is_a_mapping_from_name_to_spec(make_model: MakeModel) -> None:
    model = merge.open(make_model("a", tensors()))
    assert len(model) == 3
    assert set(model) == set(tensors())
    assert "norm" in model and "nothing" not in model
    assert model["embed.weight"] == TensorSpec("embed.weight", F32, (3, 2))
    assert model["layers.0.w"] == TensorSpec("layers.0.w", BF16, (2, 2))
    assert {s.name for s in model.values()} == set(tensors())
    assert model.space == "weight"
    with pytest.raises(KeyError):
        model["nothing"]


def test_two_checkpoints_of_the_same_shapes_are_not_the_same(make_model: MakeModel) -> None:
    a, b = (merge.open(make_model(n, tensors())) for n in "ab")
    assert a == a
    assert a != b
    assert len({a, b}) == 2


def test_a_checkpoint_is_opened_as_itself(make_model: MakeModel) -> None:
    model = merge.open(make_model("a", tensors()))
    assert merge.open(model) is model


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_folder_gives_its_tensors_whatever_the_number_of_files(
    shards: int, make_model: MakeModel
) -> None:
    folder = make_model("a", tensors(), shards=shards)
    for path in (folder, str(folder)):
        model = merge.open(path)
        assert model.label == str(path)
        assert_equal(model.state_dict(), tensors())


def test_a_link_to_a_folder_is_that_folder(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("a", tensors(), shards=2)
    (tmp_path / "link").symlink_to("a")
    assert_equal(merge.open(tmp_path / "link").state_dict(), tensors())


def test_a_lone_file_is_a_model_without_side_files(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "weights.safetensors")
    model = merge.open(tmp_path / "weights.safetensors")
    assert_equal(model.state_dict(), tensors())
    assert model.side.files == () and not model.side.config


def test_one_weight_file_of_any_name_is_taken(make_model: MakeModel) -> None:
    folder = make_model("a", tensors())
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert_equal(merge.open(folder).state_dict(), tensors())


def test_several_weight_files_need_an_index(make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=2)
    (folder / INDEX).unlink()
    error = error_of(folder)
    assert "several weight files and no index" in error.what
    assert error.found == f"{FIRST}, {SECOND}"


def test_the_real_minilm_opens(minilm: Path) -> None:
    model = merge.open(minilm)
    assert model["embeddings.word_embeddings.weight"].shape == (30522, 384)
    names = {f.name for f in model.side.files}
    assert {"config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"} <= names
    assert not any(n.endswith((".safetensors", ".bin", ".onnx", ".md")) for n in names)
    assert model.side.config["model_type"] == "bert"


def sentence_model(folder: Path, dense: Mapping[str, torch.Tensor]) -> Path:
    """A sentence-transformers folder with weights at the top and in 2_Dense."""
    write_model(folder, tensors())
    write_model(folder / "2_Dense", dense, config={"in_features": 2})
    modules = [{"idx": i, "path": p} for i, p in enumerate(("", "1_Pooling", "2_Dense"))]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def test_weights_of_a_sentence_transformers_module_carry_its_folder(tmp_path: Path) -> None:
    dense = {"linear.weight": torch.eye(2), "norm": torch.zeros(2)}
    model = merge.open(sentence_model(tmp_path / "st", dense))
    wanted = tensors() | {f"2_Dense/{n}": t for n, t in dense.items()}
    assert_equal(model.state_dict(), wanted)
    model.save(tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / "2_Dense" / "model.safetensors"), dense)
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), tensors())
    assert json.loads((tmp_path / "out" / "2_Dense" / "config.json").read_text()) == {
        "in_features": 2
    }


# -- weights in memory ---------------------------------------------------------------------------


def test_a_state_dict_is_read_when_it_is_needed() -> None:
    state = tensors()
    model = merge.open(state)
    state["norm"].fill_(3.0)
    assert_equal(model.state_dict(), state)


VIEWS: dict[str, torch.Tensor] = {
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "every other": torch.arange(6.0)[::2],
    "one element in steps of two": torch.arange(2.0)[::2],
    "a slice of more": torch.arange(100.0)[40:44],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "a parameter": nn.Parameter(torch.ones(2)),
    "bool": torch.tensor([True, False]),
    "int64": torch.tensor([1, -(2**62)]),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "complex64": torch.tensor([1 + 2j]),
    "float16": torch.tensor([1.5], dtype=torch.float16),
    "float64": torch.tensor([1 / 3], dtype=torch.float64),
    "float8_e4m3fn": torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn),
    "float8_e8m0fnu": torch.tensor([1.0, 2.0]).to(torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("tensor", VIEWS.values(), ids=VIEWS)
def test_any_tensor_is_saved_with_its_logical_values(tensor: torch.Tensor, tmp_path: Path) -> None:
    model = merge.open({"w": tensor})
    assert_equal(model.state_dict(), {"w": tensor.detach()})
    model.save(tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), {"w": tensor.detach()})


def test_a_packed_tensor_in_memory_is_saved_whole_or_refused(tmp_path: Path) -> None:
    packed = torch.tensor([0x12, 0x34, 0x56], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    try:
        merge.open({"w": packed}).save(tmp_path / "out")
    except MergeError as error:
        assert error.where["tensor"] == "w"
        return
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert found.view(torch.uint8).tolist() == [0x12, 0x34, 0x56]


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_of_a_module_are_noted_and_written_once(tmp_path: Path) -> None:
    module = Tied()
    model = merge.open(module)
    assert dict(model.tied) == {"head.weight": "embed.weight"}
    assert any("tied, written once" in n for n in model.plan().notes)
    state = model.state_dict()
    assert state["head.weight"] is state["embed.weight"]
    assert_equal(state, module.state_dict())
    model.save(tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["embed.weight"]


def test_a_transformers_module_keeps_its_config(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=11,
        max_position_embeddings=4,
    )
    module = BertModel(config).eval()
    merge.open(module).save(tmp_path / "out")
    again = BertModel.from_pretrained(tmp_path / "out")
    assert again.config.hidden_size == 8 and again.config.vocab_size == 11
    assert_equal(again.state_dict(), module.state_dict())


STATES: dict[str, tuple[Mapping[str, object], str]] = {
    "a number": ({"w": 3}, "not a dense tensor"),
    "a nested dict": ({"w": {"v": torch.ones(1)}}, "not a dense tensor"),
    "a sparse tensor": ({"w": torch.eye(2).to_sparse()}, "not a dense tensor"),
    "a tensor without data": ({"w": torch.empty(2, device="meta")}, "meta device"),
    "a type without a name": ({"w": torch.ones(2, dtype=torch.complex128)}, "dtype is not known"),
}


@pytest.mark.parametrize(("state", "what"), STATES.values(), ids=STATES)
def test_what_a_state_dict_may_not_hold_is_named(state: Mapping[str, object], what: str) -> None:
    error = error_of(state)
    assert what in error.what
    assert error.where["tensor"] == "w"


# -- which files are opened -----------------------------------------------------------------------

_seen: list[str] | None = None


@cache
def _watch() -> None:
    """Note every file that Python opens, while `_seen` is a list; a hook cannot be removed."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if _seen is not None and event == "open" and isinstance(arguments[0], str | Path):
            _seen.append(str(arguments[0]))

    sys.addaudithook(hook)


@contextmanager
def opens() -> Iterator[set[str]]:
    """The real paths of the files that are opened, complete when the context ends."""
    global _seen
    _watch()
    seen = _seen = []
    found: set[str] = set()
    try:
        yield found
    finally:
        _seen = None
        found.update(os.path.realpath(p) for p in seen)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", [3, None, ["a", "b"], 2.5, object()], ids=lambda v: type(v).__name__
)
def test_what_is_no_source_is_refused_by_type(source: object) -> None:
    error = error_of(source)
    assert error.what == "cannot open this as a checkpoint"
    assert error.found == type(source).__name__


@pytest.mark.parametrize("path", ["absent", "org/absent", "a\0b", "n" * 300, "~no_such_user/m"])
def test_a_path_that_is_not_there_is_named(path: str, tmp_path: Path) -> None:
    source = path if path.startswith("~") else f"{tmp_path}/{path}"
    error = error_of(source)
    assert error.what == "no such model"
    assert error.where["model"] == source
    assert "org/name" in str(error.do)


def folder_with(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """A folder of small files."""
    root.mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


WITHOUT: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "nothing": ({}, "no safetensors weights", "check the path"),
    "weights of something else": ({"model.onnx": b""}, "no safetensors weights", "check the path"),
}


@pytest.mark.parametrize(("files", "what", "advice"), WITHOUT.values(), ids=WITHOUT)
def test_a_folder_without_safetensors_says_what_it_holds(
    files: dict[str, str | bytes], what: str, advice: str, tmp_path: Path
) -> None:
    error = error_of(folder_with(tmp_path / "m", files | {"config.json": "{}"}))
    assert what in error.what
    assert error.where["model"] == str(tmp_path / "m")
    assert advice in str(error.do)


@pytest.mark.parametrize("name", ["model.onnx", "model.h5", "model"])
def test_a_lone_file_of_another_format_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\0")
    error = error_of(tmp_path / name)
    assert error.what == "only safetensors files are read, and pickles where they are allowed"
    assert error.where["file"] == str(tmp_path / name)


JSON_FAULTS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "not sound JSON"),
    "not UTF-8": (b'{"a":"\xff"}', "not UTF-8"),
    "a list": (b"[]", "not a JSON object"),
    "a key twice": (b'{"a":1,"a":2}', "the key 'a' occurs twice"),
    "nested": (b"[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(("content", "what"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_json_that_is_not_sound_names_the_file(
    name: str, content: bytes, what: str, make_model: MakeModel
) -> None:
    folder = make_model("a", tensors(), shards=2)
    (folder / name).write_bytes(content)
    error = error_of(folder)
    assert what in error.what
    assert error.where["file"] == str(folder / name)


def test_a_config_may_hold_what_is_infinite_as_python_writes_it(make_model: MakeModel) -> None:
    """As the time steps of Mamba 2 do."""
    folder = make_model("a", tensors(), config={"time_step_limit": [0.0, float("inf")]})
    assert "Infinity" in (folder / "config.json").read_text()
    assert merge.open(folder).side.config["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("config", [{"model_type": ["a"]}, {"text_config": {"model_type": 3}}])
def test_a_model_of_no_kind_is_refused(config: object, make_model: MakeModel) -> None:
    folder = make_model("a", tensors())
    (folder / "config.json").write_text(json.dumps(config))
    error = error_of(folder)
    assert error.where["file"] == str(folder / "config.json")
    assert error.where["key"].endswith("model_type")


@pytest.mark.parametrize("listed", [{}, 1, ["1_Pooling"], [{"path": 1}], [None]], ids=str)
def test_modules_json_that_lists_no_modules_is_refused(
    listed: object, make_model: MakeModel
) -> None:
    folder = make_model("a", tensors())
    (folder / "modules.json").write_text(json.dumps(listed))
    assert error_of(folder).where["file"] == str(folder / "modules.json")


def test_a_json_file_that_is_a_folder_is_refused(make_model: MakeModel) -> None:
    folder = make_model("a", tensors())
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert error_of(folder).where["file"] == str(folder / "config.json")


# -- indexes -------------------------------------------------------------------------------------

Entries = dict[str, Any]


def edit_index(folder: Path, edit: Callable[[Entries], object]) -> Path:
    """Change the weight_map of a folder's index."""
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


OUTSIDE = {
    "a folder up": "../outside.safetensors",
    "two folders up": "../../outside.safetensors",
    "absolute": "/etc/hostname",
    "a drive": "C:outside.safetensors",
    "a backslash": "..\\outside.safetensors",
    "a folder down": "sub/model.safetensors",
    "encoded": "%2e%2e%2foutside.safetensors",
    "empty": "",
    "this folder": ".",
    "the folder above": "..",
    "NUL": "model\0.safetensors",
    "newline": "model\n.safetensors",
    "over-long": "n" * 300,
    "a number": 3,
    "null": None,
    "a list": [FIRST],
}


@pytest.mark.parametrize("value", OUTSIDE.values(), ids=OUTSIDE)
def test_an_index_value_that_is_no_plain_name_is_refused(
    value: object, make_model: MakeModel, tmp_path: Path
) -> None:
    save_file(tensors(), tmp_path / "outside.safetensors")
    folder = make_model("a", tensors(), shards=2)
    edit_index(folder, lambda where: where.update({"norm": value}))
    with opens() as opened:
        error = error_of(folder)
    assert error.what == "the index points outside the folder"
    assert error.where == {"file": str(folder / INDEX), "tensor": "norm"}
    assert error.found == repr(value)
    assert not any(p.endswith("safetensors") or p == "/etc/hostname" for p in opened)


def test_a_name_that_no_file_can_have_is_refused(make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=2)
    text = (folder / INDEX).read_text().replace(SECOND, r"\ud800.safetensors")
    (folder / INDEX).write_text(text)
    assert error_of(folder).where["file"].startswith(str(folder))


def test_a_missing_shard_names_itself_and_its_index(make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=2)
    (folder / SECOND).unlink()
    error = error_of(folder)
    assert error.what == "a weight file is missing"
    assert error.where == {"file": str(folder / SECOND), "named_by": str(folder / INDEX)}


def test_a_shard_that_is_cut_off_names_itself_and_its_index(make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=2)
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-1])
    error = error_of(folder)
    assert error.what == "the file is cut off"
    assert error.where["file"] == str(folder / SECOND)
    assert error.where["named_by"] == str(folder / INDEX)


def move_norm(where: Entries) -> None:
    where["norm"] = SECOND if where["norm"] == FIRST else FIRST


WRONG: dict[str, tuple[Callable[[Entries], object], str, str, str]] = {
    "a tensor that no shard holds": (
        lambda where: where.update({"extra": FIRST}),
        "the index names a tensor that its shard does not hold",
        "extra",
        "no shard holds it",
    ),
    "the wrong shard": (
        move_norm,
        "the index names a tensor that its shard does not hold",
        "norm",
        f"it is in {FIRST}",
    ),
    "a tensor that is not listed": (
        lambda where: where.pop("norm"),
        "a shard holds a tensor that the index does not name",
        "norm",
        "",
    ),
}


@pytest.mark.parametrize(("edit", "what", "tensor", "found"), WRONG.values(), ids=WRONG)
def test_an_index_that_disagrees_with_its_shards_names_the_tensor(
    edit: Callable[[Entries], object], what: str, tensor: str, found: str, make_model: MakeModel
) -> None:
    error = error_of(edit_index(make_model("a", tensors(), shards=2), edit))
    assert error.what == what
    assert error.where["tensor"] == tensor
    assert found in str(error.found)


def test_a_tensor_in_two_shards_names_both(make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=2)
    both = load_file(folder / SECOND) | {"norm": torch.zeros(2)}
    save_file(both, folder / SECOND)
    error = error_of(folder)
    assert error.what == "two shards hold the same tensor"
    assert error.where["tensor"] == "norm"
    assert FIRST in str(error.found) and SECOND in str(error.found)


@pytest.mark.parametrize("weight_map", [None, [], {}, 3, "text"], ids=repr)
def test_an_index_without_a_map_is_refused(weight_map: object, make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    error = error_of(folder)
    assert "the index has no weight_map" in error.what
    assert error.where["file"] == str(folder / INDEX)


def test_an_index_that_lists_a_tensor_twice_is_refused(make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=2)
    text = f'{{"weight_map": {{"norm": "{FIRST}", "norm": "{SECOND}"}}}}'
    (folder / INDEX).write_text(text)
    assert "the key 'norm' occurs twice" in error_of(folder).what


# -- links and other things that are no plain files ------------------------------------------------


def test_opens_are_seen(make_model: MakeModel) -> None:
    folder = make_model("a", tensors())
    with opens() as opened:
        merge.open(folder)
    assert str(folder / "model.safetensors") in opened


LINKED = ["model.safetensors", FIRST, INDEX, "config.json", "modules.json", "tokenizer.json"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_out_is_refused_and_never_followed(
    name: str, make_model: MakeModel, tmp_path: Path
) -> None:
    """The file outside is what it should be, so that nothing but the link is wrong with it."""
    folder = make_model("a", tensors(), shards=1 if name == "model.safetensors" else 2)
    (folder / "modules.json").write_text("[]")
    (folder / "tokenizer.json").write_text("{}")
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / name).rename(outside / "secret")
    (folder / name).symlink_to(outside / "secret")
    with opens() as opened:
        error = error_of(folder)
    assert "a link that leads out of its folder" in error.what
    assert error.where["file"] == str(folder / name)
    assert error.found == str(outside / "secret")
    assert str(outside / "secret") not in opened


def test_a_module_folder_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "st", {"w": torch.ones(1)})
    (folder / "2_Dense").rename(tmp_path / "outside")
    (folder / "2_Dense").symlink_to(tmp_path / "outside")
    with opens() as opened:
        error = error_of(folder)
    assert "a link that leads out of its folder" in error.what
    assert str(tmp_path / "outside" / "model.safetensors") not in opened


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/b", "..", "a\\b"])
def test_modules_json_cannot_point_outside(path: str, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "st", {"w": torch.ones(1)})
    (folder / "modules.json").write_text(json.dumps([{"path": path}]))
    error = error_of(folder)
    assert error.what == "modules.json points outside the folder"
    assert error.found == repr(path)


@pytest.mark.parametrize("target", ["model.safetensors", "absent.safetensors"])
def test_a_link_to_itself_or_to_nothing_is_refused(target: str, make_model: MakeModel) -> None:
    folder = make_model("a", tensors())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    assert error_of(folder).where["file"] == str(folder / "model.safetensors")


def test_a_link_inside_the_folder_is_followed(make_model: MakeModel) -> None:
    folder = make_model("a", tensors())
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert_equal(merge.open(folder).state_dict(), tensors())


def hub_cache(root: Path, model: Path) -> Path:
    """``model`` as the Hub's cache keeps it: links in snapshots/<revision>, content in blobs."""
    snapshot, blobs = root / "snapshots" / "0123abc", root / "blobs"
    blobs.mkdir(parents=True)
    files = (p for p in model.rglob("*") if p.is_file())
    for number, path in enumerate(sorted(files)):
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"blob{number}")
        link.symlink_to(os.path.relpath(blobs / f"blob{number}", link.parent))
    return snapshot


def test_the_links_of_a_hub_cache_are_followed(make_model: MakeModel, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "models--org--a", make_model("a", tensors(), shards=2))
    model = merge.open(snapshot)
    assert_equal(model.state_dict(), tensors())
    assert [f.name for f in model.side.files] == ["config.json"]


def test_the_links_of_a_hub_cache_are_followed_in_module_folders(tmp_path: Path) -> None:
    dense = {"linear.weight": torch.eye(2)}
    snapshot = hub_cache(tmp_path / "models--org--a", sentence_model(tmp_path / "st", dense))
    found = merge.open(snapshot).state_dict()
    assert_equal(found, tensors() | {"2_Dense/linear.weight": torch.eye(2)})


def test_blobs_of_another_model_are_outside(make_model: MakeModel, tmp_path: Path) -> None:
    hub_cache(tmp_path / "models--org--b", make_model("b", tensors()))
    snapshot = hub_cache(tmp_path / "models--org--a", make_model("a", tensors()))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--org--b/blobs/blob1")
    assert "leads out of its folder" in error_of(snapshot).what


def without_hanging(action: Callable[[], object], pipe: Path) -> BaseException | None:
    """The error of ``action``, which fails the test if it waits for the pipe's other end."""
    found: list[BaseException] = []

    def attempt() -> None:
        try:
            action()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(5)
    if thread.is_alive():
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets it go on
        thread.join()
        pytest.fail("it waited for a pipe")
    return found[0] if found else None


@pytest.mark.parametrize("name", ["model.safetensors", FIRST, INDEX, "config.json", "modules.json"])
def test_a_pipe_in_place_of_a_file_is_refused(name: str, make_model: MakeModel) -> None:
    folder = make_model("a", tensors(), shards=1 if name == "model.safetensors" else 2)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    error = without_hanging(lambda: merge.open(folder), folder / name)
    assert isinstance(error, SourceError)
    assert "not a regular file" in error.what
    assert error.where["file"] == str(folder / name)


def test_a_pipe_beside_the_weights_is_left_alone(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("a", tensors())
    os.mkfifo(folder / "tokenizer.json")
    error = without_hanging(
        lambda: merge.open(folder).save(tmp_path / "out"), folder / "tokenizer.json"
    )
    assert error is None or isinstance(error, SourceError)
    assert error is not None or not (tmp_path / "out" / "tokenizer.json").exists()


# -- side files ----------------------------------------------------------------------------------


def test_side_files_are_what_a_loader_needs_and_no_more(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("a", tensors(), shards=2)
    kept = ["LICENSE.txt", "chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model"]
    left = ["image.png", "notes.md"]
    weights = ["pytorch_model.bin", "model.onnx", "tf_model.h5", "pytorch_model.bin.index.json"]
    ours = ["merge.lock.yml", "merge_manifest.json", "merge_recipe.yml", "mergekit_config.yml"]
    apart = ["README.md", "modeling_toy.py"]
    for name in (*kept, *left, *apart, *weights, *ours, ".hidden.json"):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{}")
    side = merge.open(folder).side
    names = [f.name for f in side.files]
    assert names == sorted([*kept, "config.json", "additional_chat_templates/rag.jinja"])
    assert {f.name: f.size for f in side.files}["tokenizer.json"] == 2
    assert list(side.left) == left
    assert side.card is not None and side.card.name == "README.md"
    assert [f.name for f in side.code] == ["modeling_toy.py"]
    plan = merge.open(folder).plan()
    assert "not copied: image.png, notes.md" in plan.notes
    merge.open(folder).save(tmp_path / "out")
    out = {*files_of(tmp_path / "out")}
    assert out == {*names, "model.safetensors", "merge_manifest.json", "README.md"}


# -- inputs that change, and inputs that do not ---------------------------------------------------


def test_a_merge_leaves_its_inputs_as_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    folders = [make_model(n, tensors(), shards=s) for n, s in (("a", 1), ("b", 2))]
    before = [(files_of(f), {p: p.stat().st_mtime_ns for p in [f, *f.rglob("*")]}) for f in folders]
    merge.average(folders).save(tmp_path / "out")
    after = [(files_of(f), {p: p.stat().st_mtime_ns for p in [f, *f.rglob("*")]}) for f in folders]
    assert before == after


def rewrite(path: Path) -> None:
    """Other values in the same place, so that only the time tells."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"\0")


def swap(path: Path) -> None:
    """Another file under the same name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes() + b"\0")
    other.rename(path)


@pytest.mark.parametrize("change", [rewrite, cut, grow, swap, Path.unlink])
def test_an_input_that_changes_after_planning_is_an_error(
    change: Callable[[Path], None], make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("a", tensors())
    plan = run.plan(0.5 * merge.open(folder) + 0.5 * merge.open(make_model("b", tensors())))
    change(folder / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"changed while it was in use|cannot be opened"
    ) as caught:
        run.save_plan(plan, tmp_path / "out")
    assert caught.value.where["file"] == str(folder / "model.safetensors")
    assert caught.value.where["tensor"] in tensors()
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_while_it_is_read_is_an_error(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("a", {"w": torch.ones(4)})
    model = merge.open(folder)
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], at: int) -> int:
        rewrite(folder / "model.safetensors")
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(SourceError, match="changed while it was in use"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_becomes_shorter_while_it_is_open_is_an_error(make_model: MakeModel) -> None:
    folder = make_model("a", tensors())
    read = merge.open(folder).tensors["norm"]
    assert isinstance(read, Read)
    with (
        pytest.raises(SourceError, match="became shorter") as caught,
        read.source.open("norm") as r,
    ):
        os.truncate(folder / "model.safetensors", 16)
        r.read_into(0, memoryview(bytearray(8)))
    assert caught.value.where == {"file": str(folder / "model.safetensors"), "tensor": "norm"}


def test_a_side_file_that_is_gone_is_an_error_of_the_input(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("a", tensors())
    (folder / "tokenizer.json").write_text("{}")
    plan = run.plan(merge.open(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError) as caught:
        run.save_plan(plan, tmp_path / "out")
    assert caught.value.where["file"] == str(folder / "tokenizer.json")
    assert not (tmp_path / "out").exists()
