"""Which quantised checkpoints are refused, and what to do instead.

A quantised weight is a code, not a number: averaging codes gives noise. Those that are read are in
`merge.checkpoint.scheme`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from merge.checkpoint.place import Files, json_object
from merge.checkpoint.scheme import entries_of
from merge.errors import SourceError
from merge.ir.checkpoint import some

__all__ = ["check_quantised", "check_unpacked", "refuse_gguf"]

_BESIDE = {
    "quantize_config.json": ("gptq", "bits"),
    "quant_config.json": ("awq", "w_bit"),
    "hf_quant_config.json": ("modelopt", "quantization"),
}
"""Files in which tools without an entry in config.json say what they did, under which key."""

_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4",
    "torchao": "TorchAO",
}
_UNPACKS = ("bitsandbytes", "hqq", "mxfp4", "fp8", "fbgemm_fp8", "compressed-tensors", "quanto")
"""Methods that transformers can undo by ``model.dequantize()``."""

_PACKED = {
    "GPTQ or AWQ": (".qweight", ".qzeros"),
    "bitsandbytes, 4 bit": (
        ".quant_map",
        ".quant_state.bitsandbytes__nf4",
        ".quant_state.bitsandbytes__fp4",
    ),
    "bitsandbytes, 8 bit": (".SCB", ".weight_format"),
    "HQQ": (".W_q",),
}
"""Ends of the names of tensors that only packed weights have."""

_README = 8192  # characters in which the card's front matter is looked for


def check_quantised(config: Mapping[str, object], files: Files, folder: str) -> None:
    """Raise SourceError if config.json, or a file beside it, says that the weights are quantised.

    config: config.json of the model, or of one component, in ``folder``.
    """
    for key, found in entries_of(config):
        raise _refusal(found, files, folder, _told(key, found))
    prefix = f"{folder}/" if folder else ""
    for file, (method, key) in _BESIDE.items():
        beside = json_object(files, prefix + file)
        if key in beside:
            raise _refusal({"quant_method": method, **beside}, files, folder, file)


def check_unpacked(names: Collection[str], files: Files | None, folder: str) -> None:
    """Raise SourceError if tensors are named as only packed weights are, whatever config says.

    folder: of the component in ``files``; the file itself where it lies alone.
    """
    for method, ends in _PACKED.items():
        packed = [n for n in names if n.endswith(ends)]
        if packed:
            raise SourceError(
                f"the weights are quantised ({method}), so their numbers cannot be averaged",
                model=folder if files is None else files.where(folder),
                tensor=packed[0],
                found=some(packed),
                expected="weights in float16, bfloat16, float32 or float64",
                do=_advice("", files, folder),
            )


def refuse_gguf(file: str) -> SourceError:
    """The error for weights in llama.cpp's format."""
    return SourceError(
        "the weights are a GGUF file: other names, other order, and mostly quantised",
        file=file,
        expected="safetensors weights",
        do="use the model that it was converted from; or, if only this is left, load it in"
        " transformers (gguf_file=...), which undoes the quantisation, and save_pretrained it",
    )


def _refusal(found: Mapping[str, object], files: Files, folder: str, told: str) -> SourceError:
    method = str(found.get("quant_method", "")).lower()
    name = _NAMES.get(method, method or "by a method that is not named")
    if bits := _bits(found):
        name += f", {bits} bit"
    return SourceError(
        f"the weights are quantised ({name}), so their numbers cannot be averaged",
        model=files.where(folder),
        found=told,
        expected="weights in float16, bfloat16, float32 or float64",
        do=_advice(method, files, folder),
    )


def _told(key: str, found: Mapping[str, object]) -> str:
    words = [w for w in (found.get("quant_method"), found.get("format")) if isinstance(w, str)]
    return f"{key}: {', '.join(words)}" if words else key


def _bits(found: Mapping[str, object]) -> object:
    """Bits of a weight, where the entry says it."""
    for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if found.get(key) is True:
            return bits
    named = [found.get(k) for k in ("bits", "w_bit", "nbits")]
    return next((b for b in named if type(b) is int), None)


def _advice(method: str, files: Files | None, folder: str) -> str:
    base = None if files is None else _unquantised(files, folder)
    do = "use the model that this one was quantised from" + (f": {base}" if base else "")
    if method in _UNPACKS:
        do += "; or load it in transformers, call model.dequantize() and save_pretrained it"
    return do


def _unquantised(files: Files, folder: str) -> str | None:
    """The model that the card names as what this one was made of."""
    try:
        path = files.small(f"{folder}/README.md" if folder else "README.md")
        with path.open(encoding="utf-8", errors="replace") as f:
            text = f.read(_README)
    except (OSError, SourceError):
        return None  # it would only have made a better advice
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = front[1] if front else ""
    named = re.search(r"^base_model:\s*(?:-\s*)?([\w./-]+)", lines, re.MULTILINE)
    return named[1] if named else None
