"""Chat templates: what transformers makes of them, and what a hostile one is kept from."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from deployfa.errors import BundleError, MissingExtraError
from deployfa.generation.chat import Message, open_chat_template, render

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: What large templates do: macros, namespaces, loop controls, filters, tests on tools that are not there, blocks.
RICH = """{{- bos_token }}
{%- macro block(role, text) %}
    [{{ role | upper }}] {{ text | trim }}
{% endmacro %}
{%- set state = namespace(count=0) %}
{%- if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set state.count = state.count + 1 %}
    {{- block(message.role, message.content) }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ message.content | tojson }}{% endgeneration %}{% endif %}
    {%- if state.count > 5 %}{% break %}{% endif %}
{%- endfor %}
{{ {'é': state.count} | tojson }}{{ eos_token }}
"""
TALK = [
    Message("system", "Be short."),
    Message("user", "  Grüße, 日本 </s> {{ 1 }} "),
    Message("assistant", "Ja."),
    Message("user", "Why?"),
]


def theirs(template: str, messages: list[Message]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    talk = [{"role": each.role, "content": each.content} for each in messages]
    rendered, _ = render_jinja_template(
        conversations=[talk], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return str(rendered[0])


@pytest.mark.parametrize("template", [CHATML, RICH])
def test_prompts_are_those_of_transformers(template):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    found = render(template, [TALK, TALK[3:]], special)
    assert found == [theirs(template, TALK), theirs(template, TALK[3:])]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("hostile", "match"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|unsafe|UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError|unsafe"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "memory or time"),
        ("{{ 'x' * 10**10 }}", "memory or time"),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 1000000 characters"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError|unsafe|UndefinedError"),
    ],
)
def test_a_hostile_template_is_an_error_and_no_more(hostile, match):
    with pytest.raises(BundleError, match=f"(?s)the chat template fails .*({match}).*; leave --chat out"):
        render(hostile, [[Message("user", "x")]])


def test_a_template_that_sleeps_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr("deployfa.generation.chat._SECONDS", 0.001)
    with pytest.raises(BundleError, match="does not come to an end"):
        render(CHATML, [TALK])


def test_without_jinja2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"deployfa\[chat\]"):
        render(CHATML, [TALK])


def bundle(path, *, says: bool = True, vouched: bool = True) -> Any:
    files = {"chat_template.jinja": "sha"} if vouched else {}
    return SimpleNamespace(
        path=path,
        manifest=SimpleNamespace(
            files=files, preprocessing=SimpleNamespace(generation=SimpleNamespace(chat_template=says))
        ),
    )


def test_the_template_of_a_bundle(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None, "other": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert open_chat_template(bundle(tmp_path)) == (CHATML, {"bos_token": "<s>", "eos_token": "</s>"})
    for one in ({"says": False}, {"vouched": False}):
        with pytest.raises(BundleError, match="no chat template"):
            open_chat_template(bundle(tmp_path, **one))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BundleError, match="not UTF-8"):
        open_chat_template(bundle(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    for broken in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(BundleError, match="no JSON object"):
            open_chat_template(bundle(tmp_path))
