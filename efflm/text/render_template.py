"""A program: it runs one chat template in a process of its own, which efflm.text.chat starts, limits and stops.

On stdin comes a JSON object with the template, its variables and the limits; its arguments are folders to import Jinja
from. On stdout it says by a letter how it went: `t` and the text, `f` and why the template failed, `m` for too much
memory, `l` for too long a text. After too long a time an alarm ends it. It imports nothing of efflm.

A template is a stranger's code. It runs in Jinja's immutable sandbox, under the environment that Hugging Face's
documentation of chat templates promises it.
"""

import contextlib
import datetime
import json
import os
import signal
import sys
from typing import Any


def render(template: str, variables: dict[str, Any]) -> str:
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
    return environment.from_string(template).render(**variables)


def limit(memory: int, seconds: int) -> None:
    """Let this process map `memory` bytes more than it has now, and end it after `seconds`. Where the system has no
    such limits, nothing is done."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))


def answer(template: str, variables: dict[str, Any], longest: int) -> bytes:
    try:
        text = render(template, variables)
        return b"t" + text.encode("utf-8", "surrogatepass") if len(text) <= longest else b"l"
    except MemoryError:
        return b"m"
    except Exception as error:  # a program may fail in any way
        words = " ".join(str(error)[:2000].split()) or type(error).__name__
        return b"f" + "".join(c if c.isprintable() else "?" for c in words[:300]).encode()


def main() -> None:
    sys.path += sys.argv[1:]
    import jinja2.ext  # before the limits and the time
    import jinja2.sandbox  # noqa: F401

    told = json.loads(sys.stdin.buffer.read())
    limit(told["memory"], told["seconds"])
    try:
        sys.stdout.buffer.write(answer(told["template"], told["variables"], told["longest"]))
    except MemoryError:
        sys.stdout.buffer.write(b"m")
    sys.stdout.buffer.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
