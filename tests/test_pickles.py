"""Pickles: opened only when allowed, read like any other weights, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from safetensors.torch import save_file
from torch import Tensor, nn

import merge
from merge import run
from merge.checkpoint import archive, strided
from merge.checkpoint.strided import StridedReader
from merge.errors import SourceError
from merge.ir.dtypes import BY_NAME
from merge.ir.spec import TensorSpec

from .conftest import MakeModel

PACKED = torch.contiguous_format
OLD = {"_use_new_zipfile_serialization": False}


def opened(path: Path) -> merge.Checkpoint:
    return merge.open(path, allow_pickle=True)


def saved(path: Path, content: object, **options: Any) -> Path:
    """``content`` as torch.save writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def error_of(path: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        opened(path)
    return caught.value


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Names, order, types, shapes and bytes."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        mine, theirs = (t.flatten().clone(memory_format=PACKED) for t in (found[name], tensor))
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name


# -- the law: a pickle and a safetensors file of the same tensors are the same model ---------------

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
NEWER = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]
"""Types that torch's old format does not know."""


def numbered(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Elements that differ from their neighbours."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7 % 251).to(dtype).reshape(shape)


@st.composite
def views(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (*DTYPES, *NEWER)) -> Tensor:
    """A tensor of any shape and type, seen through a few slices, steps, swaps and expansions."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    tensor = numbered(shape, draw(st.sampled_from(dtypes)))
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        axis, other = (draw(st.integers(0, tensor.dim() - 1)) for _ in range(2))
        match draw(st.sampled_from(["swap", "step", "part", "expand"])):
            case "swap":
                tensor = tensor.transpose(axis, other)
            case "step":
                tensor = tensor[(slice(None),) * axis + (slice(None, None, 2),)]
            case "part":
                start = draw(st.integers(0, tensor.shape[axis]))
                tensor = tensor.narrow(axis, start, tensor.shape[axis] - start)
            case "expand":
                tensor = tensor.unsqueeze(axis).expand(
                    *tensor.shape[:axis], draw(st.integers(1, 3)), *tensor.shape[axis:]
                )
    return tensor


@settings(max_examples=150, deadline=None)
@given(data=st.data(), old=st.booleans())
def test_a_pickle_opens_to_the_tensors_of_the_safetensors_file(
    data: st.DataObject, old: bool
) -> None:
    dtypes = DTYPES if old else [*DTYPES, *NEWER]
    tensors = data.draw(st.lists(views(dtypes), min_size=1, max_size=4))
    state = {f"t{i}": t for i, t in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as scratch:
        file = saved(Path(scratch) / "m.bin", state, _use_new_zipfile_serialization=not old)
        plain = Path(scratch) / "m.safetensors"
        save_file({n: t.contiguous() for n, t in state.items()}, plain)
        found, wanted = opened(file), merge.open(plain)
        assert dict(found) == dict(wanted)
        assert_equal(found.state_dict(), {n: wanted.state_dict()[n] for n in state})


class Bytes:
    """A reader of bytes in memory that counts its reads."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.reads = 0

    def read_into(self, start: int, view: memoryview) -> None:
        assert start + len(view) <= len(self.content)
        view[:] = self.content[start : start + len(view)]
        self.reads += 1


def read(reader: StridedReader, start: int, stop: int) -> bytes:
    """The elements from ``start`` to ``stop``."""
    size = reader.spec.dtype.itemsize
    out = bytearray((stop - start) * size)
    reader.read_into(start * size, memoryview(out))
    return bytes(out)


@settings(max_examples=150, deadline=None)
@given(
    tensor=views(), gap=st.sampled_from([0, 8, 64]), piece=st.sampled_from([3, 1000]), at=st.data()
)
def test_any_part_of_a_view_is_read_whatever_the_cuts(
    tensor: Tensor, gap: int, piece: int, at: st.DataObject
) -> None:
    start = at.draw(st.integers(0, tensor.numel()))
    stop = at.draw(st.integers(start, tensor.numel()))
    whole = bytes(tensor.untyped_storage())[tensor.storage_offset() * tensor.element_size() :]
    spec = TensorSpec("t", BY_NAME[str(tensor.dtype)[6:]], tuple(tensor.shape))
    size = tensor.element_size()
    every = tensor.flatten().clone(memory_format=PACKED).view(torch.uint8)
    wanted = every[start * size : stop * size].numpy().tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "_GAP", gap)
        patch.setattr(strided, "_PIECE", piece)
        reader = StridedReader(Bytes(whole), spec, tensor.stride())
        assert read(reader, start, stop) == wanted


def test_a_transpose_costs_one_read_a_column_and_nothing_is_read_twice() -> None:
    tensor = torch.arange(64.0 * 100).reshape(100, 64).T  # 64 rows of 100 elements
    source = Bytes(bytes(tensor.untyped_storage()))
    reader = StridedReader(source, TensorSpec("t", BY_NAME["float32"], (64, 100)), tensor.stride())
    assert read(reader, 0, 800) == tensor[:8].contiguous().numpy().tobytes()
    assert source.reads == 100


# -- what is opened --------------------------------------------------------------------------------


def test_only_the_list_of_tensors_is_read_when_a_pickle_is_opened(tmp_path: Path) -> None:
    """The data of the file is overwritten before it is read: what comes out is the new data."""
    file = saved(tmp_path / "m.bin", {"w": torch.arange(1000.0)})
    at = file.read_bytes().index(torch.arange(1000.0).numpy().tobytes())
    stamp = file.stat()
    model = opened(file)
    with file.open("r+b") as f:
        f.seek(at)
        f.write(torch.ones(1000).numpy().tobytes())
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert_equal(model.state_dict(), {"w": torch.ones(1000)})


def test_the_plan_of_a_pickle_is_that_of_a_file(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.ones(4), "v": torch.ones(3)})
    one, two = opened(file).plan(), opened(file).plan()
    assert one.hash == two.hash
    assert [f.path for f in one.inputs] == [str(file)]
    assert one.input_bytes == 28
    assert opened(file).same_as(opened(file))


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_names_of_one_storage_are_tied(options: dict[str, bool], tmp_path: Path) -> None:
    w = torch.randn(4, 3)
    state = {"embed": w, "head": w, "row": w[1:], "turned": w.T, "own": w.clone()}
    model = opened(saved(tmp_path / "m.bin", state, **options))
    assert dict(model.tied) == {"head": "embed"}
    assert_equal(model.state_dict(), state)
    model.save(tmp_path / "out")
    assert set(merge.open(tmp_path / "out")) == {"embed", "row", "turned", "own"}


def test_a_tie_in_a_pickle_goes_with_a_model_that_was_saved_without_its_second_name(
    make_model: MakeModel, tmp_path: Path
) -> None:
    w = torch.ones(2, 2)
    pickled = opened(saved(tmp_path / "m.bin", {"embed": w, "head": w}))
    plain = merge.open(make_model("a", {"embed": 3 * w}))
    assert_equal((0.5 * plain + 0.5 * pickled).state_dict(), {"embed": 2 * w, "head": 2 * w})


WRAPPED: dict[str, tuple[Callable[[dict[str, Tensor]], object], set[str]]] = {
    "plain": (lambda state: state, set()),
    "ordered": (lambda state: OrderedDict(state), set()),
    "parameters": (lambda state: {n: nn.Parameter(t) for n, t in state.items()}, set()),
    "lightning": (
        lambda state: {"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}]},
        {"epoch", "optimizer_states"},
    ),
    "with a score": (lambda state: {"model": state, "best": torch.tensor(0.5)}, {"best"}),
    "with an optimizer": (
        lambda state: {"model": state, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
        {"optimizer"},
    ),
    "with things among the tensors": (
        lambda state: state | {"version": 2, "x": None},
        {"version", "x"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wrap", "beside"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_a_state_dict_is_found_where_there_is_but_one(
    wrap: Callable[[dict[str, Tensor]], object],
    beside: set[str],
    options: dict[str, bool],
    tmp_path: Path,
) -> None:
    state = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    model = opened(saved(tmp_path / "m.ckpt", wrap(state), **options))
    assert_equal(model.state_dict(), state)
    assert set(model.dropped) == beside
    notes = " ".join(model.plan().notes)
    assert all(name in notes for name in beside)


def test_a_module_of_batch_norm_opens_as_its_state_dict(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    file = saved(tmp_path / "m.pth", module.state_dict())
    assert_equal(opened(file).state_dict(), module.state_dict())


def test_shards_with_an_index_are_read_as_those_of_safetensors(tmp_path: Path) -> None:
    first = {"a": torch.ones(2), "b": torch.zeros(3)}
    second = {"c": torch.full((2, 2), 2.0)}
    folder = tmp_path / "m"
    saved(folder / "pytorch_model-00001-of-00002.bin", first)
    saved(folder / "pytorch_model-00002-of-00002.bin", second)
    where = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin")
    where |= dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_equal(opened(folder).state_dict(), first | second)
    index.write_text(json.dumps({"weight_map": where | {"d": "../other.bin"}}))
    assert error_of(folder).what == "the index points outside the folder"
    index.write_text(json.dumps({"weight_map": where | {"d": "pytorch_model-00001-of-00002.bin"}}))
    assert "does not hold" in error_of(folder).what


def test_a_real_model_saved_as_a_pickle_merges_like_itself(
    llamas: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    base, other, *_ = llamas("bfloat16")
    folder = tmp_path / "pickled"
    model = LlamaForCausalLM.from_pretrained(base)
    model.config.save_pretrained(folder)
    saved(folder / "pytorch_model.bin", model.state_dict())
    half = 0.5 * opened(folder) + 0.5 * merge.open(other)
    half.save(tmp_path / "out")
    wanted = 0.5 * merge.open(base) + 0.5 * merge.open(other)
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_equal({n: found[n] for n in wanted}, wanted.state_dict())


def test_safetensors_go_before_pickles(make_model: MakeModel) -> None:
    folder = make_model("a", {"w": torch.ones(2)})
    saved(folder / "pytorch_model.bin", {"w": torch.zeros(2)})
    assert_equal(opened(folder).state_dict(), {"w": torch.ones(2)})
    assert_equal(merge.open(folder).state_dict(), {"w": torch.ones(2)})


def test_what_a_trainer_leaves_beside_is_no_model(tmp_path: Path) -> None:
    saved(tmp_path / "m" / "weights.pt", {"w": torch.ones(2)})
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "m" / name).write_bytes(b"not a pickle")
    assert_equal(opened(tmp_path / "m").state_dict(), {"w": torch.ones(2)})
    saved(tmp_path / "m" / "other.ckpt", {"w": torch.ones(2)})
    assert error_of(tmp_path / "m").found == "other.ckpt, weights.pt"


def test_a_file_of_the_old_format_is_held_in_memory_and_the_plan_says_so(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.ones(4), "v": torch.ones(3)}, **OLD)
    plan = opened(file).plan()
    note = f"{file} is of torch's format before 1.6: its 28 bytes of weights are held in memory"
    assert note in plan.notes
    assert plan.hash == opened(file).plan().hash
    assert opened(file).same_as(opened(file))


def test_the_output_is_safetensors_and_sound(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.randn(4, 3).T, "v": torch.ones(3)})
    opened(file).save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert merge.verify(tmp_path / "out").ok


def test_a_pickle_that_changes_after_planning_is_an_error(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.ones(4)})
    plan = run.plan(opened(file))
    saved(file, {"w": torch.ones(40)})
    with pytest.raises(SourceError, match="changed while it was in use"):
        run.save_plan(plan, tmp_path / "out")


# -- nothing without leave -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "weights.pt", "model.pth", "last.ckpt", "pytorch_model.fp16.bin"]
)
def test_a_pickle_is_refused_unopened_unless_it_is_allowed(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "m" / name, {"w": torch.ones(2)})
    for source in (file.parent, file):
        with pytest.raises(SourceError, match=r"the weights are a pickle") as caught:
            merge.open(source)
        assert caught.value.where == {"file": str(file)}
        assert "save_pretrained" in str(caught.value.do)
        assert "--allow-pickle" in str(caught.value.do) and "trust" in str(caught.value.do)
        assert_equal(opened(source).state_dict(), {"w": torch.ones(2)})


def test_a_module_of_sentence_transformers_with_a_pickle_needs_leave_too(
    make_model: MakeModel,
) -> None:
    folder = make_model("a", {"w": torch.ones(2)})
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    saved(folder / "2_Dense" / "pytorch_model.bin", {"linear": torch.eye(2)})
    with pytest.raises(SourceError, match="pickle"):
        merge.open(folder)
    model = opened(folder)
    assert_equal(model.state_dict(), {"w": torch.ones(2), "2_Dense/linear": torch.eye(2)})
    assert dict(model.stems) == {"": "model", "2_Dense": "model"}


@pytest.mark.parametrize(
    ("pickled", "written"),
    [
        ("pytorch_model.bin", "model"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model"),
        ("open_clip_pytorch_model.bin", "open_clip_model"),
        ("epoch=3-step=40.ckpt", "model"),
    ],
)
def test_the_output_has_the_name_that_the_library_gives_to_safetensors(
    pickled: str, written: str, tmp_path: Path
) -> None:
    saved(tmp_path / "m" / pickled, {"w": torch.ones(2)})
    opened(tmp_path / "m").save(tmp_path / "out")
    assert_equal(merge.open(tmp_path / "out").state_dict(), {"w": torch.ones(2)})
    assert (tmp_path / "out" / f"{written}.safetensors").exists()


def test_the_command_line_asks_for_leave(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m" / "pytorch_model.bin", {"w": torch.ones(2)}).parent
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"{{merge_method: linear, models: [{{model: {folder}, parameters: {{weight: 1}}}}]}}"
    )
    for words in (
        ["plan", str(recipe)],
        ["apply", str(recipe), str(tmp_path / "out")],
        ["inspect", str(folder)],
        ["soup", str(folder), "--score", "echo 1"],
        ["sweep", str(recipe), "parameters.weight", "1", "--score", "echo 1"],
    ):
        assert isinstance(CliRunner().invoke(cli, words).exception, SourceError)
        done = CliRunner().invoke(cli, [*words, "--allow-pickle"])
        assert done.exit_code == 0, done.output
    assert_equal(merge.open(tmp_path / "out").state_dict(), {"w": torch.ones(2)})
    made = merge.load_recipe(recipe, allow_pickle=True)
    assert_equal(made.state_dict(), {"w": torch.ones(2)})
    merge.apply(recipe, tmp_path / "again", allow_pickle=True)


# -- what is hostile, damaged or no state dict -----------------------------------------------------


class Evil:
    """A pickle of it creates a file when it is run."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


ATTACKS: dict[str, Callable[[Path], Evil]] = {
    "posix.mkdir": lambda canary: Evil(os.mkdir, str(canary)),
    "eval": lambda canary: Evil(eval, f"__import__('os').mkdir({str(canary)!r})"),
    "exec": lambda canary: Evil(exec, f"import os; os.mkdir({str(canary)!r})"),
    "posix.system": lambda canary: Evil(os.system, f"mkdir {canary}"),
    "check_call": lambda canary: Evil(subprocess.check_call, ["mkdir", str(canary)]),
}


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("wants", ATTACKS)
def test_a_pickle_with_code_is_refused_by_what_it_wants_and_never_run(
    wants: str, options: dict[str, bool], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    evil = ATTACKS[wants](canary)
    for content in (evil, {"w": torch.ones(2), "x": evil}, {"state_dict": {"w": [evil]}}):
        error = error_of(saved(tmp_path / "m.bin", content, **options))
        assert error.what == "the pickle holds more than tensors, and is not opened"
        assert wants in str(error.found)
        assert error.where["file"] == str(tmp_path / "m.bin")
        assert "weights_only=False" not in str(error) and "add_safe_globals" not in str(error)
    assert not canary.exists()
    torch.load(tmp_path / "m.bin", weights_only=False)
    assert canary.exists(), "the attack is no real one"


@pytest.mark.parametrize(
    "content", [pickle.dumps(Evil(os.mkdir, "x")), b"", b"GGUF" + bytes(100), b"7z\xbc\xaf\x27\x1c"]
)
def test_what_torch_did_not_write_is_refused_unread(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    assert error_of(tmp_path / "m.bin").what == "not a file of torch.save"


NO_STATE: dict[str, tuple[object, str, str]] = {
    "a tensor": (torch.ones(2), "holds no state dict", "Tensor"),
    "a list": ([torch.ones(2)], "holds no state dict", "list"),
    "a number": (3, "holds no state dict", "int"),
    "an empty dict": ({}, "holds no tensors", "an empty dict"),
    "no tensors": ({"a": 1, "b": "x"}, "holds no tensors", "a, b"),
    "too deep": ({"a": {"b": {"c": torch.ones(2)}}}, "holds no tensors", "a"),
    "two models": (
        {"model": {"w": torch.ones(2)}, "model_ema": {"w": torch.ones(2)}},
        "several sets of tensors",
        "model, model_ema",
    ),
    "tensors beside a model": (
        {"w": torch.ones(2), "model": {"w": torch.ones(2)}},
        "several sets of tensors",
        "tensors at the top, model",
    ),
    "a name that is no text": ({3: torch.ones(2)}, "name is no text", ""),
    "an empty name": ({"": torch.ones(2)}, "name is no text, empty", ""),
    "a name of two lines": ({"a\nb": torch.ones(2)}, "control characters", ""),
    "sparse": ({"w": torch.eye(2).to_sparse()}, "not a plain dense one", "sparse_coo"),
    "conjugate": ({"w": torch.tensor([1j]).conj()}, "not a plain dense one", "complex64"),
    "complex128": ({"w": torch.ones(1).to(torch.complex128)}, "dtype is not known", "complex128"),
    "without data": ({"w": torch.empty(2, device="meta")}, "data is not in the file", "no data"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "what", "found"), NO_STATE.values(), ids=NO_STATE)
def test_what_is_no_state_dict_is_named(
    content: object, what: str, found: str, tmp_path: Path
) -> None:
    error = error_of(saved(tmp_path / "m.bin", content))
    assert what in error.what
    assert found in (error.found or "")
    assert error.where["file"] == str(tmp_path / "m.bin")


def test_a_file_cut_off_anywhere_is_an_error_of_ours(tmp_path: Path) -> None:
    content = saved(tmp_path / "m.bin", {"w": torch.randn(50), "v": torch.ones(3)}).read_bytes()
    for length in range(0, len(content), 41):
        (tmp_path / "cut.bin").write_bytes(content[:length])
        assert error_of(tmp_path / "cut.bin").where["file"] == str(tmp_path / "cut.bin")


def test_an_old_file_cut_off_anywhere_is_an_error_of_ours(tmp_path: Path) -> None:
    content = saved(tmp_path / "m.bin", {"w": torch.randn(50), "v": torch.ones(3)}, **OLD)
    whole = content.read_bytes()
    for length in range(0, len(whole), 41):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        assert error_of(tmp_path / "cut.bin").where["file"] == str(tmp_path / "cut.bin")


def rewritten(
    file: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The archive written anew by another zip program; None drops a record."""
    with zipfile.ZipFile(file) as old:
        records = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in records.items():
            if (changed := change(name, content)) is not None:
                new.writestr(name, changed)
    return file


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """The same with a few bytes changed."""
    out = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        out[data.draw(st.integers(0, len(out) - 1))] = data.draw(st.integers(0, 255))
    return bytes(out)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), old=st.booleans(), within=st.booleans())
def test_a_file_with_bytes_changed_is_read_or_refused(
    data: st.DataObject, old: bool, within: bool
) -> None:
    """Never another exception, and never a read outside the file.

    within: in the pickle of an archive, whose checksum is then that of the changed one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        state = {"w": torch.arange(20.0), "v": torch.ones(3)}
        file = saved(Path(scratch) / "m.bin", state, _use_new_zipfile_serialization=not old)
        if within and not old:
            rewritten(file, lambda n, c: mutated(data, c) if n.endswith("data.pkl") else c)
        else:
            file.write_bytes(mutated(data, file.read_bytes()))
        with suppress(merge.MergeError):
            model = opened(file)
            assert sum(spec.nbytes for spec in model.values()) < 10**6
            model.state_dict()


def test_an_archive_of_another_zip_program_is_read_where_it_is_sound(tmp_path: Path) -> None:
    state = {"w": torch.randn(5, 5), "v": torch.ones(3)}
    file = rewritten(saved(tmp_path / "m.bin", state), named(".format_version", None))
    assert_equal(opened(file).state_dict(), state)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.zeros(10**6)})
    rewritten(file, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10_000
    error = error_of(file)
    assert "compressed or encrypted" in error.what
    assert "data.pkl" in str(error.found)


def named(end: str, content: bytes | None) -> Callable[[str, bytes], bytes | None]:
    """Another content for the record with this end of its name."""
    return lambda name, old: content if name.endswith(end) else old


HOSTILE: dict[str, tuple[Callable[[str, bytes], bytes | None], str]] = {
    "less data than the tensor": (named("data/0", b"1234"), "data is not in the file"),
    "more data than the tensor": (named("data/0", bytes(100)), "data is not in the file"),
    "no data": (named("data/0", None), ""),
    "no pickle": (named("data.pkl", None), "not one of torch.save"),
    "big-endian": (named("byteorder", b"big"), "other byte order"),
}


@pytest.mark.parametrize(("change", "what"), HOSTILE.values(), ids=HOSTILE)
def test_an_archive_whose_records_do_not_fit_its_pickle_is_refused(
    change: Callable[[str, bytes], bytes | None], what: str, tmp_path: Path
) -> None:
    error = error_of(rewritten(saved(tmp_path / "m.bin", {"w": torch.ones(10)}), change))
    assert what in error.what
    assert error.where["file"] == str(tmp_path / "m.bin")


def test_a_pickle_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"weight": torch.ones(10)})
    file.write_bytes(file.read_bytes().replace(b"weight", b"weighs"))
    error = error_of(file)
    assert "damaged zip archive" in error.what and "CRC" in error.what


def test_a_pickle_that_is_too_large_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_PICKLE", 100)
    error = error_of(saved(tmp_path / "m.bin", {"w": torch.ones(2), "text": "x" * 100}))
    assert "too large" in error.what and error.expected == "at most 100 bytes"


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.ones(2)})
    with zipfile.ZipFile(file, "a") as out, pytest.warns(UserWarning, match="Duplicate name"):
        out.writestr("m/data/0", bytes(8))
    assert error_of(file).what == "two records of the archive have one name"


def test_a_torchscript_program_is_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.pt", {"w": torch.ones(2)})
    with zipfile.ZipFile(file, "a") as out:
        out.writestr("m/constants.pkl", b"\x80\x02).")
    assert error_of(file).what == "a TorchScript program, not a state dict"


class Storage:
    """Stands for a stored run of ``count`` floats in a pickle made by hand."""

    def __init__(self, count: int) -> None:
        self.count = count


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, Storage):
            return None
        return ("storage", torch.FloatStorage, "0", "cpu", obj.count)


def by_hand(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle of a state dict with one tensor, whose numbers may be lies."""
    out = io.BytesIO()
    rebuilt = Evil(
        torch._utils._rebuild_tensor_v2, Storage(count), offset, shape, stride, False, OrderedDict()
    )
    Pickler(out, protocol=2).dump({"w": rebuilt})
    return out.getvalue()


LIES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    "more elements than there are": (4, 0, (5,), (1,)),
    "a stride that leads out": (4, 0, (2, 2), (100, 1)),
    "an offset that leads out": (4, 3, (2,), (1,)),
    "a negative offset": (4, -1, (2,), (1,)),
    "a negative stride": (4, 3, (2,), (-1,)),
    "a storage of another size": (400, 0, (400,), (1,)),
    "a shape beyond all files": (4, 0, (2**40, 2**40), (1, 1)),
    "a stride beyond all files": (4, 0, (2, 2), (2**62, 1)),
}


def test_a_pickle_made_by_hand_is_read_when_it_tells_the_truth(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.arange(4.0)})
    rewritten(file, named("data.pkl", by_hand(4, 1, (3,), (1,))))
    assert_equal(opened(file).state_dict(), {"w": torch.arange(1.0, 4.0)})


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_tensor_that_leads_out_of_its_data_is_refused(lie: Any, tmp_path: Path) -> None:
    file = saved(tmp_path / "m.bin", {"w": torch.arange(4.0)})
    error = error_of(rewritten(file, named("data.pkl", by_hand(*lie))))
    assert error.where["file"] == str(file)


# -- cost ------------------------------------------------------------------------------------------


def test_torch_is_not_imported_for_a_pickle_that_is_not_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m" / "pytorch_model.bin", {"w": torch.ones(2)}).parent
    code = (
        "import sys, merge\n"
        "try: merge.open(sys.argv[1])\n"
        "except merge.SourceError as error: print('torch' in sys.modules, error.what[:24])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False the weights are a pickle"


def test_a_pickle_of_many_tensors_opens_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    real = torch.load

    def load(f: Any, **options: Any) -> Any:
        calls.append(options)
        return real(f, **options)

    monkeypatch.setattr(torch, "load", load)
    file = saved(tmp_path / "m.bin", {f"w{i}": torch.ones(2) for i in range(500)})
    model = opened(file)
    model.state_dict()
    assert calls == [{"map_location": "meta", "weights_only": True}]
