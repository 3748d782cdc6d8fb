"""The loss along the line: barriers of losses that are known by formula, pictures, the command."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
import transformers
from merge_cli.app import cli
from safetensors.torch import save_file
from torch import Tensor, nn

import merge
from merge.analysis.barrier import between, curve, estimate, layer_barriers
from merge.errors import MergeError, PlanError, RecipeError, ScoreError, SourceError
from merge.streams.open import open_task

from .networks import (
    VIT,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    symmetry_of,
)
from .symmetries import LLAMA


class Point(nn.Module):
    """Two numbers, whose loss is any function of them."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, _: Tensor) -> Tensor:
        return torch.stack([self.x, self.y])


def task_of(loss: Any) -> merge.Task:
    return merge.Task(Point(), lambda out, _: loss(*out), [(torch.zeros(1), None)])


def point(x: float, y: float) -> dict[str, Tensor]:
    return {"x": torch.tensor(float(x)), "y": torch.tensor(float(y))}


# -- by formula ------------------------------------------------------------------------------------
def test_a_double_well_has_a_barrier_of_its_height() -> None:
    """(x^2 - 1)^2 between -1 and 1 rises to 1."""
    task = task_of(lambda x, y: (x**2 - 1) ** 2)
    found = curve(task, point(-1, 0), point(1, 0), task.train)
    assert found.barrier == pytest.approx(1.0) and found.middle.loss == pytest.approx(1.0)
    assert len(found.t) == 25 and found.t[12] == 0.5


def test_the_barrier_is_the_rise_over_the_line_between_the_ends() -> None:
    """A slope has none, and neither has a valley."""
    for loss in (lambda x, y: 3 * x + 7, lambda x, y: (x - 0.2) ** 2):
        task = task_of(loss)
        assert curve(task, point(0, 0), point(1, 0), task.train).barrier == pytest.approx(0.0)


def test_curvature_at_the_ends_foretells_the_rise_of_a_parabola_exactly() -> None:
    """-x^2 from 0 to 1: slopes 0 and -2, curvature -2, a quarter over the mean half way."""
    task = task_of(lambda x, y: -(x**2))
    found = estimate(task, point(0, 0), point(1, 0), task.train)
    assert found.slope == pytest.approx((0.0, -2.0, -1.0))
    assert found.curvature == pytest.approx((-2.0, -2.0, -2.0))
    middle = curve(task, point(0, 0), point(1, 0), task.train, points=3).middle.loss
    assert found.rise == pytest.approx(middle + 0.5) == pytest.approx(0.25)
    assert found.from_middle == pytest.approx(0.25)


def test_minima_foretell_an_eighth_of_their_curvature() -> None:
    """cos^2 between its minima: d'Hd = 2 pi^2 at both, an eighth of it stands where 1 is."""
    task = task_of(lambda x, y: torch.cos(torch.pi * x) ** 2)
    found = estimate(task, point(-0.5, 0), point(0.5, 0), task.train)
    assert found.rise == pytest.approx(2 * np.pi**2 / 8, rel=1e-4)
    assert found.from_middle == pytest.approx(found.rise, rel=1e-4)  # the top is as curved


def test_layers_rise_alone_and_together() -> None:
    """x y with the ends (1, 1) and (-1, -1): half way to 0 in x alone the loss is 0, over 1."""
    task = task_of(lambda x, y: -x * y)
    found = layer_barriers(
        task, point(1, 1), point(-1, -1), task.train, {"first": ["x"], "second": ["y"]}
    )
    assert [(x.layer, x.alone, x.up_to) for x in found] == [("first", 1, 1), ("second", 1, 1)]
    flat = task_of(lambda x, y: (x**2 - 1) ** 2)
    one, two = layer_barriers(
        flat, point(-1, 0), point(1, 5), flat.train, {"first": ["x"], "second": ["y"]}
    )
    assert (one.alone, one.up_to) == (1, 1) and (two.alone, two.up_to) == (0, 1)


def test_whole_numbers_stay_those_of_the_first_network() -> None:
    a, b = (
        {"n": torch.tensor(3), "w": torch.tensor(0.0)},
        {"n": torch.tensor(9), "w": torch.tensor(4.0)},
    )
    found = between(a, b, 0.25)
    assert found["n"] == 3 and found["w"] == 1.0


def test_a_short_batch_counts_for_as_much_as_it_holds(vits: Path) -> None:
    """The loss over batches of 7, 7, 7, 7 and 4 is that of all 32 samples at once."""
    model = transformers.ViTForImageClassification.from_pretrained(vits / "a").eval()
    tasks = [open_task(str(vits / "d.npz"), vits / "a", batch=size) for size in (7, 64)]
    assert [len(t) for _, t in tasks[0].train] == [7, 7, 7, 7, 4]
    short, whole = (t.measure(model.state_dict(), t.train) for t in tasks)
    assert short.loss == pytest.approx(whole.loss, rel=1e-6)
    assert short.right == pytest.approx(whole.right, rel=1e-6)
    others = [
        {n: torch.randn_like(x) * 0.1 for n, x in model.state_dict().items()} for _ in range(2)
    ]
    one, two = (estimate(t, *others, t.train) for t in tasks)
    assert one.curvature == pytest.approx(two.curvature, rel=1e-4)


def test_masked_tokens_weigh_alike_in_every_batch() -> None:
    inputs = {"labels": torch.tensor([[1, -100, -100]])}, {"labels": torch.tensor([[1, 2, 3]])}
    task = merge.Task(
        nn.Identity(), lambda out, t: out, [], count=lambda b: float((b[0]["labels"] > 0).sum())
    )
    assert task.weights([(x, None) for x in inputs]) == [0.25, 0.75]


def test_losses_are_means_over_batches() -> None:
    batches = [(torch.full((2,), float(i)), torch.zeros(2)) for i in (1, 2, 6)]
    task = merge.Task(
        nn.Identity(), lambda out, t: (out - t).mean(), batches, right=lambda o, t: 0.5
    )
    found = task.measure({}, batches)
    assert (found.loss, found.right) == (3.0, 0.5)
    with pytest.raises(PlanError, match="no data to judge"):
        task.measure({}, [])


# -- networks --------------------------------------------------------------------------------------
def noisy(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in state.items()}


@pytest.fixture
def digits_like() -> Iterator[tuple[merge.Task, dict[str, Tensor], dict[str, Tensor]]]:
    """A network that classifies by a rule, and the same in other coordinates with some noise."""
    torch.manual_seed(0)
    teacher = mlp([6, 24, 24, 3])
    for layer in teacher:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.6)
    x = torch.randn(300, 6)
    y = teacher(x).argmax(1)
    task = merge.Task(
        mlp([6, 24, 24, 3]),
        nn.functional.cross_entropy,
        [(x[:150], y[:150])],
        [(x[150:], y[150:])],
        lambda out, target: float((out.argmax(1) == target).float().mean()),
    )
    a = {n: t.detach() for n, t in teacher.state_dict().items()}
    b, _ = planted(symmetry_of(mlp_spec(3), a), a)
    yield task, noisy(a, 1), noisy(b, 2)


Given = tuple[merge.Task, dict[str, Tensor], dict[str, Tensor]]


@pytest.mark.parametrize("method", ["weight", "activation", "ste"])
def test_alignment_takes_the_barrier_away(digits_like: Given, method: str) -> None:
    task, a, b = digits_like
    found = merge.barrier(a, b, task, aligned=method, symmetry=mlp_spec(3), points=9)
    naive, aligned = found.lines
    assert naive.called == "naive" and aligned.called == f"aligned by {method}"
    assert naive.test.barrier > 0.1 and aligned.test.barrier < naive.test.barrier / 10
    assert aligned.test.points[0] == naive.test.points[0]
    assert aligned.test.points[-1].loss == pytest.approx(naive.test.points[-1].loss, rel=1e-4)
    assert [x.layer for x in aligned.layers] == ["0", "2", "4"]
    assert found.report is not None and found.report.moved > 0.5


def test_a_table_and_plain_data(digits_like: Given) -> None:
    task, a, b = digits_like
    found = merge.barrier(a, b, task, symmetry=mlp_spec(3), points=5)
    text = str(found)
    assert "naive" in text and "aligned by weight" in text and "one layer alone" in text
    data = json.loads(json.dumps(found.to_json()))
    assert data["lines"][0]["test"]["barrier"] == found.lines[0].test.barrier
    assert len(data["lines"][1]["train"]["loss"]) == 5


def test_a_line_without_alignment_needs_no_symmetry(digits_like: Given) -> None:
    task, a, b = digits_like
    found = merge.barrier(a, b, task, aligned=None, points=3, layers=False, curvature=False)
    assert len(found.lines) == 1 and found.report is None and "layer" not in str(found)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn(digits_like: Given, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    task, a, b = digits_like
    found = merge.barrier(a, b, task, symmetry=mlp_spec(3), points=5)
    file = found.picture(tmp_path / f"line.{ending}")
    head = file.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if ending == "png" else b"<svg" in file.read_bytes()
    assert file.stat().st_size > 5000
    again = found.picture(tmp_path / f"again.{ending}")
    assert again.read_bytes() == file.read_bytes()
    if ending == "svg":
        text = file.read_text()
        assert f"barrier {found.lines[0].test.barrier:.3f}" in text and "mean loss" in text


def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data is not there, which would be told next."""
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    base = ("barrier", tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--data", "no.npz")
    done = run(*base, "-o", "line.jpeg")
    assert "no kind of picture" in str(done.exception)
    monkeypatch.setattr("merge.analysis.figure.find_spec", lambda _name: None)
    done = run(*base, "-o", "line.png")
    assert "matplotlib, which is not installed" in str(done.exception)


def test_a_picture_of_an_unknown_kind_is_refused(digits_like: Given, tmp_path: Path) -> None:
    task, a, b = digits_like
    found = merge.barrier(a, b, task, aligned=None, points=3, layers=False, curvature=False)
    with pytest.raises(RecipeError, match="no kind of picture") as caught:
        found.picture(tmp_path / "line.pnj")
    assert ".png" in str(caught.value.do)


# -- models of transformers ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny classifiers of pictures and some pictures."""
    root = tmp_path_factory.mktemp("vits")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=3, num_channels=1,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.ViTForImageClassification(config).save_pretrained(root / name)
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(40, 1, 8, 8)), draw.integers(0, 3, 40)
    np.savez(root / "d.npz", x=x[:32], y=y[:32], x_test=x[32:], y_test=y[32:])
    return root


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, [str(a) for a in arguments])


def test_the_command_judges_classifiers_of_transformers(vits: Path) -> None:
    (vits / "vit.json").write_text(json.dumps(VIT))
    done = run(
        "barrier", vits / "a", vits / "b", "--data", vits / "d.npz", "--json", "--points", 3,
        "--symmetry", vits / "vit.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(done.output)
    naive, aligned = data["lines"]
    assert naive["test"]["loss"][0] == pytest.approx(aligned["test"]["loss"][0])
    assert naive["test"]["loss"][2] == pytest.approx(aligned["test"]["loss"][2], rel=1e-5)
    assert 0 <= naive["test"]["right"][0] <= 1
    assert "vit.layers.0" in [x["layer"] for x in naive["layers"]]


def test_losses_are_those_of_the_model_itself(vits: Path) -> None:
    task = open_task(str(vits / "d.npz"), vits / "a")
    assert [len(t) for _, t in (*task.train, *task.test)] == [32, 8]
    model = transformers.ViTForImageClassification.from_pretrained(vits / "a").eval()
    with np.load(vits / "d.npz") as arrays:
        x, y = torch.tensor(arrays["x_test"]).float(), torch.tensor(arrays["y_test"])
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(model(x).logits, y)
    found = task.measure(model.state_dict(), task.test)
    assert found.loss == pytest.approx(float(wanted), rel=1e-5)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with a tokenizer of words, and some texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("lm")
    words = [f"w{i}" for i in range(50)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=51, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 60)) for _ in range(30)]
    (root / "t.txt").write_text("\n".join(texts))
    (root / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return root


@pytest.mark.parametrize("file", ["t.txt", "t.jsonl"])
def test_language_models_are_judged_by_texts(language_model: Path, file: str) -> None:
    root = language_model
    found = merge.barrier(
        root / "a", root / "b", str(root / file), symmetry=LLAMA, points=3, curvature=False
    )
    for line in found.lines:
        assert line.test.points[0].loss == pytest.approx(np.log(51), abs=0.3)  # knows nothing
        assert line.test.points[0].right is None


def test_samples_at_most_and_at_a_time(vits: Path, language_model: Path) -> None:
    data = str(vits / "d.npz")
    task = open_task(data, vits / "a", batch=4, limit=10)
    assert [[len(t) for _, t in part] for part in (task.train, task.test)] == [[4, 4, 2], [4, 4]]
    texts = open_task(str(language_model / "t.txt"), language_model / "a", batch=2, limit=3)
    assert [len(x["input_ids"]) for x, _ in texts.train] == [2, 1]
    batches = [(torch.zeros(5, 6), torch.zeros(5).long()) for _ in range(4)]
    own = merge.Task(mlp([6, 5, 3]), nn.functional.cross_entropy, batches)
    seen: list[tuple[int, int]] = []
    found = merge.barrier(
        own.module, own.module, own, points=3, limit=6, progress=lambda *x: seen.append(x)
    )  # two whole batches of five
    assert len(found.lines) == 2 and set(seen) == {(1, len(seen))}
    with pytest.raises(RecipeError, match="size of these batches"):
        merge.barrier(own.module, own.module, own, batch=3)
    with pytest.raises(RecipeError, match="nothing to judge by"):
        open_task(data, vits / "a", limit=0)


def test_labels_beyond_the_classes_are_told_in_words(vits: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 1, 8, 8)), y=np.array([0, 1, 7, 2, 1]))
    with pytest.raises(SourceError) as caught:
        open_task(str(tmp_path / "d.npz"), vits / "a")
    for said in ("label 7", "0 to 2", "3 classes", "d.npz"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.npz", b"no zip", "cannot be read"),
        ("y.jsonl", b'{"txt": 1}', "key 'text'"),
        ("z.txt", b"w1 w2", "too little text"),
    ],
)
def test_data_that_cannot_be_used_is_named(
    language_model: Path, tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(SourceError, match=what):
        open_task(str(file), language_model / "a")


def test_arrays_want_a_target_for_each_input(language_model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 2)), y=np.zeros(2))
    with pytest.raises(SourceError, match="not one y for each x"):
        open_task(str(tmp_path / "b.npz"), language_model / "a")


def test_a_model_without_a_loss_is_refused(vits: Path, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "body")
    with pytest.raises(MergeError) as caught:
        merge.barrier(tmp_path / "body", tmp_path / "body", str(vits / "d.npz"), aligned=None)
    assert caught.value.do


# -- what a line must not depend on, and what is told ----------------------------------------------
class Dropping(nn.Module):
    """Dropout, BatchNorm and tied weights: none of them may show in a judgement."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(self.norm(self.first(x))))
        return found


def dropping(seed: int) -> Dropping:
    torch.manual_seed(seed)
    network = Dropping()
    network(torch.randn(64, 6) + seed)
    return network


def test_networks_are_judged_in_evaluation_mode_and_left_as_they_were() -> None:
    a, b = dropping(1), dropping(2)
    a.drop.eval()  # all else is in training mode, and is to be so afterwards
    x, y = torch.randn(32, 6), torch.arange(32) % 6
    task = merge.Task(a, nn.functional.cross_entropy, [(x, y)])
    before = {n: t.clone() for n, t in a.state_dict().items()}
    modes = [part.training for part in a.modules()]
    found = merge.barrier(a, b, task, aligned=None, points=3).lines[0].test
    assert [part.training for part in a.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in a.state_dict().items())
    for end, network in ((0, a), (2, b)):
        with torch.no_grad():
            truth = nn.functional.cross_entropy(network.eval()(x), y)
        assert found.points[end].loss == float(truth)
    middle = copy.deepcopy(a)
    middle.load_state_dict(between(a.state_dict(), b.state_dict(), 0.5))
    with torch.no_grad():
        truth = nn.functional.cross_entropy(middle.eval()(x), y)
    assert found.middle.loss == pytest.approx(float(truth), rel=1e-6)


def test_a_network_and_itself_have_one_loss_to_the_bit(digits_like: Given) -> None:
    task, a, _ = digits_like
    found = curve(task, a, a, task.test)
    assert {p.loss for p in found.points} == {found.points[0].loss}
    assert found.barrier == 0.0


def test_the_symmetry_is_traced_where_none_is_given(digits_like: Given) -> None:
    task, a, _ = digits_like
    b, _ = planted(symmetry_of(mlp_spec(3), a), a)
    found = merge.barrier(a, b, task, points=5, layers=False, curvature=False)
    naive, aligned = found.lines
    assert naive.test.barrier > 0.1
    assert aligned.test.barrier == 0.0
    assert {p.loss for p in aligned.test.points} == {naive.test.points[0].loss}


def test_an_operator_that_is_not_known_is_named() -> None:
    """Where it freezes all there is in an error, where it freezes a part in the report."""

    class Unknown(nn.Module):
        def __init__(self, free: bool) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.free = free

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu() if self.free else torch.special.bessel_j0(self.first(x))
            found: Tensor = self.third(torch.special.bessel_j0(self.second(x)))
            return found

    x = torch.randn(6, 6)
    for free in (False, True):
        network = Unknown(free)
        task = merge.Task(network, nn.functional.cross_entropy, [(x, torch.zeros(6).long())])
        if free:
            report = merge.barrier(network, Unknown(free), task, points=3).report
            assert report is not None and "special_bessel_j0 is not known" in str(report)
            continue
        with pytest.raises(PlanError) as caught:
            merge.barrier(network, network, task, points=3)
        assert "special_bessel_j0 is not known" in str(caught.value) and caught.value.do


def test_fused_attention_has_a_curvature_by_finite_differences() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(q, k, v).sum(1)

    torch.manual_seed(0)
    a, b = (dict(Attention().state_dict()) for _ in range(2))
    data = [(torch.randn(4, 2, 5, 8), torch.zeros(4, 5, 8))]
    task = merge.Task(Attention(), nn.functional.mse_loss, data)
    found, h = estimate(task, a, b, data), 1e-4
    exact = merge.Task(
        Attention().double(),
        nn.functional.mse_loss,
        [(x.double(), y.double()) for x, y in data],
    )
    wide = [{n: t.double() for n, t in state.items()} for state in (a, b)]
    for at, slope, curvature in zip((0, 1, 0.5), found.slope, found.curvature, strict=True):
        moved = [
            {n: x + t * (wide[1][n] - x) for n, x in wide[0].items()} for t in (at - h, at, at + h)
        ]
        low, here, high = (exact.measure(state, exact.train).loss for state in moved)
        assert slope == pytest.approx((high - low) / (2 * h), rel=1e-4)
        assert curvature == pytest.approx((high - 2 * here + low) / h**2, rel=1e-3)


def test_what_cannot_be_judged_is_told() -> None:
    x = torch.randn(4, 6)
    network = mlp([6, 3])
    label = merge.Task(network, nn.functional.cross_entropy, [(x, torch.full((4,), 3))])
    shape = merge.Task(network, nn.functional.cross_entropy, [(x[:, :5], torch.zeros(4).long())])
    infinite = merge.Task(network, nn.functional.mse_loss, [(x / 0, torch.zeros(4, 3))])
    empty = merge.Task(network, nn.functional.mse_loss, [])
    for task, kind, what in (
        (label, PlanError, "found: label 3"),
        (shape, PlanError, "RuntimeError: mat1 and mat2"),
        (infinite, ScoreError, "not a finite number"),
        (empty, PlanError, "no data to judge"),
    ):
        with pytest.raises(kind) as caught:
            merge.barrier(network, network, task, aligned=None, points=3)
        assert what in str(caught.value)
    with pytest.raises(RecipeError, match="odd number"):
        merge.barrier(network, network, label, points=4)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise OSError('the disk is gone')", "OSError: the disk is gone"),
        ("return 3", "does not return a task"),
    ],
)
def test_a_function_that_raises_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "of_my_own", raising=False)
    (tmp_path / "of_my_own.py").write_text(f"def task():\n    {body}\n")
    with pytest.raises(SourceError) as caught:
        open_task("of_my_own:task")
    assert what in str(caught.value)
    assert caught.value.where["function"] == "of_my_own:task"
    with pytest.raises(SourceError, match="no such function") as caught:
        open_task("of_my_own:tsk")
    assert caught.value.do == "did you mean 'task'?"


# -- constants that only some files hold -----------------------------------------------------------
def sentences(vocabulary: int) -> Any:
    inputs = {
        "input_ids": torch.arange(24).reshape(3, 8) % vocabulary,
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
    }
    return [(inputs, torch.zeros(3))]


def pooled(model: nn.Module, data: Any) -> merge.Task:
    def far(out: Any, target: Tensor) -> Tensor:
        return (out.last_hidden_state.mean((1, 2)) - target).square().mean()

    return merge.Task(model, far, data)


def test_position_ids_that_the_network_makes_itself_are_no_obstacle(minilm: Path) -> None:
    """The real MiniLM's file holds them, the library's network does not any more."""
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(minilm))
    assert "embeddings.position_ids" in merge.open(minilm)
    assert "embeddings.position_ids" not in model.state_dict()
    task = pooled(model, sentences(1000))
    found = merge.barrier(minilm, minilm, task, aligned=None, points=3, layers=False)
    assert found.lines[0].train.barrier == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_models_align_whichever_of_them_holds_position_ids(tmp_path: Path, stored: int) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertModel(config)
    state = model.state_dict()
    order = torch.randperm(24)
    layer = "encoder.layer.0"
    other = dict(state)
    for name in (f"{layer}.intermediate.dense.weight", f"{layer}.intermediate.dense.bias"):
        other[name] = state[name][order]
    other[f"{layer}.output.dense.weight"] = state[f"{layer}.output.dense.weight"][:, order]
    for number, (name, tensors) in enumerate({"a": state, "b": other}.items()):
        config.save_pretrained(tmp_path / name)
        ids = {"embeddings.position_ids": torch.arange(8)[None]} if stored in (number, 2) else {}
        found = {n: t.contiguous() for n, t in {**tensors, **ids}.items()}
        save_file(found, tmp_path / name / "model.safetensors", {"format": "pt"})
    task = pooled(model, sentences(40))
    for method, data in {"weight": None, "activation": task}.items():
        moved = merge.align(tmp_path / "b", tmp_path / "a", method, data=data)
        assert list(moved) == list(merge.open(tmp_path / "b"))
        got = moved.state_dict()
        for name in state:
            torch.testing.assert_close(got[name], state[name], rtol=0, atol=0)
