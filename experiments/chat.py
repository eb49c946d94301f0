r"""Talk with a model in the terminal: it sees what was said before, and answers are shown while they are written.

    bash launch/run.sh experiments.chat --model=smollm2
    bash launch/run.sh experiments.chat --model=smollm2 --system="You answer in one word." --temperature=0.7
    printf 'Name a river.\nName another.\n' | bash launch/run.sh experiments.chat --model=smollm2 > answers.txt

A line is a turn. /reset forgets all turns; /quit or Ctrl-D ends the chat; Ctrl-C stops the answer. Expect the answers
on stdout and all else on stderr. Turns that no longer fit into the model's length are left out from the oldest on,
which is told. A model without a chat template is refused: experiments.generate continues a text with it.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from efflm import ops, user_cache
from efflm.cli import signals, stdio
from efflm.cli.flags import launch
from efflm.cli.writing import Writing
from efflm.config import InputError, flag, require
from efflm.formats import sources
from efflm.infer import streaming
from efflm.text.chat import Messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Writing):
    """The run"""

    system: str = flag("", "what the model is told before the first turn")
    max_tokens: int = flag(256, "tokens of an answer at most")


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lines(terminal: bool, attempt: Callable[[Callable[[], str]], str | None]) -> Iterator[str]:
    """What the user writes, line by line. Raises InputError for what is not UTF-8."""
    require(sys.stdin is not None, "stdin is closed: write turns on it, one a line")
    if not terminal:
        try:
            yield from (line.decode().rstrip("\r\n") for line in sys.stdin.buffer)
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not UTF-8 (byte {error.object[error.start]:#04x}): convert it first") from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input edits lines and has a history with it)
    while True:
        try:
            line = attempt(lambda: input("> "))
        except EOFError:
            return note("")
        if line is None:
            note("\n/quit or Ctrl-D ends the chat")
        else:
            yield line


def fitting(tokenizer: Any, system: Messages, turns: Messages, room: int) -> tuple[Messages, list[int]]:
    """The turns without as many of the oldest as it takes to fit into `room` tokens, and their ids with the system's.
    turns: the user's and the model's by turns, the last one the user's. Raises InputError if that one is too long."""
    for first in range(0, len(turns), 2):
        ids = tokenizer.encode(tokenizer.chat([*system, *turns[first:]]))
        if len(ids) <= room:
            return turns[first:], ids
    raise InputError(f"this turn takes {len(ids)} tokens, but there is room for {room}: shorten it")


def main(run: Run) -> None:
    loaded = sources.load(run.model, precision=run.precision)
    model, tokenizer = loaded.model, loaded.tokenizer
    require(
        tokenizer.template is not None,
        f"{run.model} brings no chat template: continue a text with it, by experiments.generate --prompt",
    )
    draft = sources.load(run.draft, precision=run.precision).model if run.draft else None
    longest = min(each.config.max_length for each in (model, draft) if each)
    require(run.max_tokens < longest, f"max_tokens is {run.max_tokens}, but the model's max_length is {longest}")
    user_cache.use_compilation_cache()
    jax.block_until_ready([each and ops.prepared(each, jax.default_backend()) for each in (model, draft)])
    system = [{"role": "system", "content": run.system}] if run.system else []
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        note(f"{run.model}: /reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer")

    def answer(turns: Messages, attempt: Callable[[Callable[[], None]], None]) -> Messages:
        """The turns and one more, the model's: what it wrote until it ended or Ctrl-C came."""
        kept, written = turns, ""

        def write() -> None:
            nonlocal kept, written
            kept, ids = fitting(tokenizer, system, turns, longest - run.max_tokens)
            if len(kept) < len(turns):
                note(f"left out the oldest turns, {(len(turns) - len(kept)) // 2}: the model's max_length is {longest}")
            how = {"stops": [run.stop], "seed": run.seed, "draft": draft, "ahead": run.ahead}
            for piece in streaming.pieces(model, tokenizer, ids, run.max_tokens, run.sampling(), **how):
                written += piece.text
                print(piece.text, end="", flush=True)

        attempt(write)
        print(flush=True)
        return [*kept, {"role": "assistant", "content": written}] if written else kept[:-1]

    turns: Messages = []
    # where lines are piped in, Ctrl-C ends this command, as it does any other
    with signals.interrupts_are_handled(wanted=terminal) as attempt:
        for line in lines(terminal, attempt):
            if line.strip() == "/quit":
                break
            if line.strip() == "/reset":
                turns = []
                note("all turns are forgotten")
            elif line.strip():
                try:
                    turns = answer([*turns, {"role": "user", "content": line}], attempt)
                except InputError as error:
                    note(f"error: {error}")
                except BrokenPipeError:  # the reader of stdout has closed it
                    return stdio.drop(sys.stdout)


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
