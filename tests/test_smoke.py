"""The smoke check: what is whole passes with its own figures, what is broken is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from merge_cli.app import cli
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

import merge
from merge.errors import RecipeError, SourceError
from merge.smoke import Smoke, smoke
from merge.smoke.inputs import dummy_inputs
from merge.smoke.result import tensors_of

from .architectures import DECODERS, PARTS, Family, new_model

FAMILIES = {
    name: (DECODERS | PARTS)[name]
    for name in (
        "llama", "mixtral", "gpt2", "bert", "vit", "t5 encoder", "bart encoder", "whisper decoder",
        "clip text", "llava text",
    )
}  # fmt: skip
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved("llama")``: the folder of a small model, not to be changed."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            new_model(FAMILIES[name]).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture
def llama(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A llama to be damaged."""
    return Path(shutil.copytree(saved("llama"), tmp_path / "llama"))


def change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite the weights of ``folder``."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# -- what it is given ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_input_suits_the_model_and_is_the_same_each_time(family: Family) -> None:
    model = new_model(family)
    given, again = dummy_inputs(model), dummy_inputs(model)
    assert model.main_input_name in given
    for name, value in given.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, again[name]) and value.shape[0] == 1
    for name in {"input_ids", "decoder_input_ids"} & given.keys():
        size = model.config.get_text_config().vocab_size
        assert int(given[name].min()) >= 0 and int(given[name].max()) < size
        assert len(given[name].unique()) > 3


def test_ids_are_none_of_the_special_ones_but_the_last() -> None:
    model = new_model(DECODERS["phi3"], {"pad_token_id": 3, "bos_token_id": 10, "eos_token_id": 17})
    ids = dummy_inputs(model)["input_ids"][0].tolist()
    assert ids[-1] == 17 and not {3, 10, 17} & set(ids[:-1])


def test_a_model_with_pictures_in_its_text_is_tried_without(saved: Callable[[str], Path]) -> None:
    assert "pixel_values" not in dummy_inputs(new_model(FAMILIES["llava text"]))
    assert smoke(saved("llava text")).notes == ("pixel_values were not tried",)


# -- what is whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_passes_with_the_figures_of_its_output(
    name: str, saved: Callable[[str], Path]
) -> None:
    found = smoke(saved(name))
    assert found.ok and not found.missing and not found.unexpected and found.dtype == "float32"
    assert found.loader == f"transformers.{FAMILIES[name].model}"
    model = new_model(FAMILIES[name])
    with torch.inference_mode():
        output = model(**dummy_inputs(model))
    assert found.figures is not None
    main = output[found.figures.name]
    assert "logits" in found.figures.name and found.figures.shape == tuple(main.shape)
    figures = [found.figures.mean, found.figures.std, found.figures.largest]
    wanted = [main.mean().item(), main.std(correction=0).item(), main.abs().max().item()]
    assert figures == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_stored_type_is_the_type_it_runs_in(tmp_path: Path) -> None:
    new_model(DECODERS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    found = smoke(tmp_path / "m")
    assert (found.ok, found.dtype, found.notes) == (True, "bfloat16", ())


def test_a_missing_kernel_is_made_up_for_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_model(DECODERS["llama"]).to(torch.float16).save_pretrained(tmp_path / "m")
    plain = transformers.LlamaModel.forward

    def lacking(self: Any, *args: Any, **rest: Any) -> Any:
        if self.dtype == torch.float16:
            raise RuntimeError("\"some_kernel\" not implemented for 'Half'")
        return plain(self, *args, **rest)

    monkeypatch.setattr(transformers.LlamaModel, "forward", lacking)
    found = smoke(tmp_path / "m")
    assert found.ok and found.figures is not None
    assert found.notes == ("run in float32: no kernel here for float16",)


def test_every_tensor_of_a_nested_output_is_looked_at() -> None:
    one, two = torch.ones(1), torch.zeros(2)
    output = {"a": {"h": one, "n": 3, "i": torch.ones(1, dtype=torch.int64)}, "b": (two, [one])}
    assert [name for name, _ in tensors_of(output)] == ["a.h", "b.0", "b.1.0"]
    assert [name for name, _ in tensors_of(one)] == ["output"]


def test_without_architectures_the_bare_model_is_tried(llama: Path) -> None:
    found = smoke(configure(llama, architectures=None))
    assert found.ok and found.loader == "transformers.LlamaModel"
    assert found.figures is not None and found.figures.name == "last_hidden_state"
    assert found.notes == ("1 weights have no place in the model: lm_head.weight",)


# -- what is broken --------------------------------------------------------------------------------


def lacks(name: str) -> Callable[[Path], Path]:
    return lambda folder: change(folder, lambda state: state.pop(name))


def poisoned(value: float) -> Callable[[Path], Path]:
    return lambda folder: change(folder, lambda state: state[UP].view(-1)[5].fill_(value))


def cut_off(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return folder


def empty(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a tensor is missing": (lacks(UP), f"1 weights are missing: {UP}"),
    "a tensor of another shape": (
        lambda f: change(f, lambda s: s.update({UP: torch.ones(3, 16)})),
        f"1 weights do not fit: {UP} [3, 16], not [24, 16]",
    ),
    "NaN": (poisoned(float("nan")), "320 numbers are NaN or infinite: 320 in logits"),
    "infinity": (poisoned(float("inf")), "numbers are NaN or infinite"),
    "a file that is cut off": (cut_off, "it cannot be opened: the file is cut off"),
    "no weights at all": (
        empty,
        "it cannot be opened: the folder holds no safetensors weights",
    ),
    "a config that the class does not take": (
        lambda folder: configure(folder, hidden_size="wide"),
        "it does not load: ",
    ),
    "a config of another model": (
        lambda folder: configure(folder, head_dim=4),
        "weights do not fit: model.layers.0.self_attn.k_proj.weight [8, 16], not [4, 16]",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named(damage: Callable[[Path], Path], problem: str, llama: Path) -> None:
    found = smoke(damage(llama))
    assert not found.ok
    assert any(problem in p for p in found.problems), found.problems
    assert "smoke check failed" in str(found) and problem in str(found)


def test_a_forward_pass_that_breaks_off_is_a_failure(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any, **__: Any) -> Any:
        raise KeyError("layer_types")

    monkeypatch.setattr(transformers.LlamaModel, "forward", broken)
    assert smoke(llama).problems == ("its forward pass broke off: KeyError: 'layer_types'",)


def test_missing_weights_are_listed_and_the_rest_is_run_all_the_same(llama: Path) -> None:
    found = smoke(lacks("model.norm.weight")(llama))
    assert found.missing == ("model.norm.weight",) and found.figures is not None


def test_a_weight_without_a_place_is_noted_and_no_failure(llama: Path) -> None:
    found = smoke(change(llama, lambda s: s.update({"vision.w": torch.ones(2)})))
    assert found.ok and found.unexpected == ("vision.w",)
    assert found.notes == ("1 weights have no place in the model: vision.w",)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such model"):
        smoke(tmp_path / "absent")


# -- what nothing here loads -----------------------------------------------------------------------

UNKNOWN: dict[str, tuple[Mapping[str, Any], str]] = {
    "a class": ({"architectures": ["NewForCausalLM"]}, "has no class NewForCausalLM of its own"),
    "a type": (
        {"architectures": None, "model_type": "brand_new"},
        "has no model type brand_new of its own",
    ),
    "a word of the library": ({"architectures": ["logging"]}, "has no class logging of its own"),
    "no type": ({"model_type": None}, ""),
}


@pytest.mark.parametrize(("config", "note"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_transformers_does_not_know_is_not_checked(
    config: Mapping[str, Any], note: str, llama: Path
) -> None:
    if config.get("model_type", "") is None:
        (llama / "config.json").write_text("{}")
        note = "config.json has no model_type"
    else:
        configure(llama, **config)
    found = smoke(llama)
    assert found.ok and found.loader is None and note in found.notes[0]
    assert "smoke check not made" in str(found)


def test_a_config_of_a_far_larger_model_is_not_loaded(llama: Path) -> None:
    """All that is not in the files would be made up, in memory: here 25 GiB."""
    found = smoke(configure(llama, hidden_size=4096, intermediate_size=16384, num_hidden_layers=32))
    assert not found.ok and found.loader is None
    assert found.problems[0].startswith("config.json describes a model of 6,")


def test_a_models_own_code_is_not_run(llama: Path) -> None:
    (llama / "modeling_own.py").write_text("raise SystemExit('it was run')")
    configure(
        llama,
        model_type="own",
        architectures=None,
        auto_map={"AutoModel": "modeling_own.Own", "AutoConfig": "modeling_own.Config"},
    )
    assert smoke(llama).loader is None


def test_a_difference_of_weights_is_no_model(llama: Path, tmp_path: Path) -> None:
    (merge.open(llama) - merge.open(llama)).save(tmp_path / "delta")
    assert smoke(tmp_path / "delta").notes == ("a difference of weights is no model",)


# -- other libraries -------------------------------------------------------------------------------


def test_sentence_transformers_gives_embeddings(minilm: Path) -> None:
    found = smoke(minilm)
    assert found.ok and found.loader == "sentence_transformers.SentenceTransformer"
    assert found.figures is not None
    assert (found.figures.name, found.figures.shape) == ("embeddings", (2, 384))
    assert found.figures.std == pytest.approx(384**-0.5, rel=0.01)  # of rows of length 1


def test_a_broken_encoder_is_named(minilm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(minilm, tmp_path / "m"))
    found = smoke(change(folder, lambda s: s.pop("encoder.layer.0.output.dense.bias")))
    assert found.missing == ("encoder.layer.0.output.dense.bias",) and not found.ok
    (folder / "modules.json").write_text("[{}]")
    assert any("sentence-transformers cannot use it" in p for p in smoke(folder).problems)


def test_a_pipeline_of_diffusers_loads(tmp_path: Path) -> None:
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "whole")
    unet.save_pretrained(tmp_path / "part")
    found = smoke(tmp_path / "whole")
    assert (found.ok, found.loader) == (True, "diffusers.DDPMPipeline")
    assert smoke(tmp_path / "part").loader == "diffusers.UNet2DModel"
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    unet.save_pretrained(tmp_path / "whole" / "unet")
    problem = "1 numbers are NaN or infinite: 1 in unet.conv_in.weight"
    assert smoke(tmp_path / "whole").problems == (problem,)
    (tmp_path / "whole" / "scheduler" / "scheduler_config.json").unlink()
    assert smoke(tmp_path / "whole").problems[0].startswith("it does not load: ")


@pytest.mark.parametrize("library", ["sentence_transformers", "diffusers"])
def test_a_library_that_is_not_installed_is_said_not_to_be(
    library: str, minilm: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, library)
    configure(llama, _class_name="UNet2DModel")
    found = smoke(llama if library == "diffusers" else minilm)
    assert found.ok and f"{library.replace('_', '-')} is not installed" in found.notes[-1]


# -- how it is asked for ---------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """As if the library were not installed."""

    def found(name: str) -> object:
        return None if name == library else find_spec(name)

    monkeypatch.setattr("merge.smoke.find_spec", found)
    monkeypatch.setattr("merge.smoke.load.find_spec", found)


def call(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(w) for w in words])


@pytest.fixture
def recipe(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yml"
    path.write_text(f"merge_method: passthrough\nmodels: [{{model: {saved('llama')}}}]\n")
    return path


def test_apply_tells_on_stderr_and_in_json(recipe: Path, saved: Callable[[str], Path]) -> None:
    done = call("apply", recipe, "out", "--smoke", "--smoke-against", saved("llama"))
    assert (done.exit_code, done.stdout) == (0, "out\n")
    assert "out: smoke check passed, transformers.LlamaForCausalLM in float32\n" in done.stderr
    assert f"{saved('llama')}: smoke check passed" in done.stderr
    assert done.stderr.count("  logits 1x8x40: mean ") == 2
    again = call("apply", recipe, "out", "--smoke", "--json", "-q")
    data = json.loads(again.stdout)
    assert data["already_complete"] and data["smoke"]["ok"] and "smoke_against" not in data
    assert data["smoke"]["figures"]["shape"] == [1, 8, 40]


def test_an_output_that_fails_stays_and_the_exit_code_is_3(recipe: Path, llama: Path) -> None:
    poisoned(float("nan"))(llama)
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {llama}}}]\n")
    done = call("apply", recipe, "out", "--allow-non-finite", "--smoke")
    assert (done.exit_code, done.stdout) == (3, "out\n")
    assert "problem: 320 numbers are NaN or infinite: 320 in logits" in done.stderr
    assert merge.verify("out").ok


def test_verify_makes_both_checks(recipe: Path, saved: Callable[[str], Path]) -> None:
    assert call("apply", recipe, "out", "-q").exit_code == 0
    done = call("verify", "out", "--smoke")
    assert (
        done.exit_code == 0 and "out: sound" in done.stdout and "smoke check passed" in done.stdout
    )
    assert "smoke" not in json.loads(call("verify", "out", "--json").stdout)
    lacks("model.norm.weight")(Path("out"))
    bad = call("verify", "out", "--smoke", "--json")
    data = json.loads(bad.stdout)
    assert (
        bad.exit_code == 3 and not data["ok"] and data["smoke"]["missing"] == ["model.norm.weight"]
    )
    cut_off(Path("out"))
    assert call("verify", "out", "--smoke").exit_code == 3


def test_the_model_to_compare_with_does_not_decide(recipe: Path, llama: Path) -> None:
    lacks(UP)(llama)
    done = call("apply", recipe, "out", "--smoke", "--smoke-against", llama)
    assert done.exit_code == 0 and f"{llama}: smoke check failed" in done.stderr


def test_what_cannot_be_checked_is_refused_before_any_work(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("apply", recipe, "out", "--smoke-against", ".").exit_code == 2
    assert call("apply", recipe, "out", "--smoke", "--smoke-against", "absent").exit_code == 2
    hide(monkeypatch, "transformers")
    done = call("apply", recipe, "out", "--smoke")
    assert isinstance(done.exception, RecipeError)
    assert "pip install 'hf-merge[transformers]'" in str(done.exception)
    assert not Path("out").exists()


def test_libraries_are_silent_and_then_as_they_were(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    lacks(UP)(llama)
    capfd.readouterr()
    smoke(llama)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_check_is_printed_with_all_that_it_found() -> None:
    found = Smoke(Path("m"), "library.Class", "float16", problems=("p",), notes=("n",))
    assert str(found) == (
        "m: smoke check failed, library.Class in float16\n  problem: p\n  note: n"
    )
    assert found.to_json()["path"] == "m"
