"""The demo model's special tokens and its chat format, as text and as a Jinja template."""

from __future__ import annotations

from collections.abc import Sequence

BOS, END, USER, ASSISTANT, SYSTEM = "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (BOS, END, USER, ASSISTANT, SYSTEM)
"""Their token ids are 0, 1, ...; the tokenizer puts `BOS` before every text by itself."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' + message['content'] | trim + '<|end|>' -}}
{%- elif message['role'] in ('user', 'system') -%}
{{- '<|' + message['role'] + '|>' + message['content'] | trim -}}
{%- else -%}
{{- raise_exception('the roles are system, user and assistant, got ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def chat(turns: Sequence[tuple[str, str]], system: str = "") -> str:
    """A document of the training text: (user, assistant) turns, without `BOS`."""
    start = SYSTEM + system if system else ""
    return start + "".join(f"{USER}{question}{ASSISTANT}{answer}{END}" for question, answer in turns)
