"""Recipes as people publish them for mergekit, in their own spellings, over models of 8 layers.

Each is text, and what its author meant: values of parameters by (tensor, parameter, model), or
whole tensors by a formula over ``w(model, tensor)`` in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .tiny import ATTENTION, EMBED, HEAD, MLP, NORM, layer

__all__ = ["WILD", "Wild"]

Weights = Callable[[str, str], Tensor]
Formula = Callable[[Weights], Tensor]


@dataclass(frozen=True)
class Wild:
    """A recipe; ``notes``: parts of the notes that it must bring, and there are no others."""

    text: str
    values: Mapping[tuple[str, str, str | None], object] = field(default_factory=dict)
    tensors: Mapping[str, Formula] = field(default_factory=dict)
    layers: int = 8
    notes: tuple[str, ...] = ()


def attention(number: int) -> str:
    return layer(number, ATTENTION)


def mlp(number: int) -> str:
    return layer(number, MLP)


WILD: dict[str, Wild] = {}

# -- averages --------------------------------------------------------------------------------------

WILD["linear, three models"] = Wild(
    """\
models:
  - model: psmathur/orca_mini_v3
    parameters:
      weight: 1.0
  - model: WizardLM/Wizard
    parameters:
      weight: 0.3
  - model: garage/platypus
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
    {(HEAD, "weight", "WizardLM/Wizard"): 0.3},
    {
        mlp(3): lambda w: (
            (
                w("psmathur/orca_mini_v3", mlp(3))
                + 0.3 * w("WizardLM/Wizard", mlp(3))
                + 0.5 * w("garage/platypus", mlp(3))
            )
            / 1.8
        )
    },
)
WILD["linear, sum without normalize"] = Wild(
    """\
merge_method: linear
parameters: { normalize: 0.0 }
models:
- {model: a, parameters: {weight: "0.5"}}
- {model: b, parameters: {weight: 5e-1}}
""",
    {(HEAD, "normalize", None): False, (HEAD, "weight", "a"): 0.5, (HEAD, "weight", "b"): 0.5},
)
WILD["linear by slices with gradients"] = Wild(
    """\
slices:
  - sources:
      - model: a
        layer_range: [0, 8]
        parameters:
          weight: [1, 0]   # fades out
      - model: b
        layer_range: [0, 8]
        parameters:
          weight: [0, 1]   # fades in
merge_method: linear
dtype: bfloat16
""",
    {(mlp(0), "weight", "a"): 1.0, (mlp(7), "weight", "a"): 0.0, (mlp(7), "weight", "b"): 1.0,
     (NORM, "weight", "a"): 1.0, (HEAD, "weight", "b"): 0.0},
)  # fmt: skip
WILD["linear over a base that is not listed"] = Wild(
    "merge_method: linear\nbase_model: base\nmodels:\n  - model: a\n  - model: b\n"
    "parameters:\n  weight: 1.0\n",
    tensors={HEAD: lambda w: (w("a", HEAD) + w("b", HEAD) + w("base", HEAD)) / 3},
    notes=("base_model base is averaged in",),
)
WILD["a soup with an anchor"] = Wild(
    """\
merge_method: linear
models:
  - model: a
    parameters: &same
      weight: 0.25
  - model: b
    parameters: *same
  - model: c
    parameters:
      <<: *same
      weight: .5
""",
    {(HEAD, "weight", "b"): 0.25, (HEAD, "weight", "c"): 0.5},
)

# -- slerp -----------------------------------------------------------------------------------------

WILD["slerp with filters"] = Wild(
    """\
slices:
  - sources:
      - model: org/a
        layer_range: [0, 8]
      - model: org/b
        layer_range: [0, 8]
# or, the equivalent models: syntax:
# models:
#   - model: org/a
#   - model: org/b
merge_method: slerp
base_model: org/a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    {(attention(0), "t", None): 0.0, (attention(7), "t", None): 1.0, (mlp(0), "t", None): 1.0,
     (mlp(7), "t", None): 0.0, (NORM, "t", None): 0.5, (HEAD, "t", None): 0.5},
)  # fmt: skip
WILD["slerp, old spelling"] = Wild(
    """\
models:
  - model: org/a
    layer_range: [0, 8]
  - model: org/b
    layer_range: [0, 8]
merge_method: slerp
base_model: org/b
tokenizer_source: model:org/b
embed_slerp: true
parameters:
  t: [0.1, 0.9]
""".replace("embed_slerp: true\nparameters:\n", "parameters:\n  embed_slerp: true\n"),
    {(mlp(0), "t", None): 0.1, (mlp(7), "t", None): 0.9, (EMBED, "t", None): 0.1},
    {},
    notes=("'layer_range' is ignored", "'layer_range' is ignored", "'embed_slerp' is ignored",
           "no model has a tokenizer"),
)  # fmt: skip
WILD["slerp, t by layers of slices"] = Wild(
    """\
slices:
- sources:
  - {model: a, layer_range: [0, 4]}
  - {model: b, layer_range: [0, 4]}
  parameters: {t: 0.25}
- sources:
  - {model: a, layer_range: [4, 8]}
  - {model: b, layer_range: [4, 8]}
  parameters:
    t:
merge_method: slerp
base_model: a
parameters:
  t: 0.75
""",
    {(mlp(3), "t", None): 0.25, (mlp(4), "t", None): 0.75, (EMBED, "t", None): 0.25,
     (HEAD, "t", None): 0.75},
)  # fmt: skip
WILD["slerp with one filter and no list"] = Wild(
    "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b]\n"
    "parameters:\n  t:\n    filter: ''\n    value: 0.5\n",
    {(HEAD, "t", None): 0.5},
)

# -- differences to a base -------------------------------------------------------------------------

WILD["ties with gradients"] = Wild(
    """\
models:
  - model: psmathur/orca_mini
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage/platypus
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    {(mlp(0), "density", "psmathur/orca_mini"): 1.0,
     (mlp(7), "density", "psmathur/orca_mini"): 0.1,
     (mlp(7), "weight", "garage/platypus"): 1.0, (HEAD, "weight", "garage/platypus"): 0.0,
     (mlp(5), "weight", "WizardLM/WizardMath"): 0.5,
     (attention(5), "weight", "WizardLM/WizardMath"): 0.0, (HEAD, "normalize", None): True,
     (HEAD, "int8_mask", None): True},
)  # fmt: skip
WILD["ties that lists its base"] = Wild(
    """\
models:
  - model: mistralai/base
    # no parameters necessary for base model
  - model: teknium/a
    parameters:
      density: 0.5
      weight: 0.5
  - model: xyz/b
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/base
parameters:
  normalize: 1.0
  int8_mask: 1
dtype: bfloat16
""",
    {(HEAD, "weight", "teknium/a"): 0.5, (HEAD, "weight", "xyz/b"): 0.3,
     (HEAD, "normalize", None): True, (HEAD, "int8_mask", None): True},
)  # fmt: skip
WILD["ties, switches in words"] = Wild(
    "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n- model: b\nparameters:\n"
    "  weight: 1\n  density: []\n  normalize: off\n  int8_mask: yes\n  lambda: '1.5'\n",
    {(HEAD, "normalize", None): False, (HEAD, "int8_mask", None): True,
     (HEAD, "lambda", None): 1.5, (HEAD, "density", "a"): 1.0},
)  # fmt: skip
WILD["task arithmetic that forgets"] = Wild(
    """\
base_model: base
merge_method: task_arithmetic
models:
- model: tuned
  parameters: {weight: 1.0}
- model: toxic
  parameters: {weight: -0.5}
""",
    tensors={
        mlp(2): lambda w: (
            w("base", mlp(2))
            + (w("tuned", mlp(2)) - w("base", mlp(2)))
            - 0.5 * (w("toxic", mlp(2)) - w("base", mlp(2)))
        )
    },
)
WILD["task arithmetic with lambda"] = Wild(
    "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\n"
    "parameters: {weight: 1, lambda: 1e-4}\n",
    {(HEAD, "lambda", None): 1e-4},
    {HEAD: lambda w: w("base", HEAD) + 1e-4 * (w("a", HEAD) - w("base", HEAD))},
)
WILD["task arithmetic over slices with the base"] = Wild(
    """\
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: a, layer_range: [4, 8], parameters: {weight: 1}}
""",
    tensors={mlp(0): lambda w: w("a", mlp(4)), HEAD: lambda w: w("a", HEAD)},
    layers=4,
)
for method in ("dare_ties", "dare_linear"):
    WILD[method] = Wild(
        f"""\
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: .53
      weight: "0.3"
merge_method: {method}
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
""",
        {
            (HEAD, "weight", "abacusai/Slerp-CM-mist-dpo"): 0.3,
            (HEAD, "density", "abacusai/Slerp-CM-mist-dpo"): 0.53,
            (HEAD, "rescale", None): True,
        },
    )
WILD["dare without rescale"] = Wild(
    "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a}]\n"
    "parameters: {weight: 1, density: 1, rescale: False}\nseed: 42\n",
    {(HEAD, "rescale", None): False},
    {HEAD: lambda w: w("a", HEAD)},
)
for method in ("breadcrumbs", "breadcrumbs_ties"):
    WILD[method] = Wild(
        f"merge_method: {method}\nbase_model: base\nmodels:\n- model: a\n"
        "  parameters: {weight: 0.5, density: 0.9, gamma: 0.01}\n- model: b\n"
        "  parameters: {weight: 0.5, density: 0.9, gamma: 0.01}\nparameters: {normalize: false}\n",
        {(HEAD, "gamma", "a"): 0.01, (HEAD, "density", "b"): 0.9},
    )
for method in ("della", "della_linear"):
    WILD[method] = Wild(
        f"merge_method: {method}\nbase_model: base\nmodels:\n- model: base\n- model: a\n"
        "  parameters: {weight: 0.5, density: 0.5, epsilon: 0.15}\n"
        "parameters: {lambda: 1.1, int8_mask: true}\n",
        {(HEAD, "epsilon", "a"): 0.15, (HEAD, "lambda", None): 1.1},
    )
WILD["sce"] = Wild(
    "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    "parameters: {select_topk: 0.1}\ndtype: bfloat16\n",
    {(HEAD, "select_topk", None): 0.1},
)
WILD["model stock"] = Wild(
    "models:\n  - model: base\n  - model: a\n  - model: b\nmerge_method: model_stock\n"
    "base_model: base\ndtype: bfloat16\n",
    {(HEAD, "filter_wise", None): False},
)
WILD["nuslerp"] = Wild(
    "merge_method: nuslerp\nmodels:\n- {model: a, parameters: {weight: 0.6}}\n"
    "- {model: b, parameters: {weight: 0.4}}\ndtype: bfloat16\n",
    {(HEAD, "weight", "a"): 0.6},
)
WILD["nuslerp of differences"] = Wild(
    "merge_method: nuslerp\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
    "- {model: b, parameters: {weight: 1}}\nparameters: {nuslerp_row_wise: true}\n",
    {(HEAD, "nuslerp_row_wise", None): True},
)
WILD["karcher"] = Wild(
    "merge_method: karcher\nmodels: [{model: a}, {model: b}, {model: c}]\n"
    "parameters: {max_iter: 10, tol: 1e-5}\ndtype: bfloat16\n",
    {(HEAD, "max_iter", None): 10, (HEAD, "tol", None): 1e-5},
)
WILD["arcee fusion"] = Wild(
    "merge_method: arcee_fusion\nbase_model: base\nmodels:\n- model: base\n- model: a\n"
    "dtype: bfloat16\n",
)
WILD["nearswap"] = Wild(
    "merge_method: nearswap\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 0.0001}\n",
    {(HEAD, "t", None): 1e-4},
)

# -- layers ----------------------------------------------------------------------------------------

WILD["a frankenmerge of two"] = Wild(
    """\
slices:
  - sources:
    - model: psmathur/orca_mini_v3
      layer_range: [0, 6]
  - sources:
    - model: garage/platypus
      layer_range: [5, 8]
merge_method: passthrough
dtype: float16
""",
    tensors={
        mlp(5): lambda w: w("psmathur/orca_mini_v3", mlp(5)).half(),
        mlp(6): lambda w: w("garage/platypus", mlp(5)).half(),
        HEAD: lambda w: w("garage/platypus", HEAD).half(),
    },
    layers=9,
)
WILD["a self-merge"] = Wild(
    "dtype: float16\nmerge_method: passthrough\nslices:\n"
    + "".join(f"- sources:\n  - layer_range: [{i}, {i + 4}]\n    model: lizpreciatior/lzlv\n"
              for i in (0, 2, 4)),
    tensors={mlp(4): lambda w: w("lizpreciatior/lzlv", mlp(2)).half(),
             mlp(11): lambda w: w("lizpreciatior/lzlv", mlp(7)).half()},
    layers=12,
)  # fmt: skip
WILD["repeated layers that start as nothing"] = Wild(
    """\
slices:
  - sources:
    - model: a
      layer_range: [0, 8]
  - sources:
    - model: a
      layer_range: [6, 8]
      parameters:
        scale:
          - filter: q_proj   # o_proj, in a model that has one
            value: 0.0
          - filter: up_proj
            value: 0.0
          - value: 1.0
merge_method: passthrough
dtype: bfloat16
""",
    {(mlp(8), "scale", "a"): 0.0, (mlp(7), "scale", "a"): 1.0, (HEAD, "scale", "a"): 1.0},
    layers=10,
)
WILD["two methods of layers, slices within"] = Wild(
    """\
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
        parameters: {weight: 1.0}
  - sources:   # the middle is blended
      - model: a
        layer_range: [2, 6]
        parameters: {weight: [0.9, 0.1]}
      - model: b
        layer_range: [2, 6]
        parameters: {weight: [0.1, 0.9]}
    residual_weight: 0.1
  - sources:
      - model: b
        layer_range: [6, 8]
        parameters: {weight: 1.0}
merge_method: linear
""",
    {(mlp(2), "weight", "a"): 0.9, (mlp(5), "weight", "a"): 0.1},
    {EMBED: lambda w: w("a", EMBED), HEAD: lambda w: w("b", HEAD)},
    notes=("'residual_weight' is ignored",),
)
WILD["passthrough of one model"] = Wild(
    "models:\n  - model: a\nmerge_method: passthrough\nparameters: null\ndtype: float32\n",
    tensors={HEAD: lambda w: w("a", HEAD)},
)

# -- how files look --------------------------------------------------------------------------------

WILD["CRLF and tabs after values"] = Wild(
    "# a comment\r\nmerge_method: linear\t# why not\r\nmodels:\r\n  - model: a\t\r\n"
    "    parameters:\r\n      weight: 1\t \r\n",
    {(HEAD, "weight", "a"): 1.0},
)
WILD["byte order mark"] = Wild(
    "\ufeffmerge_method: passthrough\nmodels: [{model: a}]\n",
    tensors={HEAD: lambda w: w("a", HEAD)},
)
WILD["parameters with nothing"] = Wild(
    "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n  - model: b\n"
    "    parameters: {}\nparameters:\n    weight: 1\nbase_model:\ntokenizer_source:\n",
    {(HEAD, "weight", "a"): 1.0},
)
WILD["YAML 1.1"] = Wild(
    "%YAML 1.1\n---\nmerge_method: ties\nbase_model: base\nmodels: [{model: a}]\n"
    "parameters: {weight: 1e-1, normalize: no, int8_mask: on}\n",
    {(HEAD, "weight", "a"): 0.1, (HEAD, "normalize", None): False},
)
WILD["everything on one line"] = Wild(
    "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], parameters: {t: .5}}",
    {(HEAD, "t", None): 0.5},
)
WILD["comments everywhere"] = Wild(
    """\
# top
merge_method: linear # method
# before models
models: # models
  # before a model
  - model: a # a
    # before parameters
    parameters: # parameters
      # before weight
      weight: # a list
        # before a filter
        - filter: mlp # mlp
          # between
          value: 0.5 # half
        # before the rest
        - value: 1 # one
# the end
""",
    {(mlp(0), "weight", "a"): 0.5, (HEAD, "weight", "a"): 1.0},
)
WILD["a parameter of another method"] = Wild(
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
    "parameters: {t: 0.5, normalize: false}\n",
    {(HEAD, "t", None): 0.5},
    notes=("'normalize' is ignored: slerp has no such parameter",),
)
WILD["several documents"] = Wild(
    """\
slices:
  - sources:
      - model: a
        layer_range: [0, 8]
      - model: first
        layer_range: [0, 8]
merge_method: slerp
base_model: a
parameters: {t: 0.5}
---
name: first
merge_method: task_arithmetic
base_model: base
models:
  - model: b
    parameters: {weight: 1.0}
""",
    {(HEAD, "t", None): 0.5},
)
WILD["a module of a decoder"] = Wild(
    "merge_method: linear\nmodules:\n  default:\n    models:\n    - model: a\n    - model: b\n"
    "    parameters: {weight: 1}\n",
    tensors={HEAD: lambda w: (w("a", HEAD) + w("b", HEAD)) / 2},
)
WILD["filters on parts, gradient within"] = Wild(
    """\
merge_method: task_arithmetic
base_model: base
models:
- model: a
  parameters:
    weight:
    - filter: layers.0.
      value: 0
    - filter: mlp
      value: [0.2, 0.4, 0.2]
    - filter: '*'
      value: 1
""",
    {
        (mlp(0), "weight", "a"): 0.0,
        (mlp(7), "weight", "a"): 0.2,
        (attention(7), "weight", "a"): 1.0,
    },
)
