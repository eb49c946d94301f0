"""Chat templates: the Jinja program a model brings along, which writes a conversation the way the model was taught it.

A template is a stranger's code. Jinja's sandbox keeps it from files and from Python, but neither from looping for ever
nor from asking for all of the memory. So it runs in a process of its own (render_template.py), which starts in a tenth
of a second and is stopped at the limits below. Systems that limit no process's memory (macOS, Windows) stop it by
the time alone.
"""

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efflm.config import InputError, require
from efflm.text.encoding import require_characters

Messages = list[dict[str, str]]
SECONDS, MEGABYTES = 2, 256
STARTED = 60  # seconds, the start included, after which it is stopped where the system has no alarms
LONGEST = 10_000_000  # characters: more than any model here reads
PROBLEMS = {
    "f": "fails on these messages",
    "l": f"wrote over {LONGEST:,} characters",
    "m": f"needed over {MEGABYTES} MB of memory",
    "s": f"ran for over {SECONDS} s",
    "d": "ended the process it ran in",
}
PROGRAM = Path(__file__).with_name("render_template.py")


def render(
    template: str, messages: Messages, names: dict[str, str], add_generation_prompt: bool, where: str = "this model"
) -> str:
    """The conversation as one text. names: bos_token, eos_token and so on, as the template may ask for them. where:
    what it belongs to, for errors.

    Raises InputError if the template is none, refuses these messages, or exceeds the limits.
    """
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    request = {
        "template": template,
        "variables": names | {"tools": None, "documents": None} | given,
        "memory": MEGABYTES * 10**6,
        "seconds": SECONDS,
        "longest": LONGEST,
    }
    try:
        sent = json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages must hold what JSON can: {error}") from None
    require_characters(json.dumps(messages, ensure_ascii=False), "messages")
    kind, text = _answer(sent)
    if kind == "t":
        return text
    problem = f"{PROBLEMS.get(kind, PROBLEMS['d'])}, so give other messages, or a plain prompt without chat"
    raise InputError(f"the chat template of {where} {problem}" + (f": {text}" if text else ""))


def prompt_ids(
    tokenizer: Any, text: str, about: Mapping[str, Any], *, chat: bool = False, system: str = ""
) -> list[int]:
    """The token ids to go on from. about: of the model. Raises InputError if it is to chat and has no template."""
    require(chat or not system, "system is for chat: put it into the prompt")
    if chat:
        told = [{"role": "system", "content": system}] if system else []
        return tokenizer.encode(tokenizer.chat([*told, {"role": "user", "content": text}]))
    if about.get("source"):  # trained here, where a separator stands before each text
        return [tokenizer.separator, *tokenizer.encode(text)]
    return tokenizer.prompt(text) or [tokenizer.separator]


def _answer(request: bytes) -> tuple[str, str]:
    """The letter and the text that the program answers; `s` if it took too long, `d` if it died."""
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = sorted({str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin})
    command = [sys.executable or "python3", "-I", "-S", "-W", "ignore", str(PROGRAM), *folders]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=STARTED)
    except subprocess.TimeoutExpired:
        return "s", ""
    except OSError as error:
        raise InputError(f"cannot start {command[0]} to run a chat template in: {error.strerror}") from None
    if done.returncode > 0:
        why = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise InputError(f"cannot start {command[0]} to run a chat template in: {why or 'it said nothing'}")
    if done.returncode == 0 and done.stdout:
        return done.stdout[:1].decode(), done.stdout[1:].decode("utf-8", "surrogatepass")
    late = done.returncode == -getattr(signal, "SIGALRM", 0)
    return ("s", "") if late else ("d", f"exit code {done.returncode}")
