"""Answers given as tokens in place of a sampler's, and Mistral's chat template with tools."""

from functools import cache

from chat_case import byte_tokenizer, tokenizer_of

from ppg_fast.dialogues import ChatFormat
from ppg_fast.models.causal_lm import make_model
from ppg_fast.rollouts.generation import Answer

MISTRAL = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('Tool call IDs should have 9 characters') }}{% endif %}
{{- '{"name": ' + call.function.name | tojson + ', "arguments": ' + call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
{%- endfor %}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should be 9 characters') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""
MISTRAL_TOKENS = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"]


def tokenizer_with_calls(name):
    """A tokenizer of bytes with TRL's template ``name``, or with Mistral's."""
    if name != "mistral":
        return tokenizer_of(name)
    special = [*MISTRAL_TOKENS, "[/TOOL_RESULTS]"]
    return byte_tokenizer(MISTRAL, special, eos_token="</s>", bos_token="<s>")


@cache
def tiny(name):
    """A model of few weights and the chat format of that name."""
    tokenizer = tokenizer_with_calls(name)
    return make_model(len(tokenizer), width=16, layers=1, seed=0), ChatFormat(tokenizer)


class Scripted:
    """A sampler whose answers are the next of ``script``, with their special tokens written out."""

    def __init__(self, script, encode, end_ids):
        self.script, self.encode, self.end_ids, self.said = [list(answers) for answers in script], encode, end_ids, []

    def answer(self, requests):
        answers = []
        for request in requests:
            tokens = self.encode(self.script[request.dialogue].pop(0))
            self.said.append((list(request.tokens), tokens))
            answers.append(Answer(tokens, [-1.0] * len(tokens), tokens[-1] in self.end_ids))
        return answers


def scripted(monkeypatch, chat, *script):
    """Every sampler of rollouts says ``script``, the answers of one dialogue after those of another."""
    sampler = Scripted(script, chat.renderer.encode, chat.end_ids)
    monkeypatch.setattr("ppg_fast.rollouts.rollout.LocalSampler", lambda *_: sampler)
    return sampler
