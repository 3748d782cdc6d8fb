"""Parts of a model by name: encoder, decoder, text tower, vision tower, projector.

Recipes name a part as mergekit does: by a word that stands in the tensors' names, by the stack of
its layers (``model.layers``), or by one of a few customary names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge.families.roles import stated_part

__all__ = ["modules_of"]

_CUSTOMARY = {
    "text_decoder": ("language_model", "text_model"),
    "text_encoder": ("text_model", "text_encoder"),
    "vision_tower": ("vision_tower", "visual", "vision_model", "vision_encoder"),
    "vision_encoder": ("vision_tower", "visual", "vision_model"),
    "audio_tower": ("audio_tower", "audio_encoder", "audio_model", "speech_encoder"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "connector", "merger"),
}
_REST = ("default", "text", "text_decoder", "language_model")
"""Modules that take what no other one is called by."""

_SENSES = ("vision", "audio", "projector")
"""Modules that are told by all words for them; none of them is of a text model."""


def modules_of(names: Iterable[str], wanted: Sequence[str]) -> dict[str, list[str]]:
    """For each wanted module, its tensors in order; what belongs to none of them is left out.

    A longer match goes before a shorter one, so ``visual.merger`` may be a module beside
    ``visual``. A wanted module without tensors has an empty list. The folder of a component, such
    as the UNet of a pipeline, is a module of that name.

    >>> modules_of(["encoder.a", "decoder.a", "lm_head"], ["encoder", "decoder"])
    {'encoder': ['encoder.a'], 'decoder': ['decoder.a']}
    >>> modules_of(["unet/conv_in.weight", "vae/decoder.conv_in.weight"], ["unet"])
    {'unet': ['unet/conv_in.weight']}
    """
    found: dict[str, list[str]] = {module: [] for module in wanted}
    rest = next((m for m in _REST if m in wanted), None)
    for name in names:
        lengths = {module: _match(name, module) for module in wanted}
        best = max(lengths, key=lambda module: lengths[module], default=None)
        if best is not None and lengths[best]:
            found[best].append(name)
        elif rest == "default" or (rest and stated_part(name) not in _SENSES):
            found[rest].append(name)
    return found


def _match(name: str, module: str) -> int:
    """How much of the tensor's name is called by the module: 0 where it is not of that module."""
    dotted = f".{name.replace('/', '.')}."
    if module in _SENSES and stated_part(name) == module:
        return 1
    words = (module, *_CUSTOMARY.get(module, ()))
    return max((dotted.find(f".{w}.") + len(w) + 1 for w in words if f".{w}." in dotted), default=0)
