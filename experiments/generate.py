"""Write text with a model: a continuation of a prompt, or with --chat an answer to it, shown while it is generated.

    python -m experiments.generate --model=smollm2 --prompt="The capital of France is" --temperature=0
    python -m experiments.generate --model=smollm2 --chat --prompt="Name three rivers." --max_tokens=128
    cat notes.txt | python -m experiments.generate --model=runs/quickstart --prompt=- > more.txt

Expect the text on stdout and nothing else there; on stderr the time to the first token and tokens a second, and
separately the time that compiling took. What was compiled once is reused by the next run.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import jax

from efflm import api, ops, rundir
from efflm.config import PRECISION, AskedPrecision, flag, require
from efflm.flags import launch
from efflm.formats import sources
from efflm.formats.sources import KINDS
from efflm.infer.generate import CHUNK, stream
from efflm.infer.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag("smollm2", KINDS)
    prompt: str = flag("", "what to go on from, or to answer; -: what comes on stdin")
    chat: bool = flag(False, "answer the prompt, by the model's own chat template")
    system: str = flag("", "with --chat: what the model is told before the prompt")
    max_tokens: int = flag(64, "tokens to write at most")
    temperature: float = flag(0.0, "0 takes the likeliest token; 1 draws as the model says, more is more random")
    top_k: int = flag(0, "draw from the k likeliest tokens only; 0: all")
    top_p: float = flag(1.0, "draw from the fewest tokens that have this much of the probability; 1: all")
    min_p: float = flag(0.0, "draw from tokens at least this fraction as likely as the likeliest; 0: all")
    seed: int = flag(0, "of what is drawn")
    stop: str = flag("", "text to end before, beside the model's own stop tokens")
    precision: AskedPrecision = flag("", PRECISION)

    def __post_init__(self):
        require(self.max_tokens > 0, f"max_tokens is {self.max_tokens}, but must be positive")
        require(self.chat or not self.system, "system is for --chat: put it into the prompt")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


def until(texts: Iterable[str], stop: str) -> Iterator[str]:
    """The texts up to `stop`, which may be split over several of them; a possible beginning of it is held back."""
    held = ""
    for text in texts:
        held += text
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        keep = next((n for n in range(min(len(stop) - 1, len(held)), 0, -1) if stop.startswith(held[-n:])), 0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def compile_clock() -> Callable[[], float]:
    """Starts to watch JAX compile; what it returns says how many seconds that has taken since, tracing included."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            while spans and spans[-1][0] >= now - seconds:  # nested in this one
                spans.pop()
            spans.append((now - seconds, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: sum(end - start for start, end in spans)


def main(run: Run) -> None:
    text = sys.stdin.read() if run.prompt == "-" else run.prompt
    require(bool(text) or not run.chat, "the prompt is empty: give --prompt, or --prompt=- and something on stdin")
    note = lambda words: print(words, file=sys.stderr, flush=True)
    began = time.perf_counter()
    loaded = sources.load(run.model, precision=run.precision)
    loaded = dataclasses.replace(loaded, model=ops.prepare(loaded.model, jax.default_backend()))
    jax.block_until_ready(loaded.model.params)
    note(f"{run.model}: loaded in {time.perf_counter() - began:.1f} s")
    ids = api.prompt_ids(loaded.tokenizer, text, loaded.about, chat=run.chat, system=run.system)
    rundir.use_compilation_cache(rundir.ROOT / "compilation_cache")
    compiling, tokens = compile_clock(), loaded.tokenizer
    # Bad input is refused here, before anything is on stdout.
    chunks = stream(loaded.model, [ids], run.max_tokens, run.sampling(), tokens.stops, run.seed, CHUNK)
    times, counts = [(time.perf_counter(), 0.0)], [0]  # after each chunk: the time, compiling until then; tokens so far

    def texts() -> Iterator[str]:
        decode = tokens.stream()
        for (new,) in chunks:
            times.append((time.perf_counter(), compiling()))
            counts.append(counts[-1] + len(new))
            yield decode(new)
        yield decode([], final=True)

    try:
        if not run.chat:
            sys.stdout.write(text)
        for part in until(texts(), run.stop):
            sys.stdout.write(part)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
    except KeyboardInterrupt:
        note("")
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    note(timing(times, counts, len(ids)))


def timing(times: list[tuple[float, float]], counts: list[int], prompt: int) -> str:
    """The last line: of `times` the first is when it began, the second when the first token was there."""
    if len(times) < 2:
        return "nothing was written"
    (start, _), (first, before), (last, compiled) = times[0], times[1], times[-1]
    words = [f"first token after {first - start - before:.2f} s ({prompt} in the prompt)"]
    further, seconds = counts[-1] - counts[1], last - first - (compiled - before)
    if further > 0:
        words.append(f"{further} more at {further / seconds:.1f} tokens/s")
    return "; ".join([*words, f"compiling took {compiled:.1f} s beside that"])


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
