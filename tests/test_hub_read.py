"""Models on the Hub: what is asked of it, what is believed of its answers, what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

import merge
from merge import run
from merge.errors import DamagedInput, HubError, MergeError, SourceError
from merge.hub import Hub as Client
from merge.hub import use
from merge.run import PlanOptions
from tests.conftest import MakeModel, write_model
from tests.hub import TOKEN, Hub

WEIGHTS = r"resolve/[^/]+/.*\.(safetensors|bin)$"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A client that knows nothing yet, and waits that are noted and not waited for."""
    waits: list[float] = []
    monkeypatch.setattr("merge.hub.patience.time.sleep", waits.append)
    use(None)
    yield waits
    use(None)


@pytest.fixture
def pair(hub: Hub, make_model: MakeModel) -> list[Path]:
    """Two models in shards, here and on the Hub as org/a and org/b."""
    folders = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tensors = {f"model.layers.{i}.w": torch.randn(300, 257) for i in range(6)}
        tensors["lm_head.weight"] = torch.randn(64, 257).bfloat16()
        folder = make_model(name, tensors, shards=2)
        (folder / "tokenizer.json").write_text("{}" + " " * 5000)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
        hub.upload(f"org/{name}", folder)
        folders.append(folder)
    return folders


def assert_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def average(first: object, second: object) -> merge.Checkpoint:
    return 0.5 * merge.open(first) + 0.5 * merge.open(second)


def refused(*arguments: object, **options: object) -> MergeError:
    with pytest.raises(MergeError) as caught:
        merge.open(*arguments, **options).state_dict()
    return caught.value


# -- what is asked ---------------------------------------------------------------------------------


def test_a_merge_from_the_hub_is_that_of_the_folders(
    hub: Hub, pair: list[Path], tmp_path: Path
) -> None:
    average("org/a", "hf://org/b@main").save(tmp_path / "far")
    average(*pair).save(tmp_path / "near")
    for file in (tmp_path / "near").glob("*.safetensors"):
        assert (tmp_path / "far" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "far/tokenizer.json").read_bytes() == (
        pair[0] / "tokenizer.json"
    ).read_bytes()
    assert merge.verify(tmp_path / "far").ok
    assert len(hub.seen("HEAD .*" + WEIGHTS)) == 4, "one question for the place of each weight file"
    assert not hub.seen("GET .*" + WEIGHTS)
    assert hub.leaks == []


def test_each_byte_comes_once_whatever_the_method_and_the_budget(
    hub: Hub, make_model: MakeModel
) -> None:
    """Headers apart: those of small files come with much of the file."""
    folders = []
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        tensors = {f"l.{i}.w": torch.randn(1000, 700) for i in range(6)}
        folders.append(make_model(name, tensors))
        hub.upload(f"org/{name}", folders[-1])
    names = ["org/a", "org/b", "org/c"]
    size = sum(p.stat().st_size for f in folders for p in f.glob("*.safetensors"))
    opened = [merge.open(n) for n in names]
    local = [merge.open(f) for f in folders]
    for memory in ("24MiB", "1GiB"):
        for method, given in (
            ("linear", {"weight": 1.0}),
            ("ties", {"weight": 1.0, "density": 0.5}),
        ):
            hub.forget()
            base = {} if method == "linear" else {"base": opened[0]}
            of = opened if method == "linear" else opened[1:]
            found = getattr(merge, method)(of, **base, **given)
            near = {} if method == "linear" else {"base": local[0]}
            wanted = getattr(merge, method)(local[3 - len(of) :], **near, **given)
            state = dict(_stream(found, memory))
            assert_equal(state, wanted.state_dict())
            assert size * 0.99 < hub.sent("/blob/") < size * 1.02, (memory, method)
            assert not hub.seen("HEAD")
            assert len(hub.seen("/blob/")) < 60


def _stream(checkpoint: merge.Checkpoint, memory: str) -> Iterator[tuple[str, torch.Tensor]]:
    from merge.engine.execute import execute
    from merge.write.memory import MemorySink

    plan = run.plan(checkpoint, PlanOptions(memory=memory, threads=2, card=False))
    assert plan.budget.buffers <= plan.budget.memory
    assert plan.budget.ahead > 0
    sink = MemorySink(plan)
    execute(plan, sink)
    yield from sink.tensors.items()


def test_a_tensor_larger_than_the_room_passes_through_it(hub: Hub, make_model: MakeModel) -> None:
    torch.manual_seed(0)
    tensors = {"big": torch.randn(3000, 2000), "small": torch.randn(10)}
    hub.upload("org/big", make_model("big", tensors))
    found = dict(_stream(2.0 * (merge.open("org/big") - 0.5 * merge.open("org/big")), "16MiB"))
    assert_equal(found, tensors)
    assert hub.sent("/blob/") < 1.02 * 24_000_000 + 100_000
    hub.forget()
    folder = make_model("same", {n: t.clone() for n, t in tensors.items()})
    hub.upload("org/other", folder)
    far = merge.ties([merge.open("org/other")], base=merge.open("org/big"), weight=1.0, density=0.5)
    assert not run.plan(far, PlanOptions(card=False)).notes
    assert_equal(dict(_stream(far, "48MiB")), tensors)
    told = run.plan(far, PlanOptions(memory="48MiB", card=False)).notes
    assert any("fetched up to" in note and "--download" in note for note in told)


def test_only_the_layers_that_are_used_are_read(hub: Hub, pair: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(2)
    tensors = {f"model.layers.{i}.w": torch.randn(400, 400) for i in range(8)}
    folder = write_model(
        tmp_path / "deep", tensors, config={"model_type": "llama", "num_hidden_layers": 8}
    )
    hub.upload("org/deep", folder)
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: org/deep, layer_range: [2, 5]}]\n"
    )
    out = merge.apply(recipe, tmp_path / "out")
    assert merge.verify(out).ok
    used = 3 * 400 * 400 * 4
    assert used < hub.sent("/blob/") < 1.02 * used + 100_000


def test_a_plan_and_an_inspection_read_headers_only(
    hub: Hub, pair: list[Path], tmp_path: Path
) -> None:
    from merge.inspect import inspect

    told = inspect("org/a")
    assert told["tensors"] == 7
    assert told["files"][0]["file"].startswith("hf://org/a@")
    average("org/a", "org/b").plan()
    ranges = hub.seen("/blob/")
    assert len(ranges) == 4 and all(r.sent <= 100_000 for r in ranges)
    assert not hub.seen(r"tokenizer\.json"), "a small file is fetched when it is needed"
    hub.forget()
    use(None)
    merge.open("org/a")
    assert not hub.seen("/blob/|HEAD"), "headers and small files are kept"


def test_the_same_plan_wherever_the_cache_is(
    hub: Hub, pair: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    first = average("org/a", "org/b").plan().hash
    use(None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    merge.hub.current().fetch(merge.hub.current().pin("org/a"), "model-00001-of-00002.safetensors")
    assert average("org/a", "org/b").plan().hash == first


# -- what is kept ----------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_read_there(hub: Hub, pair: list[Path], tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/a", endpoint=hub.url)
    hub.forget()
    found = merge.open("org/a").state_dict()
    assert_equal(found, merge.open(pair[0]).state_dict())
    assert not hub.seen("/blob/|HEAD")


def test_ranges_never_go_to_the_cache(hub: Hub, pair: list[Path], tmp_path: Path) -> None:
    average("org/a", "org/b").save(tmp_path / "out")
    cache = tmp_path / "hf-home" / "hub"
    held = {p.name for p in cache.rglob("snapshots/*/*")}
    assert held == {"config.json", "model.safetensors.index.json", "README.md", "tokenizer.json"}
    assert not list(cache.rglob("*.incomplete"))


def test_a_snapshot_is_kept_when_that_is_asked_for(hub: Hub, pair: list[Path]) -> None:
    use(Client(download=True))
    found = merge.open("org/a").state_dict()
    hub.forget()
    use(None)
    assert_equal(found, merge.open("org/a").state_dict())
    assert not hub.seen("/blob/")


def test_offline_the_cache_alone_is_read(
    hub: Hub, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    use(Client(download=True))
    wanted = merge.open("org/a").state_dict()
    merge.open("org/b@main").plan()
    hub.forget()
    use(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_equal(merge.open("org/a").state_dict(), wanted)
    assert hub.requests == []
    missing = refused("org/c")
    assert missing.what.startswith("no such model")
    assert "HF_HUB_OFFLINE" in str(missing) and missing.where["repo"] == "org/c"
    assert missing.exit_code == 3


def test_offline_a_weight_file_that_is_not_in_the_cache_is_named(
    hub: Hub, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    merge.open("org/a")
    use(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused("org/a")
    assert error.where["file"] == "model-00001-of-00002.safetensors"
    assert "hf download org/a" in str(error.do)


# -- names -----------------------------------------------------------------------------------------


def test_a_folder_goes_before_the_hub(
    hub: Hub, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "org/a", {"here": torch.ones(2)})
    assert list(merge.open("org/a")) == ["here"]
    assert len(merge.open("hf://org/a")) == 7
    assert hub.seen("/api/models/org/a")


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, pair: list[Path]) -> None:
    first = hub.repos["org/a"].head.sha
    hub.tag("org/a", "v1")
    other = write_model(pair[0].parent / "new", {"w": torch.ones(3)})
    files = {n: p for n in ("config.json", "model.safetensors") if (p := other / n).is_file()}
    hub.commit("org/a", {**files, "model.safetensors.index.json": b"{}"})
    assert list(merge.open("org/a")) == ["w"]
    for revision in ("v1", first):
        assert len(merge.open(f"org/a@{revision}")) == 7
    hub.commit("org/a", {}, revision="next")
    assert list(merge.open("org/a@next")) == ["w"]


def test_a_name_that_is_wrong_is_told_with_a_near_one(hub: Hub, pair: list[Path]) -> None:
    hub.commit("org/llama-math", {"config.json": b"{}"})
    hub.tag("org/a", "v1.0")
    error = refused("org/lama-math")
    assert isinstance(error, SourceError) and "org/lama-math" in str(error)
    assert "no folder here" in error.what and "401" in str(error.found)
    assert "did you mean org/llama-math?" in str(error.do)
    wrong = refused("org/a@v1.1")
    assert "no such revision" in wrong.what
    assert "v1.0" in str(wrong.do) and wrong.where["revision"] == "v1.1"
    assert "no such folder" in refused("hf://org/a/unet").what


def test_a_model_in_a_folder_of_a_repo(hub: Hub, pair: list[Path]) -> None:
    inner = {f"sub/{p.name}": p for p in pair[1].iterdir()}
    hub.commit("org/nested", inner)
    assert_equal(merge.open("hf://org/nested/sub").state_dict(), merge.open(pair[1]).state_dict())


# -- who may read ----------------------------------------------------------------------------------


def test_private_and_gated_repos(
    hub: Hub, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/a"].private = True
    hub.repos["org/b"].gated = True
    error = refused("org/a")
    assert error.exit_code == 3 and "hf auth login" in str(error.do)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(merge.open("org/a").state_dict()) == 7
    gated = refused("org/b")
    assert "gated" in gated.what and "https://huggingface.co/org/b" in str(gated.do)
    assert gated.where["repo"] == "org/b" and "403" in str(gated.found)
    hub.accepted.add("org/b")
    assert len(merge.open("org/b").state_dict()) == 7
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    bad = refused("org/a")
    assert "wrongwrong" not in str(bad) and "token" in bad.what
    assert hub.leaks == []


def test_a_small_weight_file_in_a_private_repo_is_asked_for_with_the_token(
    hub: Hub, make_model: MakeModel
) -> None:
    """Kept in git itself, it has no other place: the Hub serves it, and wants the token."""
    folder = make_model("tiny", {"w": torch.arange(6.0)})
    hub.upload("org/tiny", folder)
    held = hub.repos["org/tiny"]
    for sha, commit in held.commits.items():
        from dataclasses import replace

        files = {n: replace(f, large=False) for n, f in commit.files.items()}
        held.commits[sha] = replace(commit, files=files)
    held.private = True
    use(Client(token=TOKEN))
    assert_equal(merge.open("org/tiny").state_dict(), {"w": torch.arange(6.0)})
    assert not hub.seen("/blob/")


# -- faults ----------------------------------------------------------------------------------------

PASSING = {
    "cut": {"cut": 1000},
    "cut at once": {"cut": 0},
    "no answer": {"refuse": True},
    "the whole file for a range": {"whole": True},
    "another range": {"shift": 8},
    "408": {"status": 408},
    "416": {"status": 416},
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "429 of a limit": {"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=55'}},
    "500": {"status": 500},
    "503": {"status": 503},
    "expired": {"status": 403},
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(
    hub: Hub, pair: list[Path], fresh: list[float], name: str
) -> None:
    fault = hub.fault(r"GET /blob/", skip=2, times=2, **PASSING[name])
    assert_equal(merge.open("org/a").state_dict(), merge.open(pair[0]).state_dict())
    assert fault.hits == 2
    if name == "429":
        assert 7.0 in fresh
    if name == "429 of a limit":
        assert 56.0 in fresh


def test_a_body_that_breaks_off_is_taken_up_where_it_ended(hub: Hub, make_model: MakeModel) -> None:
    tensors = {"w": torch.arange(1_000_000.0)}
    hub.upload("org/long", make_model("long", tensors))
    opened = merge.open("org/long")
    hub.forget()
    hub.fault("GET /blob/", cut=1_500_000)
    assert_equal(opened.state_dict(), tensors)
    first, second = hub.seen("GET /blob/")
    assert first.sent == 1_500_000
    assert second.sent < 4_000_000 - 1_500_000 + 100_000, "what came does not come again"


def test_an_expired_location_is_renewed(hub: Hub, pair: list[Path]) -> None:
    opened = merge.open("org/a")
    hub.expire()
    hub.forget()
    assert_equal(opened.state_dict(), merge.open(pair[0]).state_dict())
    assert len(hub.seen("HEAD .*" + WEIGHTS)) == 2
    assert hub.leaks == []


@pytest.mark.parametrize("where", ["/api/models/org/a$", "/tree/", "HEAD .*config", "HEAD .*saf"])
@pytest.mark.parametrize("status", [429, 503])
def test_questions_about_a_repo_are_tried_again_too(
    hub: Hub, pair: list[Path], where: str, status: int
) -> None:
    fault = hub.fault(where, times=2, status=status)
    assert len(merge.open("org/a")) == 7
    assert fault.hits == 2


LASTING = {
    "500": ({"status": 500}, HubError, "500"),
    "429": ({"status": 429}, HubError, "429"),
    "403": ({"status": 403}, MergeError, "403"),
    "404": ({"status": 404}, MergeError, "404"),
    "no answer": ({"refuse": True}, HubError, ""),
    "whole files": ({"whole": True}, HubError, "--download"),
    "another range": ({"shift": 8}, HubError, "asked for"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_does_not_pass_is_an_error_with_its_place(
    hub: Hub, pair: list[Path], name: str
) -> None:
    how, kind, word = LASTING[name]
    opened = merge.open("org/a")
    hub.fault("GET /blob/", times=10_000, **how)
    with pytest.raises(kind) as caught:
        opened.state_dict()
    error = caught.value
    assert error.where["repo"] == "org/a"
    assert error.where["file"].startswith("model-0000")
    assert word in str(error) and error.do
    assert "Signature" not in str(error)


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused("org/a")
    assert isinstance(error, HubError) and error.exit_code == 4
    assert "HF_ENDPOINT" in str(error.do)


def test_damage_of_the_same_size_is_noticed_and_nothing_stays(
    hub: Hub, pair: list[Path], tmp_path: Path
) -> None:
    made = average("org/a", "org/b")
    hub.fault("GET /blob/", corrupt=True)
    with pytest.raises(DamagedInput, match="other bytes") as caught:
        made.save(tmp_path / "out")
    assert caught.value.where["file"].startswith("hf://org/")
    assert [p.name for p in tmp_path.glob("out*")] == []
    made.save(tmp_path / "out")
    average(*pair).save(tmp_path / "near")
    for file in (tmp_path / "near").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_damaged_header_or_small_file_is_fetched_again(hub: Hub, pair: list[Path]) -> None:
    hub.fault("GET .*config.json", corrupt=True)
    assert len(merge.open("org/a")) == 7
    assert len(hub.seen("GET .*config.json")) == 2
    hub.fault("GET .*README", corrupt=True, times=9)
    with pytest.raises(HubError, match="not those of the file") as caught:
        merge.open("org/a").plan()
    assert caught.value.where["file"] == "README.md"


def test_a_file_that_the_index_names_and_nobody_uploaded(hub: Hub, pair: list[Path]) -> None:
    held = hub.repos["org/a"]
    from dataclasses import replace

    files = {n: f for n, f in held.head.files.items() if "00002-of" not in n}
    held.commits[held.head.sha] = replace(held.head, files=files)
    error = refused("org/a")
    assert error.where["file"] == "model-00002-of-00002.safetensors"
    assert "named_by" in error.where and error.where["repo"] == "org/a"


# -- other forms of weights ------------------------------------------------------------------------


def test_a_pickle_is_as_lazy(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = {"w": torch.randn(700, 600), "t": torch.randn(200, 300).t(), "unused": torch.randn(1)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    hub.commit(
        "org/old", {"config.json": b"{}", "pytorch_model.bin": tmp_path / "pytorch_model.bin"}
    )
    assert "--allow-pickle" in str(refused("org/old").do)
    opened = merge.open("org/old", allow_pickle=True)
    assert hub.sent("/blob/") < 500_000
    assert_equal(opened.state_dict(), state)
    assert hub.leaks == []


def test_an_adapter_on_a_base_both_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(4)
    base = {"model.layers.0.q_proj.weight": torch.randn(8, 8)}
    hub.upload("org/base", write_model(tmp_path / "base", base, config={"model_type": "llama"}))
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    name = "base_model.model.model.layers.0.q_proj"
    factors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    hub.upload("org/lora", adapter)
    wanted = base["model.layers.0.q_proj.weight"] + 2.0 * (b @ a)
    for called in ("org/lora", "org/base+org/lora", "org/base@main+hf://org/lora@main"):
        found = merge.open(called).state_dict()["model.layers.0.q_proj.weight"]
        torch.testing.assert_close(found, wanted)


def test_components_in_folders(hub: Hub, tmp_path: Path) -> None:
    unet = {"_class_name": "UNet", "sample_size": 4}
    write_model(tmp_path / "pipe/text_encoder", {"t": torch.ones(3)})
    write_model(tmp_path / "pipe/unet", {"u": torch.ones(4)}, config=unet)
    weights = tmp_path / "pipe/unet/model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.safetensors"))
    index = {
        "_class_name": "P",
        "unet": ["d", "U"],
        "text_encoder": ["t", "T"],
        "sched": ["d", "S"],
    }
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    hub.upload("org/pipe", tmp_path / "pipe")
    far, near = merge.open("org/pipe"), merge.open(tmp_path / "pipe")
    assert set(far) == {"unet/u", "text_encoder/t"}
    assert_equal(far.state_dict(), near.state_dict())
    assert [f.name for f in far.side.files] == [f.name for f in near.side.files]


# -- the command line ------------------------------------------------------------------------------


def run_merge(
    hub: Hub, tmp_path: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", **more}
    return subprocess.run(
        [sys.executable, "-m", "merge_cli", *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_token_is_shown_nowhere(hub: Hub, pair: list[Path], tmp_path: Path) -> None:
    """Neither in output and errors, nor in anything that is written, temporary files included."""
    hub.repos["org/a"].private = True
    (tmp_path / "tmp").mkdir()
    more = {"HF_TOKEN": TOKEN, "TMPDIR": str(tmp_path / "tmp")}
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n  - {model: org/a, parameters: {weight: 1}}\n"
        "  - {model: org/b, parameters: {weight: 1}}\n"
    )
    done = run_merge(hub, tmp_path, "apply", "r.yml", "out", **more)
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, done.stderr]
    hub.fault("/tree/", times=99, status=403, message=f"bad {TOKEN}")
    done = run_merge(hub, tmp_path, "inspect", "org/a", "--json", **more)
    assert done.returncode == 3
    assert json.loads(done.stdout)["where"]["repo"] == "org/a"
    texts += [done.stdout, done.stderr]
    hub.forget()
    hub.fault("/blob/", times=99, corrupt=True)
    done = run_merge(hub, tmp_path, "apply", "r.yml", "other", "--fresh", **more)
    assert done.returncode in (3, 4), done.stderr
    texts += [done.stdout, done.stderr]
    assert not any(TOKEN in text for text in texts)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and "hub-store" not in p.parts]
    assert any(p.name == "README.md" for p in written)
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]
