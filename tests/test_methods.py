"""Laws that hold for every merge method, found by scanning: a new one is covered as it is added."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import merge
from merge import methods
from merge.ir.checkpoint import Checkpoint
from merge.ir.merging import merge_checkpoints
from merge.methods.core.measure import Tiles
from merge.methods.core.schema import (
    Coefficients,
    Method,
    Operands,
    ParameterSpec,
    PerModel,
    Range,
    each,
    method,
)
from merge.methods.core.shapes import row_length
from merge.recipe.compile import compile_recipe
from merge.recipe.read import parse_recipe

State = dict[str, Tensor]

METHODS = list(methods.registry().values())
WITH_BASE = [
    dataclasses.replace(m, space="delta", base="required") for m in METHODS if m.space == "either"
]  # what a method with an optional base is when it is given one
SUBJECTS = [*METHODS, *WITH_BASE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
law = settings(max_examples=25, deadline=None)


def over(chosen: Sequence[Method]) -> pytest.MarkDecorator:
    ids = [f"{m.name} with base" if m in WITH_BASE else m.name for m in chosen]
    return pytest.mark.parametrize("m", chosen, ids=ids)


every_method = over(SUBJECTS)


# -- merging a few tensors by any method ---------------------------------------------------------


def merged(
    m: Method,
    models: Sequence[State],
    base: State | None = None,
    parameters: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Checkpoint:
    """``m`` over state dicts; ``base`` is used by methods that need one."""
    opened = [merge.open(state) for state in models]
    root = merge.open(base) if m.base == "required" and base is not None else None
    known = [merge.open(statistic_of(m, state)) for state in models] if m.statistics else []
    bound = m.bind(len(opened), parameters or {})
    return merge_checkpoints(m, opened, root, lambda _: bound, seed, known)


def statistic_of(m: Method, model: State) -> State:
    """Something positive for each weight, or a Gram matrix, which goes where its model goes."""
    if m.statistic is not None:
        return {n: t.float().T @ t.float() for n, t in model.items() if t.ndim == 2}
    return {n: t.float().square() if t.is_floating_point() else t for n, t in model.items()}


def some_value(spec: ParameterSpec) -> object:
    """A value that a parameter takes and that is not its default, if there is one."""
    if spec.type is bool:
        return not spec.default
    if spec.type is str:
        return spec.default
    choices = [0.5, 0.3, 1.0, 2.0, 3.0, spec.range.low, spec.range.high]
    fits = [spec.type(c) for c in choices if c in spec.range and np.isfinite(c)]
    return next((v for v in fits if v != spec.default), spec.default)


def plain(m: Method) -> dict[str, object]:
    """What must be said to run ``m``, and nothing more."""
    return {key: some_value(spec) for key, spec in m.parameters.items() if spec.required}


def busy(m: Method) -> dict[str, object]:
    """Every parameter away from its default."""
    return {key: some_value(spec) for key, spec in m.parameters.items()}


both_settings = pytest.mark.parametrize("parameters", [plain, busy])


def how_many(m: Method, most: int = 3) -> int:
    low, high = m.inputs
    return max(low, most if high is None else min(most, high))


def family(
    shapes: Mapping[str, tuple[int, ...]], count: int, dtype: torch.dtype = torch.float32
) -> tuple[State, list[State]]:
    """A base of random tensors, and models that differ a little from it."""
    draw = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tuned = [
        {n: (t + 0.1 * torch.randn(t.shape, generator=draw)).to(dtype) for n, t in base.items()}
        for _ in range(count)
    ]
    return {name: t.to(dtype) for name, t in base.items()}, tuned


def as_bytes(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state.items()}


def copy_of(state: State) -> State:
    return {name: t.clone() for name, t in state.items()}


SHAPES = {
    "matrix": (6, 10),
    "wide": (3, 129),
    "vector": (37,),
    "block": (2, 3, 4),
    "scalar": (),
    "one": (1,),
    "column": (5, 1),
    "empty": (0, 4),
}


# -- the file of a method is its documentation ---------------------------------------------------


@every_method
def test_a_method_states_its_formula(m: Method) -> None:
    assert re.search(r"^    \S.* = \S", m.doc, re.MULTILINE)


@every_method
def test_a_method_names_its_paper(m: Method) -> None:
    """An arXiv number, or an author with a year."""
    assert re.search(r"arXiv:\d{4}\.\d{5}|\b[A-Z][a-z]+( et al\.)? (19|20)\d\d\b", m.doc)


@every_method
def test_the_recipe_of_a_method_runs(m: Method) -> None:
    block = m.doc.partition("Recipe::\n")[2]
    lines = [line for line in block.split("\n") if line.startswith("    ") or not line]
    recipe = parse_recipe(textwrap.dedent("\n".join(lines)), m.name)
    model = recipe.final.model
    assert model.merge_method == m.name
    entries = model.models or []
    names = dict.fromkeys([model.base_model, *(e.model for e in entries)])
    base, tuned = family(SHAPES, len(names))
    opened = {n: merge.open(t) for n, t in zip(names, tuned, strict=True)}
    for entry in entries:
        opened[entry.statistics] = merge.open(statistic_of(m, base))
    state = compile_recipe(recipe, lambda name: opened[name]).checkpoint.state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in base.items()}
    assert all(t.isfinite().all() for t in state.values())


@over([m for m in METHODS if m.coefficients])
def test_the_example_of_a_linear_combination_holds(m: Method) -> None:
    finder = doctest.DocTestFinder()
    (example,) = finder.find(m.function, m.name, globs=dict(vars(inspect.getmodule(m.function))))
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(0, len(example.examples))
    assert example.examples


@every_method
def test_every_parameter_is_explained(m: Method) -> None:
    prose = m.function.__doc__ or ""
    required = [key for key, spec in m.parameters.items() if spec.required]
    assert [key for key in required if not re.search(rf"\b{key}\b", prose)] == []
    assert m.summary.endswith(".")


# -- laws of the result --------------------------------------------------------------------------

EIGHTHS = st.lists(
    st.integers(-128, 128).map(lambda n: n / 8), min_size=1, max_size=40
)  # sums of a few of them are exact, so that a sign never hangs on rounding


@over([m for m in SUBJECTS if m.idempotent])
@law
@given(values=EIGHTHS)
def test_copies_of_one_model_give_it_back(m: Method, values: list[float]) -> None:
    model = {"w": torch.tensor(values)}
    copies = [copy_of(model) for _ in range(how_many(m))]
    out = merged(m, copies, copy_of(model), plain(m)).state_dict()
    torch.testing.assert_close(out["w"], model["w"], rtol=2**-22, atol=0.0)


@over([m for m in SUBJECTS if m.idempotent])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_of_one_half_precision_model_give_its_very_bits(
    m: Method, dtype: torch.dtype
) -> None:
    _, [model] = family(SHAPES, 1, dtype)
    copies = [copy_of(model) for _ in range(how_many(m))]
    assert as_bytes(merged(m, copies, copy_of(model), plain(m)).state_dict()) == as_bytes(model)


@over([m for m in SUBJECTS if m.symmetric and how_many(m) > 1])
@both_settings
@law
@given(data=st.data())
def test_the_order_of_models_is_irrelevant(
    m: Method, parameters: Callable[[Method], dict[str, object]], data: st.DataObject
) -> None:
    count, size = how_many(m), data.draw(st.integers(1, 30))
    column = st.lists(st.integers(-128, 128).map(lambda n: n / 8), min_size=size, max_size=size)
    base, *models = ({"w": torch.tensor(data.draw(column))} for _ in range(count + 1))
    order = data.draw(st.permutations(range(count)))
    straight = merged(m, models, base, parameters(m)).state_dict()["w"]
    permuted = merged(m, [models[i] for i in order], base, parameters(m)).state_dict()["w"]
    torch.testing.assert_close(permuted, straight, rtol=2**-20, atol=2**-16)


@over([m for m in SUBJECTS if m.symmetric and how_many(m) > 1 and "weight" in m.parameters])
def test_a_weight_stays_with_its_model_in_any_order(m: Method) -> None:
    base, models = family(SHAPES, how_many(m))
    weights, order = [0.5, 0.25, 2.0][: len(models)], [*range(1, len(models)), 0]
    straight = merged(m, models, base, {"weight": weights}).state_dict()
    moved = merged(m, [models[i] for i in order], base, {"weight": [weights[i] for i in order]})
    torch.testing.assert_close(moved.state_dict(), straight, rtol=2**-18, atol=2**-20)


@over([m for m in SUBJECTS if "weight" in m.parameters and m.inputs[0] == 1])
def test_a_single_model_of_weight_one_is_given_back(m: Method) -> None:
    base, [model] = family(SHAPES, 1)
    whole = {"weight": 1.0, "lambda": 1.0}
    given_ = {**plain(m), **{k: v for k, v in whole.items() if k in m.parameters}}
    out = merged(m, [model], base, given_).state_dict()
    torch.testing.assert_close(out, model, rtol=0.0, atol=2**-21)


@over([methods.get("linear"), methods.get("task_arithmetic")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_model_of_weight_one_is_copied_byte_for_byte(
    m: Method, dtype: torch.dtype
) -> None:
    base, [model] = family(SHAPES, 1, dtype)
    assert as_bytes(merged(m, [model], base, {"weight": 1.0}).state_dict()) == as_bytes(model)


@every_method
@both_settings
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_and_dtype_survive(
    m: Method, parameters: Callable[[Method], dict[str, object]], dtype: torch.dtype
) -> None:
    base, models = family(SHAPES, how_many(m), dtype)
    lazy = merged(m, models, base, parameters(m))
    state = lazy.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
        n: (torch.Size(shape), dtype) for n, shape in SHAPES.items()
    }
    assert {n: s.shape for n, s in lazy.items()} == SHAPES
    assert all(t.isfinite().all() for t in state.values())


@every_method
@both_settings
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_tensors_of_one_value_stay_finite(
    m: Method, parameters: Callable[[Method], dict[str, object]], value: float
) -> None:
    flat = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    models = [copy_of(flat) for _ in range(how_many(m))]
    out = merged(m, models, copy_of(flat), parameters(m)).state_dict()
    assert all(t.isfinite().all() for t in out.values())
    if value == 0.0:
        assert all(not t.any() for t in out.values())


@over([m for m in SUBJECTS if m.space == "delta"])
@both_settings
def test_models_equal_to_their_base_give_the_base(
    m: Method, parameters: Callable[[Method], dict[str, object]]
) -> None:
    base, _ = family(SHAPES, 1)
    out = merged(m, [copy_of(base)] * how_many(m), base, parameters(m)).state_dict()
    torch.testing.assert_close(out, base, rtol=2**-22, atol=0.0)


@over(
    [
        m
        for m in SUBJECTS
        if m.space == "delta" and "weight" in m.parameters and m.name != "nuslerp"
    ]  # whose weights only say where between two models: half way if they sum to 0
)
def test_weights_of_zero_give_the_base(m: Method) -> None:
    base, models = family(SHAPES, how_many(m))
    parameters = {**busy(m), "weight": 0.0}
    if "normalize_weights" in m.parameters:
        parameters["normalize_weights"] = False  # which would have them add up to 1
    out = merged(m, models, base, parameters).state_dict()
    torch.testing.assert_close(out, base, rtol=0.0, atol=0.0)


@every_method
@both_settings
def test_types_may_be_mixed(m: Method, parameters: Callable[[Method], dict[str, object]]) -> None:
    """The result is that of the same values in float32, in the type that holds all of them."""
    base, models = family(SHAPES, how_many(m), torch.bfloat16)
    kinds = [torch.float16, torch.float32, torch.bfloat16]
    mixed = [{n: t.to(kind) for n, t in s.items()} for s, kind in zip(models, kinds, strict=False)]
    out = merged(m, mixed, base, parameters(m)).state_dict()
    single = [{n: t.float() for n, t in s.items()} for s in (base, *mixed)]
    expected = merged(m, single[1:], single[0], parameters(m)).state_dict()
    based = m.base == "required"
    wanted = torch.float32 if based or len(mixed) > 1 else torch.float16
    assert {t.dtype for t in out.values()} == {wanted}
    assert as_bytes(out) == as_bytes({n: t.to(wanted) for n, t in expected.items()})


@over([m for m in SUBJECTS if m.space == "delta"])
def test_a_merge_of_differences_is_the_difference_of_the_merge(m: Method) -> None:
    """Deltas may be given as they are; then no base is added back."""
    base, models = family(SHAPES, how_many(m))
    root, opened = merge.open(base), [merge.open(t) for t in models]
    bound = m.bind(len(opened), busy(m))
    whole = merge_checkpoints(m, opened, root, lambda _: bound)
    delta = merge_checkpoints(m, [o - root for o in opened], None, lambda _: bound)
    assert (whole.space, delta.space) == ("weight", "delta")
    expected = {n: t - base[n] for n, t in whole.state_dict().items()}
    torch.testing.assert_close(delta.state_dict(), expected, rtol=0.0, atol=2**-20)


@every_method
@both_settings
def test_an_input_that_is_not_finite_is_named(
    m: Method, parameters: Callable[[Method], dict[str, object]]
) -> None:
    base, models = family({"sound": (4,), "broken": (6, 10)}, how_many(m))
    models[-1]["broken"][3, 7] = float("nan")
    with pytest.raises(merge.SourceError, match="not finite") as caught:
        merged(m, models, base, parameters(m)).state_dict()
    assert caught.value.where["tensor"] == "broken"
    assert caught.value.found == "at least 1 NaN, the first seen at index 37"


# -- purity and repetition -----------------------------------------------------------------------


@every_method
@both_settings
def test_inputs_are_never_written_to(
    m: Method, parameters: Callable[[Method], dict[str, object]]
) -> None:
    base, models = family(SHAPES, how_many(m))
    before = [as_bytes(s) for s in (base, *models)]
    merged(m, models, base, parameters(m)).state_dict()
    assert [as_bytes(s) for s in (base, *models)] == before


@over([m for m in SUBJECTS if not m.coefficients])
@both_settings
def test_a_method_leaves_its_operands_as_they_are(
    m: Method, parameters: Callable[[Method], dict[str, object]]
) -> None:
    """A tile is shared with whatever else uses that operand: a base, or another method."""
    calls = []

    def watched(*groups: list[Tensor], **rest: Any) -> Tensor:
        operands = [x for group in groups for x in group]
        before = [x.clone() for x in operands]
        out: Tensor = m.function(*groups, **rest)
        calls.append(all(torch.equal(x, b) for x, b in zip(operands, before, strict=True)))
        return out

    base, models = family(SHAPES, how_many(m))
    spied = dataclasses.replace(m, function=watched)
    merged(spied, models, base, parameters(m)).state_dict()
    assert calls
    assert all(calls)


READ_ONLY = """
import mmap, sys, warnings
import torch
from test_methods import SUBJECTS, as_bytes, busy, how_many, merged

warnings.simplefilter("ignore")  # torch says that the memory is read-only, which is the point
file = open(sys.argv[1], "rb")
page = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
models = [{"w": torch.frombuffer(page, dtype=torch.float32, offset=400 * i, count=100)}
          for i in range(4)]
for m in SUBJECTS:
    merged(m, models[: how_many(m)], models[3], busy(m)).state_dict()
print(len(SUBJECTS))
"""


def test_weights_in_read_only_memory_can_be_merged(tmp_path: Path) -> None:
    """A write to a read-only map would kill the process."""
    weights = tmp_path / "weights"
    weights.write_bytes(np.random.default_rng(0).normal(size=400).astype(np.float32).tobytes())
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, weights],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(SUBJECTS)


@pytest.fixture(scope="module")
def large() -> tuple[State, list[State]]:
    """Tensors of several tiles and chunks."""
    return family({"long": (2_300_000,), "matrix": (700, 900), "small": (3, 5)}, 3)


@every_method
def test_any_number_of_threads_gives_the_same_bytes_every_time(
    m: Method, large: tuple[State, list[State]]
) -> None:
    base, models = large
    lazy = merged(m, models[: how_many(m)], base, busy(m))
    first, *others = (as_bytes(lazy.state_dict(threads=n)) for n in (1, 1, 2, 4))
    assert all(other == first for other in others)


@every_method
def test_a_seed_changes_a_random_method_and_no_other(m: Method) -> None:
    base, models = family(SHAPES, how_many(m))
    zero, again, one = (
        as_bytes(merged(m, models, base, busy(m), seed).state_dict()) for seed in (0, 0, 1)
    )
    assert zero == again
    assert (zero != one) == m.random


@over([m for m in SUBJECTS if m.random])
def test_random_methods_neither_use_nor_move_the_generator_of_the_process(m: Method) -> None:
    base, models = family(SHAPES, how_many(m))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = as_bytes(merged(m, models, base, busy(m)).state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert as_bytes(merged(m, models, base, busy(m)).state_dict()) == first


@over([m for m in SUBJECTS if m.random])
def test_what_else_is_in_the_model_does_not_move_the_draws_of_a_tensor(m: Method) -> None:
    base, models = family(SHAPES, how_many(m))
    alone = [{"wide": s["wide"]} for s in (base, *models)]
    whole = merged(m, models, base, busy(m)).state_dict()["wide"]
    assert torch.equal(merged(m, alone[1:], alone[0], busy(m)).state_dict()["wide"], whole)


# -- scanning and registering --------------------------------------------------------------------

SCAN = """
import sys
import merge
from merge.recipe.schema import json_schema
assert [m.doc for m in merge.methods.registry().values()] and json_schema()
print(sorted({"torch", "transformers", "safetensors"} & set(sys.modules)))
"""


def test_scanning_the_methods_does_not_import_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCAN], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_methods_are_found_by_their_file() -> None:
    files = {p.stem for p in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(methods.registry()) == files
    assert list(methods.registry()) == sorted(files)


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(merge.RecipeError, match="unknown merge method 'tise'") as caught:
        methods.get("tise")
    assert caught.value.do == "did you mean 'ties'?"


PLUGIN = '''
from merge.methods.core.schema import Coefficients, method


@method(space="weight", inputs=(2, 2))
def blend(*, share: float = 0.5) -> Coefficients:
    """The first model's share, and the rest of the second."""
    return [share, 1.0 - share]


not_a_method = 3
'''

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install("module:object")``: a package whose entry point leads there."""

    def put(target: str) -> None:
        info = tmp_path / "blend_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: blend-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[hf_merge.methods]\nblend = {target}\n")
        (tmp_path / "blend_plugin.py").write_text(PLUGIN)
        monkeypatch.syspath_prepend(tmp_path)
        methods.registry.cache_clear()

    yield put
    sys.modules.pop("blend_plugin", None)
    methods.registry.cache_clear()


def test_a_package_adds_a_method_by_an_entry_point(install: Install) -> None:
    install("blend_plugin:blend")
    assert [*methods.registry()] == sorted([*(m.name for m in METHODS), "blend"])
    models = {"a": merge.open({"w": torch.zeros(3)}), "b": merge.open({"w": torch.ones(3)})}
    lazy = merge.blend(list(models.values()), share=0.25)
    assert lazy.state_dict()["w"].tolist() == [0.75, 0.75, 0.75]
    recipe = parse_recipe("merge_method: blend\nmodels: [{model: a}, {model: b}]\n")
    state = compile_recipe(recipe, lambda reference: models[str(reference)]).checkpoint.state_dict()
    assert state["w"].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "target", ["blend_plugin:not_a_method", "blend_plugin:missing", "no_such_module:blend"]
)
def test_an_entry_point_that_leads_to_no_method_is_named(install: Install, target: str) -> None:
    install(target)
    with pytest.raises(merge.RecipeError, match=r"'blend' of group 'hf_merge\.methods'"):
        methods.registry()


# -- the schema in the signature -----------------------------------------------------------------


@method(space="weight", inputs=(2, 3))
def knobs(
    *,
    weight: PerModel[float],
    part: Annotated[float, Range(0.0, 1.0, open_low=True)] = 1.0,
    steps: Annotated[int, Range(1, 9)] = 3,
    strict: bool = False,
    lambda_: Annotated[PerModel[float], Range(low=0.0)] = each(2.0),
    mode: str = "mean",
) -> Coefficients:
    """A method with one parameter of each kind."""
    return [part * w for w in weight]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("weight", 1, 1.0),
        ("weight", "1e-4", 1e-4),
        ("weight", " -2.5 ", -2.5),
        ("weight", True, 1.0),
        ("part", 1.0, 1.0),
        ("part", "0.25", 0.25),
        ("steps", 3.0, 3),
        ("steps", "9", 9),
        ("strict", True, True),
        ("strict", 1.0, True),
        ("strict", 0, False),
        ("strict", "yes", True),
        ("strict", "True", True),
        ("strict", "on", True),
        ("strict", "No", False),
        ("strict", "off", False),
        ("lambda", 0, 0.0),
        ("mode", "median", "median"),
    ],
)
def test_a_parameter_takes_what_recipes_in_the_wild_write(
    key: str, value: object, expected: object
) -> None:
    got = knobs.parameter(key).coerce(value)
    assert (got, type(got)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("weight", "heavy", "'weight' needs a number"),
        ("weight", None, "'weight' needs a number"),
        ("weight", [1.0], "'weight' needs a number"),
        ("weight", float("nan"), "'weight' is out of range"),
        ("weight", "inf", "'weight' is out of range"),
        ("part", 0.0, "'part' is out of range"),
        ("part", 1.0001, "'part' is out of range"),
        ("steps", 2.5, "'steps' needs a whole number"),
        ("steps", "1e400", "'steps' needs a whole number"),
        ("steps", 10, "'steps' is out of range"),
        ("strict", 2, "'strict' needs true or false"),
        ("strict", "maybe", "'strict' needs true or false"),
        ("strict", None, "'strict' needs true or false"),
        ("lambda", -0.1, "'lambda' is out of range"),
        ("mode", 3, "'mode' needs text"),
    ],
)
def test_a_parameter_refuses_what_does_not_fit(key: str, value: object, what: str) -> None:
    with pytest.raises(merge.RecipeError, match=what) as caught:
        knobs.parameter(key).coerce(value)
    assert caught.value.where["key"] == key
    assert caught.value.found == repr(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_taken_exactly_as_it_is_or_as_text(value: float) -> None:
    weight = knobs.parameter("weight")
    assert weight.coerce(value) == weight.coerce(repr(value)) == value


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Range(), "any finite number"),
        (Range(0.0, 1.0), "[0, 1]"),
        (Range(0.0, 1.0, open_low=True), "(0, 1]"),
        (Range(low=0.5), "[0.5, inf)"),
        (Range(high=2.0), "(-inf, 2]"),
    ],
)
def test_a_range_is_said_as_an_interval(interval: Range, text: str) -> None:
    assert str(interval) == text


def test_the_signature_is_the_schema() -> None:
    assert list(knobs.parameters) == ["weight", "part", "steps", "strict", "lambda", "mode"]
    assert [k for k, p in knobs.parameters.items() if p.required] == ["weight"]
    assert [k for k, p in knobs.parameters.items() if p.per_model] == ["weight", "lambda"]
    assert knobs.parameter("lambda").argument == "lambda_"


def test_one_value_of_a_per_model_parameter_goes_to_all() -> None:
    bound = knobs.bind(2, {"weight": "0.5", "strict": "yes"})
    assert bound == {
        "weight": (0.5, 0.5),
        "part": 1.0,
        "steps": 3,
        "strict": True,
        "lambda_": (2.0, 2.0),
        "mode": "mean",
    }
    assert knobs.bind(2, {"weight": [1, "2"], "lambda": (3, 4)})["lambda_"] == (3.0, 4.0)


@pytest.mark.parametrize(
    ("given_", "what", "do"),
    [
        ({}, "'knobs' needs parameter 'weight'", None),
        ({"weight": [1.0]}, "'weight' needs one value a model", None),
        ({"weight": [1.0, 2.0, 3.0]}, "'weight' needs one value a model", None),
        ({"weigth": 1.0}, "no parameter 'weigth'", "did you mean 'weight'?"),
        ({"weight": 1.0, "xyz": 1.0}, "no parameter 'xyz'", "see `merge methods knobs`"),
        ({"weight": [1.0, "x"]}, "'weight' needs a number", None),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    given_: dict[str, object], what: str, do: str | None
) -> None:
    with pytest.raises(merge.RecipeError, match=what) as caught:
        knobs.bind(2, given_)
    assert caught.value.do == do


@pytest.mark.parametrize(
    ("m", "count", "says"),
    [
        (methods.get("slerp"), 3, "exactly 2"),
        (methods.get("passthrough"), 0, "exactly 1"),
        (methods.get("model_stock"), 1, "at least 2"),
        (knobs, 1, "2"),
        (knobs, 4, "3"),
    ],
    ids=str,
)
def test_a_wrong_number_of_models_is_refused_with_the_right_one(
    m: Method, count: int, says: str
) -> None:
    with pytest.raises(merge.RecipeError, match=f"method '{m.name}' takes") as caught:
        m.check_inputs(count)
    assert caught.value.found == str(count)
    assert says in (caught.value.expected or "")


@over([m for m in METHODS if m.space == "delta"])
def test_weights_without_a_base_are_refused(m: Method) -> None:
    models = [merge.open({"w": torch.ones(2)}) for _ in range(how_many(m))]
    with pytest.raises(merge.PlanError, match="no base was given"):
        merge_checkpoints(m, models, None, lambda _: m.bind(len(models), plain(m)))


# -- the base as one of the models ---------------------------------------------------------------


@method(space="weight", inputs=(2, 2), base="first operand")
def between(*, share: PerModel[float]) -> Coefficients:
    """Each model's share."""
    return list(share)


def test_a_base_that_is_the_first_operand_has_a_value_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "registry", lambda: {"between": between})
    base, other = merge.open({"w": torch.zeros(2)}), merge.open({"w": torch.ones(2)})
    unlisted = merge.between([other], base=base, share=[0.25, 0.75])
    assert unlisted.state_dict()["w"].tolist() == [0.75, 0.75]
    listed_last = merge.between([other, base], base=base, share=[0.25, 0.75])
    assert listed_last.state_dict()["w"].tolist() == [0.25, 0.25]


def test_a_base_that_is_listed_by_its_path_is_not_taken_twice(
    make_model: Callable[..., Path],
) -> None:
    a, b = (make_model(n, {"w": torch.full((2,), v)}) for n, v in (("a", 1.0), ("b", 3.0)))
    for models in ([a, b], [b, a], [b], [str(a), b]):
        assert merge.slerp(models, base=a, t=0.25).state_dict()["w"].tolist() == [1.5, 1.5]


# -- how much of a tensor a method sees ----------------------------------------------------------

Seen = list[tuple[int, ...]]
SEEN: Seen = []


@pytest.fixture
def seen() -> Iterator[Seen]:
    """The shapes of the tiles that the two methods below were given."""
    SEEN.clear()
    yield SEEN
    SEEN.clear()


@method(space="weight", local="row")
def centred(models: Operands) -> torch.Tensor:
    """The first model with the mean of each row taken away."""
    SEEN.append(tuple(models[0].shape))
    return models[0] - models[0].mean(dim=-1, keepdim=True)


@method(space="weight", local="tensor")
def turned(models: Operands) -> torch.Tensor:
    """The first model with every axis reversed."""
    SEEN.append(tuple(models[0].shape))
    return models[0].flip(tuple(range(models[0].dim())))


def rows_measured(tiles: Tiles, **_: object) -> list[tuple[int, ...]]:
    return [tuple(operands[0].shape) for _, operands in tiles()]


@method(space="weight", local="row", measure=rows_measured)
def measured_rows(models: Operands, *, measured: list[tuple[int, ...]]) -> torch.Tensor:
    """The first model; notes what its measuring pass saw."""
    SEEN.extend(measured)
    return models[0].clone()


MANY_SHAPES = {
    "matrix": (1000, 600),
    "wide": (3, 100_000),
    "vector": (600,),
    "long vector": (1 << 18,),
    "block": (4, 8, 6),
    "one chunk": (2, 512, 256),
    "column": (50, 1),
    "one": (1, 1),
    "scalar": (),
    "empty": (0, 4),
}


@pytest.mark.parametrize("shape", MANY_SHAPES.values(), ids=MANY_SHAPES)
@pytest.mark.parametrize("m", [centred, measured_rows], ids=str)
def test_a_method_on_rows_sees_whole_rows(m: Method, shape: tuple[int, ...], seen: Seen) -> None:
    weights = torch.randn(shape)
    out = merged(m, [{"w": weights}]).state_dict(threads=2)["w"]
    if not weights.numel():
        assert seen == []
        return
    length = row_length(shape)
    assert {len(tile) for tile in seen} == {2}
    assert {tile[-1] for tile in seen} == {length}
    if m is centred:
        rows = weights.reshape(-1, length)
        torch.testing.assert_close(out.view_as(rows), rows - rows.mean(dim=-1, keepdim=True))
        assert sum(count for count, _ in seen) == len(rows)


def test_rows_come_in_tiles_that_fit_the_cache(seen: Seen) -> None:
    merged(centred, [{"w": torch.zeros(3000, 600)}]).state_dict()
    assert len(seen) > 1
    assert max(rows * columns for rows, columns in seen) <= 1 << 18


@pytest.mark.parametrize("shape", MANY_SHAPES.values(), ids=MANY_SHAPES)
def test_a_method_on_tensors_sees_the_whole_tensor(shape: tuple[int, ...], seen: Seen) -> None:
    weights = torch.randn(shape)
    out = merged(turned, [{"w": weights}]).state_dict(threads=2)["w"]
    assert torch.equal(out, weights.flip(tuple(range(weights.dim()))))
    assert seen == ([shape] if weights.numel() else [])
