"""Quantised weights of every kind are refused by name, and the message says what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import merge
from merge.errors import SourceError

from .conftest import MakeModel
from .folders import UNET, error_of, pipeline, saved, state, written

BNB = {"quant_method": "bitsandbytes"}
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "GPTQ, 4 bit"),
    "awq": ({"quant_method": "awq", "bits": 4}, "AWQ, 4 bit"),
    "bitsandbytes in 4 bit": (BNB | {"load_in_4bit": True, "bits": 8}, "bitsandbytes, 4 bit"),
    "bitsandbytes in 8 bit": (
        BNB | {"load_in_4bit": False, "load_in_8bit": True},
        "bitsandbytes, 8 bit",
    ),
    "hqq": ({"quant_method": "hqq"}, "HQQ"),
    "of tomorrow": ({"quant_method": "quip-sharper", "bits": 2}, "quip-sharper, 2 bit"),
    "without a name": ({"scheme": "secret"}, "by a method that is not named"),
}


@pytest.mark.parametrize(("entry", "name"), TOLD.values(), ids=TOLD)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_method_that_config_names_is_refused_by_name(
    entry: dict[str, Any], name: str, key: str, make_model: MakeModel
) -> None:
    folder = make_model("a", state(), config={"model_type": "toy", key: entry})
    error = error_of(folder)
    assert error.what == f"the weights are quantised ({name}), so their numbers cannot be averaged"
    assert error.where == {"model": str(folder)}
    assert key in str(error.found)
    assert "the model that this one was quantised from" in str(error.do)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("entry", [None, False, "none"])
def test_a_config_that_names_no_method_is_none(
    key: str, entry: object, make_model: MakeModel
) -> None:
    assert len(merge.open(make_model("a", state(), config={key: entry}))) == 3


def test_the_unquantised_model_that_the_card_names_is_passed_on(make_model: MakeModel) -> None:
    folder = make_model("a", state(), config={"quantization_config": {"quant_method": "gptq"}})
    for front in ("base_model: org/base-7B", "tags: [x]\nbase_model:\n- org/base-7B\n- org/other"):
        written(folder / "README.md", f"---\n{front}\n---\nbase_model: wrong\n")
        assert str(error_of(folder).do).endswith("quantised from: org/base-7B")
    for other in ("base_model: org/base-7B", "---\nlicense: mit\n---\nbase_model: wrong\n"):
        written(folder / "README.md", other)
        assert str(error_of(folder).do).endswith("quantised from")
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    assert str(error_of(folder).do).endswith("quantised from")


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq"])
def test_what_transformers_can_undo_says_how(method: str, make_model: MakeModel) -> None:
    folder = make_model("a", state(), config={"quantization_config": {"quant_method": method}})
    assert "model.dequantize()" in str(error_of(folder).do)


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "GPTQ, 4 bit"),
        ("quant_config.json", {"w_bit": 4, "zero_point": True}, "AWQ, 4 bit"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "NVIDIA ModelOpt"),
    ],
)
def test_tools_that_tell_in_a_file_of_their_own_are_heard(
    file: str, content: dict[str, Any], name: str, make_model: MakeModel
) -> None:
    folder = make_model("a", state())
    written(folder / file, content)
    error = error_of(folder)
    assert f"quantised ({name})" in error.what
    assert error.found == file
    written(folder / file, {"per_channel": True})  # of a converter to another format
    assert len(merge.open(folder)) == 3


CODES = torch.zeros(4, 4, dtype=torch.int32)
PACKED = {
    "GPTQ or AWQ": {"l.qweight": CODES, "l.qzeros": CODES + 1, "l.scales": torch.ones(4)},
    "bitsandbytes, 4 bit": {
        "l.weight": CODES.byte(),
        "l.weight.absmax": torch.ones(4),
        "l.weight.quant_map": torch.ones(4),
        "l.weight.quant_state.bitsandbytes__nf4": CODES.byte(),
    },
    "bitsandbytes, 8 bit": {"l.weight": CODES.char(), "l.SCB": torch.ones(4)},
    "HQQ": {"l.W_q": CODES.byte(), "l.scale": torch.ones(4), "l.zero": torch.ones(4)},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_known_by_their_names_whatever_config_says(
    name: str, make_model: MakeModel
) -> None:
    folder = make_model("a", {"norm": torch.ones(4)} | PACKED[name])
    error = error_of(folder)
    assert f"the weights are quantised ({name})" in error.what
    assert error.where["tensor"] in PACKED[name]
    assert "quantised from" in str(error.do)
    assert error_of(folder / "model.safetensors").what == error.what


def test_a_part_of_a_pipeline_that_is_quantised_is_refused(tmp_path: Path) -> None:
    root = pipeline(tmp_path / "p", UNET)
    written(root / "unet" / "config.json", {"quantization_config": BNB | {"load_in_4bit": True}})
    error = error_of(root)
    assert "bitsandbytes, 4 bit" in error.what
    assert error.where["model"] == str(root / "unet")


def test_a_gguf_file_is_refused_alone_and_as_all_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "m" / "model-Q4_K_M.gguf"
    written(file, "GGUF")
    for source in (file, file.parent):
        error = error_of(source)
        assert "a GGUF file" in error.what
        assert error.where["file"] == str(file)
        assert "converted from" in str(error.do) and "gguf_file=" in str(error.do)


def test_a_gguf_file_beside_weights_is_left_alone(make_model: MakeModel) -> None:
    folder = make_model("a", state())
    written(folder / "model.gguf", "GGUF")
    assert len(merge.open(folder)) == 3


def test_leave_for_pickles_is_no_leave_for_quantised_ones(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    torch.save({"l.qweight": CODES}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(SourceError, match="GPTQ or AWQ"):
        merge.open(tmp_path / "m", allow_pickle=True)
    saved(tmp_path / "h" / "model.safetensors", state())
    (tmp_path / "h" / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "hqq"}})
    )
    with pytest.raises(SourceError, match="HQQ"):
        merge.open(tmp_path / "h", allow_pickle=True)
