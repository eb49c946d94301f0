"""Inference speed by precision, compared with other programs' and with the portable kernels: tokens/s, bytes, memory.

    bash launch/run.sh experiments.bench_infer --model=smollm2 --rounds=5
    bash launch/run.sh experiments.bench_infer --precisions=w8a8,w4a8 --phases=decode --batches=1 --portable=both
    bash launch/run.sh experiments.bench_infer --model=runs/quickstart --phases=decode --batches=1 --busy=1 --rounds=7
    bash launch/run.sh experiments.bench_infer --peer="PYTHON openvino_infer.py --model=DIR; PYTHON llama_cpp_infer.py"

Expect in each round one JSON line a shape and precision, of the rounds so far, so that the last lines count and an
interrupt loses one measurement. prefill reads one prompt of `context` tokens; decode writes tokens greedily, after
`context` of them, for `batch` sequences at once.

    tokens_per_second (median of the rounds), low, high (the least and the greatest)
    bytes_per_token       the least that must move: weights as they are held, KV cache, operands of matmuls
    bandwidth_fraction    of the bytes a second that all cores read from memory (read_bytes_per_second)
    resident_bytes        the most memory while the first shape runs, above the same process before it had the model
    kernels               what the matmuls were prepared for: avx512, avx2, portable, or none

With --portable=both the native kernels are on and off in turn (A B A B): portable_ratio is theirs to the portable
forms, noise the largest deviation from 1 of the same ratio between two halves of the runs of one and the same path
(A A), not_slower whether portable_ratio + noise reaches 1. With --busy=N everything is also measured beside N processes
that each keep a core busy, in turn with measuring it without them (A B A B): busy_tokens_per_second, and busy_ratio,
the median of the rounds' ratios of that to the speed without, with busy_low and busy_high, the least and the greatest.
Every precision has a process of its own. A peer is a
command that prints JSON lines with `format`, `prefill_tokens_per_second` (of 512 tokens) and
`decode_tokens_per_second` (after 16), or `decode_1024_tokens_per_second` for after 1024, and so on. It runs in turn
with everything else, never at once; ratio, ratio_min, ratio_max are to the best of the peers' formats of as many bits,
in prefill to the best of all.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np

from efflm import trees
from efflm.cli import progress, run_directory
from efflm.cli.flags import launch
from efflm.config import flag, require
from efflm.config.model import ModelConfig
from efflm.evaluate import machine
from efflm.evaluate.speed import PRECISIONS, Answer, Ask, Portable, Shape, in_precision, worker
from efflm.formats import sources
from efflm.formats.sources import KINDS
from efflm.model import LanguageModel, params
from efflm.model.presets import PRESETS
from experiments.bench_train import beside_busy, run_peer

PHASES = ("prefill", "decode")
PEER_PROMPT, PEER_CONTEXT = 512, 16  # what peers measure where their field names no length
# What the formats of peers are called, by precision.
FORMATS = {"float32": r"f(loat|p)?32", "bfloat16": r"bf(loat)?16"}
FORMATS |= {name: rf"(int|i?q|u|w|nf){name[1]}.*" for name in PRECISIONS if name[0] == "w"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag("smollm2-135m", f"{KINDS}; or, for random weights in its shapes, {', '.join(PRESETS)}", path=True)
    phases: str = flag(",".join(PHASES), "phases to measure, joined by commas")
    precisions: str = flag(",".join(PRECISIONS), "precisions to measure, joined by commas")
    prompts: str = flag("128,512,2048", "tokens of a prompt in prefill, joined by commas")
    batches: str = flag("1,4,16", "sequences decoded at once, joined by commas")
    contexts: str = flag("128,1024", "tokens before those that are decoded; a peer adds 16 for one sequence")
    new: int = flag(64, "tokens decoded in a run, over all sequences of the batch")
    rounds: int = flag(2, "times everything is measured, in turn")
    portable: Portable = flag("off", "on: with the portable kernels; both: with native and portable ones in turn")
    busy: int = flag(0, "processes that each keep a core busy, beside which everything is measured too; 0: none")
    peer: str = flag("", "command of a peer to run in turn, or several with ; between them; it prints JSON lines")

    def __post_init__(self):
        for name, known in {"phases": PHASES, "precisions": PRECISIONS}.items():
            for each in getattr(self, name).split(","):
                require(each in known, f"{name} holds {each!r}: choose among {', '.join(known)}")
        for name in ("prompts", "batches", "contexts"):
            good = re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", getattr(self, name))
            require(bool(good), f"{name} is {getattr(self, name)!r}, but must be positive numbers joined by commas")
        for name in ("rounds", "new"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")
        require(self.busy >= 0, f"busy is {self.busy}, but must be 0 or more processes")


def shapes(run: Run) -> list[Shape]:
    """What is measured, decoding of one sequence first: memory is measured with the first shape."""
    numbers = lambda text: sorted(set(map(int, text.split(","))))
    pairs = set(itertools.product(numbers(run.batches), numbers(run.contexts)))
    if run.peer:
        pairs.add((1, PEER_CONTEXT))
    decode = [Shape("decode", batch, context, max(4, run.new // batch)) for batch, context in sorted(pairs)]
    prefill = [Shape("prefill", 1, prompt) for prompt in numbers(run.prompts)]
    return [shape for shape in decode + prefill if shape.phase in run.phases.split(",")]


def random_params(config: ModelConfig) -> dict[str, Any]:
    """Fresh weights by numpy, which compiles nothing: every process makes its own."""
    rng = np.random.default_rng(0)
    fixed = {"ones": np.ones, "zeros": np.zeros}
    made = {
        path: fixed[param.init](param.shape, np.float32)
        if param.init in fixed
        else rng.standard_normal(param.shape, np.float32) * np.float32(param.stddev)
        for path, param in params.table(config).items()
    }
    return trees.unflatten({path: jnp.asarray(weight) for path, weight in made.items()})


def loaded(model: str, precision: str) -> LanguageModel:
    """The model in a precision, in the process that measures it."""
    run_directory.use_compilation_cache()
    if model in PRESETS:
        return in_precision(LanguageModel(PRESETS[model], random_params(PRESETS[model])), precision)
    return in_precision(sources.load_model(model)[0], precision)


def main(run: Run) -> None:
    # On a GPU several processes share its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names, todo = run.precisions.split(","), shapes(run)
    peers = [command.strip() for command in run.peer.split(";") if command.strip()]
    with progress.bar("measuring the machine", live=False):
        bandwidth = machine.read_bandwidth()
    answers: dict[tuple[Shape, str], list[Answer]] = {each: [] for each in itertools.product(todo, names)}
    crowded: dict[tuple[Shape, str], list[Answer]] = {each: [] for each in answers}
    theirs: list[list[dict[str, Any]]] = []
    measured = run.rounds * (1 + bool(run.busy))
    ticks, total = itertools.count(1), len(names) + len(answers) * (measured + 1) + run.rounds * len(peers)
    with contextlib.ExitStack() as held:
        beside_rivals = held.enter_context(machine.rivals(run.busy))
        update = held.enter_context(progress.bar("measuring", total, live=False))
        ask: dict[str, Ask] = {}
        for name in names:  # one after the other, so that none is loading while another is measured
            load = functools.partial(loaded, run.model, name)
            ask[name] = held.enter_context(worker(load, todo, run.portable))
            update(next(ticks))
        for round_ in range(run.rounds):
            theirs.append([])
            for command in peers:
                theirs[-1] += run_peer(command)
                update(next(ticks))
            for (shape, name), found in answers.items():
                if not round_:
                    ask[name](shape, "warm")
                    update(next(ticks))
                found.append(ask[name](shape, "measure"))
                update(next(ticks))
                if run.busy:
                    beside_rivals(True)
                    crowded[shape, name].append(ask[name](shape, "measure"))
                    beside_rivals(False)
                    update(next(ticks))
                known = line(shape, name, found, bandwidth) | beside_busy(
                    rounds(shape, found), rounds(shape, crowded[shape, name])
                )
                print(run_directory.to_json(known | beside(theirs, shape, name, found)), flush=True)


def line(shape: Shape, precision: str, found: list[Answer], bandwidth: float) -> dict[str, Any]:
    """What is known of a shape in a precision after some rounds."""
    rates = rounds(shape, found)
    median, last = statistics.median(rates), found[-1]
    return {
        "phase": shape.phase,
        "precision": precision,
        "batch": shape.batch,
        "context": shape.context,
        "rounds": len(found),
        "tokens_per_second": round(median, 1),
        "low": round(min(rates), 1),
        "high": round(max(rates), 1),
        "bytes_per_token": round(last.bytes_per_token),
        "bandwidth_fraction": round(last.bytes_per_token * median / bandwidth, 4),
        "read_bytes_per_second": round(bandwidth),
        "resident_bytes": last.resident_bytes,
        "kernels": last.kernels,
    } | against_portable(shape, found)


def rounds(shape: Shape, found: list[Answer], path: int = 0) -> list[float]:
    """Tokens a second in each round, by the path that is measured first (0) or second (1)."""
    return [shape.tokens / statistics.median(itertools.chain(*answer.seconds[path::2])) for answer in found]


def against_portable(shape: Shape, found: list[Answer]) -> dict[str, Any]:
    """The chosen path compared with the portable one; nothing where only one was measured."""
    turns = len(found[0].seconds)
    if turns < 4:
        return {}
    by_turn = [statistics.median(itertools.chain(*(answer.seconds[turn] for answer in found))) for turn in range(turns)]
    noise = max(abs(by_turn[path] / by_turn[path + 2] - 1) for path in range(2))
    portable = statistics.median(rounds(shape, found, path=1))
    ratio = statistics.median(rounds(shape, found)) / portable
    return {
        "portable_tokens_per_second": round(portable, 1),
        "portable_ratio": round(ratio, 3),
        "noise": round(noise, 3),
        "not_slower": ratio + noise >= 1,
    }


def beside(theirs: list[list[dict[str, Any]]], shape: Shape, precision: str, found: list[Answer]) -> dict[str, Any]:
    """The rates of all rounds compared with the best peer's; nothing where no peer measures the like."""
    best = [peer_best(lines, shape, precision) for lines in theirs]
    if not all(best):
        return {}
    rates, peers = rounds(shape, found), [rate for rate, _ in best]
    ratios = [ours / peer for ours, peer in zip(rates, peers)]
    return {
        "ratio": round(statistics.median(rates) / statistics.median(peers), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "peer": best[-1][1],
        "peer_tokens_per_second": round(statistics.median(peers), 1),
    }


def peer_best(lines: list[dict[str, Any]], shape: Shape, precision: str) -> tuple[float, str] | None:
    """The highest rate among what a precision is compared with in a shape, and whose it is."""
    usual = (shape.phase, shape.context) in (("prefill", PEER_PROMPT), ("decode", PEER_CONTEXT))
    field = f"{shape.phase}_tokens_per_second" if usual else f"{shape.phase}_{shape.context}_tokens_per_second"
    named = lambda line: str(line.get("format") or line.get("dtype") or "")
    like = lambda line: shape.phase == "prefill" or re.fullmatch(FORMATS[precision], named(line), re.IGNORECASE)
    fits = [line for line in lines if field in line and line.get("batch", 1) == shape.batch and like(line)]
    return max(((line[field], f"{line.get('peer', '?')} {named(line)}") for line in fits), default=None)


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
