"""Which kinds of adapter become weights, how, and why the others do not.

Kinds are PEFT's ``peft_type``. Of those that become weights, LoRA and token rows are ours; the
others are computed by one layer of peft each.
"""

from __future__ import annotations

from dataclasses import dataclass

from merge.adapters.config import AdapterConfig
from merge.errors import SourceError, hint

__all__ = ["LAYERS", "REFUSED", "Tuner", "tuner_of"]


@dataclass(frozen=True, slots=True)
class Tuner:
    """How one layer of a kind is found in an adapter.

    prefix: how the names of its tensors begin, behind the module's path. biases: whether it changes
    biases too. shares: whether its layers use matrices as large as the largest of them needs.
    """

    prefix: str
    biases: bool = False
    shares: bool = False


LAYERS = {
    "ADALORA": Tuner("lora_"),
    "ADAMSS": Tuner("adamss_", biases=True),
    "BEFT": Tuner("beft_", biases=True),
    "BOFT": Tuner("boft_"),
    "C3A": Tuner("c3a_"),
    "DEFT": Tuner("deft_"),
    "DELORA": Tuner("delora_"),
    "FOURIERFT": Tuner("fourierft_"),
    "GLORA": Tuner("glora_", biases=True),
    "GRALORA": Tuner("gralora_"),
    "HIRA": Tuner("hira_"),
    "HRA": Tuner("hra_"),
    "IA3": Tuner("ia3_", biases=True),
    "LN_TUNING": Tuner("ln_tuning_", biases=True),
    "LOHA": Tuner("hada_"),
    "LOKR": Tuner("lokr_"),
    "MISS": Tuner("miss_"),
    "OFT": Tuner("oft_"),
    "OSF": Tuner("osf_"),
    "PEANUT": Tuner("peanut_"),
    "PSOFT": Tuner("psoft_"),
    "PVERA": Tuner("pvera_lambda_", shares=True),
    "RANDLORA": Tuner("randlora_", shares=True),
    "ROAD": Tuner("road_", biases=True),
    "SHIRA": Tuner("shira_"),
    "SUPERTUNING": Tuner("supertuning_"),
    "VBLORA": Tuner("vblora_"),
    "VERA": Tuner("vera_lambda_", shares=True),
    "WAVEFT": Tuner("waveft_"),
}
_LORA = Tuner("lora_")
"""LoRA with something more to it, see `_MORE`."""

_VECTORS = "it adds vectors to what the model reads and changes no weight"
_MIXTURE = "it mixes several adapters anew for each input, so it is no one weight"
_JOINT = "each of its layers depends on all the others, not on its own tensors alone"
REFUSED = {
    "ADAPTION_PROMPT": _VECTORS,
    "CARTRIDGE": _VECTORS,
    "CPT": _VECTORS,
    "FROD": _JOINT,
    "LILY": "its layers share matrices by a rule that peft has no merged weight for",
    "MULTITASK_PROMPT_TUNING": _VECTORS,
    "POLY": _MIXTURE,
    "PREFIX_TUNING": _VECTORS,
    "PROMPT_TUNING": _VECTORS,
    "P_TUNING": _VECTORS,
    "SHADOW": "it is a network beside the model and changes no weight",
    "TINYLORA": _JOINT,
    "UNILORA": _JOINT,
    "XLORA": _MIXTURE,
}
_MORE = ("kasa_config", "use_bdlora")
_NOT_ALWAYS = {
    "alora_invocation_tokens": "it is switched on by certain tokens of the input",
    "arrow_config": _MIXTURE,
    "use_qalora": "it works on means of the input for quantised layers, which peft does not merge",
}


def tuner_of(config: AdapterConfig) -> Tuner | None:
    """How peft's layers of this adapter are found; None for a kind that is ours.

    Raises SourceError, with the reason, for what does not become weights.
    """
    kind, data = config.kind, config.data
    if kind == "TRAINABLE_TOKENS":
        return None
    if kind == "LORA":
        for key, why in _NOT_ALWAYS.items():
            if data.get(key):
                raise _refused(config, f"LORA with {key}", why)
        return _LORA if any(data.get(key) for key in _MORE) else None
    if kind in REFUSED:
        raise _refused(config, kind, REFUSED[kind])
    if kind not in LAYERS:
        every = ("LORA", "TRAINABLE_TOKENS", *LAYERS, *REFUSED)
        raise SourceError(
            "an adapter is of a kind that is not known",
            file=config.file,
            key="peft_type",
            found=kind,
            expected=", ".join(every[:2] + tuple(LAYERS)),
            do=hint(kind, every),
        )
    return LAYERS[kind]


def _refused(config: AdapterConfig, kind: str, why: str) -> SourceError:
    return SourceError(
        f"an adapter of kind {kind} does not become weights: {why}",
        file=config.file,
        key="peft_type",
        found=kind,
        do="use it with peft on the finished model",
    )
