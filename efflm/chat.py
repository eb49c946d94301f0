"""Chat templates: the Jinja program a model brings along, which writes a conversation the way the model was taught it.

A template is a stranger's code. It runs in Jinja's immutable sandbox, under the environment that Hugging Face's
documentation of chat templates promises it.
"""

import datetime
import json
from typing import Any

from efflm.config import InputError

Messages = list[dict[str, str]]


def render(template: str, messages: Messages, names: dict[str, str], add_generation_prompt: bool) -> str:
    """The conversation as one text. names: bos_token, eos_token and so on, as the template may ask for them.

    Raises InputError if the template is none, or refuses these messages.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant said, for training on it alone: here its body is just shown."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes HTML, which a prompt must not contain.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    given = {**names, "tools": None, "documents": None}
    try:
        return environment.from_string(template).render(
            **given, messages=messages, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a program may fail in any way
        line = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the model's chat template fails on these messages: {line}") from None
