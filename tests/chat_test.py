import datetime

import pytest

from efflm import chat
from efflm.config import InputError

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
