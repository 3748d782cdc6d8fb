"""The chat templates that recipes may name, in Jinja, and the marks that they put into a prompt."""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["MARKS", "TEMPLATES"]

_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'].strip() + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '### Response:\\n' + message['content'].strip() + eos_token + '\\n\\n' }}
{%- elif message['role'] == 'system' -%}
{{ message['content'].strip() + '\\n\\n' }}
{%- else -%}
{{ raise_exception('alpaca knows the roles system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_EXAONE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif -%}
{{ '[|' + message['role'] + '|]' + message['content'] }}
{%- if message['role'] != 'user' -%}
{{ '[|endofturn|]' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '[|assistant|]' }}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'].strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

_MISTRAL = """\
{{- bos_token -}}
{%- set first = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set first.system = message['content'].strip() + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + first.system + message['content'].strip() + ' [/INST]' }}
{%- set first.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'].strip() + eos_token }}
{%- else -%}
{{ raise_exception('mistral knows the roles system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
"""

TEMPLATES = MappingProxyType(
    {
        "alpaca": _ALPACA,
        "chatml": _CHATML,
        "exaone": _EXAONE,
        "llama3": _LLAMA3,
        "mistral": _MISTRAL,
    }
)
MARKS = MappingProxyType(
    {
        "alpaca": (),
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
        "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "mistral": (),
    }
)
"""Tokens of a vocabulary that a template counts on."""
