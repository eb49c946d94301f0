import datetime
import sys

import pytest

from efflm.config import InputError
from efflm.text import chat

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<Hi>"}]


def render(template, messages=HELLO, prompt=True):
    return chat.render(template, messages, {"bos_token": "<s>", "eos_token": "</s>"}, prompt)


def test_blocks_leave_no_blank_lines_and_the_answer_is_asked_for():
    template = """{{ bos_token }}
    {% for message in messages %}
    {% if message['role'] == 'system' %}{% continue %}{% endif %}
{{ message['role'] }}: {{ message['content'] }}
    {% endfor %}
    {% if add_generation_prompt %}
assistant:
    {%- endif %}"""
    assert render(template) == "<s>\nuser: <Hi>\nassistant:"
    assert render(template, prompt=False) == "<s>\nuser: <Hi>\n"


def test_what_templates_are_promised():
    assert render("{{ messages[1] | tojson }}") == '{"role": "user", "content": "<Hi>"}'
    assert render("{{ {'a': 'é'} | tojson(indent=1) }}") == '{\n "a": "é"\n}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("a{% generation %}b{{ eos_token }}{% endgeneration %}c") == "ab</s>c"
    assert render("{% if tools is none %}none{% endif %}") == "none"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for m in messages %}", "endfor"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ missing.name }}", "undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% generation %}", "endgeneration"),
        ("{% include 'x' %}", "fails"),
        ("{{ range(10000000) }}", "range"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(template, message):
    with pytest.raises(InputError, match=message):
        render(template)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"
TIME, MEMORY = "ran for over 2 s", "needed over 256 MB of memory"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, TIME),
        ("{{ 9 ** (9 ** 9) % 7 }}", TIME),  # one operation, which nothing inside the process can interrupt
        ("{{ 'a' * 4000000000 }}", MEMORY),
        ("{{ '%1500000000d' | format(1) }}", MEMORY),
        ("{{ '{:1500000000}'.format(1) }}", MEMORY),
        ("{{ 'a' | center(1500000000) }}", MEMORY),
        ("{{ ([0] * 1000000000) | length }}", MEMORY),
        (DOUBLING, MEMORY),
        ("{{ 'ab' * 10000000 }}", "wrote over 10,000,000 characters"),
        ("{{ raise_exception('x' * 5000) }}", "x{300}$"),
        ("{{ raise_exception('a\n\x1b[2Jb') }}", r"a \?\[2Jb"),
    ],
)
def test_a_template_has_two_seconds_and_256_megabytes(template, message):
    with pytest.raises(InputError, match=f"^the chat template of /models/x/tokenizer.json .*{message}") as error:
        chat.render(template, HELLO, {}, True, "/models/x/tokenizer.json")
    assert len(str(error.value)) < 500


def test_conversations_reach_a_template_as_they_are():
    odd = "\x00 \u2028 \r\n é😀 " + "long " * 100_000
    assert render("{{ messages[0]['content'] }}{{ messages[0]['n'] }}", [{"content": odd, "n": 1.5}]) == odd + "1.5"
    with pytest.raises(InputError, match="messages must hold what JSON can"):
        render("", [{"content": {1, 2}}])
    with pytest.raises(InputError, match="half of a surrogate pair"):
        render("", [{"content": "\ud800"}])


def test_a_template_is_never_run_here(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(InputError, match="cannot start"):
        render("a")
