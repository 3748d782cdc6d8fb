"""Smaller and larger networks: what is kept, what makes up for the rest, and whether they load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import merge
from merge.resize.fold import folded
from merge.resize.importance import activation_importance, weight_importance
from merge.resize.influence import least_influential
from merge.resize.refit import refitted
from merge.resize.selection import kept, most, selected
from merge.resize.templates import factorised, grown
from merge.stream import TensorsOf
from merge.symmetry.axes import parse_axis
from merge.symmetry.resolve import resolve
from merge.symmetry.spec import parse_spec
from merge.symmetry.symmetry import Layout
from merge.transport.mapped import roles_of

from .symmetries import MLP

Folder = Path


def mlp(width: int = 6, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )


def symmetry_of(net: nn.Module) -> Any:
    shapes = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    return resolve(parse_spec(MLP), shapes)


def rows(_batch: Any, value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])


# -- which units -----------------------------------------------------------------------------------
def test_importance_is_what_writes_a_unit_times_what_reads_it() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].weight[2] = 0.0
        net[0].bias[2] = 0.0  # never written
        net[2].weight[:, 4] = 0.0  # never read
    own = symmetry_of(net)
    tensors = TensorsOf(merge.open(net.state_dict()))
    found = weight_importance(own, roles_of(own), tensors, ["a", "b"])
    assert found["a"][2] == found["a"][4] == 0.0
    w, b = net[0].weight.detach().double().numpy(), net[0].bias.detach().double().numpy()
    out = net[2].weight.detach().double().numpy()
    written = (w**2).sum(1) / (w**2).sum() + b**2 / (b**2).sum()
    read = (out**2).sum(0) / (out**2).sum()
    assert np.allclose(found["a"], np.sqrt(written * read), rtol=1e-12)


def test_importance_does_not_see_how_a_units_scale_is_shared_out() -> None:
    """A layer written twice as large and read half as large: the same function and scores."""
    net, other = mlp(), mlp()
    with torch.no_grad():
        for t in (other[0].weight, other[0].bias):
            t.mul_(2.0)
        other[2].weight.mul_(0.5)
    own = symmetry_of(net)
    scores = [
        weight_importance(own, roles_of(own), TensorsOf(merge.open(n.state_dict())), ["a"])["a"]
        for n in (net, other)
    ]
    assert np.allclose(scores[0], scores[1], rtol=1e-6)


def test_importance_by_activations_is_the_mean_magnitude_of_what_is_read() -> None:
    net = mlp()
    x = torch.randn(50, 4)
    own = symmetry_of(net)
    found = activation_importance(net, own, ["a", "b"], net, [x[:30], x[30:]], rows)
    hidden = net[:2](x).detach().double().abs().sum(0).numpy()
    assert np.allclose(found["a"], hidden / hidden.mean(), rtol=1e-5)


def test_a_group_that_nothing_shows_is_named() -> None:
    net = mlp()
    own = symmetry_of(net)
    with pytest.raises(merge.PlanError, match="no layer shows") as caught:
        activation_importance(nn.Sequential(), own, ["a"], lambda b: b, [torch.ones(2, 4)], rows)
    assert caught.value.where["group"] == "a"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.data())
def test_most_keeps_the_largest(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    index = most(np.array(scores), count)
    assert list(index) == sorted(set(index)) and len(index) == count
    rest = [s for i, s in enumerate(scores) if i not in index]
    assert min(scores[i] for i in index) >= max(rest, default=0.0)


def test_positions_that_remain_along_a_nested_axis() -> None:
    """Heads of a fused projection: of three heads, each with q, k and v of two, keep two."""
    net_axis = parse_axis("h.(q+k+v)")
    sizes = {"h": 3, "q": 2, "k": 2, "v": 2}

    def sized(factor: Any) -> Any:
        from dataclasses import replace

        return replace(factor, size=sizes[factor.group])

    layout = Layout((18,), (net_axis.map(sized),))
    found = kept(layout, 0, {"h": selected(np.array([0, 2]), 3, 2.0)})
    assert found.tolist() == [*range(6), *range(12, 18)]


# -- least squares ---------------------------------------------------------------------------------
def moments(z: torch.Tensor) -> torch.Tensor:
    ones = torch.cat([z, z.new_ones(len(z), 1)], 1)
    return ones.T @ ones / len(z)


@pytest.mark.parametrize("bias", [True, False])
def test_refit_is_the_least_squares_solution(bias: bool) -> None:
    torch.manual_seed(1)
    z = torch.randn(200, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 0.5
    w, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    index = torch.tensor([0, 2, 3, 6])
    new, offset = refitted(w, b if bias else None, moments(z), index, ridge=0.0)
    target = z @ w.T + (b if bias else 0.0)
    design = torch.cat([z[:, index], torch.ones(200, 1, dtype=torch.float64)], 1)
    design = design if bias else design[:, :-1]
    truth = torch.linalg.lstsq(design, target).solution.T
    assert torch.allclose(new, truth[:, :4], atol=1e-9)
    assert (offset is None) is not bias
    if offset is not None:
        assert torch.allclose(offset, truth[:, 4], atol=1e-9)


def test_a_large_ridge_leaves_the_plain_cut_and_a_singular_matrix_is_no_harm() -> None:
    torch.manual_seed(2)
    z = torch.randn(100, 5, dtype=torch.float64)
    z[:, 4] = z[:, 0]  # a copy: what it gave can be taken over exactly
    z[:, 3] = 0.0
    w = torch.randn(2, 5, dtype=torch.float64)
    index = torch.tensor([0, 1, 2, 3])
    new, _ = refitted(w, None, moments(z), index, ridge=0.0)
    assert torch.allclose(z[:, index] @ new.T, z @ w.T, atol=1e-9)
    assert torch.isfinite(new).all()
    far, _ = refitted(w, None, moments(z), index, ridge=1e12)
    assert torch.allclose(far, w[:, index], atol=1e-6)
    with pytest.raises(merge.PlanError, match="ridge"):
        refitted(w, None, moments(z), index, ridge=-1.0)
    with pytest.raises(merge.PlanError, match="moments"):
        refitted(w, None, moments(z)[:3, :3], index)


# -- blocks ----------------------------------------------------------------------------------------
class Block(nn.Module):
    """A pre-norm block without its norm: the stream plus a small network of it."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        with torch.no_grad():
            self.down.weight.mul_(scale)
            self.down.bias.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.relu(self.up(x)))


def residual(scales: list[float]) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(Block(5, s) for s in scales))


def test_the_least_influential_blocks_go_first() -> None:
    net = residual([1.0, 0.0, 2.0, 0.01]).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    found = least_influential(net, ["0", "1", "2", "3"], 2, net, [x])
    assert [name for name, _ in found] == ["1", "3"]
    assert found[0][1] == pytest.approx(0.0, abs=1e-12)
    assert found[1][1] > 1e-9
    with pytest.raises(merge.PlanError, match="not that many blocks"):
        least_influential(net, ["0"], 1, net, [x])


def test_what_a_block_did_linearly_is_taken_over_whole() -> None:
    """The block adds a linear map of what the last map before it reads: nothing remains."""

    class Linear(nn.Module):
        def __init__(self, first: Block) -> None:
            super().__init__()
            self.first = [first]
            self.map = nn.Linear(10, 5).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.map(self.first[0].seen)

    class Seen(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = functional.relu(self.up(x))
            out: torch.Tensor = x + self.down(self.seen)
            return out

    torch.manual_seed(4)
    first = Seen(5, 1.0).double()
    net = nn.Sequential(first, Linear(first))
    x = torch.randn(300, 5, dtype=torch.float64)
    found = folded(net, "0", "1", net, [x[:200], x[200:]], rows, ridge=0.0)
    assert (found.linear, found.norm) == ("0.down", None)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        wanted = net(x)
        first.down.weight.copy_(found.weight)
        assert found.bias is not None
        first.down.bias.copy_(found.bias)
        assert torch.allclose(first(x), wanted, atol=1e-9)


# -- whole models ----------------------------------------------------------------------------------
def loaded(folder: Path, kind: str = "AutoModel") -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, dtype="float32").eval()


def task(folder: Path, kind: str, vocabulary: int, count: int = 48) -> merge.Task:
    """Random tokens, some of them padding, in the model of a folder."""
    torch.manual_seed(5)
    ids = torch.randint(3, vocabulary, (count, 12))
    mask = torch.ones_like(ids)
    mask[::2, 8:] = 0
    parts = zip(ids.split(16), mask.split(16), strict=True)
    batches = [({"input_ids": i, "attention_mask": m}, None) for i, m in parts]
    return merge.Task(
        loaded(folder, kind),
        lambda out, _target: out[0].sum(),
        train=batches,
        load=lambda place: loaded(Path(place), kind).state_dict(),
    )


def difference(folder: Path, whole: Path, kind: str, data: merge.Task) -> float:
    """Mean of 1 - cos between the outputs of two models, padding left out."""
    total = []
    with torch.no_grad():
        for inputs, _ in data.train:
            a, b = (loaded(f, kind)(**inputs)[0] for f in (folder, whole))
            cosine = functional.cosine_similarity(a, b, dim=-1)
            total.append(1 - cosine[inputs["attention_mask"].bool()])
    return float(torch.cat(total).mean())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, int]]:
    """Tiny networks, each with its class and the size of its vocabulary."""
    import transformers as t

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(6)
    bert = t.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=60, max_position_embeddings=32,
    )  # fmt: skip
    llama = t.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=60, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    gpt2 = t.GPT2Config(n_embd=32, n_inner=64, n_layer=4, n_head=4, vocab_size=60, n_positions=32)
    made: dict[str, tuple[Path, str, int]] = {}
    for name, kind, config in (
        ("bert", "BertModel", bert),
        ("llama", "LlamaForCausalLM", llama),
        ("gpt2", "GPT2LMHeadModel", gpt2),
    ):
        net = getattr(t, kind)(config)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        net.save_pretrained(root / name)
        made[name] = root / name, kind, 60
    return made


WIDTHS = {"bert": "intermediate_size", "llama": "intermediate_size", "gpt2": "n_inner"}


@pytest.mark.parametrize("name", WIDTHS)
def test_least_squares_is_nearer_than_the_plain_cut(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path, name: str
) -> None:
    folder, kind, vocabulary = models[name]
    data = task(folder, kind, vocabulary)
    widths = {WIDTHS[name]: 40}
    for out, fit in (("plain", False), ("fitted", True)):
        made = merge.shrink(
            folder, widths=widths, data=data, importance="weights", least_squares=fit
        )
        made.save(tmp_path / out)
        assert json.loads((tmp_path / out / "config.json").read_text())[WIDTHS[name]] == 40
    plain, fitted = (difference(tmp_path / o, folder, kind, data) for o in ("plain", "fitted"))
    assert 0 < fitted < 0.9 * plain


@pytest.mark.parametrize("name", WIDTHS)
def test_a_block_that_goes_is_made_up_for(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path, name: str
) -> None:
    folder, kind, vocabulary = models[name]
    data = task(folder, kind, vocabulary)
    for out, fit in (("plain", False), ("fitted", True)):
        made = merge.shrink(folder, layers=3, data=data, least_squares=fit)
        made.save(tmp_path / out)
        assert any("layers left out" in note for note in made.notes)
    plain, fitted = (difference(tmp_path / o, folder, kind, data) for o in ("plain", "fitted"))
    assert 0 < fitted < plain


def test_layers_and_widths_together_on_data(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path
) -> None:
    folder, kind, vocabulary = models["bert"]
    data = task(folder, kind, vocabulary)
    both = {"layers": 3, "widths": {"intermediate_size": 40}}
    merge.shrink(folder, **both).save(tmp_path / "blind")
    merge.shrink(folder, **both, data=data).save(tmp_path / "seeing")
    blind, seeing = (difference(tmp_path / o, folder, kind, data) for o in ("blind", "seeing"))
    assert seeing < blind
    assert len(loaded(tmp_path / "seeing", kind).encoder.layer) == 3


def test_dead_units_are_cut_without_a_trace(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path
) -> None:
    folder, kind, vocabulary = models["llama"]
    net = loaded(folder, kind)
    with torch.no_grad():
        for layer in net.model.layers:
            layer.mlp.down_proj.weight[:, 5::4] = 0.0
    net.save_pretrained(tmp_path / "dead")
    merge.shrink(tmp_path / "dead", widths={"intermediate_size": 64 - 15}).save(tmp_path / "cut")
    data = task(folder, kind, vocabulary)
    assert difference(tmp_path / "cut", tmp_path / "dead", kind, data) < 1e-6


def test_heads_are_cut_whole(models: dict[str, tuple[Path, str, int]], tmp_path: Path) -> None:
    folder, kind, _ = models["llama"]
    widths = {"num_key_value_heads": 1, "num_attention_heads": 2}
    merge.shrink(folder, widths=widths).save(tmp_path / "out")
    net = loaded(tmp_path / "out", kind)
    assert net.model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    assert net.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    with pytest.raises(merge.PlanError):
        merge.shrink(folder, widths={"num_key_value_heads": 1})


def test_the_stream_is_cut_with_what_reads_it_scaled(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path
) -> None:
    folder, kind, _ = models["llama"]
    merge.shrink(folder, widths={"hidden_size": 24}).save(tmp_path / "out")
    net, old = loaded(tmp_path / "out", kind), loaded(folder, kind)
    assert net.config.hidden_size == 24 and net.config.head_dim == 8
    new, was = (n.model.layers[1].mlp.up_proj.weight.detach() for n in (net, old))
    assert new.square().sum(1).mean() == pytest.approx(float(was.square().sum(1).mean()), rel=0.15)


def test_layers_left_out_are_those_of_a_slice_recipe(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path
) -> None:
    folder, _, _ = models["llama"]
    merge.shrink(folder, layers=[0, 1, 3]).save(tmp_path / "shrunk")
    (tmp_path / "r.yml").write_text(
        "merge_method: passthrough\nslices:\n"
        f"  - sources: [{{model: {folder}, layer_range: [0, 2]}}]\n"
        f"  - sources: [{{model: {folder}, layer_range: [3, 4]}}]\n"
    )
    merge.apply(tmp_path / "r.yml", tmp_path / "sliced")
    name = "model.safetensors"
    ours, theirs = (tmp_path / o / name for o in ("shrunk", "sliced"))
    assert ours.read_bytes() == theirs.read_bytes()
    config = json.loads((tmp_path / "shrunk" / "config.json").read_text())
    assert config == json.loads((tmp_path / "sliced" / "config.json").read_text())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "nothing is to be shrunk"),
        ({"widths": {"intermediate": 40}}, "did you mean 'intermediate_size'"),
        ({"widths": {"intermediate_size": 80}}, "cannot be cut to that size"),
        ({"widths": {"f1": 40}}, "one size for all of these groups"),
        ({"layers": 9}, "not that many layers"),
        ({"layers": [2, 1]}, "not some of the model's, in order"),
        ({"layers": 3, "importance": "activations"}, "this needs data"),
        ({"layers": 3, "least_squares": True}, "this needs data"),
        ({"layers": 3, "importance": "weigths"}, "did you mean 'weights'"),
    ],
)
def test_what_cannot_be_is_said(
    models: dict[str, tuple[Path, str, int]], how: dict[str, Any], said: str
) -> None:
    with pytest.raises(merge.MergeError) as caught:
        merge.shrink(models["llama"][0], **how)
    assert said in str(caught.value)


def test_real_weights_lose_less_by_least_squares(minilm: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, six layers to five and 1536 units to 1024, on tokens of its vocabulary."""
    torch.manual_seed(7)
    data = task(minilm, "AutoModel", 2000, 32)
    both: dict[str, Any] = {"layers": [0, 1, 3, 4, 5], "widths": {"intermediate_size": 1024}}
    merge.shrink(minilm, **both).save(tmp_path / "plain")
    merge.shrink(minilm, **both, data=data).save(tmp_path / "fitted")
    plain, fitted = (difference(tmp_path / o, minilm, "AutoModel", data) for o in
                     ("plain", "fitted"))  # fmt: skip
    assert fitted < 0.7 * plain


# -- larger ----------------------------------------------------------------------------------------
def stacked(layers: int, width: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(8)
    a, b = torch.randn(width, width), torch.randn(width, width)
    return {f"h.{n}.w": a + n / (layers - 1) * b for n in range(layers)} | {"emb": torch.ones(3)}


@pytest.mark.parametrize("layers", [1, 3, 5, 9])
def test_layers_on_a_line_stay_on_it(layers: int) -> None:
    old = stacked(5)
    made = merge.expand(old, layers, align=False).state_dict()
    assert len(made) == layers + 1
    a, b = old["h.0.w"], old["h.4.w"] - old["h.0.w"]
    for n in range(layers):
        t = n / (layers - 1) if layers > 1 else 0.5
        assert torch.allclose(made[f"h.{n}.w"], a + t * b, atol=1e-5)


def test_new_layers_are_the_least_squares_line(models: dict[str, tuple[Path, str, int]]) -> None:
    folder, _, _ = models["llama"]
    made = merge.expand(folder, 6, align=False)
    name = "model.layers.{}.mlp.up_proj.weight"
    old = merge.open(folder).state_dict()
    values = torch.stack([old[name.format(n)].double().reshape(-1) for n in range(4)])
    at = torch.linspace(0, 1, 4, dtype=torch.float64)
    design = torch.stack([torch.ones(4, dtype=torch.float64), at], 1)
    line = torch.linalg.lstsq(design, values).solution
    state = made.state_dict()
    for n in range(6):
        wanted = line[0] + n / 5 * line[1]
        assert torch.allclose(state[name.format(n)].double().reshape(-1), wanted, atol=1e-5)


def test_layers_are_aligned_before_they_are_averaged(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path
) -> None:
    """Layers that are one another's copies with units in another order: the line is that layer."""
    folder, kind, vocabulary = models["llama"]
    net = loaded(folder, kind)
    with torch.no_grad():
        first = net.model.layers[0].state_dict()
        for n in range(1, 4):
            net.model.layers[n].load_state_dict(first)
            order = torch.randperm(64)
            part = net.model.layers[n].mlp
            part.up_proj.weight.copy_(part.up_proj.weight[order])
            part.gate_proj.weight.copy_(part.gate_proj.weight[order])
            part.down_proj.weight.copy_(part.down_proj.weight[:, order])
    net.save_pretrained(tmp_path / "same")
    merge.expand(tmp_path / "same", 4).save(tmp_path / "again")
    merge.expand(tmp_path / "same", 4, align=False).save(tmp_path / "blurred")
    data = task(folder, kind, vocabulary)
    assert difference(tmp_path / "again", tmp_path / "same", kind, data) < 1e-5
    assert difference(tmp_path / "blurred", tmp_path / "same", kind, data) > 1e-2


def test_an_expanded_model_loads(models: dict[str, tuple[Path, str, int]], tmp_path: Path) -> None:
    for name, (folder, kind, _) in models.items():
        for way in ("line", "templates"):
            merge.expand(folder, 6, kind=way).save(tmp_path / f"{name}-{way}")
            net = loaded(tmp_path / f"{name}-{way}", kind)
            assert net.config.num_hidden_layers == 6


def test_templates_give_the_layers_back_and_new_ones_are_orthogonal() -> None:
    torch.manual_seed(9)
    layers = torch.randn(4, 50)
    mixing, shared = factorised(layers, 4)
    assert torch.allclose(mixing @ shared, layers.double(), atol=1e-9)
    assert torch.allclose(shared @ shared.T, torch.eye(4, dtype=torch.float64), atol=1e-9)
    few, two = factorised(layers, 2)
    best = torch.linalg.svd(layers.double(), full_matrices=False)
    nearest = (best.U[:, :2] * best.S[:2]) @ best.Vh[:2]
    assert torch.allclose(few @ two, nearest, atol=1e-9)
    wide = torch.cat([mixing[:2], torch.zeros(2, 4)])[:2]
    new = grown(wide, 2)
    assert torch.allclose(new @ wide.T, torch.zeros(2, 2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(new.norm(dim=1), wide.norm(dim=1).mean().expand(2), atol=1e-9)
    with pytest.raises(merge.PlanError, match="templates"):
        factorised(layers, 5)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("llama", {"intermediate_size": 100}),
        ("bert", {"intermediate_size": 65}),
        ("gpt2", {"n_inner": 128}),
    ],
)
def test_a_wider_network_computes_the_same(
    models: dict[str, tuple[Path, str, int]], tmp_path: Path, name: str, widths: dict[str, int]
) -> None:
    folder, kind, vocabulary = models[name]
    merge.widen(folder, widths).save(tmp_path / "wide")
    data = task(folder, kind, vocabulary)
    inputs, _ = data.train[0]
    with torch.no_grad():
        a, b = (loaded(f, kind)(**inputs)[0] for f in (folder, tmp_path / "wide"))
    assert torch.allclose(a, b, atol=1e-5 * float(a.abs().max()))


def test_a_stream_behind_norms_is_only_multiplied(
    models: dict[str, tuple[Path, str, int]],
) -> None:
    with pytest.raises(merge.PlanError, match="a group cannot be made that wide") as caught:
        merge.widen(models["llama"][0], {"hidden_size": 40})
    assert "a multiple of 32" in str(caught.value)


# -- stitches --------------------------------------------------------------------------------------
def test_a_network_stitched_to_itself_is_itself(
    models: dict[str, tuple[Path, str, int]],
) -> None:
    folder, kind, vocabulary = models["llama"]
    net, data = loaded(folder, kind), task(folder, kind, vocabulary, 128)
    joined = merge.stitch(net, net, ("model.layers.1", "model.layers.2"), data, ridge=0.0)
    inputs, _ = data.train[0]
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, wanted = joined(**inputs)[0][mask], net(**inputs)[0][mask]
    assert joined.error < 1e-6
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))
    assert sum(p.numel() for p in joined.front.parameters()) < sum(
        p.numel() for p in net.parameters()
    )


def test_networks_of_two_widths_are_stitched() -> None:
    torch.manual_seed(10)
    small, large = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), mlp(9)
    x = torch.randn(64, 4)
    joined = merge.stitch(small, large, ("1", "2"), [x], samples=64, ridge=0.0)
    y = large[:2](x).detach()
    design = torch.cat([torch.tanh(small[0](x)).detach(), torch.ones(64, 1)], 1).double()
    solution = torch.linalg.lstsq(design, y.double()).solution
    wanted = large[2:]((design @ solution).float())
    assert torch.allclose(joined(x), wanted, atol=1e-4)
    gap = (design @ solution - y.double()).square().sum()
    assert joined.error == pytest.approx(
        float(gap / (y - y.mean(0)).double().square().sum()), rel=1e-3
    )
    assert torch.equal(nn.Module.state_dict(joined)["stitch.weight"], joined.stitch.weight)


def test_a_cut_that_is_no_block_is_named() -> None:
    with pytest.raises(merge.PlanError, match="no block of that name") as caught:
        merge.stitch(mlp(), mlp(), ("1", "layers.2"), [torch.randn(3, 4)])
    assert caught.value.found == "layers.2"
    with pytest.raises(merge.PlanError, match="no data"):
        merge.stitch(mlp(), mlp(), ("1", "2"), [])


# -- the command -----------------------------------------------------------------------------------
def test_the_command(models: dict[str, tuple[Path, str, int]], tmp_path: Path) -> None:
    from click.testing import CliRunner
    from merge_cli.app import cli

    folder = models["llama"][0]
    words = ["shrink", str(folder), "-o", str(tmp_path / "out"), "--layers", "3"]
    done = CliRunner().invoke(cli, [*words, "--width", "intermediate_size=48"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "out")
    assert "note: layers left out: 2" in done.stderr
    assert "note: cut by weights: intermediate_size to 48" in done.stderr
    bad = CliRunner().invoke(cli, [*words, "--width", "intermediate_size"])
    assert isinstance(bad.exception, merge.RecipeError) and "KEY=SIZE" in str(bad.exception)
