"""Tiny twins of transformers' models: made from a config, with inputs and what counts as output."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merge.errors import SourceError

__all__ = ["Twin", "main_outputs", "make_twin", "model_class", "quiet"]

_LIMIT = 20_000_000
_MAIN = ("logits", "embeds", "prediction", "scores")


@dataclass(frozen=True, slots=True)
class Twin:
    """A model, inputs for it, and whether it has a head."""

    module: nn.Module
    inputs: Mapping[str, Any]
    headed: bool


def model_class(name: str) -> Any:
    """The class of this name in transformers; `SourceError` where there is none."""
    try:
        import transformers
    except ImportError:
        raise SourceError(
            "the symmetry of this model has to be derived, which needs transformers",
            found="no transformers in this environment",
            do="pip install transformers, or give a symmetry spec",
        ) from None
    found = getattr(transformers, name, None)
    if found is None:
        raise SourceError(
            "transformers does not have the model's class",
            found=name,
            do="give a symmetry spec, or the module itself with example inputs",
        )
    return found


def make_twin(kind: Any, config: Mapping[str, Any], seed: int = 0) -> Twin:
    """A model of class ``kind`` with this config, in plain operators, and inputs for it.

    `SourceError` where the class does not take the config, or where it would not be tiny.
    """
    with quiet():
        settings = kind.config_class(**{**config, "attn_implementation": "eager"})
        settings.use_cache = False
        if getattr(settings, "pad_token_id", 0) is None:
            settings.pad_token_id = 0  # classifiers ask for it
        with torch.device("meta"):
            count = sum(p.numel() for p in kind(settings).parameters())
        if count > _LIMIT:
            raise SourceError(
                "the twin of a model is not tiny: its config has a size that is not known",
                model=kind.__name__,
                found=f"{count:,} parameters",
                expected=f"at most {_LIMIT:,}",
                do="give a symmetry spec, or the module itself with example inputs",
            )
        torch.manual_seed(seed)
        module = kind(settings).eval()
        with contextlib.suppress(Exception):  # models without experts refuse it in many ways
            module.set_experts_implementation("batched_mm")
    base = getattr(module, "base_model_prefix", "")
    headed = bool(base) and hasattr(module, base) and getattr(module, base) is not module
    return Twin(module, _inputs(module, settings), headed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No talk about tokens that a small vocabulary does not have, and no bars of progress."""
    from transformers.utils import logging as library

    talk: Any = library

    level = talk.get_verbosity()
    bars = talk.is_progress_bar_enabled()
    talk.set_verbosity(logging.ERROR)
    talk.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()


def _inputs(module: Any, settings: Any) -> dict[str, Any]:
    """Tokens, pictures or sounds, as the model's main inputs are called."""
    import inspect

    taken = inspect.signature(module.forward).parameters
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    text = getattr(settings, "text_config", settings)
    if "input_ids" in taken and module.main_input_name != "input_features":
        found["input_ids"] = _tokens(text, 2, 8, draw)
        if "pixel_values" in taken:
            _put_pictures(found["input_ids"], settings)
    if "pixel_values" in taken:
        vision = getattr(settings, "vision_config", settings)
        size = getattr(vision, "image_size", 16)
        high, wide = (size, size) if isinstance(size, int) else size
        channels = getattr(vision, "num_channels", 3)
        found["pixel_values"] = torch.randn(2, channels, high, wide, generator=draw)
    if "input_features" in taken and hasattr(settings, "num_mel_bins"):
        length = 2 * settings.max_source_positions
        found["input_features"] = torch.randn(2, settings.num_mel_bins, length, generator=draw)
    if "decoder_input_ids" in taken:
        found["decoder_input_ids"] = _tokens(text, 2, 7, draw)
    if "use_cache" in taken:
        found["use_cache"] = False
    return found


def _put_pictures(tokens: Tensor, settings: Any) -> None:
    """Tokens that stand for a picture, where the model has such a token and says how many."""
    names = ("image_token_id", "image_token_index")
    token = next((t for n in names if (t := getattr(settings, n, None)) is not None), None)
    count = getattr(settings, "mm_tokens_per_image", None)
    if token is not None and count is not None:
        tokens[:, 1 : 1 + count] = token


def _tokens(settings: Any, count: int, length: int, draw: torch.Generator) -> Tensor:
    """Tokens that are all different, none of them special."""
    size = getattr(settings, "vocab_size", 40)
    order = torch.randperm(size - 10, generator=draw)[: count * length] + 10
    return order.reshape(count, -1)


def main_outputs(output: Any) -> Any:
    """Logits and embeddings where there are any; of a model without a head all but caches."""
    if not isinstance(output, Mapping):
        return output
    main = {k: v for k, v in output.items() if any(w in k for w in _MAIN) and "router" not in k}
    if main:
        return main
    aside = ("past_key_values", "cache_params", "attentions", "hidden_states", "router_logits")
    return {k: v for k, v in output.items() if not k.endswith(aside)}
