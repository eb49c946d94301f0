"""The speed and memory of one model at chosen shapes, measured in a process that holds nothing else."""

import contextlib
import dataclasses
import math
import multiprocessing
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efflm import malloc, ops, trees
from efflm.config import InputError, require
from efflm.infer.generate import State, decode, forward, prefill, row_keys
from efflm.infer.sampling import GREEDY
from efflm.model import LanguageModel, empty_cache, in_dtype
from efflm.model.params import find, in_layer, is_matrix
from efflm.ops import Format, QArray
from efflm.ops.kernels.cpu import build
from efflm.parallel import sharding
from efflm.plan import work
from efflm.precision import policy_for

QUANTIZED = {
    f"w{bits}a{size}": Format(bits=bits, group=0 if bits == 8 else 32, activations=activations)
    for bits in (8, 4, 3, 2)
    for size, activations in ((16, "float"), (8, "int8"))
}
PRECISIONS = ("float32", "bfloat16", *QUANTIZED)
LEAST = 0.5  # seconds for which what is quick is run again in a turn

Portable = Literal["off", "on", "both"]
# Which kernels are used, turn after turn: build.chosen's names.
TURNS: dict[Portable, tuple[str, ...]] = {"off": ("auto",), "on": ("off",), "both": ("auto", "off") * 2}


@dataclasses.dataclass(frozen=True)
class Shape:
    """prefill: one prompt of `context` tokens is read; decode: `new` tokens follow `context` in each of the `batch`."""

    phase: Literal["prefill", "decode"]
    batch: int
    context: int
    new: int = 0

    @property
    def tokens(self) -> int:
        """Tokens read or written in a run."""
        return self.batch * (self.new or self.context)


@dataclasses.dataclass(frozen=True)
class Answer:
    """seconds: of the runs of each turn. bytes_per_token: the least that moves. resident_bytes: None: not known."""

    seconds: list[list[float]]
    bytes_per_token: float
    resident_bytes: int | None
    kernels: str


def in_precision(model: LanguageModel, name: str) -> LanguageModel:
    """A model of floats in one of PRECISIONS. Raises InputError."""
    quantized = any(isinstance(leaf, QArray) for _, leaf in trees.flatten(model.params))
    require(not quantized, "the model is quantized already: give the one that it was made from")
    if name not in QUANTIZED:
        return in_dtype(model, name)

    def one(path: str, w: Any) -> Any:
        return ops.quantize_array(w, find(path)[0].contracted, QUANTIZED[name]) if is_matrix(path) else w

    model = in_dtype(model, "float32")
    return model.replace(params=trees.map_with_path(one, model.params))


def bytes_per_token(model: LanguageModel, shape: Shape) -> float:
    """The least that moves between memory and processor (see plan.work), with the weights as they are held."""
    config, policy = model.config, policy_for(model.config)
    if shape.phase == "prefill":
        found, tokens = work.prefill(config, shape.batch, shape.context, policy), shape.batch * shape.context
    else:
        found, tokens = work.decode(config, shape.batch, shape.context + shape.new, policy), shape.batch
    table = "embedding" if config.tied else "unembedding"  # read whole for the logits; of any other a few rows are
    read = [leaf for path, leaf in trees.flatten(model.params) if in_layer(path) or path == table]
    plain = trees.count(read) * work.ITEMSIZE[policy.param]  # what plan.work has for them
    return (work.total(found).nbytes - plain + trees.nbytes(read)) / tokens


# --- runs ------------------------------------------------------------------------------------------------------------


def runner(model: LanguageModel, shape: Shape) -> Callable[[], float]:
    """What runs a shape once and gives the seconds it took. The first call compiles."""
    how, stops = GREEDY.arrays(), np.zeros(0, np.int32)
    if shape.phase == "prefill":
        tokens = np.broadcast_to(np.arange(shape.context, dtype=np.int32) % 251, (shape.batch, shape.context))
        lengths = np.full(shape.batch, shape.context, np.int32)
        return lambda: _seconds(lambda: prefill(model, tokens, lengths, cache_length=shape.context))
    config, length = model.config, shape.context + shape.new

    def write() -> float:
        # The speed does not depend on what the cache holds: filling it by reading prompts would take far longer.
        cache = empty_cache(config, shape.batch, length, policy_for(config).compute)
        cache = cache.replace(length_B=jnp.full(shape.batch, shape.context, jnp.int32))
        token_B, done_B = jnp.zeros(shape.batch, jnp.int32), jnp.zeros(shape.batch, bool)
        state = jax.block_until_ready(State(cache, token_B, done_B, row_keys(0, shape.batch)))
        return _seconds(lambda: decode(model, state, how, stops, np.int32(shape.new), steps=shape.new))

    return write


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """The most memory of this process while run() goes on; None where the system is not Linux or does not say."""
    malloc.trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is held now
        run()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return None


def cost_of(work: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """What work() gives once all of it is computed, the seconds that took, and the most memory of this process
    meanwhile above what it held before; None as in peak_bytes."""
    made, held, start = [], peak_bytes(lambda: None), time.perf_counter()
    peak = peak_bytes(lambda: made.append(jax.block_until_ready(work())))
    return made[0], time.perf_counter() - start, None if peak is None or held is None else peak - held


def seconds_to_read(model: LanguageModel, batch: Mapping[str, np.ndarray]) -> float:
    """Of one forward pass over all rows of a batch, at most 8 at a time, with the logits, after warm-up."""
    run = jax.jit(lambda model, tokens, positions, segments: forward(
        model, tokens, positions=positions, segments=segments)[0].max())  # fmt: skip
    arrays = [batch[name] for name in ("inputs", "positions", "segments")]
    rows = len(arrays[0])
    part = lambda start: [array[start : start + math.gcd(rows, 8)] for array in arrays]
    jax.block_until_ready(run(model, *part(0)))
    seconds = [_seconds(lambda start=start: run(model, *part(start))) for start in range(0, rows, math.gcd(rows, 8))]
    return sum(seconds)


# --- a process for each model ----------------------------------------------------------------------------------------


class Subject:
    """What the process holds: the model as each kind of kernels reads it, and the runs that are compiled."""

    def __init__(self, load: Callable[[], LanguageModel], portable: Portable, least: float = LEAST):
        jax.block_until_ready(jax.jit(lambda x: jnp.sort(x @ x))(jnp.ones((64, 64))))  # the compiler is in memory
        before = peak_bytes(lambda: None)
        self.load, self.turns, self.least = load, TURNS[portable], least
        self.models: dict[str, LanguageModel] = {}
        self.runs: dict[tuple[str, Shape], Callable[[], float]] = {}
        self.before, self.resident = before, None
        self.model(self.turns[0])

    def model(self, form: str) -> LanguageModel:
        """Loaded anew for each kind of kernels, so that nothing but what they read is held."""
        if form not in self.models:
            model = sharding.on_one_device(self.load())
            if not self.runs:
                jax.clear_caches()  # the programs that rounded the weights: no part of running a model that is stored
            with build.chosen(form):
                self.models[form] = ops.prepare(model, jax.default_backend())
        return self.models[form]

    def _warm(self, shape: Shape) -> None:
        """Compile and run a shape; with the first of all shapes memory is measured."""
        for form in dict.fromkeys(self.turns):
            if (form, shape) in self.runs:
                continue
            run = runner(self.model(form), shape)
            with build.chosen(form):
                run()
            if not self.runs and self.before is not None:
                self.resident = peak_bytes(run) - self.before
            self.runs[form, shape] = run

    def measure(self, shape: Shape) -> Answer:
        self._warm(shape)
        seconds: list[list[float]] = [[] for _ in self.turns]
        while not seconds[0] or sum(map(sum, seconds)) < self.least * len(self.turns):
            for form, kept in zip(self.turns, seconds, strict=True):
                kept.append(self.runs[form, shape]())
        with build.chosen(self.turns[0]):
            kernels = build.form() if jax.default_backend() == "cpu" else ""
        moved = bytes_per_token(self.models[self.turns[0]], shape)
        return Answer(seconds, moved, self.resident, kernels or "none")


def serve(link: Connection, load: Callable[[], LanguageModel], portable: Portable, least: float) -> None:
    """The process's side of `worker`: what `link` brings is done until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    try:
        subject = Subject(load, portable, least)
        link.send(subject.model(subject.turns[0]).config.max_length)
        while True:
            link.send(subject.measure(link.recv()))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        link.send(error if isinstance(error, InputError) else RuntimeError(str(error)))


def require_within(shapes: list[Shape], longest: int) -> None:
    """Raise InputError for a shape that is longer than a model reads."""
    for shape in shapes:
        require(
            shape.context + shape.new <= longest,
            f"{shape.phase} of {shape.context + shape.new} tokens is longer than the model's max_length of {longest}: "
            "lower prompts, contexts or new",
        )


@contextlib.contextmanager
def worker(
    load: Callable[[], LanguageModel], shapes: list[Shape], portable: Portable = "off", least: float = LEAST
) -> Iterator[Callable[[Shape], Answer]]:
    """A process with the model that `load` gives, while the context lasts: it is asked to measure a shape, and
    warms up before the first of its runs.

    load: must be importable in a new process. least: seconds for which a turn goes on. Raises InputError, also where
    a shape is longer than the model reads.
    """
    spawned = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads in an unknown state
    here, there = spawned.Pipe()
    process = spawned.Process(target=serve, args=(there, load, portable, least), daemon=True)
    process.start()
    there.close()

    def received() -> Any:
        try:
            answer = here.recv()
        except (EOFError, OSError):
            process.join(1)
            raise MemoryError(f"a measuring process ended with exit code {process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(shape: Shape) -> Answer:
        here.send(shape)
        return received()

    try:
        require_within(shapes, received())
        yield ask
    finally:
        process.kill()
        process.join()
