"""One short, fixed input for any model of transformers, made from its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from merge.methods.core.schema import Tensor

__all__ = ["dummy_inputs"]

_LENGTH = 8  # tokens
_FRAMES = 1600  # samples of sound, a tenth of a second
_SIDE = 64  # of a picture, for models that take any


def dummy_inputs(model: Any) -> dict[str, Any]:
    """What the model's ``forward`` is to be called with: one sequence, picture or sound.

    Token ids lie below the vocabulary's size and are none of the config's special ones but the
    last, which ends the sequence. Pictures of models that find their place in a text by special
    tokens are left out. What no rule covers is left to the model's own ``dummy_inputs``.
    """
    taken = inspect.signature(model.forward).parameters
    config = model.config
    found: dict[str, Any] = {}
    if "input_ids" in taken:
        found["input_ids"] = _tokens(config.get_text_config())
        if "attention_mask" in taken:
            found["attention_mask"] = found["input_ids"].new_ones(found["input_ids"].shape)
    in_text = any(n.startswith("image_token") or n == "media_token_index" for n in _keys(config))
    if "pixel_values" in taken and (model.main_input_name == "pixel_values" or not in_text):
        found["pixel_values"] = _picture(config)
    if "input_features" in taken and model.main_input_name == "input_features":
        found["input_features"] = _spectrum(config)
    if "input_values" in taken and model.main_input_name == "input_values":
        found["input_values"] = _sound(config)
    if "decoder_input_ids" in taken and getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = _started(config)
    if not found:
        found = dict(model.dummy_inputs)
    return found | {k: v for k, v in (("use_cache", False), ("return_dict", True)) if k in taken}


def _keys(config: Any) -> Iterable[str]:
    known: Mapping[str, object] = config.to_dict()
    return known.keys()


def _tokens(config: Any) -> Tensor:
    """(1, 8) token ids."""
    import torch

    size = int(config.vocab_size)
    named = {k: v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index"))}
    special = {v for v in named.values() if isinstance(v, int)}
    plain = [i for i in range(min(size, 1000)) if i not in special] or [0]
    ids = [plain[(3 + 7 * i) % len(plain)] for i in range(_LENGTH)]
    end = named.get("eos_token_id")
    if isinstance(end, int) and 0 <= end < size:
        ids[-1] = end
    return torch.tensor([ids])


def _started(config: Any) -> Tensor:
    """(1, 8) ids for a decoder, its start first."""
    text = config.get_text_config(decoder=True)
    ids = _tokens(text)
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        start = getattr(config, name, None)
        if isinstance(start, int) and 0 <= start < text.vocab_size:
            ids[0, 0] = start
            break
    return ids


def _ramp(*shape: int) -> Tensor:
    """Numbers from -1 to 1 in a shape."""
    import torch

    count = torch.Size(shape).numel()
    return torch.linspace(-1.0, 1.0, count).reshape(shape)


def _picture(config: Any) -> Tensor:
    """(1, channels, height, width), or (1, frames, channels, height, width) for films."""
    part = getattr(config, "vision_config", None) or config
    size = getattr(part, "image_size", None) or _SIDE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = [part.num_frames] if hasattr(part, "num_frames") else []
    return _ramp(1, *frames, getattr(part, "num_channels", 3), height, width)


def _spectrum(config: Any) -> Tensor:
    """(1, bands, frames) for whisper and its kin, else (1, frames, features)."""
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return _ramp(1, config.num_mel_bins, 2 * config.max_source_positions)
    names = ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins")
    width = next((getattr(config, n) for n in names if hasattr(config, n)), 80)
    return _ramp(1, 4 * _LENGTH, width)


def _sound(config: Any) -> Tensor:
    """(1, samples), or (1, frames, bands) for models that take a spectrum under this name."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _ramp(1, config.max_length, config.num_mel_bins)
    return _ramp(1, _FRAMES)
