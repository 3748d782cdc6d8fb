"""The model card: what the Hub reads of it, which licence it states, what it does with others'."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from ruamel.yaml import YAML

import merge
from merge import applying, methods, run
from merge.card import recipe_card
from merge.checkpoint.memory import open_state_dict
from merge.errors import RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.ir.side import Side, SideFile
from merge.plan.model import Plan
from merge.provenance import is_hub_id, read_card
from merge.recipe.compile import compile_recipe
from merge.recipe.read import parse_recipe
from merge.write.card import code, front_matter
from merge.write.licence import Licence, settle

from .conftest import write_model
from .tiny import model, zoo

law = settings(max_examples=60, deadline=None)
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}
TIES = (
    "merge_method: ties\nbase_model: base\n"
    "models:\n- {model: a, parameters: {weight: 0.5, density: [0.2, 0.6]}}\n- model: b\n"
    "parameters: {weight: 1, density: 0.5, lambda: 0.7}\n"
)


def linear(*models: str) -> str:
    listed = ", ".join(f"{{model: {m}}}" for m in models)
    return f"merge_method: linear\nmodels: [{listed}]\nparameters: {{weight: 1}}\n"


MEAN = linear("a", "b")


def card(front: str, body: str = "# A model\n") -> str:
    return f"---\n{front}\n---\n{body}"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models a, b and base, without cards, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "base"):
        write_model(tmp_path / name, model(name, 3), config=LLAMA)
    return tmp_path


def planned(text: str, **options: object) -> Plan:
    Path("r.yml").write_text(text)
    return applying.plan_recipe("r.yml", **options).plan  # type: ignore[arg-type]


def card_of(plan: Plan) -> ModelCard:
    """The card of a plan as huggingface_hub reads it."""
    (text,) = (s.text for s in plan.side if s.name == "README.md")
    assert text is not None
    return ModelCard(text)


def data_of(plan: Plan) -> dict[str, object]:
    found = card_of(plan).data.to_dict()
    assert isinstance(found, dict)
    return found


def write_card(folder: str, text: str) -> None:
    Path(folder, "README.md").write_text(text)


# -- what the Hub reads ----------------------------------------------------------------------------


def test_the_hub_reads_what_the_inputs_say(folders: Path) -> None:
    write_card("a", card("license: mit\nlanguage: [en, no]\nbase_model:\n- org/base\n- org/other"))
    write_card("b", card("license: mit\nlanguage: de\ndatasets:\n- org/data\n- squad"))
    write_card("base", card(
        "license: mit\nlanguage: no\ndatasets: squad\nbase_model: org/base\n"
        "pipeline_tag: text-generation\ntags: [conversational, trl, gguf]"
    ))  # fmt: skip
    assert data_of(planned(TIES)) == {
        "base_model": ["org/base", "org/other"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "language": ["no", "en", "de"],
        "datasets": ["squad", "org/data"],
        "tags": ["merge", "hf-merge", "ties", "conversational"],
    }


def test_without_cards_there_is_little_to_say(folders: Path) -> None:
    plan = planned(MEAN)
    tags = ["merge", "hf-merge", "linear"]
    assert data_of(plan) == {"library_name": "transformers", "tags": tags}
    assert not plan.notes


WORDS = st.one_of(
    st.sampled_from(["no", "YES", "on", "null", "~", "1e3", "12:30", "0x1f", "1_000", ".5", "2.0",
                     "= ", "-", "a: b", "#a", "a #b", "!x", "&a", "*a", "{a}", "2024-01-01", "'",
                     "true", "Off", "N", "a\nb", "\x07", "é", "", " a ", "%a", "@a", "|", "---"]),
    st.text(max_size=20),
)  # fmt: skip


@law
@given(st.dictionaries(st.sampled_from(["license", "language"]), WORDS | st.lists(WORDS)))
def test_every_reader_of_yaml_reads_the_words_that_were_written(
    data: dict[str, str | list[str]],
) -> None:
    text = front_matter(data)
    assert (yaml.safe_load(text) or {}) == data
    assert (YAML(typ="safe", pure=True).load(text) or {}) == data


LIBRARIES: dict[str, tuple[dict[str, object], str | None, str | None]] = {
    "transformers": ({"model_type": "bert"}, None, "transformers"),
    "sentence-transformers": ({"model_type": "bert"}, "modules.json", "sentence-transformers"),
    "diffusers": ({}, "model_index.json", "diffusers"),
    "a part of diffusers": ({"_class_name": "UNet2DModel"}, None, "diffusers"),
    "timm": ({"architecture": "resnet18", "pretrained_cfg": {}}, None, "timm"),
    "open_clip": ({}, "open_clip_config.json", "open_clip"),
    "peft": ({}, "adapter_config.json", "peft"),
    "none known": ({"my": "own"}, None, None),
}


@pytest.mark.parametrize(("config", "file", "library"), LIBRARIES.values(), ids=LIBRARIES)
def test_the_library_is_that_of_the_folder(
    config: dict[str, object], file: str | None, library: str | None
) -> None:
    side = Side(() if file is None else (SideFile(file, file, 2, 0),), config)
    plan = run.plan(open_state_dict({"w": torch.ones(2)}, "m", side))
    assert data_of(plan).get("library_name") == library


def test_the_donor_of_a_stage_is_found_through_it(folders: Path) -> None:
    write_card("a", card("pipeline_tag: fill-mask"))
    write_card("b", card("pipeline_tag: text-ranking"))
    text = "---\n".join([f"name: m\n{MEAN}", linear("m", "b")])
    assert data_of(planned(text))["pipeline_tag"] == "fill-mask"


# -- licences --------------------------------------------------------------------------------------

MIT, APACHE, OTHER = Licence("mit"), Licence("apache-2.0"), Licence("other", "x", "LICENSE")
SETTLED: dict[str, tuple[list[Licence], Licence | None]] = {
    "all agree": ([MIT, MIT], MIT),
    "they differ": ([MIT, APACHE], None),
    "one states none": ([MIT, Licence()], None),
    "none states any": ([Licence(), Licence()], None),
    "others of one name": ([OTHER, OTHER], OTHER),
    "a name in other letters": ([OTHER, Licence("other", "X", "LICENSE")], OTHER),
    "others of two names": ([OTHER, Licence("other", "y", "LICENSE")], None),
    "links to two copies": ([OTHER, Licence("other", "x", "org/LICENSE")], Licence("other", "x")),
    "others without a name": ([Licence("other"), Licence("other")], None),
    "others of one link": ([Licence("other", None, "L"), Licence("other", None, "L")],
                           Licence("other", None, "L")),
    "not for commercial use": ([Licence("cc-by-nc-4.0"), Licence("cc-by-nc-4.0")], None),
    "by its name": ([Licence("other", "flux-1-dev-non-commercial-license")], None),
    "for research": ([Licence("intel-research"), Licence("intel-research")], None),
    "for research by its name": ([Licence("other", "mrl", "MRL-0.1.md")], None),
    "gated": ([Licence("llama3.1", gated=True), Licence("llama3.1")], None),
    "gated without a licence": ([Licence(gated=True)], None),
    "several at once": ([Licence("mit + apache-2.0"), Licence("mit + apache-2.0")], None),
    "no input at all": ([], None),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "wanted"), SETTLED.values(), ids=SETTLED)
def test_a_licence_is_taken_over_when_all_inputs_state_it_without_limits(
    inputs: list[Licence], wanted: Licence | None
) -> None:
    named = [(f"m{i}", licence) for i, licence in enumerate(inputs)]
    found, note = settle(named)
    assert found == wanted
    silent = wanted is not None or not any(i.stated or i.gated for i in inputs)
    assert (note is None) == silent
    if note is not None:
        assert note.endswith("; set `--license`")
        assert all(f"{name}: {licence}" in note for name, licence in named)


@pytest.mark.parametrize("inputs", [i for i, _ in SETTLED.values()], ids=SETTLED)
def test_the_authors_word_counts_for_any_inputs(inputs: list[Licence]) -> None:
    found, note = settle([("m", licence) for licence in inputs], "gpl-3.0")
    assert (found, note) == (Licence("gpl-3.0"), None)


def test_the_authors_word_keeps_the_name_and_link_that_all_inputs_give_it() -> None:
    gated = Licence("other", "x", "LICENSE", gated=True)
    assert settle([("a", gated), ("b", gated)], "other") == (OTHER, None)


def test_a_licence_that_is_left_out_is_noted_and_each_is_listed(folders: Path) -> None:
    write_card("a", card("license: mit"))
    write_card("b", card("license: apache-2.0"))
    plan = planned(MEAN)
    assert plan.notes == ("the licences differ: a: mit, b: apache-2.0; set `--license`",)
    assert "license" not in data_of(plan)
    assert "| `a` | model | `mit` |\n| `b` | model | `apache-2.0` |" in card_of(plan).text
    assert data_of(planned(MEAN, licence="mit"))["license"] == "mit"


def test_a_gated_input_is_told_by_its_card(folders: Path) -> None:
    for name in "ab":
        write_card(name, card("license: llama3.1\nextra_gated_prompt: |\n  Accept: this"))
    plan = planned(MEAN)
    assert "license" not in data_of(plan)
    (note,) = plan.notes
    assert note.startswith("no licence is taken over from inputs with limits: a: llama3.1 (gated)")
    assert data_of(planned(MEAN, licence="llama3.1"))["license"] == "llama3.1"


@pytest.mark.parametrize("word", ["", "MIT", "a b", "mit\nx: y", "mit: x", "ä", "a" * 70])
def test_a_licence_of_another_shape_is_refused(word: str, folders: Path) -> None:
    with pytest.raises(RecipeError, match="identifier on the Hub") as caught:
        planned(MEAN, licence=word)
    assert caught.value.found == repr(word)


# -- other people's cards --------------------------------------------------------------------------

UNREADABLE: dict[str, tuple[str, str]] = {
    "no end": ("---\nlicense: mit\n", "no end"),
    "bad YAML": (card("license: [mit"), "not readable as YAML"),
    "a tag": (card("license: !!python/object:os.system x"), "unknown tag"),
    "far too long": (card("tags: [" + "a, " * 30_000 + "b]"), "longer than 50000 characters"),
    "far too deep": (card("tags: " + "[" * 1900 + "]" * 1900), "more than 200 brackets"),
    "an anchor that is elsewhere": (card("x: &a mit\nlicense: *a"), "undefined alias"),
}


@pytest.mark.parametrize(("text", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_card_that_cannot_be_read_is_noted_and_ignored(
    text: str, problem: str, folders: Path
) -> None:
    write_card("a", text)
    plan = planned(MEAN)
    (note,) = plan.notes
    assert note.startswith("the model card of a is not taken into account: ") and problem in note
    assert "license" not in data_of(plan)


IGNORED: dict[str, str] = {
    "empty": "",
    "no front matter": "# License: mit\n---\nlicense: mit\n---\n",
    "a list": card("- license: mit"),
    "a text": card("license"),
    "numbers": card("license: 1\nlanguage: [1, 2]\ntags: {a: b}\ndatasets: [[x]]"),
    "markup": card(
        'license_name: "<script>"\nlanguage: "en`|"\ntags: ["a\\nb"]\nbase_model: "a/b/c"\n'
        'datasets: ["../x", "a b"]\npipeline_tag: "$(touch x)"'
    ),
    "bytes": card("license: m\udcfft"),
    "aliases": card("tags: &a [x, x, x]\ndatasets: [*a, *a, *a]"),
}


@pytest.mark.parametrize("text", IGNORED.values(), ids=IGNORED)
def test_what_is_no_plain_word_in_a_card_is_ignored(text: str, folders: Path) -> None:
    Path("a", "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
    plan = planned(MEAN)
    found = data_of(plan)
    assert set(found) == {"library_name", "tags"} and found["tags"] == [
        "merge",
        "hf-merge",
        "linear",
    ]
    assert not plan.notes


def test_a_licence_in_words_is_shown_and_not_taken_for_an_identifier(folders: Path) -> None:
    for name in "ab":
        write_card(name, card("license: Apache License 2.0"))
    plan = planned(MEAN)
    assert "license" not in data_of(plan) and len(plan.notes) == 1
    assert "| `a` | model | `Apache License 2.0` |" in card_of(plan).text


def test_benchmark_figures_are_not_parsed(tmp_path: Path) -> None:
    figures = "".join(f"  - type: t{i}\n    value: [{i}\n" for i in range(20_000))  # unbalanced
    path = tmp_path / "README.md"
    path.write_text(card(f"model-index:\n- name: m\n{figures}license: mit"))
    assert read_card(path).licence == MIT


def test_windows_line_ends_and_a_mark_at_the_beginning_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    text = card("license: mit\nlanguage:\n- en").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert (read_card(path).licence, read_card(path).languages) == (MIT, ("en",))


def test_a_card_that_is_a_folder_is_no_card(folders: Path) -> None:
    Path("a", "README.md").mkdir()
    assert not planned(MEAN).notes


# -- where inputs come from ------------------------------------------------------------------------

SHA = "0123456789abcdef0123456789abcdef01234567"


def cached(root: Path, repository: str, name: str, shards: int = 1) -> tuple[Path, dict[str, str]]:
    """A model in a cache of the Hub's client, and the SHA-256 of its weight files by name."""
    home = root / f"models--{repository.replace('/', '--')}"
    snapshot = write_model(home / "snapshots" / SHA, model(name, 3), config=LLAMA, shards=shards)
    (home / "blobs").mkdir()
    digests = {}
    for path in sorted(snapshot.glob("*.safetensors")):
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(home / "blobs" / digests[path.name])
        path.symlink_to(Path("..", "..", "blobs", digests[path.name]))
    return snapshot, digests


def test_a_path_in_the_hubs_cache_names_repository_and_commit(folders: Path) -> None:
    snapshot, digests = cached(folders, "org/name", "a")
    plan = planned(linear(str(snapshot.relative_to(folders)), "b"))
    assert data_of(plan)["base_model"] == ["org/name"]
    text = card_of(plan).text
    assert f"| `models--org--name/snapshots/{SHA}` ([Hub](https://huggingface.co/org/name))" in text
    assert f"| `{SHA}` |" in text and "# Merge of `name` and `b`" in text
    assert f"snapshots/{SHA}`: sha256 `{digests['model.safetensors']}`\n" in text


def test_a_lone_file_in_the_hubs_cache_is_known_too(folders: Path) -> None:
    snapshot, digests = cached(folders, "org/name", "a")
    plan = run.plan(merge.open(snapshot / "model.safetensors"))
    assert data_of(plan)["base_model"] == ["org/name"]
    assert f"sha256 `{digests['model.safetensors']}`" in card_of(plan).text


def test_the_digest_of_shards_is_what_sha256sum_makes_of_them(folders: Path) -> None:
    snapshot, digests = cached(folders, "org/name", "a", shards=3)
    lines = sorted(f"{digest}  {name}\n" for name, digest in digests.items())
    wanted = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert f"sha256 `{wanted}` of the sorted output" in card_of(run.plan(merge.open(snapshot))).text


def downloaded(folder: str, digest: str) -> Path:
    """The note that `hf download --local-dir` leaves."""
    note = Path(folder, ".cache/huggingface/download/model.safetensors.metadata")
    note.parent.mkdir(parents=True)
    changed = Path(folder, "model.safetensors").stat().st_mtime
    note.write_text(f"{SHA}\n{digest}\n{changed + 0.5}\n")
    return note


def test_a_folder_that_was_downloaded_has_a_commit_and_a_digest(folders: Path) -> None:
    Path("org").mkdir()
    Path("a").rename("org/a")
    downloaded("org/a", "5" * 64)
    plan = planned(linear("org/a", "b"))
    assert data_of(plan)["base_model"] == ["org/a"]
    text = card_of(plan).text
    assert "| [`org/a`](https://huggingface.co/org/a) | model |" in text
    assert f"`{SHA}`" in text and f"`org/a`: sha256 `{'5' * 64}`" in text


def test_a_download_that_was_changed_is_not_what_was_downloaded(folders: Path) -> None:
    downloaded("a", "5" * 64)
    os.utime("a/model.safetensors", (2e9, 2e9))
    text = card_of(planned(MEAN)).text
    assert SHA not in text and "5" * 64 not in text


def made_of(text: str, opener: Callable[[str], Checkpoint]) -> ModelCard:
    """The card of a recipe whose models ``opener`` opens."""
    recipe = parse_recipe(text)
    made = compile_recipe(recipe, lambda reference: opener(str(reference)))
    found, _ = recipe_card(recipe, made.made, made.made[-1], made.checkpoint, "merge apply")
    return ModelCard(found)


def test_a_name_that_is_no_folder_is_that_of_the_hub(folders: Path) -> None:
    opener = zoo(**{"org/a": 3, "org/b": 3})
    found = made_of(
        linear("org/a@v2", "org/b"), lambda name: opener(Reference(name.partition("@")[0]))
    )
    assert found.data.base_model == ["org/a", "org/b"]
    assert "| [`org/a`](https://huggingface.co/org/a) | model | `v2` |" in found.text


def test_a_folder_may_be_called_like_a_model_with_a_revision(folders: Path) -> None:
    for name in ("a@v2", "b+x"):
        Path(name[0]).rename(name)
    text = card_of(planned(linear("a@v2", "b+x"))).text
    assert "| `a@v2` | model |" in text and "| `b+x` | model |" in text


@pytest.mark.parametrize(
    ("called", "rows"),
    [
        ("base+lora", ["| `base` | model | `mit` |", "| `lora`, from `org/base` | adapter |"]),
        ("lora", ["| `base` | model | `mit` |", "| `lora`, from `org/base` | adapter |"]),
        (
            "base+org/lora@v2",
            ["| `base` | model |", "(https://huggingface.co/org/lora) | adapter |"],
        ),
    ],
)
def test_an_adapter_is_an_input_of_its_own(called: str, rows: list[str], folders: Path) -> None:
    Path("lora").mkdir()
    write_card("base", card("license: mit"))
    write_card("lora", card("license: apache-2.0\nbase_model: org/base"))
    roots = tuple(str(folders / name) for name in ("base", "lora"))
    found = made_of(
        linear(called, "b"),
        lambda name: merge.open(name) if name == "b" else replace(merge.open("base"), roots=roots),
    )
    assert all(row in found.text for row in rows)
    twice = made_of(linear(called, "base"), lambda _: replace(merge.open("base"), roots=roots))
    assert twice.text.count("- `base`: headers") == 1, "a model's files are listed once"
    assert "licence" in found.text and found.data.license is None


def test_a_config_may_say_what_a_model_was_made_from(folders: Path) -> None:
    write_model(folders / "c", model("c", 3), config={**LLAMA, "_name_or_path": "org/parent"})
    write_model(folders / "d", model("d", 3), config={**LLAMA, "_name_or_path": "/home/me/x"})
    plan = planned(linear("c", "d"))
    assert data_of(plan)["base_model"] == ["org/parent"]
    assert (
        "| `c`, from `org/parent` |" in card_of(plan).text and "/home/me" not in card_of(plan).text
    )


@pytest.mark.parametrize(
    "word", ["a/b/c", "./a", "/a/b", "a/", "a--b/c", "a/b.git", "a b/c", "ä/b"]
)
def test_what_is_no_name_on_the_hub(word: str) -> None:
    assert is_hub_id("org/Name-2.0_x") and not is_hub_id(word)


def test_weights_that_are_no_blob_have_a_digest_that_says_what_it_is_of(folders: Path) -> None:
    def digests() -> list[str]:
        return re.findall(r"headers `([0-9a-f]{64})`", card_of(planned(MEAN)).text)

    before = digests()
    assert "not what the weights are" in card_of(planned(MEAN)).text
    assert len(before) == 2 and before[0] == before[1]  # of one shape, so of one header
    write_model(folders / "c", {n: t.double() for n, t in model("a", 3).items()}, config=LLAMA)
    Path("a").rename("old")
    Path("c").rename("a")
    assert digests()[0] != before[0] and digests()[1] == before[1]


# -- the body --------------------------------------------------------------------------------------


def test_the_body_tells_method_inputs_and_parameters(folders: Path) -> None:
    text = card_of(planned(TIES)).text
    for part in (
        "# Merge of `base`, `a` and `b`\n",
        "- `ties`: The base plus the agreeing part of the trimmed differences to it",
        "(Yadav et al. 2023, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708))",
        "Shared by all models: `weight` `1.0`, `density` `0.5`, `lambda` `0.7`.",
        "| `base` | base |  |",
        "| `a` | model | `weight` `0.5`; `density` varies |",
        "| `b` | model |  |",
        f"```yaml\n{TIES}```\n",
        "- 9 tensors, 108 parameters, 432 B\n- stored as float32\n",
        f"hf-merge {merge.__version__}",
    ):
        assert part in text
    assert "- [" not in text and "](" in text


def test_slices_say_which_layers_and_a_base_what_it_gives(folders: Path) -> None:
    slices = (
        "merge_method: passthrough\nbase_model: base\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n"
        "- sources: [{model: b, layer_range: [1, 3]}]\n"
        "- sources: [{model: a, layer_range: [2, 3]}]\n"
    )
    text = card_of(planned(slices)).text
    assert "| `a` | model | layers 0 to 1, 2 to 2 |" in text
    assert "| `b` | model | layers 1 to 2 |" in text
    assert "| `base` | config and tokenizer |  |" in text


def test_statistics_are_inputs(folders: Path) -> None:
    for name in ("fa", "fb"):
        squares = {n: t.square() for n, t in model(name, 3).items()}
        write_model(folders / name, squares, config=LLAMA)
    listed = "".join(f"- {{model: {m}, statistics: f{m}}}\n" for m in "ab")
    text = card_of(planned(f"merge_method: fisher\nmodels:\n{listed}")).text
    assert "| `fa` | statistics |" in text and "# Merge of `a` and `b`\n" in text
    for name in "ab":
        (folders / name / "README.md").write_text("---\nlicense: mit\n---\n")
    found = card_of(planned(f"merge_method: fisher\nmodels:\n{listed}"))
    assert found.data.to_dict()["license"] == "mit"


def test_tensors_that_are_left_out_are_named_with_the_reason(folders: Path) -> None:
    write_model(folders / "c", {**model("c", 3), "x.position_ids": torch.ones(2)}, config=LLAMA)
    text = card_of(planned(linear("c", "b"))).text
    assert "Not in it:\n\n- `x.position_ids`, since the model rebuilds it" in text


@pytest.mark.parametrize("ticks", ["`", "```", "``````", "~~~"])
def test_a_recipe_with_fences_of_its_own_stays_in_its_fence(ticks: str, folders: Path) -> None:
    recipe = f"# {ticks}\n{ticks and '# '}{ticks}yaml\n{MEAN}# {ticks}".rstrip("\n")
    text = card_of(planned(recipe)).text
    fence = re.search(r"^(`{3,})yaml$", text, re.MULTILINE)
    assert fence is not None
    inside, _, rest = text[fence.end() + 1 :].partition(f"\n{fence[1]}\n")
    assert inside == recipe and rest.startswith("\nTo make it again")
    assert fence[1] not in recipe


@law
@given(st.text(max_size=300))
def test_a_code_span_holds_any_text_in_one_line(text: str) -> None:
    span = code(text)
    run_ = len(span) - len(span.lstrip("`"))
    inside = span[run_:-run_] if span.strip("`") else ""
    assert "\n" not in span and len(span) < 620
    assert all(len(found) != run_ for found in re.findall("`+", inside))
    assert not inside.startswith("`") and not inside.endswith("`")


def test_odd_names_break_no_table(folders: Path) -> None:
    odd = "a|b `x` <b>*c*[d](e)"
    Path("a").rename(odd)
    write_card("b", card('license: other\nlicense_name: "x | y"\nbase_model: "o/`|`"'))
    text = card_of(planned(linear(f"'{odd}'", "b"))).text
    row = next(line for line in text.splitlines() if line.startswith("| ``"))
    assert row == "| `` a\\|b `x` <b>*c*[d](e) `` | model | not stated |"


# -- which outputs have one ------------------------------------------------------------------------


def test_a_stage_that_is_saved_has_a_card_of_its_own(folders: Path) -> None:
    first = f"name: m\nsave: kept\n{TIES}"
    text = "---\n".join([first, linear("m", "b")])
    Path("r.yml").write_text(text)
    merge.apply("r.yml", "out")
    kept, whole = (ModelCard.load(f"{folder}/README.md") for folder in ("kept", "out"))
    assert kept.data.tags == ["merge", "hf-merge", "ties"]
    assert whole.data.tags == ["merge", "hf-merge", "ties", "linear"]
    assert "This is its stage `m`." in kept.text and "its stage" not in whole.text
    assert "`ties` in stage `m`" in whole.text and "in stage" not in kept.text
    assert kept.text.count("\n| `") == 3 and whole.text.count("\n| `") == 3
    assert all(f"```yaml\n{text}```" in found.text for found in (kept, whole))
    for folder in ("kept", "out"):
        assert merge.verify(folder).ok


def test_what_is_saved_from_python_has_a_short_one(folders: Path) -> None:
    write_card("base", card("license: mit\npipeline_tag: fill-mask"))
    base, a, b = (merge.open(folders / n) for n in ("base", "a", "b"))
    (base + 0.5 * (a - base)).save("sum")
    merge.ties([a, b], base=base, weight=1.0, density=0.5).save("ties")
    found = ModelCard.load("sum/README.md")
    assert "computed as `(1*base + 1*(0.5*(1*a + -1*base)))`" in found.text
    assert "| `base` | input | `mit` |\n| `a` | input | not stated |" in found.text
    assert found.data.tags == ["merge", "hf-merge"] and found.data.pipeline_tag == "fill-mask"
    assert found.data.license is None
    ties = ModelCard.load("ties/README.md")
    assert ties.data.tags == ["merge", "hf-merge", "ties"] and "arXiv:2306.01708" in ties.text
    assert not any(str(folders) in c.content for c in (found, ties))


def test_a_copy_is_no_merge(folders: Path) -> None:
    write_card("a", card("license: mit\nbase_model: org/a"))
    merge.open("a").save("copy", dtype="float16")
    found = ModelCard.load("copy/README.md")
    assert found.data.to_dict() == {
        "base_model": ["org/a"],
        "library_name": "transformers",
        "license": "mit",
        "tags": ["hf-merge"],
    }
    assert "# Copy of `a`" in found.text and "stored as float16" in found.text


def test_a_difference_says_that_it_is_one(folders: Path) -> None:
    (merge.open("a") - merge.open("b")).save("delta")
    assert "432 B, a difference of weights" in Path("delta/README.md").read_text()


def test_weights_in_memory_are_named_by_their_class(folders: Path) -> None:
    merge.average([torch.nn.Linear(2, 3), merge.open(torch.nn.Linear(2, 3))]).save("mean")
    text = Path("mean/README.md").read_text()
    assert "# Merge of `Linear` and `Linear`\n" in text and "| `Linear` | input |" in text
    assert "computed as `linear(Linear, Linear)`" in text


def test_no_card_is_written_where_none_is_wanted(folders: Path) -> None:
    merge.open("a").save("x", card=False)
    Path("r.yml").write_text(MEAN)
    merge.apply("r.yml", "y", card=False)
    done = CliRunner().invoke(cli, ["apply", "r.yml", "z", "--no-card", "-q"])
    assert done.exit_code == 0
    assert not any(Path(folder, "README.md").exists() for folder in "xyz")


def test_the_command_in_the_card_makes_the_same_output_again(folders: Path) -> None:
    Path("r.yml").write_text(TIES)
    options = ["--seed", "3", "--dtype", "bfloat16", "--shard-size", "150B", "--license", "mit"]
    settings = ["--set", "parameters.lambda=0.5", "--lenient", "--threads", "1"]
    assert CliRunner().invoke(cli, ["apply", "r.yml", "out", *options, *settings]).exit_code == 0
    block = re.search(r"```sh\n(.*)\n```", Path("out/README.md").read_text())
    assert block is not None
    words = shlex.split(block[1].replace("OUT", "again").replace("merge_recipe.yml", "r.yml"))
    assert words[0] == "merge" and CliRunner().invoke(cli, words[1:]).exit_code == 0
    for path in Path("out").iterdir():
        assert path.read_bytes() == Path("again", path.name).read_bytes()


def test_equal_inputs_make_equal_cards_anywhere(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = card_of(planned(TIES)).content
    other = tmp_path_factory.mktemp("other")
    for name in ("a", "b", "base"):
        write_model(other / name, model(name, 3), config=LLAMA)
    monkeypatch.chdir(other)
    assert card_of(planned(TIES)).content == here
    assert str(folders) not in here and not re.search(r"20\d\d-\d\d", here)


def test_an_input_whose_card_changed_is_another_plan(folders: Path) -> None:
    before = planned(MEAN).hash
    assert planned(MEAN).hash == before
    write_card("a", card("language: en"))
    assert planned(MEAN).hash != before


def test_a_card_is_there_to_be_written_on(folders: Path) -> None:
    Path("r.yml").write_text(MEAN)
    merge.apply("r.yml", "out")
    with Path("out/README.md").open("a") as file:
        file.write("\nIt is good at chess.\n")
    assert merge.verify("out").ok
    merge.apply("r.yml", "out")  # complete, so it is left as it is
    assert "chess" in Path("out/README.md").read_text()
    Path("out/config.json").write_text("{}")
    assert not merge.verify("out").ok


def test_nothing_asks_the_network(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    write_card("a", card("base_model: org/a\nlicense_link: https://huggingface.co/org/a/L"))
    assert data_of(planned(MEAN))["base_model"] == ["org/a"]


def test_the_real_minilm_says_what_it_is(minilm: Path, tmp_path: Path) -> None:
    found = data_of(run.plan(merge.open(minilm)))
    assert found["library_name"] == "sentence-transformers" and found["license"] == "apache-2.0"
    assert found["base_model"] == ["nreimers/MiniLM-L6-H384-uncased"]
    assert found["language"] == ["en"] and "s2orc" in found["datasets"]  # type: ignore[operator]
    assert found["tags"] == ["hf-merge", "sentence-transformers", "feature-extraction",
                             "sentence-similarity"]  # fmt: skip


@pytest.mark.parametrize("method", methods.registry().values(), ids=methods.registry())
def test_every_method_names_its_paper(method: methods.Method) -> None:
    assert re.search(r"\d{4}", method.paper) and not re.search(r"[()\n]", method.paper)
