"""What single tasks have for themselves: learned in recipes, written, taken up, loaded, pushed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from merge_cli.app import cli
from safetensors.torch import load_file
from torch import Tensor, nn

import merge
from merge import applying, publishing, run
from merge.analysis.named import called
from merge.errors import MergeError, PlanError, SourceError
from merge.hub import Hub as Client
from merge.hub import use
from merge.learning.free import layers_in
from merge.plan.model import side_output
from merge.publishing import Target
from merge.task_files import task_files, tasks_in
from tests.hub import TOKEN, Hub
from tests.pushing import Push

from .conftest import write_model
from .texts import saved_classifier, written_texts

OWN = """
import merge, torch
from safetensors.torch import load_file
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x))


def _task(name, seed, net=None):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 6, generator=draw) + seed - 1.5
    net = net or Net(2 + seed)
    net.load_state_dict(load_file(f"{name}/model.safetensors"))
    with torch.no_grad():
        y = net(x).argmax(-1)
    cut = lambda a, b: [(x[i : i + 20], y[i : i + 20]) for i in range(a, b, 20)]
    return merge.Task(
        net, nn.functional.cross_entropy, cut(0, 120), name=name, validate=cut(120, 200),
        head=["head"],
    )


def one():
    return _task("x", 1)


def two():
    return _task("y", 2)


class Plain(Net):
    def __init__(self):
        super().__init__(3)
        del self.head
        self.forward = lambda x: self.body(x)


def headless():
    x = one()
    return merge.Task(Plain(), nn.functional.cross_entropy, x.train, validate=x.validate)
"""
TEXT = """# learned
merge_method: task_arithmetic
base_model: base
heads: base
models: [{model: x}, {model: y}]
parameters: {weight: 0.3}
learn:
  preset: tinting
  data: {x: 'parts_own:one', y: 'parts_own:two'}
  steps: 30
  every: 10
  rate: 0.02
"""
NAMES = ("size", "turn")
SURGERY = """preset: surgery
  surgery: body
  surgery_rank: 3
  free_rate: 0.02"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Folders base, x and y, whose heads have 3, 3 and 4 classes, with tasks and a recipe."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shapes = {"body.0.weight": (12, 6), "body.0.bias": (12,), "body.2.weight": (8, 12),
              "body.2.bias": (8,)}  # fmt: skip
    base = {n: torch.randn(s) / s[-1] ** 0.5 for n, s in shapes.items()}
    states = {}
    for name, classes in (("base", 3), ("x", 3), ("y", 4)):
        near = 0.0 if name == "base" else 0.5
        body = {n: t + near * torch.randn_like(t) for n, t in base.items()}
        head = {"head.weight": torch.randn(classes, 8), "head.bias": torch.randn(classes)}
        states[name] = {**body, **head}
        write_model(tmp_path / name, states[name])
    (tmp_path / "parts_own.py").write_text(OWN)
    yield states
    sys.modules.pop("parts_own", None)


def recipe(text: str = TEXT) -> Path:
    Path("r.yml").write_text(text)
    return Path("r.yml")


def network(classes: int = 3) -> nn.Module:
    made: nn.Module = vars(sys.modules["parts_own"])["Net"](classes)
    return made


def learned(preset: str = "tinting", **how: Any) -> merge.Learned:
    """What the library learns, as the recipe says."""
    tasks = {n: called(f"parts_own:{f}") for n, f in (("x", "one"), ("y", "two"))}
    settings: dict[str, Any] = {"steps": 30, "every": 10, "rate": 0.02, "init": 0.3, **how}
    return merge.learn({"x": "x", "y": "y"}, base="base", tasks=tasks, preset=preset, **settings)


def files_of(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def invoke(*words: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, [str(w) for w in words])


# -- from recipe to networks -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "preset", "how"),
    [
        ("preset: tinting", "tinting", {}),
        ("preset: tinting++\n  free_rate: 0.03", "tinting++", {"free_rate": 0.03}),
        (SURGERY, "surgery", {"surgery": "body", "surgery_rank": 3, "free_rate": 0.02}),
        (
            "preset: tinting\n  free: ['*', body.2]\n  granularity: layer", "tinting",
            {"free": ("*", "body.2"), "granularity": "layer"},
        ),
    ],
)  # fmt: skip
def test_networks_of_tasks_are_what_the_library_learns(
    here: dict[str, Any], said: str, preset: str, how: dict[str, Any]
) -> None:
    merge.apply(recipe(TEXT.replace("preset: tinting", said)), "out")
    found = learned(preset, **how)
    assert found.chosen.startswith("step"), found.report()
    written = load_file("out/model.safetensors")
    for name, tensor in found.checkpoint.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(written[name], tensor)
    assert [own.task for own in tasks_in("out")] == ["x", "y"]
    for task, classes in (("x", 3), ("y", 4)):
        one = merge.load_task("out", task, network(classes))
        other = found.module(task)
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
        x = torch.randn(5, 6)
        assert torch.equal(one(x), other(x)) and not one.training
    assert merge.verify("out").ok and not list(Path().glob("out.*"))
    assert set(merge.open("out")) == set(here["base"])


def test_a_correction_is_behind_its_layer(here: dict[str, Any]) -> None:
    merge.apply(recipe(TEXT.replace("preset: tinting", SURGERY)), "out")
    plain = TEXT.partition("learn:")[0]
    merge.apply(recipe(plain), "plain")
    merged = load_file("out/model.safetensors")
    for name, tensor in load_file("plain/model.safetensors").items():
        torch.testing.assert_close(merged[name], tensor)  # the merge is what is written
    own = load_file("out/tasks/y/own.safetensors")
    assert own["surgery.down"].shape == (3, 8) and bool(own["surgery.up"].any())
    for name in ("head.weight", "head.bias"):
        assert torch.equal(own[name], here["y"][name])
    x = torch.randn(4, 6)
    hidden = torch.tanh(F.linear(x, merged["body.0.weight"], merged["body.0.bias"]))
    z = torch.tanh(F.linear(hidden, merged["body.2.weight"], merged["body.2.bias"]))
    z = z - torch.relu(z @ own["surgery.down"].T) @ own["surgery.up"].T
    wanted = F.linear(z, own["head.weight"], own["head.bias"])
    made = merge.load_task("out", "y", network(4))
    torch.testing.assert_close(made(x), wanted)
    assert {"surgery.down", "surgery.up"} <= made.state_dict().keys()


def test_the_library_saves_what_the_recipe_writes(here: dict[str, Any]) -> None:
    merge.apply(recipe(), "out")
    found = learned()
    assert found.save("saved", card=False) == Path("saved")
    both = [n for n in files_of("out") if n.startswith("tasks/")]
    assert len(both) == 4  # tensors and a word on them for two tasks, no config
    for name in both:
        assert files_of("saved")[name] == files_of("out")[name]
    again = merge.apply_coefficients("saved/coefficients.json", {"x": "x", "y": "y"}, "base")
    state = load_file("saved/model.safetensors")
    assert all(torch.equal(state[n], t) for n, t in again.state_dict().items())
    assert found.coefficients.tasks == ("x", "y")


def test_what_was_learned_is_written_again_without_data(here: dict[str, Any]) -> None:
    file = recipe()
    merge.apply(file, "out")
    Path("parts_own.py").unlink()
    wanted = files_of("out")
    merge.apply("out/merge_recipe.yml", "again")
    merge.apply("out/merge.lock.yml", "locked")
    done = invoke("apply", file, "third", "--coefficients", "out/coefficients.json", "-q")
    assert done.exit_code == 0, done.output
    for name in ("again", "locked", "third"):
        assert files_of(name) == wanted
    shutil.copy("out/coefficients.json", "alone.json")
    planned = applying.plan_recipe(file, coefficients="alone.json")
    assert any("what x, y had learned besides is not taken" in n for n in planned.plan.notes)
    assert not any(s.name.startswith("tasks/") for s in planned.plan.side)
    tensors = Path("out/tasks/y/own.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    problem = merge.verify("out").problems
    assert len(problem) == 1 and "tasks/y/own.safetensors" in problem[0]
    with pytest.raises(SourceError, match="what was learned is not what it was") as caught:
        merge.apply("out/merge.lock.yml", "other")
    assert caught.value.where["file"] == "tasks/y/own.safetensors"
    shutil.rmtree("out/tasks/y")
    with pytest.raises(SourceError, match="no tensors of a task's own") as caught:
        merge.apply("out/merge_recipe.yml", "other")
    assert caught.value.where["task"] == "y" and not Path("other").exists()


class Stopped(Exception):
    pass


def test_learning_that_was_stopped_goes_on_to_the_same_files(here: dict[str, Any]) -> None:
    file = recipe(f"{TEXT}  rebuild: 5\n")
    merge.apply(file, "whole")

    def stop(step: Any, _: int) -> None:
        if step.number == 17:
            raise Stopped

    with pytest.raises(Stopped):
        applying.plan_recipe(file, out="out", learning=stop)
    assert Path("out.learn.safetensors").exists() and not Path("out").exists()
    seen: list[int] = []
    planned = applying.plan_recipe(file, out="out", learning=lambda s, _: seen.append(s.number))
    applying.apply_plan(planned, Path("out"))
    assert seen[0] == 16
    assert files_of("out") == files_of("whole")


def test_a_named_layer_moves_by_its_own_gradient(here: dict[str, Any]) -> None:
    """One step of plain descent, the merge held still: autograd in float64 is the truth."""
    double = {n: {k: t.double() for k, t in s.items()} for n, s in here.items()}
    bodies = {n: {k: t for k, t in s.items() if k[:4] == "body"} for n, s in double.items()}
    tasks = {n: called(f"parts_own:{f}") for n, f in (("x", "one"), ("y", "two"))}
    for name, task in tasks.items():
        task.module.double().load_state_dict(double[name])
    data = {n: [(x.double(), y) for x, y in t.train] for n, t in tasks.items()}
    from dataclasses import replace

    tasks = {n: replace(t, train=data[n][:1], validate=[]) for n, t in tasks.items()}
    found = merge.learn(
        {"x": bodies["x"], "y": bodies["y"]}, base=bodies["base"], tasks=tasks, free=("body.2",),
        objective="cross_entropy", optimiser="sgd", rate=0.0, free_rate=0.5, steps=1, holdout=0,
        granularity="tensor",
    )  # fmt: skip
    merged = {n: t + 0.3 * sum(bodies[e][n] - t for e in "xy") for n, t in bodies["base"].items()}
    state = found.checkpoint.state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12)
    for name, task in tasks.items():
        inputs, labels = data[name][0]
        own = {
            n: double[name][n].clone().requires_grad_() for n in ("body.2.weight", "body.2.bias")
        }
        head = {n: t for n, t in double[name].items() if n.startswith("head")}
        out = torch.func.functional_call(task.module, {**merged, **own, **head}, (inputs,))
        F.cross_entropy(out, labels).backward()
        for key, tensor in own.items():
            assert tensor.grad is not None
            wanted = tensor.detach() - 0.5 * tensor.grad
            torch.testing.assert_close(found.heads[name][key], wanted, rtol=1e-10, atol=1e-12)
        module = found.module(name)
        assert torch.equal(module.state_dict()["head.bias"], head["head.bias"])


def test_heads_of_the_shared_model_are_as_the_recipe_has_them(here: dict[str, Any]) -> None:
    """Merged as it is written, whatever tasks learn for themselves; after a rerun, too."""
    text = TEXT.replace("heads: base\n", "").replace("[{model: x}, {model: y}]", "[{model: x}]")
    text = text.replace("{x: 'parts_own:one', y: 'parts_own:two'}", "{x: 'parts_own:one'}")
    merge.apply(recipe(text), "out")
    merge.apply("out/merge_recipe.yml", "again")
    base, expert = here["base"]["head.weight"], here["x"]["head.weight"]
    for folder in ("out", "again"):
        head = load_file(f"{folder}/model.safetensors")["head.weight"]
        torch.testing.assert_close(head, base + 0.3 * (expert - base))
    assert "`tasks/` has what was learned" in Path("out/README.md").read_text()


def test_a_stage_that_is_not_the_result_is_told(here: dict[str, Any]) -> None:
    last = "merge_method: linear\nmodels: [{model: inner}, {model: base}]\nparameters: {weight: 1}"
    planned = applying.plan_recipe(recipe(f"name: inner\nsave: kept\n{TEXT}---\n{last}\n"))
    assert any("learned for stage 'inner'" in n for n in planned.plan.notes)
    applying.apply_plan(planned, Path("out"))
    found = learned()
    one, other = merge.load_task("kept", "x", network()), found.module("x")
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


# -- on transformers -------------------------------------------------------------------------------
def test_from_the_command_line_to_classifiers_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved_classifier("base", ["a", "b"], 0)
    saved_classifier("size", ["low", "high"], 1, base="base")
    saved_classifier("turn", ["zero", "one", "two"], 2, base="base")
    for name, labels in (("size", ["low", "high"]), ("turn", ["zero", "one", "two"])):
        written_texts(f"{name}.jsonl", "label", labels, 1)
    file = recipe(
        """
merge_method: task_arithmetic
base_model: base
heads: drop
models: [{model: size}, {model: turn}]
parameters: {weight: 0.3}
learn:
  preset: tinting
  objective: cross_entropy
  data: {size: size.jsonl?label=label, turn: turn.jsonl?label=label}
  free_rate: 0.05
  steps: 30
  every: 10
  batch: 16
"""
    )
    done = invoke("plan", file)
    assert done.exit_code == 0, done.output
    told = "task turn learns classifier.bias [3], classifier.weight [3, 16] for itself"
    assert told in " ".join(done.stdout.split()) and "tasks/" in done.stdout
    done = invoke("apply", file, "out")
    assert done.exit_code == 0, done.output
    assert "turn has 2 learned tensors of its own" in done.stderr
    assert "is the best of" in done.stderr and "start is the best" not in done.stderr
    assert invoke("verify", "out").exit_code == 0
    body = merge.open("out").state_dict()
    assert not any("classifier" in n for n in body)
    made = merge.load_task("out", "turn")
    assert isinstance(made, transformers.BertForSequenceClassification)
    assert made.config.id2label == {0: "zero", 1: "one", 2: "two"}
    own = load_file("out/tasks/turn/own.safetensors")
    before = load_file("turn/model.safetensors")
    assert not torch.equal(own["classifier.weight"], before["classifier.weight"])
    done = invoke("task", "out")
    assert done.stdout == "".join(f"{n}: classifier.weight, classifier.bias\n" for n in NAMES)
    done = invoke("task", "out", "turn", "-o", "alone")
    assert done.exit_code == 0 and done.stdout == "alone\n"
    assert invoke("verify", "alone").exit_code == 0
    assert isinstance(invoke("task", "out", "trun").exception, PlanError)
    assert "learned" in json.loads(invoke("task", "out", "turn", "--json").stdout)[0]
    alone = transformers.AutoModelForSequenceClassification.from_pretrained("alone").eval()
    # without this program: the merged body in the class of the task, then the task's tensors
    config = transformers.AutoConfig.from_pretrained("out/tasks/turn")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained("out", config=config)
    plain.load_state_dict(own, strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    inputs = tokenizer(["w1 w2 w3", "w4 w5 w6"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        logits = [m.eval()(**inputs).logits for m in (made, alone, plain)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    with pytest.raises(Exception, match=r"no file named|not appear to have"):
        transformers.AutoModel.from_pretrained("out/tasks/turn")  # no model by itself
    free = file.read_text().replace("free_rate", "free: classifer\n  free_rate")
    done = invoke("plan", recipe(free))
    assert "did you mean 'classifier'?" in done.stdout
    done = invoke("apply", recipe(free), "wrong", "-q")
    assert isinstance(done.exception, PlanError)
    assert "did you mean 'classifier'?" in str(done.exception)
    assert not Path("wrong").exists()


def test_networks_with_a_prefix_find_the_merged_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is the encoder alone: its tensors have other names in a classifier."""
    monkeypatch.chdir(tmp_path)
    saved_classifier("whole", ["a", "b"], 0)
    transformers.BertModel.from_pretrained("whole").save_pretrained("base")
    saved_classifier("size", ["low", "high"], 1, base="whole")
    written_texts("size.jsonl", "label", ["low", "high"], 1)
    text = """
merge_method: task_arithmetic
base_model: base
heads: drop
models: [{model: size}]
parameters: {weight: 0.5}
learn:
  preset: surgery
  surgery: bert.pooler
  data: {size: size.jsonl?label=label}
  steps: 10
  every: 5
  batch: 16
"""
    for layer, doubt in (("bert.pooler", None), ("bert.poolr", "did you mean 'bert.pooler'?")):
        planned = applying.plan_recipe(recipe(text.replace("bert.pooler", layer)), compute=False)
        note = next(n for n in planned.plan.notes if "task size gets a correction of rank 16" in n)
        assert ("no tensor there" in note) == (doubt is not None) and (doubt or "") in note
    merge.apply(recipe(text), "out")
    assert "encoder.layer.0.output.dense.weight" in merge.open("out")
    made = merge.load_task("out", "size")
    with pytest.raises(PlanError, match="no part of a model's weights") as caught:
        merge.open_task("out", "size")
    assert caught.value.where["layer"] == "bert.pooler"
    encoder = transformers.BertModel.from_pretrained("out").eval()
    ids = torch.arange(2, 10).reshape(2, 4)
    own = load_file("out/tasks/size/own.safetensors")
    with torch.no_grad():
        z = encoder(ids).pooler_output
        z = z - torch.relu(z @ own["surgery.down"].T) @ own["surgery.up"].T
        wanted = F.linear(z, own["classifier.weight"], own["classifier.bias"])
        torch.testing.assert_close(made(ids).logits, wanted)
    tinted = text.replace("surgery\n  surgery: bert.pooler", "tinting\n  free: ['*', bert.pooler]")
    merge.apply(recipe(tinted), "tinted")
    merge.open_task("tinted", "size").save("alone")  # the encoder's names become the classifier's
    alone = transformers.AutoModelForSequenceClassification.from_pretrained("alone").eval()
    made = merge.load_task("tinted", "size")
    assert "bert.pooler.dense.weight" in load_file("tinted/tasks/size/own.safetensors")
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, made(ids).logits)


# -- pushed ----------------------------------------------------------------------------------------
def test_they_are_published_loaded_from_there_and_go_with_their_merge(
    here: dict[str, Any], hub: Hub, push: Push
) -> None:
    found = learned(steps=10, every=5)
    out = found.save("out")
    push(out, repo="me/merged")
    assert hub.files("me/merged") == files_of(out)
    side = [side_output(n, c) for n, c in found.files().items()]
    plan = run.plan(found.checkpoint, run.PlanOptions(in_memory=True), extra=side)
    target = publishing.open_target(Target("me/straight", token=TOKEN, endpoint=hub.url))
    publishing.push_plan(plan, target)  # without a local copy
    sent, local = hub.files("me/straight"), files_of(out)
    both = [n for n in local if n.startswith("tasks/")]
    assert len(both) == 4 and all(sent[n] == local[n] for n in both)
    with reading(hub):
        one = merge.load_task("me/merged", "y", network(4))
        two = merge.load_task("out", "y", network(4))
        assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
        with pytest.raises(PlanError, match="no such task"):
            merge.open_task("me/merged", "yy")
    learned(preset="pseudo_labels", steps=4, every=2).save("out", replace=True)
    push(out, repo="me/merged")
    assert not any(n.startswith("tasks/") for n in hub.files("me/merged"))


@contextmanager
def reading(hub: Hub) -> Iterator[None]:
    use(Client(hub.url, TOKEN))
    try:
        yield
    finally:
        use(None)


# -- what is wrong ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "what", "near", "line"),
    [
        ("preset: tinting\n  free: hed", "no such layer to learn", "'head'", 9),
        ("preset: tinting\n  free: [head, body.3]", "no such layer to learn", "'body.0'", 9),
        ("preset: surgery", "not said behind which layer", None, 7),
        ("preset: surgery\n  surgery: boddy", "no such layer", "'body'", 9),
        ("preset: tinting\n  tasks: out/tasks", "together with coefficients", None, 7),
        ("preset: tinting\n  fre: head", "unknown key 'fre'", "'free'", 9),
    ],
)
def test_a_layer_that_is_not_there_is_told(
    here: dict[str, Any], said: str, what: str, near: str | None, line: int
) -> None:
    with pytest.raises(MergeError) as caught:
        merge.apply(recipe(TEXT.replace("preset: tinting", said)), "out")
    assert what in caught.value.what, caught.value
    assert near is None or f"did you mean {near}?" in str(caught.value)
    assert caught.value.where["line"] == str(line), caught.value
    assert not Path("out").exists()


def test_a_task_without_a_head_is_told(
    here: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT.replace("parts_own:two", "parts_own:headless")
    with pytest.raises(PlanError, match="no head to learn") as caught:
        merge.apply(recipe(text), "out")
    assert caught.value.where["task"] == "y" and caught.value.where["line"] == "7"
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path / "bare")
    saved_classifier("base", ["a", "b"], 0)
    transformers.BertModel.from_pretrained("base").save_pretrained("x")
    text = TEXT.replace("[{model: x}, {model: y}]", "[{model: x}]")
    text = text.replace("{x: 'parts_own:one', y: 'parts_own:two'}", "{x: x.jsonl}")
    with pytest.raises(PlanError, match="no head to learn") as caught:
        applying.plan_recipe(recipe(text), compute=False)  # from headers alone
    assert caught.value.where["task"] == "x" and caught.value.where["line"] == "8"


def test_networks_that_do_not_fit_are_told(here: dict[str, Any]) -> None:
    found = learned(steps=2, every=1)
    found.save("out", card=False)
    with pytest.raises(PlanError, match="no such task") as caught:
        merge.load_task("out", "z", network())
    assert caught.value.expected == "one of x, y"
    with pytest.raises(PlanError, match="network of your own"):
        merge.load_task("out", "x")
    with pytest.raises(PlanError, match="other shapes") as caught:
        merge.load_task("out", "y", network(3))
    assert caught.value.where["tensor"] == "head.weight"
    with pytest.raises(PlanError, match="not the one"):
        merge.load_task("out", "y", nn.Linear(2, 2))
    with pytest.raises(PlanError, match="no task has tensors"):
        merge.load_task("base", "x", network())
    with pytest.raises(SourceError, match="no such model"):
        merge.load_task("nowhere/at/all", "x", network())
    file = Path("out/tasks/x/task.json")
    said = json.loads(file.read_text())
    for bad in ({**said, "version": 2}, {**said, "learned": 3}, {**said, "learned": ["tail"]}, [1]):
        file.write_text(json.dumps(bad))
        with pytest.raises(SourceError) as refused:
            merge.load_task("out", "x", network())
        assert "out/tasks/x" in refused.value.where["file"]


def test_names_of_tasks_become_plain_names_of_folders(here: dict[str, Any]) -> None:
    from dataclasses import replace

    first = learned(steps=1, every=1).own()[0]
    named = [replace(first, task=t) for t in ("../../a b", "a-b", "a b", "..", "x")]
    files = task_files([(own, network()) for own in named])
    folders = dict.fromkeys(n.split("/")[1] for n in files)
    assert sorted(folders) == ["a-b", "a-b-2", "a-b-3", "task", "x"]
    said = {json.loads(d)["task"] for n, d in files.items() if n.endswith(".json")}
    assert said == {own.task for own in named}


def test_a_tensor_that_is_used_twice_is_nobodys_own(here: dict[str, Any]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.second(self.first(x)))
            return out

    made = {n: Twice() for n in ("base", "a", "b")}
    x = torch.randn(8, 4)
    tasks = {n: merge.Task(made[n], F.cross_entropy, [(x, torch.arange(8) % 2)]) for n in "ab"}
    with pytest.raises(PlanError, match="used twice") as caught:
        merge.learn({n: made[n] for n in "ab"}, base=made["base"], tasks=tasks, free=("first",))
    assert caught.value.where["task"] == "a"


def test_layers_are_told_by_names() -> None:
    assert layers_in(["a.0.w", "a.1"]) == ["a", "a.0", "a.0.w", "a.1"]
