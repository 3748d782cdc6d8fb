"""The plan: complete before a weight is read, plain data, stable, and right about every byte."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import merge
from merge import applying, methods, run
from merge.checkpoint.header import read_header
from merge.engine.execute import execute
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Apply, InputFile, Read
from merge.ir.merging import merge_checkpoints
from merge.methods.core.measure import Tiles
from merge.plan import parse_bytes
from merge.plan.layout import lay_out
from merge.plan.model import Plan, human_bytes
from merge.plan.simplify import simplify
from merge.run import PlanOptions
from merge.write.memory import MemorySink

MakeModel = Callable[..., Path]
law = settings(max_examples=60, deadline=None)


def ramp(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    n = torch.Size(shape).numel()
    return (scale * torch.linspace(-1.0, 1.0, n)).reshape(shape).to(dtype)


@pytest.fixture
def three(make_model: MakeModel) -> list[Path]:
    """A base and two models over two layers."""
    return [
        make_model(
            name,
            {f"layers.{i}.w": ramp(40, 25, scale=s + i) for i in range(2)} | {"norm": ramp(40)},
            config={"model_type": "toy", "dtype": "float32"},
        )
        for name, s in (("base", 1.0), ("a", 2.0), ("b", 3.0))
    ]


def ties(models: list[Path], **given: Any) -> Checkpoint:
    base, *tuned = models
    return merge.ties(tuned, base=base, **{"weight": 1.0, "density": 0.5, **given})


# -- plain data ----------------------------------------------------------------------------------


def test_a_plan_is_printed_with_what_it_reads_writes_and_holds(three: list[Path]) -> None:
    plan = ties(three).plan(threads=2)
    text = str(plan)
    assert text.splitlines()[0] == "ties(a, b)"
    assert "3 tensors, 2,040 parameters (0 copied as they are)" in text
    assert re.search(r"reads +47\.81 KiB  from 3 files, each byte 2\.00 times", text)
    assert re.search(r"writes +8\.\d\d KiB  to 1 files and 2 side files", text)
    held = re.escape(human_bytes(plan.budget.buffers))
    assert re.search(
        rf"holds +{held}  of buffers at most: 2 workers on cpu, tiles of 262,144 ", text
    )
    assert text.splitlines()[-1] == f"  plan {plan.hash[:16]}"


def test_a_plan_is_json(three: list[Path]) -> None:
    plan = ties(three).plan()
    data = json.loads(json.dumps(plan.to_json(tensors=True)))
    assert (data["tensors"], data["parameters"]) == (3, 2040)
    assert data["input_bytes"] == 3 * 4 * 2040
    assert data["read_bytes"] == 2 * data["input_bytes"]
    assert data["write_bytes"] == sum(f["bytes"] for f in data["outputs"])
    assert [f["file"] for f in data["inputs"]] == sorted(
        str(m / "model.safetensors") for m in three
    )
    assert list(data["sources"]) == ["A", "B", "C"]
    assert sorted(s["tensor"] for s in data["steps"]) == ["layers.0.w", "layers.1.w", "norm"]
    assert all("ties(" in s["formula"] and '"density": [0.5, 0.5]' in s["formula"]
               for s in data["steps"])  # fmt: skip
    assert "steps" not in plan.to_json()


def test_a_plan_can_be_hashed_and_compared(three: list[Path]) -> None:
    plan, again = ties(three).plan(), ties(three).plan()
    assert plan.hash == again.hash
    assert len({plan, plan}) == 1
    assert plan != ties(three, density=0.4).plan()


def test_no_weight_is_read_to_plan(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = ties(three)
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    checkpoint.plan().to_json(tensors=True)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 29, "1.50 GiB"),
        (5 << 40, "5.00 TiB"),
    ],
)
def test_bytes_are_said_in_binary_units(n: int, text: str) -> None:
    assert human_bytes(n) == text


# -- the hash stands for every byte of the output ------------------------------------------------


def test_how_the_work_is_cut_does_not_change_the_hash(three: list[Path]) -> None:
    hashes = {
        ties(three).plan(threads=t, memory=m).hash
        for t, m in ((1, "1GiB"), (4, "1GiB"), (2, "64MiB"))
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": 0.9},
        {"weight": [1.0, 1.0 + 2**-52]},
        {"density": 0.49},
        {"lambda_": 0.5},
        {"normalize": False},
    ],
    ids=str,
)
def test_another_parameter_gives_another_hash(three: list[Path], changed: dict[str, Any]) -> None:
    assert ties(three, **changed).plan().hash != ties(three).plan().hash


def test_another_order_method_dtype_or_shard_size_gives_another_hash(three: list[Path]) -> None:
    base, a, b = three
    plans = [
        ties(three).plan(),
        ties([base, b, a]).plan(),
        merge.dare_ties([a, b], base=base, weight=1.0, density=0.5).plan(),
        ties(three).cast("bfloat16").plan(),
        ties(three).cast("float16").plan(),
        run.plan(ties(three), PlanOptions(shard_size="4KB")),
    ]
    assert len({p.hash for p in plans}) == len(plans)


def test_another_seed_of_a_random_method_gives_another_hash(three: list[Path]) -> None:
    base, *tuned = three
    zero, one = (
        merge.dare_ties(tuned, base=base, weight=1.0, density=0.5, seed=seed).plan().hash
        for seed in (0, 1)
    )
    assert zero != one


def test_a_changed_input_file_gives_another_hash(three: list[Path]) -> None:
    before = ties(three).plan().hash
    file = three[1] / "model.safetensors"
    info = file.stat()
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert ties(three).plan().hash != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_changed_side_file_gives_another_hash(three: list[Path], name: str) -> None:
    """Side files are part of the output, so an old output is not the new one."""
    file = three[0] / name
    file.write_text('{"model_type": "toy", "dtype": "float32"}')
    before = ties(three).plan().hash
    file.write_text('{"model_type": "toy", "dtype": "float32", "more": 1}')
    assert ties(three).plan().hash != before


def test_a_changed_side_file_reaches_the_output(three: list[Path], tmp_path: Path) -> None:
    (three[0] / "tokenizer.json").write_text("old")
    out = ties(three).save(tmp_path / "out")
    (three[0] / "tokenizer.json").write_text("new")
    with suppress(merge.OutputRefused):  # refusing to overwrite is fine, a silent old file is not
        ties(three).save(out)
        assert (out / "tokenizer.json").read_text() == "new"


def test_a_changed_state_dict_reaches_the_output(tmp_path: Path) -> None:
    state = {"w": torch.ones(4)}
    checkpoint = merge.open(state)
    out = checkpoint.save(tmp_path / "out")
    state["w"].mul_(5.0)
    with suppress(merge.OutputRefused):  # as above
        checkpoint.save(out)
        with safe_open(out / "model.safetensors", "pt") as file:
            assert file.get_tensor("w").tolist() == [5.0] * 4


# -- thousands of tensors ------------------------------------------------------------------------


def many(folder: Path, count: int, files: int = 1) -> Path:
    """A model of ``count`` tensors of two elements."""
    folder.mkdir()
    where = {}
    for i in range(files):
        part = {f"layers.{j % 60}.experts.{j}.w": torch.ones(2) for j in range(i, count, files)}
        save_file(part, folder / f"part{i}.safetensors")
        where.update(dict.fromkeys(part, f"part{i}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_thirty_thousand_tensors_are_planned(tmp_path: Path) -> None:
    base = merge.open(many(tmp_path / "base", 30_000) / "part0.safetensors")
    tuned = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        os.link(tmp_path / "base" / "part0.safetensors", tmp_path / name / "model.safetensors")
        tuned.append(merge.open(tmp_path / name))
    plan = merge.ties(tuned, base=base, weight=1.0, density=0.5).plan()
    assert len(plan.steps) == 30_000
    assert plan.read_bytes == 2 * 4 * 30_000 * 8


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the description of an input file was hashed."""
    count, plain = [0], InputFile.__hash__

    def counted(file: InputFile) -> int:
        count[0] += 1
        return plain(file)

    monkeypatch.setattr(InputFile, "__hash__", counted)
    return count


def test_the_work_of_planning_grows_with_tensors_and_not_with_tensors_times_files(
    tmp_path: Path, hashed: list[int]
) -> None:
    calls = []
    for tensors, files in ((200, 2), (400, 2), (400, 40)):
        models = [many(tmp_path / f"{m}{tensors}{files}", tensors, files) for m in "abc"]
        hashed[0] = 0
        ties(models).plan()
        calls.append(hashed[0])
    assert calls[1] <= 2.2 * calls[0] + 100
    assert calls[2] <= calls[1] + 10 * 3 * 40


def test_simplifying_a_sum_of_many_models_takes_linear_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from merge.ir.expr import Linear

    count, plain = [0], Linear.__hash__

    def counted(node: Linear) -> int:
        count[0] += 1
        return plain(node)

    monkeypatch.setattr(Linear, "__hash__", counted)
    calls = []
    for n in (50, 100):
        total = merge.open({"w": torch.ones(2)}) * (1 / n)
        for _ in range(n - 1):
            total = total + merge.open({"w": torch.ones(2)}) * (1 / n)
        count[0] = 0
        simplify(total.tensors["w"])
        calls.append(count[0])
    assert calls[1] <= 2.2 * calls[0] + 10


# -- shards, headers and offsets -----------------------------------------------------------------

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@law
@given(sizes=SIZES, limit=st.integers(1, 400))
def test_shards_are_those_of_huggingface_hub(sizes: list[int], limit: int) -> None:
    state = {f"t{i}": torch.zeros(n, dtype=torch.float32) for i, n in enumerate(sizes)}
    files, places, _ = lay_out([merge.open(state)[n] for n in state], limit)
    split = huggingface_hub.split_torch_state_dict_into_shards(
        {n: t.clone() for n, t in state.items()}, max_shard_size=limit
    )
    ours: dict[str, set[str]] = {f.name: set() for f in files}
    for name in state:
        ours[places[name][0]].add(name)
    assert ours == {file: set(names) for file, names in split.filename_to_tensors.items()}


def test_a_sharded_output_is_what_its_plan_says(three: list[Path], tmp_path: Path) -> None:
    plan = run.plan(ties(three), PlanOptions(shard_size="5KB"))
    out = run.save_plan(plan, tmp_path / "out").path
    assert [f.name for f in plan.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for file in plan.files:
        path = out / file.name
        assert path.stat().st_size == file.size
        header = read_header(path)
        assert path.read_bytes()[: len(file.header)] == file.header
        assert len(header.tensors) == file.tensors
        assert header.begin == {s.output.name: s.offset for s in plan.steps if s.file == file.name}
        assert {n: s.shape for n, s in header.tensors.items()} == {
            s.output.name: s.output.shape for s in plan.steps if s.file == file.name
        }
    assert sum(f.size for f in plan.files) == plan.write_bytes
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {s.output.name: s.file for s in plan.steps}
    assert index["metadata"] == {"total_size": 4 * 2040, "total_parameters": 2040}


def test_one_file_needs_no_index(three: list[Path]) -> None:
    plan = ties(three).plan()
    assert [f.name for f in plan.files] == ["model.safetensors"]
    assert [s.name for s in plan.side] == ["config.json", "README.md"]


@pytest.mark.parametrize("shard_size", ["5GB", "100B"])
def test_a_copied_model_is_the_file_that_safetensors_writes(
    make_model: MakeModel, tmp_path: Path, shard_size: str
) -> None:
    tensors = {
        "z": ramp(3, 4),
        "a.half": ramp(7, dtype=torch.float16),
        "a.brain": ramp(2, 2, dtype=torch.bfloat16),
        "count": torch.tensor(5),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        'Ä "quoted"': ramp(1, dtype=torch.float64),
    }
    model = make_model("model", tensors)
    out = merge.open(model).save(tmp_path / "out", shard_size=shard_size)
    split = huggingface_hub.split_torch_state_dict_into_shards(
        {n: tensors[n] for n in merge.open(model)}, max_shard_size=parse_bytes(shard_size)
    )
    for name, members in split.filename_to_tensors.items():
        expected = tmp_path / "expected.safetensors"
        save_file({n: tensors[n] for n in members}, expected, metadata={"format": "pt"})
        assert (out / name).read_bytes() == expected.read_bytes()
    assert {p.name for p in out.glob("*.safetensors")} == set(split.filename_to_tensors)


HOSTILE = ["../beside/w", "../../w", "/outside/w", "a/../../w", "./w", "a/b"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("source", ["file", "state dict"])
def test_a_tensor_name_never_leads_out_of_the_output_folder(
    name: str, source: str, tmp_path: Path
) -> None:
    """Such a name is a name: the output holds it as it is, or the model is refused."""
    name = name.replace("/outside", str(tmp_path / "outside"))
    state = {name: torch.ones(3)}
    room = tmp_path / "deep" / "room"
    room.mkdir(parents=True)
    if source == "file":
        save_file(state, tmp_path / "m.safetensors")
    before = set(tmp_path.rglob("*"))
    saved = None
    with suppress(merge.MergeError):
        lazy = merge.open(tmp_path / "m.safetensors" if source == "file" else state)
        saved = lazy.save(room / "out")
    if saved is not None:
        assert list(merge.open(saved)) == [name]
    new = {p for p in tmp_path.rglob("*") if p not in before}
    assert [str(p) for p in new if room / "out" not in (p, *p.parents)] == []


# -- what is read --------------------------------------------------------------------------------


def copied(plan: Plan) -> list[str]:
    return sorted(s.output.name for s in plan.steps if isinstance(s.expr, Read))


def test_identical_inputs_are_read_once(three: list[Path], tmp_path: Path) -> None:
    base, a, _ = three
    link = tmp_path / "link"
    link.symlink_to(a)
    size = 4 * 2040
    assert merge.linear([base, a, a, link], weight=1.0).plan().read_bytes == 2 * size
    doubled = merge.ties([a, link], base=base, weight=1.0).plan()
    assert (doubled.input_bytes, doubled.read_bytes) == (2 * size, 4 * size)


def test_untouched_tensors_are_copied_and_nothing_else_is_read(three: list[Path]) -> None:
    base, a, b = three
    for lazy in (
        merge.task_arithmetic([a, b], base=base, weight=0.0),
        merge.linear([base, a], weight=[1.0, 0.0]),
        merge.linear([base, base], weight=[0.3, 0.4]),
        merge.open(base) + (merge.open(a) - merge.open(a)),
    ):
        plan = lazy.plan()
        assert copied(plan) == ["layers.0.w", "layers.1.w", "norm"]
        assert plan.to_json()["copied_tensors"] == 3
        assert plan.read_bytes == 4 * 2040
        assert [f.path for f in plan.inputs] == [str(base / "model.safetensors")]


def test_a_tensor_that_a_filter_leaves_alone_is_copied(three: list[Path], tmp_path: Path) -> None:
    base, a, _ = three
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {a}}}]\n"
        "parameters: {weight: [{filter: layers.1, value: 0.5}, {value: 0.0}]}\n"
    )
    plan = applying.plan_recipe(recipe).plan
    assert copied(plan) == ["layers.0.w", "norm"]
    assert plan.read_bytes == 4 * (2040 + 1000)


def test_a_cast_tensor_is_not_a_byte_copy_but_is_read_once(three: list[Path]) -> None:
    plan = merge.open(three[0]).cast("bfloat16").plan()
    assert plan.read_bytes == 4 * 2040
    assert {s.output.dtype.name for s in plan.steps} == {"bfloat16"}
    assert plan.write_bytes == len(plan.files[0].header) + 2 * 2040


def test_work_follows_the_order_on_disk(make_model: MakeModel) -> None:
    names = ["w10", "w2", "w1", "b"]
    model = make_model("m", {n: ramp(3) for n in names} | {"half": ramp(3, dtype=torch.float16)})
    plan = (
        merge.open(model) * 0.5 + merge.open({n: ramp(3) for n in [*names, "half"]}) * 0.5
    ).plan()
    begins = read_header(model / "model.safetensors").begin
    assert [s.output.name for s in plan.steps] == sorted(begins, key=begins.__getitem__)


# -- memory --------------------------------------------------------------------------------------

EXAMPLES: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "ties": {"weight": 1.0, "density": 0.3},
    "dare_ties": {"weight": 1.0, "density": 0.3},
}
every_example = pytest.mark.parametrize("method", EXAMPLES)


def wide(method: str, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    """A merge of a tensor of several tiles."""
    states = [{"w": ramp(2_500_000, scale=1 + i, dtype=dtype)} for i in range(3)]
    lazy = (
        getattr(merge, method)(states[1:], base=states[0], **EXAMPLES[method])
        if methods.get(method).base == "required"
        else getattr(merge, method)(states[:2], **EXAMPLES[method])
    )
    assert isinstance(lazy, Checkpoint)
    return lazy


def least(checkpoint: Checkpoint) -> int:
    with pytest.raises(merge.PlanError, match="memory budget is too small") as caught:
        checkpoint.plan(memory=1)
    error = caught.value
    assert error.found == "1 bytes"
    stated = re.fullmatch(r"at least (\d+) bytes", error.expected or "")
    assert stated
    return int(stated[1])


@every_example
def test_a_budget_that_is_too_small_is_refused_with_the_least_that_would_do(method: str) -> None:
    checkpoint = wide(method)
    needed = least(checkpoint)
    plan = checkpoint.plan(memory=needed)
    assert plan.budget.workers == 1
    assert plan.budget.buffers <= needed
    with pytest.raises(merge.PlanError) as caught:
        checkpoint.plan(memory=needed - 1)
    assert caught.value.where["tensor"] == "w"
    advice = re.search(r"--memory (\d+MiB)", caught.value.do or "")
    assert advice
    assert checkpoint.plan(memory=advice[1]).budget.buffers <= parse_bytes(advice[1])


@every_example
@pytest.mark.parametrize("memory", ["16MiB", "40MiB", "64MiB", "256MiB", "1GiB"])
@pytest.mark.parametrize("threads", [1, 3, 64])
def test_buffers_stay_within_the_budget(method: str, memory: str, threads: int) -> None:
    budget = wide(method).plan(memory=memory, threads=threads).budget
    assert 0 < budget.buffers <= parse_bytes(memory)
    assert 1 <= budget.workers <= threads
    assert budget.tile % (1 << 16) == 0


@pytest.mark.parametrize("memory", ["32MiB", "64MiB", "1GiB"])
def test_what_a_measure_may_hold_is_within_the_budget_beside_the_tiles(memory: str) -> None:
    found = methods.get("ties")
    allowances = []

    def watched(tiles: Tiles, **parameters: Any) -> object:
        allowances.append(tiles.allowance)
        return found.measure(tiles, **parameters) if found.measure else None

    states = [merge.open({"w": ramp(400_000, scale=1 + i)}) for i in range(3)]
    bound = found.bind(2, EXAMPLES["ties"])
    spied = replace(found, measure=watched)
    lazy = merge_checkpoints(spied, states[1:], states[0], lambda _: bound)
    plan = lazy.plan(memory=memory, threads=2)
    execute(plan, MemorySink(plan))
    budget, operands = plan.budget, 3
    assert allowances
    for_tiles = budget.workers * operands * 4 * budget.tile
    assert budget.workers * max(allowances) + for_tiles <= budget.buffers <= parse_bytes(memory)


def test_what_a_method_holds_besides_its_operands_is_in_the_budget() -> None:
    """A decomposition works in float64 on squares of the short side."""
    base, *models = (merge.open({"w": torch.zeros(512, 1024)}) for _ in range(3))
    found = methods.get("tsv")
    assert found.scratch is not None
    more, less = (
        least(merge_checkpoints(m, models, base, lambda _: found.bind(2, {})))
        for m in (found, replace(found, scratch=None))
    )
    assert more - less >= 4 * found.scratch((512, 1024), 2) >= 8 * 4 * 512**2


def test_a_method_on_whole_tensors_needs_memory_for_the_largest() -> None:
    small, large = ({"w": torch.zeros(n, 1000)} for n in (100, 4000))
    whole = replace(methods.get("ties"), local="tensor")
    bound = whole.bind(1, EXAMPLES["ties"])
    needed = [
        least(merge_checkpoints(whole, [merge.open(s)], merge.open(s), lambda _: bound))
        for s in (small, large)
    ]
    assert needed[1] >= 3 * 4 * 4_000_000
    assert needed[0] < needed[1]


def test_threads_must_be_at_least_one(three: list[Path]) -> None:
    with pytest.raises(merge.RecipeError, match="at least 1"):
        ties(three).plan(threads=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (123, 123),
        ("0", 0),
        ("1000", 1000),
        ("12B", 12),
        ("5GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("1.5GB", 15 * 10**8),
        ("256MiB", 1 << 28),
        ("256 mib", 1 << 28),
        ("2Ki", 2048),
        (" 0.5 TiB ", 1 << 39),
        ("20KB", 20_000),
        ("20k", 20_000),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5 5", "-1GB", "1e9", "five", "5iB", "5PB", "1.GB", "0x10", "1,5GB", "nan"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(merge.RecipeError, match="not a size in bytes") as caught:
        parse_bytes(text)
    assert caught.value.found == repr(text)


# -- side files ----------------------------------------------------------------------------------


def config_after(
    make_model: MakeModel, config: dict[str, object], stored: torch.dtype, asked: str | None
) -> tuple[bytes, bytes]:
    """config.json of a model before and after it is written as ``asked``."""
    model = make_model("m", {"w": ramp(4, dtype=stored)}, config=config)
    out = merge.open(model).save(model.parent / "out", dtype=asked)
    return (model / "config.json").read_bytes(), (out / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("config", "stored", "asked"),
    [
        ({"dtype": "float32"}, torch.float32, None),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16, None),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, torch.bfloat16, "bf16"),
        ({"model_type": "toy"}, torch.float16, None),
        ({"dtype": "float32", "ü": "é", "text_config": {"dtype": "float32"}}, torch.float32, None),
        ({}, torch.float32, None),
    ],
    ids=str,
)
def test_a_config_that_stays_right_is_copied_byte_for_byte(
    make_model: MakeModel, config: dict[str, object], stored: torch.dtype, asked: str | None
) -> None:
    before, after = config_after(make_model, config, stored, asked)
    assert after == before


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ({"dtype": "float32"}, "bfloat16", {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, "fp16", {"torch_dtype": "float16"}),
        (
            {"dtype": "float32", "torch_dtype": "float32"},
            "bfloat16",
            {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        ),
        ({"dtype": None, "torch_dtype": "float32"}, "bf16",
         {"dtype": None, "torch_dtype": "bfloat16"}),
        ({"dtype": "bfloat16"}, None, {"dtype": "float32"}),  # it was wrong about its weights
    ],
    ids=str,
)  # fmt: skip
def test_a_config_names_the_type_that_is_stored(
    make_model: MakeModel,
    config: dict[str, object],
    asked: str | None,
    expected: dict[str, object],
) -> None:
    _, after = config_after(make_model, {"a": 1, **config, "z": [2]}, torch.float32, asked)
    data = json.loads(after)
    assert data == {"a": 1, **expected, "z": [2]}
    assert list(data) == ["a", *config, "z"]


@pytest.mark.parametrize("config", [{"model_type": "toy"}, {"dtype": None}])
def test_a_config_that_names_no_type_gets_the_one_that_was_asked_for(
    make_model: MakeModel, config: dict[str, object]
) -> None:
    _, after = config_after(make_model, config, torch.float32, "bfloat16")
    named = json.loads(after)
    assert "bfloat16" in (named.get("dtype"), named.get("torch_dtype"))


def test_side_files_come_from_the_base_and_weights_of_others_do_not(three: list[Path]) -> None:
    base, a, _ = three
    (base / "tokenizer.json").write_text("{}")
    (base / "image.png").write_text("base")
    (a / "vocab.txt").write_text("a")
    side = {s.name: s.path for s in ties(three).plan().side}
    assert side == {
        "tokenizer.json": str(base / "tokenizer.json"),
        "config.json": str(base / "config.json"),
        "README.md": None,  # not the base's: a card of its own
    }
    assert any("image.png" in note for note in ties(three).plan().notes)


# -- refusals and notes --------------------------------------------------------------------------


def test_nothing_to_write_is_refused() -> None:
    with pytest.raises(merge.PlanError, match="no tensors"):
        merge.open({}).plan()


def test_mixed_types_are_noted(three: list[Path], make_model: MakeModel) -> None:
    half = make_model("half", {n: ramp(*s.shape, dtype=torch.bfloat16)
                               for n, s in merge.open(three[0]).items()})  # fmt: skip
    plan = merge.linear([three[0], half], weight=1.0).plan()
    assert any("3 tensors mix element types" in note for note in plan.notes)
    assert {s.output.dtype.name for s in plan.steps} == {"float32"}
    assert merge.linear(three, weight=1.0).plan().notes == ()


def test_measured_methods_read_their_inputs_twice_and_others_once(three: list[Path]) -> None:
    base, *tuned = three
    once = merge.task_arithmetic(tuned, base=base, weight=0.5).plan()
    twice = merge.model_stock(tuned, base=base).plan()
    assert {s.passes for s in once.steps} == {1}
    assert {s.passes for s in twice.steps} == {2}
    assert not any(isinstance(s.expr, Apply) for s in once.steps)


def each_chunk(plan: Plan) -> Iterator[tuple[str, int, int]]:
    for number, step in enumerate(plan.steps):
        for chunk in step.chunks(number):
            assert (chunk.step, plan.steps[chunk.step]) == (number, step)
            yield step.output.name, chunk.start, chunk.stop


def test_chunks_cover_every_element_once() -> None:
    state = {"big": torch.zeros(5_000_001), "one": torch.zeros(()), "none": torch.zeros(0, 7)}
    covered: dict[str, int] = dict.fromkeys(state, 0)
    for name, start, stop in each_chunk(merge.open(state).plan()):
        assert start == covered[name] < stop
        assert start % (1 << 18) == 0  # tiles of every size begin alike in every chunk
        covered[name] = stop
    assert covered == {"big": 5_000_001, "one": 1, "none": 0}


def test_the_dtype_of_sub_models_follows(make_model: MakeModel, tmp_path: Path) -> None:
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "hidden_size": 4}}
    model = make_model("a", {"w": torch.ones(2)}, config=config)
    out = merge.open(model).save(tmp_path / "out", dtype="bfloat16")
    written = json.loads((out / "config.json").read_text())
    assert written == {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "hidden_size": 4},
    }
