"""Write text with a model: a continuation of a prompt, or with --chat an answer to it, shown while it is generated.

    bash launch/run.sh experiments.generate --model=smollm2 --prompt="The capital of France is" --temperature=0
    bash launch/run.sh experiments.generate --model=smollm2 --chat --prompt="Name three rivers." --max_tokens=128
    cat notes.txt | bash launch/run.sh experiments.generate --model=runs/quickstart --prompt=- > more.txt

Expect the text on stdout and nothing else there; on stderr the time to the first token and tokens a second, and
separately the time that compiling took. What was compiled once is reused by the next run.
"""

import dataclasses
import io
import sys
import time

import jax

from efflm import ops, user_cache
from efflm.cli import stdio
from efflm.cli.flags import launch
from efflm.cli.writing import Writing
from efflm.config import InputError, flag, require
from efflm.evaluate import compiling
from efflm.formats import sources
from efflm.infer import streaming
from efflm.infer.generate import CHUNK
from efflm.text.chat import prompt_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Writing):
    """The run"""

    prompt: str = flag("", "what to go on from, or to answer; -: what comes on stdin")
    chat: bool = flag(False, "answer the prompt, by the model's own chat template")
    system: str = flag("", "with --chat: what the model is told before the prompt")

    def __post_init__(self):
        super().__post_init__()
        require(self.chat or not self.system, "system is for --chat: put it into the prompt")


def read_prompt() -> str:
    """What comes on stdin, line ends as they are, whatever the locale says of its encoding. Raises InputError."""
    require(
        sys.stdin is not None, "--prompt=- reads stdin, which is closed: pipe the prompt in, or give it as --prompt"
    )
    try:
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", newline="").read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompt=- reads stdin, which is not UTF-8 (byte {error.object[error.start]:#04x} at offset "
            f"{error.start}): convert it first"
        ) from None


def main(run: Run) -> None:
    text = read_prompt() if run.prompt == "-" else run.prompt
    require(bool(text) or not run.chat, "the prompt is empty: give --prompt, or --prompt=- and something on stdin")
    note = lambda words: print(words, file=sys.stderr, flush=True)
    began = time.perf_counter()
    loaded = sources.load(run.model, precision=run.precision)
    draft = sources.load(run.draft, precision=run.precision).model if run.draft else None
    jax.block_until_ready([each and ops.prepared(each, jax.default_backend()) for each in (loaded.model, draft)])
    note(f"{run.model}: loaded in {time.perf_counter() - began:.1f} s")
    ids = prompt_ids(loaded.tokenizer, text, loaded.about, chat=run.chat, system=run.system)
    user_cache.use_compilation_cache()
    clock = compiling.clock()
    # Bad input is refused here, before anything is on stdout.
    how = {"stops": [run.stop], "seed": run.seed, "draft": draft, "ahead": run.ahead, "chunk": CHUNK}
    pieces = streaming.pieces(loaded.model, loaded.tokenizer, ids, run.max_tokens, run.sampling(), **how)
    times, counts, drafting = [time.perf_counter()], [0], None  # after each piece: the time, and how many tokens
    try:
        if not run.chat:
            sys.stdout.write(text)
        for piece in pieces:
            times.append(time.perf_counter())
            counts.append(counts[-1] + len(piece.ids))
            drafting = piece.drafting
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has closed it
        stdio.drop(sys.stdout)
    if drafting:
        note(
            f"{run.draft}: proposed {drafting.drafted} tokens, of which {drafting.accepted} stayed "
            f"({drafting.acceptance:.0%}); {drafting.passes} passes of {run.model}"
        )
    note(timing(times, counts, len(ids), clock))


def timing(times: list[float], counts: list[int], prompt: int, clock: compiling.Clock) -> str:
    """The last line: of `times` the first is when it began, the second when the first token was there."""
    if len(times) < 2:
        return "nothing was written"
    start, first, last = times[0], times[1], times[-1]
    words = [f"first token after {clock(start, first)[1]:.2f} s ({prompt} in the prompt)"]
    further, seconds = counts[-1] - counts[1], clock(first, last)[1]
    if further > 0 and seconds > 0:
        words.append(f"{further} more at {further / seconds:.1f} tokens/s")
    return "; ".join([*words, f"compiling took {clock(start, last)[0]:.1f} s beside that"])


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
