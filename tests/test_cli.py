"""The command line: what goes where, exit codes, which outputs are refused, what verify finds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from merge_cli.app import cli as group
from merge_cli.app import main
from safetensors.torch import load_file

import merge
from merge import methods

from .conftest import MakeModel, write_model


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Merge = Callable[..., Result]


@pytest.fixture
def merge_(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Merge]:
    """``merge_("plan", path)``: the command, run in this process within the test's folder."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "embed": torch.full((8, 4), value),
        "layers.0.w": torch.full((4, 4), value),
        "layers.1.w": torch.full((4, 4), 2 * value),
    }


@pytest.fixture
def recipe(make_model: MakeModel, tmp_path: Path) -> Path:
    """The mean of model a (one file) and model b (two shards)."""
    a, b = make_model("a", tensors(1.0)), make_model("b", tensors(3.0), shards=2)
    (a / "tokenizer.json").write_text("{}")
    return write_recipe(tmp_path / "mean.yml", a, b)


def write_recipe(path: Path, *models: Path, extra: str = "") -> Path:
    lines = [f"  - {{model: {m}, parameters: {{weight: 1}}}}\n" for m in models]
    path.write_text("".join(["merge_method: linear\nmodels:\n", *lines, extra]))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- apply ---------------------------------------------------------------------------------------

WRITTEN = {
    "README.md", "config.json", "merge.lock.yml", "merge_manifest.json", "merge_recipe.yml",
    "model.safetensors",
    "tokenizer.json",
}  # fmt: skip


def test_apply_prints_where_the_output_is_and_the_rest_on_stderr(
    merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    done = merge_("apply", recipe, tmp_path / "out")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n")
    assert "linear of" in done.err and "3 tensors" in done.err and "done in" in done.err
    assert set(files_of(tmp_path / "out")) == WRITTEN
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: set(t.flatten().tolist()) for n, t in found.items()} == {
        "embed": {2.0},
        "layers.0.w": {2.0},
        "layers.1.w": {4.0},
    }
    assert (tmp_path / "out" / "merge_recipe.yml").read_text() == recipe.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "mean.yml", "out"]


def test_the_output_is_named_after_the_recipe(merge_: Merge, recipe: Path, tmp_path: Path) -> None:
    done = merge_("apply", recipe)
    assert (done.code, done.out) == (0, "mean\n")
    assert set(files_of(tmp_path / "mean")) == WRITTEN


def test_quiet_says_where_and_no_more(merge_: Merge, recipe: Path) -> None:
    for flag in ("-q", "--quiet"):
        done = merge_("apply", recipe, f"out{flag}", flag)
        assert (done.code, done.out, done.err) == (0, f"out{flag}\n", "")


def test_json_is_all_there_is_on_stdout(merge_: Merge, recipe: Path) -> None:
    done = merge_("apply", recipe, "out", "--json")
    assert done.code == 0
    assert "linear of" in done.err
    found = done.json
    assert (found["output"], found["already_complete"], found["resumed_chunks"]) == (
        "out",
        False,
        0,
    )
    assert found["bytes_written"] == 64 * 4
    assert found["bytes_read"] == 2 * 64 * 4
    assert re.fullmatch("[0-9a-f]{64}", found["plan"])
    assert found["peak_rss"] > 0 and found["seconds"] > 0
    quiet = merge_("apply", recipe, "out2", "--json", "-q")
    assert quiet.json["output"] == "out2" and quiet.err == ""


def test_dry_run_writes_nothing(merge_: Merge, recipe: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    done = merge_("apply", recipe, "out", "--dry-run")
    assert done.code == 0
    assert "3 tensors, 64 parameters" in done.out and done.err == ""
    assert merge_("apply", recipe, "out", "--dry-run", "--json").json["tensors"] == 3
    assert files_of(tmp_path) == before


def test_a_second_run_finds_the_output_complete(
    merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    merge_("apply", recipe, "out")
    before = files_of(tmp_path / "out")
    again = merge_("apply", recipe, "out")
    assert (again.code, again.out) == (0, "out\n")
    assert "the output was there already, complete and verified" in again.err
    assert merge_("apply", recipe, "out", "--json").json["already_complete"] is True
    assert files_of(tmp_path / "out") == before


def test_options_decide_what_is_written(merge_: Merge, recipe: Path, tmp_path: Path) -> None:
    options = ["--dtype", "bf16", "--shard-size", "100B", "--set", "models.1.parameters.weight=3"]
    assert merge_("apply", recipe, "out", "--threads", 1, "--memory", "64MiB", *options).code == 0
    found = merge.open(tmp_path / "out")
    assert {s.dtype.name for s in found.values()} == {"bfloat16"}
    assert found.state_dict()["embed"].unique().tolist() == [2.5]
    names = set(files_of(tmp_path / "out"))
    assert {"model.safetensors.index.json", "model-00001-of-00002.safetensors"} <= names
    copy = (tmp_path / "out" / "merge_recipe.yml").read_text()
    assert copy.startswith("# overridden when it was run: models.1.parameters.weight=3\n")


# -- errors --------------------------------------------------------------------------------------


def cut_shard(tmp_path: Path) -> None:
    shard = tmp_path / "b" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def misspell(tmp_path: Path) -> None:
    path = tmp_path / "mean.yml"
    path.write_text(path.read_text().replace("weight", "wieght"))


def other_shape(tmp_path: Path) -> None:
    write_model(tmp_path / "c", {"embed": torch.ones(1)})
    write_recipe(tmp_path / "mean.yml", tmp_path / "a", tmp_path / "c")


def not_finite(tmp_path: Path) -> None:
    write_model(tmp_path / "c", tensors(float("nan")))
    write_recipe(tmp_path / "mean.yml", tmp_path / "a", tmp_path / "c")


def nothing(tmp_path: Path) -> None:
    pass


Prepare = Callable[[Path], None]
MEAN = ["apply", "mean.yml", "out"]
ERRORS: dict[str, tuple[list[str], Prepare, int, str, str]] = {
    "a recipe": (MEAN, misspell, 2, "RecipeError", "unknown parameter 'wieght'"),
    "no recipe": (["apply", "no.yml"], nothing, 2, "RecipeError", "no such recipe"),
    "a size": ([*MEAN, "--memory", "lots"], nothing, 2, "RecipeError", "not a size in bytes"),
    "a setting": ([*MEAN, "--set", "x"], nothing, 2, "RecipeError", "not KEY=VALUE"),
    "a dtype": ([*MEAN, "--dtype", "bf17"], nothing, 2, "RecipeError", "unknown dtype 'bf17'"),
    "no threads": ([*MEAN, "--threads", "0"], nothing, 2, "RecipeError", "at least 1"),
    "a method": (["methods", "slrp"], nothing, 2, "RecipeError", "did you mean 'slerp'?"),
    "the output": (["apply", "mean.yml", "a/out"], nothing, 2, "OutputRefused", "lies inside"),
    "a cut shard": (MEAN, cut_shard, 3, "SourceError", "the file is cut off"),
    "no model": (["inspect", "absent"], nothing, 3, "SourceError", "no such model"),
    "nothing to verify": (["verify", "absent"], nothing, 3, "SourceError", "no such model"),
    "shapes": (MEAN, other_shape, 3, "PlanError", "do not hold the same tensors"),
    "no memory": ([*MEAN, "--memory", "1KiB"], nothing, 3, "PlanError", "memory budget"),
    "NaN": (MEAN, not_finite, 3, "SourceError", "not finite"),
}


@pytest.mark.parametrize(
    ("arguments", "prepare", "code", "kind", "what"), ERRORS.values(), ids=ERRORS
)
@pytest.mark.usefixtures("recipe")
def test_an_error_has_its_exit_code_and_is_json_if_asked(
    arguments: list[str],
    prepare: Prepare,
    code: int,
    kind: str,
    what: str,
    merge_: Merge,
    tmp_path: Path,
) -> None:
    prepare(tmp_path)
    plain = merge_(*arguments)
    assert (plain.code, plain.out) == (code, "")
    assert "error: " in plain.err and what in plain.err and "Traceback" not in plain.err
    asked = merge_(*arguments, "--json")
    assert asked.code == code
    assert set(asked.json) == {"error", "what", "where", "found", "expected", "do", "exit_code"}
    assert (asked.json["error"], asked.json["exit_code"]) == (kind, code)
    assert what in asked.json["what"] + str(asked.json["do"])
    assert not (tmp_path / "out").exists()


USAGE = [
    ["nonsense"],
    ["apply"],
    ["apply", "mean.yml", "out", "more"],
    ["apply", "mean.yml", "--nonsense"],
    ["apply", "mean.yml", "--threads", "two"],
    ["apply", "mean.yml", "--seed", "-1"],
    ["inspect"],
    ["verify"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
@pytest.mark.usefixtures("recipe")
def test_wrong_usage_exits_with_2_and_a_hint(arguments: list[str], merge_: Merge) -> None:
    done = merge_(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage: " in done.err and "Error: " in done.err


def test_a_mistyped_option_is_corrected(merge_: Merge, recipe: Path) -> None:
    assert "--replace" in merge_("apply", recipe, "--replce").err


def test_a_recipe_error_names_line_and_column(merge_: Merge, recipe: Path, tmp_path: Path) -> None:
    misspell(tmp_path)
    found = merge_("plan", recipe, "--json").json
    assert found["where"] == {
        "key": "wieght",
        "recipe": str(recipe),
        "line": "3",
        "column": str(recipe.read_text().splitlines()[2].index("wieght") + 1),
    }
    assert found["do"] == "did you mean 'weight'?"


def test_a_full_disk_exits_with_4_before_anything_is_written(
    merge_: Merge, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    before = files_of(tmp_path)
    done = merge_("apply", recipe, "out", "--json")
    assert done.code == 4
    assert done.json["error"] == "SinkError"
    assert done.json["what"] == "not enough space for the output"
    assert done.json["where"] == {"folder": str(tmp_path)}
    assert "100 bytes" in done.json["found"]
    assert files_of(tmp_path) == before


def test_a_defect_of_ours_leaves_a_traceback_to_report(
    merge_: Merge, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr("merge_cli.plan.plan_recipe", broken)
    done = merge_("plan", recipe)
    assert (done.code, done.out) == (70, "")
    assert "please report" in done.err and "Traceback" not in done.err
    (path,) = tmp_path.glob("hf-merge-*.txt")
    assert str(path) in done.err
    assert "ZeroDivisionError: seven" in path.read_text()
    assert "Traceback" in path.read_text()


def test_an_interrupt_exits_with_130(
    merge_: Merge, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("merge.applying.save_plan", interrupted)
    done = merge_("apply", recipe, "out", "-q")
    assert (done.code, done.out) == (130, "")
    assert "run the same command again to resume" in done.err


# -- which outputs are refused -------------------------------------------------------------------

OVERLAPS: dict[str, tuple[str, str]] = {
    "an input": ("a", "is an input"),
    "another input": ("b", "is an input"),
    "by a detour": ("b/../a", "is an input"),
    "in an input": ("a/out", "lies inside an input"),
    "deep in an input": ("a/x/y/out", "lies inside an input"),
    "around an input": (".", "contains an input"),
    "by a link": ("link", "is an input"),
    "in an input by a link": ("link/out", "lies inside an input"),
    "in an input by a link to a folder of it": ("inner/out", "lies inside an input"),
    "around an input by a link": ("up", "contains an input"),
}


@pytest.mark.parametrize(("out", "relation"), OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("replace", [False, True], ids=["", "replace"])
def test_an_output_that_touches_an_input_is_refused(
    out: str, relation: str, replace: bool, merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "up").symlink_to(".")
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "inner").symlink_to("a/sub")
    before = files_of(tmp_path)
    done = merge_("apply", recipe, out, *["--replace"] * replace)
    assert (done.code, done.out) == (2, "")
    assert f"the output {relation}, which a merge never touches" in done.err
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("out", ["folder", "folder/out", "folder/weights.safetensors"])
def test_an_output_beside_a_lone_file_may_not_hold_it(
    out: str, merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "folder" / "weights.safetensors")
    write_recipe(recipe, tmp_path / "folder" / "weights.safetensors")
    before = files_of(tmp_path)
    done = merge_("apply", recipe, out, "--replace")
    if out == "folder/out":  # beside the file, not in it
        assert done.code == 0
        assert (tmp_path / "folder" / "weights.safetensors").exists()
    else:
        assert done.code == 2
        assert files_of(tmp_path) == before


UNREAD = {
    "the base lends only its files": "base_model: {c}\n",
    "a model of no weight": "  - {{model: {c}, parameters: {{weight: 0}}}}\n",
}


@pytest.mark.parametrize("extra", UNREAD.values(), ids=UNREAD)
def test_a_model_whose_weights_are_not_read_is_an_input_too(
    extra: str, merge_: Merge, recipe: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    other = make_model("c", tensors(9.0))
    recipe.write_text(recipe.read_text() + extra.format(c=other))
    before = files_of(tmp_path)
    done = merge_("apply", recipe, "c", "--replace")
    assert done.code == 2
    assert "is an input" in done.err
    assert files_of(tmp_path) == before


def test_an_output_that_is_not_empty_is_refused(
    merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    done = merge_("apply", recipe, "out")
    assert (done.code, done.out) == (2, "")
    assert "the output folder is not empty" in done.err and "--replace" in done.err
    assert files_of(tmp_path / "out") == {"thesis.txt": b"dear"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "mean.yml", "out"]


def test_replace_replaces_all_of_it(merge_: Merge, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00009.safetensors").write_text("old")
    assert merge_("apply", recipe, "out", "--replace").code == 0
    assert set(files_of(tmp_path / "out")) == WRITTEN
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "mean.yml", "out"]


def test_an_empty_folder_is_as_good_as_none(merge_: Merge, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert merge_("apply", recipe, "out").code == 0
    assert set(files_of(tmp_path / "out")) == WRITTEN


@pytest.mark.parametrize("flags", [[], ["--replace"]], ids=["", "replace"])
def test_an_output_that_is_a_file_is_refused(
    flags: list[str], merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("dear")
    done = merge_("apply", recipe, "out", *flags)
    assert done.code == 2
    assert "the output is a file" in done.err
    assert (tmp_path / "out").read_text() == "dear"


def test_a_missing_parent_is_made(merge_: Merge, recipe: Path, tmp_path: Path) -> None:
    assert merge_("apply", recipe, "x/y/out").code == 0
    assert set(files_of(tmp_path / "x" / "y" / "out")) == WRITTEN


def test_a_parent_that_is_a_file_is_an_error_of_the_disk(
    merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("dear")
    done = merge_("apply", recipe, "x/out", "--json")
    assert done.code in (2, 4)
    assert str(tmp_path / "x") in done.out
    assert (tmp_path / "x").read_text() == "dear"


# -- plan, inspect, methods, schema --------------------------------------------------------------


def test_plan_reads_headers_only_and_says_what_it_would_do(
    merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    with (tmp_path / "a" / "model.safetensors").open("r+b") as f:
        f.seek(-4, os.SEEK_END)
        f.write(b"\xff\xff\xff\xff")  # a NaN that no one may see
    before = files_of(tmp_path)
    done = merge_("plan", recipe)
    assert (done.code, done.err) == (0, "")
    for part in ("3 tensors, 64 parameters", "reads", "writes", "holds", "plan "):
        assert part in done.out
    found = merge_("plan", recipe, "--json").json
    assert found["tensors"] == 3 and found["read_bytes"] == 2 * 64 * 4
    assert len(found["inputs"]) == 3
    assert found["outputs"][0]["file"] == "model.safetensors"
    assert "steps" not in found
    assert files_of(tmp_path) == before


def test_plan_lists_tensors_with_their_formulas(
    merge_: Merge, recipe: Path, tmp_path: Path
) -> None:
    text = merge_("plan", recipe, "--tensors").out
    assert f"  A = {tmp_path / 'a'}\n  B = {tmp_path / 'b'}\n" in text
    assert "  embed  float32 8x4\n      = 0.5*A[embed] + 0.5*B[embed]\n" in text
    found = merge_("plan", recipe, "--tensors", "--json").json
    assert found["sources"] == {"A": str(tmp_path / "a"), "B": str(tmp_path / "b")}
    assert [s["formula"] for s in found["steps"] if s["tensor"] == "embed"] == [
        "0.5*A[embed] + 0.5*B[embed]"
    ]


def test_the_same_options_give_the_same_plan(merge_: Merge, recipe: Path) -> None:
    planned = merge_("plan", recipe, "--json", "--threads", 2).json["plan"]
    assert merge_("apply", recipe, "out", "--json", "--threads", 1).json["plan"] == planned
    assert merge_("plan", recipe, "--json", "--dtype", "bfloat16").json["plan"] != planned
    assert merge_("plan", recipe, "--json", "--set", "dtype=float64").json["plan"] != planned


def test_lenient_lists_what_it_ignores(merge_: Merge, recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "nonsense: 1\n")
    assert merge_("plan", recipe).code == 2
    done = merge_("plan", recipe, "--lenient")
    assert done.code == 0
    assert "note: line 5: 'nonsense' is not known and is ignored" in done.out


@pytest.mark.usefixtures("recipe")
def test_inspect_says_what_a_model_holds(merge_: Merge) -> None:
    done = merge_("inspect", "b")
    assert (done.code, done.err) == (0, "")
    for part in ("toy", "3, 64 parameters", "256 B in 2 files", "3 float32", "2 in layers"):
        assert part in done.out
    found = merge_("inspect", "b", "--tensors", "--json").json
    assert (found["tensors"], found["bytes"], found["stacks"]) == (3, 256, {"layers": 2})
    row = {"name": "embed", "dtype": "float32", "shape": [8, 4], "bytes": 128, "role": "embedding"}
    assert row in found["tensor_list"]
    assert "embed  float32 8x4  embedding" in merge_("inspect", "b", "--tensors").out
    assert "tensor_list" not in merge_("inspect", "b", "--json").json


def test_methods_lists_all_and_tells_of_each(merge_: Merge) -> None:
    text = merge_("methods").out
    listed = merge_("methods", "--json").json
    assert [m["name"] for m in listed] == list(methods.registry())
    for name, method in methods.registry().items():
        assert re.search(rf"^{name} +{re.escape(method.summary)}$", text, re.MULTILINE)
        told = merge_("methods", name)
        assert told.code == 0 and told.err == ""
        assert "Recipe::" in told.out and "Parameters:" in told.out
        for key, spec in method.parameters.items():
            assert re.search(rf"^  {key}: {spec.type.__name__}\b", told.out, re.MULTILINE)
        assert merge_("methods", name, "--json").json["name"] == name


def test_schema_is_json(merge_: Merge) -> None:
    done = merge_("schema")
    assert (done.code, done.err) == (0, "")
    assert done.json["properties"]["merge_method"]["enum"] == list(methods.registry())


def test_help_and_version_go_to_stdout(merge_: Merge) -> None:
    for flag in ("-h", "--help"):
        done = merge_(flag)
        assert (done.code, done.err) == (0, "")
        assert all(name in done.out for name in group.commands)
    assert merge.__version__ in merge_("--version").out
    for name in group.commands:
        done = merge_(name, "--help")
        assert done.code == 0
        assert f"{name} [OPTIONS]" in done.out and f"Example: merge {name}" in done.out


# -- verify --------------------------------------------------------------------------------------


@pytest.fixture
def out(merge_: Merge, recipe: Path, tmp_path: Path) -> Path:
    """A finished output in two shards."""
    assert merge_("apply", recipe, "out", "-q", "--shard-size", "200B").code == 0
    return tmp_path / "out"


SHARD = "model-00001-of-00002.safetensors"


def flip(path: Path, at: int) -> None:
    """Change one bit of one byte; ``at`` counts from the end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_verify_finds_a_finished_output_sound(merge_: Merge, out: Path) -> None:
    done = merge_("verify", out)
    assert (done.code, done.err) == (0, "")
    assert f"{out}: sound: 3 tensors" in done.out and "hashed" in done.out
    found = merge_("verify", out, "--json").json
    assert found["ok"] is True and found["problems"] == [] and found["tensors"] == 3
    sizes = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert found["bytes_hashed"] == sizes
    assert merge.verify(out).ok


def last_tensor(shard: Path) -> str:
    """The tensor at the end of a file."""
    size = int.from_bytes(shard.read_bytes()[:8], "little")
    header = json.loads(shard.read_bytes()[8 : 8 + size])
    entries = {n: e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"}
    return max(entries, key=lambda n: entries[n])


def drop_metadata(shard: Path) -> None:
    """Another text of the same length in the header, with the same tensors."""
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"format":"pt"', b'"format":"np"'))


def rename_tensors(out: Path) -> None:
    for shard in out.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes().replace(b"layers.", b"loyers."))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of a tensor": (
        lambda out: flip(out / SHARD, -1),
        f"{SHARD}: tensor {{tensor}} differs from what was written",
    ),
    "a byte of the config": (
        lambda out: (out / "config.json").write_text('{"model_type": "tox"}'),
        "config.json: changed since it was written",
    ),
    "a byte of the recipe": (
        lambda out: flip(out / "merge_recipe.yml", -2),
        "merge_recipe.yml: changed since it was written",
    ),
    "a byte of the index": (
        lambda out: flip(out / "model.safetensors.index.json", 20),
        "model.safetensors.index.json: changed since it was written",
    ),
    "the header's length": (lambda out: flip(out / SHARD, 0), SHARD),
    "a byte of the header": (lambda out: flip(out / SHARD, 9), SHARD),
    "metadata in the header": (
        lambda out: drop_metadata(out / SHARD),
        f"{SHARD}: the header differs from what was written",
    ),
    "a tensor's name": (rename_tensors, "is missing"),
    "no tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "no config": (lambda out: (out / "config.json").unlink(), "config.json: missing"),
    "no index": (
        lambda out: (out / "model.safetensors.index.json").unlink(),
        "model.safetensors.index.json: missing",
    ),
    "no shard": (lambda out: (out / SHARD).unlink(), SHARD),
    "a cut shard": (lambda out: os.truncate(out / SHARD, 150), SHARD),
    "an empty shard": (lambda out: os.truncate(out / SHARD, 0), SHARD),
    "a longer shard": (lambda out: os.truncate(out / SHARD, 500), SHARD),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGES.values(), ids=DAMAGES)
def test_verify_names_what_is_damaged(
    damage: Callable[[Path], object], problem: str, merge_: Merge, out: Path
) -> None:
    problem = problem.format(tensor=last_tensor(out / SHARD))
    damage(out)
    done = merge_("verify", out)
    assert (done.code, done.err) == (3, "")
    assert problem in done.out
    assert re.search(rf"{re.escape(str(out))}: \d+ problems?: ", done.out)
    found = merge_("verify", out, "--json")
    assert found.code == 3
    assert found.json["ok"] is False
    assert any(problem in p for p in found.json["problems"])


@pytest.mark.parametrize("damage", [d for d, _ in DAMAGES.values()], ids=DAMAGES)
def test_a_damaged_output_is_not_taken_for_complete(
    damage: Callable[[Path], object], merge_: Merge, recipe: Path, out: Path
) -> None:
    good = files_of(out)
    damage(out)
    assert merge_("apply", recipe, "out", "--shard-size", "200B").code == 2
    assert merge_("apply", recipe, "out", "--shard-size", "200B", "--replace").code == 0
    assert files_of(out) == good


def edit_manifest(out: Path, edit: Callable[[Any], object]) -> None:
    path = out / "merge_manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "not JSON": lambda out: (out / "merge_manifest.json").write_text("{"),
    "not UTF-8": lambda out: (out / "merge_manifest.json").write_bytes(b'{"\xff":1}'),
    "a list": lambda out: (out / "merge_manifest.json").write_text("[]"),
    "nothing in it": lambda out: (out / "merge_manifest.json").write_text("{}"),
    "no plan": lambda out: edit_manifest(out, lambda m: m.pop("plan")),
    "plan a number": lambda out: edit_manifest(out, lambda m: m.update(plan=3)),
    "weights a list": lambda out: edit_manifest(out, lambda m: m.update(weights=[])),
    "side a list": lambda out: edit_manifest(out, lambda m: m.update(side=["config.json"])),
    "a digest a number": lambda out: edit_manifest(out, lambda m: m["side"].update(x=3)),
    "a file null": lambda out: edit_manifest(out, lambda m: m["weights"].update({SHARD: None})),
    "a file without a size": lambda out: edit_manifest(
        out, lambda m: m["weights"][SHARD].pop("size")
    ),
    "a file without tensors": lambda out: edit_manifest(
        out, lambda m: m["weights"][SHARD].pop("tensors")
    ),
    "a tensor without a digest": lambda out: edit_manifest(
        out, lambda m: [t.pop("blake3") for t in m["weights"][SHARD]["tensors"].values()]
    ),
    "a chunk of nothing": lambda out: edit_manifest(
        out, lambda m: [t.update(chunk_bytes=0) for t in m["weights"][SHARD]["tensors"].values()]
    ),
    "a file outside": lambda out: edit_manifest(
        out, lambda m: m["side"].update({"../a/config.json": "0"})
    ),
}


@pytest.mark.parametrize("damage", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_named(
    damage: Callable[[Path], object], merge_: Merge, recipe: Path, out: Path
) -> None:
    damage(out)
    done = merge_("verify", out)
    assert done.code == 3
    assert "merge_manifest.json" in done.out + done.err
    assert merge_("apply", recipe, "out", "--shard-size", "200B").code == 2  # not empty, not ours


def test_without_a_manifest_the_structure_is_checked(merge_: Merge, recipe: Path) -> None:
    assert recipe.exists()
    done = merge_("verify", "b")
    assert done.code == 0
    assert "b: sound: 3 tensors, no manifest: structure only, no bytes" in done.out
    Path("b", SHARD).unlink()
    done = merge_("verify", "b")
    assert done.code == 3
    assert SHARD in done.out


def test_a_config_that_names_another_type_is_found(merge_: Merge, make_model: MakeModel) -> None:
    model = make_model("m", tensors(), config={"torch_dtype": "bfloat16"})
    done = merge_("verify", model)
    assert done.code == 3
    assert "config.json: names dtype bfloat16, but the weights are float32" in done.out


# -- what is imported ----------------------------------------------------------------------------

SCRIPT = """
import sys
from merge_cli.app import main

for arguments in (["--help"], ["plan", {good!r}], ["apply", {bad!r}], ["methods"], ["schema"]):
    sys.argv = ["merge", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(f"<{{arguments[0]}} {{stop.code}}>")
heavy = ("torch", "transformers", "scipy", "huggingface_hub", "safetensors", "tqdm")
print("<imported:", *(name for name in heavy if name in sys.modules), ">")
"""


def test_help_plans_and_recipe_errors_do_not_import_torch(recipe: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text("merge_method: liner\nmodels: [{model: a}]\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(good=str(recipe), bad=str(bad))],
        capture_output=True,
        text=True,
        check=True,
    )
    marks = re.findall(r"^<(.*)>$", done.stdout, re.MULTILINE)
    assert marks == ["--help 0", "plan 0", "apply 2", "methods 0", "schema 0", "imported: "]
    assert "did you mean 'linear'?" in done.stderr


def test_both_console_scripts_and_the_module_are_the_same_command() -> None:
    from importlib.metadata import entry_points

    scripts = {
        e.name: e.load() for e in entry_points(group="console_scripts") if "merge_cli" in e.value
    }
    assert scripts == {"merge": main, "hf-merge": main}
    from merge_cli import __main__

    assert __main__.main is main


def test_a_dry_run_refuses_an_output_inside_an_input(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("a", {"w": torch.ones(2)})
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")
    argv = ["merge", "apply", str(recipe), str(model / "out"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert not (model / "out").exists()
