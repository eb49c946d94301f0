"""How fast is training, inference, or decoding with a draft, here and compared with other programs?

    bash launch/run.sh experiments.bench --what=train --peer="PYTHON experiments/peers/torch_train.py"
    bash launch/run.sh experiments.bench --what=infer --precisions=w8a8,w4a8 --phases=decode --batches=1 --portable=both
    bash launch/run.sh experiments.bench --what=infer --peer="PYTHON experiments/peers/openvino_infer.py --model=DIR"
    bash launch/run.sh experiments.bench --what=speculative --model=smollm2 --draft=small.safetensors --ahead=2,4,8

--what=WHAT --help shows the flags of each. Expect a JSON line after each measurement, of the rounds so far, so that the
last lines count and an interrupt loses one: tokens_per_second (median of the rounds), low, high (the least and the
greatest). With --run_dir the last lines are in its results.json. Everything takes turns in every round, and what is
compared is compared within a round: a ratio is the median of the rounds' ratios, with _error, its standard error, and
_min and _max, the least and the greatest of a round.

With --busy=N everything is also measured beside N processes that each keep a core busy (A B A B): busy_ratio is to the
speed without. With --portable=both the native kernels are on and off in turn: portable_ratio is theirs to the portable
forms. With --peer, ratio is to the best of what the peers print; with a draft it is to the model alone, and below 1 the
draft makes it slower. The other fields are in experiments/README.md, what a peer prints in experiments/peers/README.md.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops, trees, user_cache
from efflm.cli import progress, run_directory
from efflm.cli.flags import command_line, launch
from efflm.cli.subject import Subject
from efflm.config import InputError, flag, require, require_positive
from efflm.config.model import ModelShape
from efflm.config.parallel import HostsConfig, MeshConfig
from efflm.config.train import TrainConfig
from efflm.data import dataset
from efflm.evaluate import machine, turns
from efflm.evaluate.speed import PRECISIONS, Answer, Portable, Shape, in_precision, worker
from efflm.formats import sources
from efflm.formats.sources import KINDS
from efflm.infer import generate, speculative
from efflm.infer.sampling import Sampling
from efflm.model import LanguageModel, autotune, params, require_same_tokenizer
from efflm.model.presets import PRESETS
from efflm.parallel import meshes, processes
from efflm.plan import work
from efflm.precision import POLICIES
from efflm.report.journal import Journal
from efflm.report.rows import Row
from efflm.train.aot import timed_step

Policy = Literal[*POLICIES, autotune.AUTO]
PEER_SHAPE = ModelShape(family="gpt2", layers=6, width=384, heads=6, kv_heads=6, mlp_dim=1536, max_length=256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The benchmark"""

    what: Literal["", "train", "infer", "speculative"] = flag("", "what is measured, which decides the other flags")
    rounds: int = flag(3, "times everything is measured, in turn")
    busy: int = flag(0, "processes that each keep a core busy, beside which everything is measured too; 0: none")
    peer: str = flag("", "command of a peer to run in turn, or several with ; between them; it prints JSON lines")
    run_dir: str = flag("", "where to write the last lines as results.json; default: nowhere", path=True)

    def __post_init__(self):
        require_positive(self, "rounds")
        require(self.busy >= 0, f"busy is {self.busy}, but must be 0 or more processes")

    def turns(self, subjects: Any, best: Any = lambda lines, subject: None) -> Any:
        return turns.taken(subjects, self.rounds, self.busy, self.peer, best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Bench):
    """The benchmark of training"""

    policies: tuple[Policy, ...] = flag(tuple(POLICIES), "policies to measure; auto: as --train.policy=auto chooses")
    steps: int = flag(7, "timed steps of a policy in a round, after one to warm up")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infer(Bench):
    """The benchmark of inference"""

    model: str = flag("smollm2-135m", f"{KINDS}; or, for random weights in its shapes, {', '.join(PRESETS)}", path=True)
    phases: tuple[Literal["prefill", "decode"], ...] = flag(("prefill", "decode"), "phases to measure")
    precisions: tuple[Literal[*PRECISIONS], ...] = flag(tuple(PRECISIONS), "precisions to measure")
    prompts: tuple[int, ...] = flag((128, 512, 2048), "tokens of a prompt in prefill")
    batches: tuple[int, ...] = flag((1, 4, 16), "sequences decoded at once")
    contexts: tuple[int, ...] = flag((128, 1024), "tokens before those decoded; a peer adds 16 for one sequence")
    new: int = flag(64, "tokens decoded in a run, over all sequences of the batch")
    portable: Portable = flag("off", "on: with the portable kernels; both: with native and portable ones in turn")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "prompts", "batches", "contexts", "new")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculative(Subject, Bench):
    """The benchmark of decoding with a draft"""

    draft: str = flag("", "a smaller model with the same tokenizer", path=True)
    ahead: tuple[int, ...] = flag((2, 4, 8), "tokens that the draft proposes at a time")
    prompts: int = flag(4, "test documents that are gone on from")
    prompt_tokens: int = flag(32, "tokens of each that are the prompt")
    max_tokens: int = flag(64, "tokens to write")
    temperature: float = flag(0.0, "0 takes the likeliest token")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "ahead", "prompts", "prompt_tokens", "max_tokens")
        require(not self.peer, "peer is for --what=train and --what=infer: leave it out")


def teller(run: Bench, what: str) -> Callable[[str, dict[str, Any]], None]:
    """Prints each line, and with a run directory writes the last of each name to results.json. what: is measured."""
    log, rows = Journal(run.run_dir, command_line("experiments.bench", sys.argv)), {}
    facts = [what, f"All in turn in each of {run.rounds} rounds; their median, and that of the ratios in them."]

    def say(name: str, line: dict[str, Any]) -> None:
        print(run_directory.to_json(line), flush=True)
        rows[name] = Row(name, line)
        if run.run_dir and processes.is_first():
            log.results(facts, rows=[*rows.values()])

    return say


@run_directory.locked
def train(run: Train, model: ModelShape, train: TrainConfig, mesh: MeshConfig) -> None:
    require(not run.peer or jax.process_count() == 1, "a peer is measured on one host only: leave --peer out")
    devices = meshes.mesh_for(mesh, train.batch, train.length, train.accumulate)
    config, tokens = model.config(), train.batch * train.length
    told, names = lambda line: print(line, file=sys.stderr), run.policies
    chosen = {name: autotune.training(config, dataclasses.replace(train, policy=name), told) for name in names}
    steps = {name: timed_step(config, each, devices) for name, each in chosen.items()}
    dtypes = {name: POLICIES[each.policy].compute for name, each in chosen.items()}
    with progress.bar("measuring the machine", live=False):
        peaks = {dtype: machine.matmul_peak(dtype, 2048) for dtype in set(dtypes.values())}
    # Fake devices of a CPU share its cores.
    peak_devices = 1 if jax.default_backend() == "cpu" else devices.size
    flops = work.train_flops(config, batch=train.batch, length=train.length) / tokens

    def timed(name: str) -> float:
        _, *times = itertools.islice(steps[name].seconds, 1 + run.steps)  # the first warms up
        return tokens / statistics.median(times)

    def best(lines: list[dict[str, Any]], name: str) -> turns.Best | None:
        like = [line for line in lines if name != "float32" or line["dtype"] == "float32"]
        return max(((line["tokens_per_second"], line["dtype"]) for line in like), default=None)

    shape = f"{model.family}, {model.layers} layers of width {model.width}, vocabulary {model.vocabulary:,}"
    say = teller(run, f"A training step of {train.batch} x {train.length} tokens ({shape}).")
    for turn in run.turns({name: functools.partial(timed, name) for name in names}, best):
        name, step, found = turn.subject, steps[turn.subject], turn.line()
        known = {"name": f"train_{name}", "policy": chosen[name].policy} | found
        known["mfu"] = round(flops * found["tokens_per_second"] / (peak_devices * peaks[dtypes[name]]), 4)
        say(known["name"], known | {"compile_seconds": round(step.compile_seconds, 2), "peak_bytes": step.peak_bytes})


def shapes(run: Infer) -> list[Shape]:
    """What is measured, decoding of one sequence first: memory is measured with the first shape."""
    pairs = set(itertools.product(run.batches, run.contexts))
    if run.peer:
        pairs.add((1, turns.PEER_CONTEXT))
    decode = [Shape("decode", batch, context, max(4, run.new // batch)) for batch, context in sorted(pairs)]
    prefill = [Shape("prefill", 1, prompt) for prompt in sorted(set(run.prompts))]
    return [shape for shape in decode + prefill if shape.phase in run.phases]


def loaded(model: str, precision: str) -> LanguageModel:
    """The model in a precision, in the process that measures it."""
    user_cache.use_compilation_cache()
    if model not in PRESETS:
        return in_precision(sources.load_model(model)[0], precision)
    # Of any values, by numpy, which compiles nothing: speed does not depend on them.
    values, table = np.random.default_rng(0).normal(0, params.STDDEV, 1 << 16), params.table(PRESETS[model])
    weights = {path: jnp.asarray(np.resize(values, param.shape), jnp.float32) for path, param in table.items()}
    return in_precision(LanguageModel(PRESETS[model], trees.unflatten(weights)), precision)


@run_directory.locked
def infer(run: Infer) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU several processes share its memory
    names, todo = run.precisions, shapes(run)
    with progress.bar("measuring the machine", live=False):
        bandwidth = machine.read_bandwidth()
    say = teller(run, f"Prefill and greedy decoding of {run.model}.")
    answers: dict[Any, list[Answer]] = {each: [] for each in itertools.product(todo, names)}
    with contextlib.ExitStack() as held:
        # One after the other, so that none is loading while another is measured.
        ask = {
            name: held.enter_context(worker(functools.partial(loaded, run.model, name), todo, run.portable))
            for name in names
        }

        def measured(shape: Shape, name: str) -> float:
            answers[shape, name].append(ask[name](shape))
            return rate(shape, answers[shape, name][-1].seconds[::2])  # those of the path that is measured first

        subjects = {each: functools.partial(measured, *each) for each in answers}
        for turn in run.turns(subjects, lambda lines, subject: turns.peer_best(lines, *subject)):
            shape, name = turn.subject
            quiet, found = answers[turn.subject][:: 1 + bool(run.busy)], turn.line()
            last = quiet[-1]
            known = {"phase": shape.phase, "precision": name, "batch": shape.batch, "context": shape.context} | found
            known |= {
                "bytes_per_token": round(last.bytes_per_token),
                "bandwidth_fraction": round(last.bytes_per_token * found["tokens_per_second"] / bandwidth, 4),
                "read_bytes_per_second": round(bandwidth),
                "resident_bytes": last.resident_bytes,
                "kernels": last.kernels,
            }
            words = {"prefill": f"prefill of {shape.context}", "decode": f"decode after {shape.context}"}[shape.phase]
            words += f", {shape.batch} sequences" * (shape.batch > 1)
            say(f"{name}, {words}", known | against_portable(shape, quiet))


def rate(shape: Shape, turns_: list[list[float]]) -> float:
    """Tokens a second of the median of the runs in some turns."""
    return shape.tokens / statistics.median(itertools.chain(*turns_))


def against_portable(shape: Shape, found: list[Answer]) -> dict[str, Any]:
    """The native kernels compared with the portable ones, by pairs of turns; nothing where only one was measured."""
    pairs = [turn for answer in found for turn in zip(answer.seconds[::2], answer.seconds[1::2], strict=False)]
    if not pairs:
        return {}
    native, portable = ([rate(shape, [one]) for one in each] for each in zip(*pairs, strict=True))
    known = {"portable_tokens_per_second": round(statistics.median(portable), 1)}
    return known | turns.compared("portable_ratio", native, portable)


@run_directory.locked
def draft(run: Speculative) -> None:
    require(bool(run.draft), "--draft is missing: give a smaller model with the same tokenizer")
    target, small = (sources.load(each, precision=run.precision) for each in (run.model, run.draft))
    require_same_tokenizer(small.model, target.model, "draft", "model")
    models = [ops.prepare(each.model, jax.default_backend()) for each in (target, small)]
    source = dataset.source_of(run.corpus, target.about)
    text = dataset.held_out(source, target.tokenizer, dataset.cache(), strict=run.strict)
    read = (list(itertools.islice(document, run.prompt_tokens)) for document in text)
    prompts = list(itertools.islice((ids for ids in read if len(ids) == run.prompt_tokens), run.prompts))
    require(bool(prompts), f"no test document of {source} has {run.prompt_tokens} tokens: ask for shorter prompts")
    how, told = (run.max_tokens, Sampling(temperature=run.temperature)), {}

    def written(ahead: int) -> float:
        """Tokens a second of all prompts. ahead: 0: without the draft."""
        began = time.perf_counter()
        if ahead:
            found = [speculative.generate(*models, [prompt], *how, ahead=ahead) for prompt in prompts]
            texts, told[ahead] = zip(*found, strict=True)
        else:
            texts = [generate.generate(models[0], [prompt], *how) for prompt in prompts]
        return sum(len(ids) for (ids,) in texts) / (time.perf_counter() - began)

    subjects = {ahead: functools.partial(written, ahead) for ahead in (0, *sorted(set(run.ahead)))}
    for compiles in subjects.values():
        compiles()
    asked = f"{len(prompts)} prompts of {run.prompt_tokens} tokens, {run.max_tokens} new"
    say = teller(run, f"{run.model} with the draft {run.draft}, {asked}.")
    alone: list[float] = []
    for turn in run.turns(subjects):
        alone, line = alone or turn.rates, {"ahead": turn.subject} | turn.line()
        if ahead := turn.subject:
            counts = [sum(getattr(one, name) for one in told[ahead]) for name in ("drafted", "accepted", "passes")]
            drafted, accepted, passes = counts
            line |= {"acceptance": round(accepted / drafted, 3)}
            line |= {"tokens_per_pass": round((accepted + passes) / passes, 2)}
            line |= turns.compared("ratio", turn.rates, alone)
        say(f"{ahead} ahead" if ahead else "alone", line)
    print(f"  {asked}, on {run_directory.machine()['cpu']}")


def unknown(run: Bench) -> None:
    raise InputError(f"--what is {run.what!r}, but must be train, infer or speculative, as --what=train")


BENCHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "train": (train, {
        "run": Train(), "model": PEER_SHAPE, "train": TrainConfig(batch=16, length=256), "mesh": MeshConfig(),
        "hosts": HostsConfig(),
    }),
    "infer": (infer, {"run": Infer()}),
    "speculative": (draft, {"run": Speculative()}),
}  # fmt: skip


def main(argv: list[str]) -> None:
    asked = re.search(r"(?:^| )--?what[= ](\w+)", " ".join(argv))
    function, groups = BENCHES.get(asked[1] if asked else "", (unknown, {"run": Bench()}))
    launch(function, __doc__, argv, **groups)


if __name__ == "__main__":
    main(sys.argv)
