"""What recovers a model that was made smaller, and in which order its steps are best.

    python -m experiments.recovery --model=runs/pretrain
    python -m experiments.recovery --model=smollm2 --corpus=notes/ --precision=auto --seeds=3 --chains="width@0.3
      width@0.3,finetune width@0.3,distill"
    python -m experiments.recovery --model=runs/pretrain --chains= --orders="width@0.3 distill w8a16"

A chain is steps joined by commas (efflm/compress/grammar.py). finetune and distill, which train on the text alone and
with the first model as teacher, have --steps steps and --learning_rate, adapt has --steps steps; with @ they have a
share of them: "width@0.2,distill@0.5,width@0.2,distill@0.5" prunes and distills in turn. --distill.* and --adapt.* are
settings of these steps too. What recipes such as shrink30_distill consist of is as it is there. Two words are of this
command alone: fresh gives all weights new random values, and finetune@seconds trains for as many seconds as distill
took after the same steps. distill[cache=top_k] keeps the teacher's distributions on disk first.

Expect a table in the terminal, and in the run directory results.json, which is written anew after each model, and
report.html with loss against bytes.

Protocol: everything is of the training split but the text that is scored, which is of the test split. A seed draws the
batches, the calibration text and fresh weights; shown are the mean over seeds and their standard deviation. Recovered:
the share that training took away of the loss that the parts before it had brought. Memory: what the process held at
most while it trained, above what it held before, compiling included. Speed is measured for the first
model of each shape, in turn with the first model.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efflm import api, ops, trees
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress import grammar, recipe
from efflm.compress.adapt import Adapt
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.step import Calibration, Context, Step, trains
from efflm.compress.structured.depth import Depth
from efflm.config import PRECISION, AskedPrecision, flag, require
from efflm.data import corpora, dataset
from efflm.evaluate import confidence, machine, quality, scoring, speed, throughput
from efflm.evaluate.quality import Quality
from efflm.evaluate.windows import Scoring
from efflm.formats import sources
from efflm.formats.sources import KINDS, Loaded
from efflm.model import LanguageModel, autotune
from efflm.parallel import meshes, sharding
from efflm.report import page, recovered, rows, swept, table
from efflm.report.page import Section, Table
from efflm.report.recovered import COLUMNS
from efflm.report.rows import Row

FRESH, SECONDS = "fresh", "finetune@seconds"
TIMED = ("finetune", "distill")  # what SECONDS compares
CHAINS = ("width@0.3", "width@0.3,finetune", "width@0.3,distill", f"width@0.3,{SECONDS}", "width@0.3,fresh,finetune")
CHAINS += ("depth@0.5", "depth@0.5,finetune", "depth@0.5,distill")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag(str(run_directory.ROOT / "quickstart"), KINDS, path=True)
    corpus: str = flag("", f"{corpora.KINDS}; default: what the model was trained on, else stdlib", path=True)
    strict: bool = flag(False, corpora.STRICT)
    precision: AskedPrecision = flag("", PRECISION)
    chains: str = flag(" ".join(CHAINS), "chains of parts, with spaces between them; see above")
    orders: str = flag("", "parts of which every order is a chain, as in 'width@0.3 distill w8a16'; empty: none")
    steps: int = flag(150, "optimizer steps of distill, finetune and adapt")
    learning_rate: float = flag(5e-4, "peak learning rate of distill and finetune")
    batch: int = flag(8, "sequences in a training batch")
    length: int = flag(256, "tokens in each")
    seeds: int = flag(1, "seeds of each chain")
    speed: bool = flag(True, "measure prefill and decode of each shape")
    calibration_error: bool = flag(False, "measure how far the confidence of each model is from its accuracy")
    run_dir: str = flag(str(run_directory.ROOT / "recovery"), "where everything is written", path=True)

    def __post_init__(self):
        for name in ("steps", "learning_rate", "batch", "length", "seeds"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")
        require(bool(self.names), "chains and orders are empty: give one of them")
        for chain, parts in self.names.items():
            for index, part in enumerate(parts):
                needed = [",".join([*parts[:index], kind]) for kind in TIMED] if part == SECONDS else []
                missing = [each for each in needed if each not in self.names]
                require(not missing, f"{chain}: {SECONDS} takes its time from {' and '.join(needed)}: list them too")
                steps_of(part, {}, 1)

    @property
    def names(self) -> dict[str, list[str]]:
        """{chain: its parts}."""
        orders = itertools.permutations(grammar.parts(self.orders))
        return grammar.parts(self.chains) | grammar.parts(" ".join(map(",".join, orders)))

    @property
    def schedule(self) -> dict[str, Any]:
        return {"steps": self.steps, "learning_rate": self.learning_rate}


def defaults_of(run: Run, distill: dict[str, Any], adapt: dict[str, Any]) -> grammar.Defaults:
    """The fields of the steps that recover a model. Raises InputError for settings of a step that no chain names."""
    for kind, fields in ((Distill, distill), (Adapt, adapt)):
        name = kind.__name__.lower()
        flags = ", ".join(f"--{name}.{field}" for field in fields)
        used = any(grammar.kind_of(part) is kind for parts in run.names.values() for part in parts)
        require(not fields or used, f"{flags} is of the step {name}, which no chain has: list it in --chains")
        require(
            "steps" not in fields,
            f"--{name}.steps is for experiments.compress: give --steps, or the step a share of them, as in {name}@0.5",
        )
    return {Finetune: run.schedule, Distill: run.schedule | distill, Adapt: {"steps": run.steps} | adapt}


def steps_of(part: str, defaults: grammar.Defaults, layers: int, longer: float = 1.0) -> tuple[Step, ...]:
    """The steps of a part for a model of so many layers. longer: of SECONDS, how many times the steps."""
    if part == FRESH:
        return (Depth(layers=layers, init="random"),)
    if part != SECONDS:
        return grammar.steps_of([part], defaults)
    (step,) = grammar.steps_of([TIMED[0]], defaults)
    return (dataclasses.replace(step, steps=max(1, round(longer * step.steps))),)


def recovers(part: str) -> bool:
    """Whether it is a step that trains, and not one that takes something away too, as a recipe may."""
    return getattr(grammar.kind_of(part), "at", "") == "steps"


@dataclasses.dataclass
class Made:
    """A model; the seconds and the tokens it was trained for, and the bytes that took at most."""

    model: LanguageModel
    seconds: float = 0.0
    tokens: int = 0
    memory: int = 0


@dataclasses.dataclass
class Maker:
    """Makes the models of chains. Those that no part has trained yet are kept, as later chains begin with them."""

    run: Run
    dense: LanguageModel
    defaults: grammar.Defaults
    context: Callable[[int], Context]
    kept: dict[tuple[str, int], LanguageModel] = dataclasses.field(default_factory=dict)
    seconds: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)

    def __call__(self, parts: list[str], seed: int) -> Made:
        made = Made(self.dense)
        for index, part in enumerate(parts):
            so_far = ",".join(parts[: index + 1])
            if (so_far, seed) in self.kept:
                made.model = self.kept[so_far, seed]
                continue
            before = ",".join(parts[:index])
            took = [self.seconds.get((f"{before},{kind}".lstrip(","), seed), 1.0) for kind in TIMED]
            steps = steps_of(part, self.defaults, len(made.model.config.blocks), took[1] / took[0])
            if not trains(steps):
                made.model, _ = recipe.run(made.model, steps, self.context(seed))
                if not made.tokens:
                    self.kept[so_far, seed] = made.model
                continue
            self.seconds[so_far, seed] = self._train(made, steps, seed)
        return made

    def _train(self, made: Made, steps: tuple[Step, ...], seed: int) -> float:
        """Changes `made`, and gives the seconds that took."""
        work = functools.partial(recipe.run, made.model, steps, self.context(seed))
        (made.model, _), took, above = speed.cost_of(work)
        made.seconds += took
        made.memory = max(made.memory, above or 0)
        made.tokens += sum(getattr(step, "steps", 0) for step in steps) * self.run.batch * self.run.length
        return took


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring, distill: dict[str, Any], adapt: dict[str, Any]) -> None:
    began = time.perf_counter()
    say = lambda words: print(f"[{time.perf_counter() - began:4.0f} s] {words}", flush=True)
    run_dir, defaults = Path(run.run_dir), defaults_of(run, distill, adapt)
    run_directory.require_writable(run_dir, needs=run_directory.SMALL_FILES)
    run_dir.mkdir(parents=True, exist_ok=True)
    run_directory.use_compilation_cache()
    auto = run.precision == autotune.AUTO
    loaded = sources.load(run.model, precision="" if auto else run.precision, mesh=meshes.data_parallel(run.batch))
    if auto:  # most of the time goes into training
        loaded = dataclasses.replace(loaded, model=autotune.trained(loaded.model, run.batch, run.length, say))
    dense = loaded.model
    recipe.require_finite(dense)
    source = dataset.source_of(run.corpus, loaded.about)
    text = dataset.held_out(source, loaded.tokenizer, dataset.cache(), strict=run.strict)
    score = score.within(dense.config.max_length, loaded.about.get("train.length", 0), text.unbroken)
    context = functools.cache(functools.partial(context_for, run, calibration, loaded, source))
    make, kept = Maker(run, dense, defaults, context), {}
    measure = lambda model: scoring.measure(
        {"": sharding.on_one_device(model)}, text, loaded.tokenizer, score, sharding.on_one_device(dense), kept
    )[""]
    before = measure(dense)
    error_of = lambda model: confidence.of_text(sharding.on_one_device(model), text, loaded.tokenizer, score)
    first = rows.label(loaded.about)
    say(f"{first}: {quality.words(quality.bits_per_byte(before))} bits per byte")
    found = {first: recovered.row(
        first, parameters=trees.count(dense.params), bytes=ops.stored_nbytes(dense.params, dense.masks),
        bits_per_byte=quality.bits_per_byte(before)[0],
        calibration=error_of(dense) if run.calibration_error else None,
    )}  # fmt: skip
    protocol, speeds, loads = throughput.protocol_for(dense), {}, []
    timed = f"Speed: {protocol}; the median over the first model's in the same rounds."
    facts = [
        f"Quality: {scoring.protocol(text, score, before)}. Teacher: the first model.",
        f"Training: batches of {run.batch} x {run.length} tokens, {run.steps} steps, learning rate "
        f"{run.learning_rate:g}, matmuls in {dense.config.precision}.",
        *([timed] if run.speed else []),
        *rows.cautions(run.model, loaded.about, text.known),
    ]
    shared = {
        "protocol": facts,
        "command": command_line("experiments.recovery", sys.argv),
        "versions": run_directory.machine(),
    }
    for chain, parts in run.names.items():
        made: list[Made] = []
        scores: list[Quality] = []
        for seed in range(run.seeds):
            made.append(make(parts, seed))
            model = made[-1].model
            scores.append(measure(model))
            shape = (model.config, ops.stored_nbytes(model.params, model.masks))
            if run.speed and shape not in speeds:
                speeds[shape], load = speed_of(dense, model, protocol)
                loads.append(load)
                facts[2] = f"{timed}{machine.most(loads)}"
            row = row_of(parts, made, scores, before, speeds.get(shape, (None, None)), found)
            if run.calibration_error:
                row = row.but(calibration=error_of(model))
            found[chain] = row
            took = f"{made[-1].seconds:.0f} s"
            over, _ = quality.paired_difference(scores[-1], before)
            say(f"{chain}, seed {seed}: {over:+.4f} bits per byte over the first model, {took}")
            run_directory.write_json(
                run_dir / "results.json", shared | {"rows": [each.json() for each in found.values()]}
            )
    listed = list(found.values())
    table.show(listed, facts, COLUMNS)
    page.write(
        run_dir / "report.html",
        title=f"What recovers a smaller model: {run.model}",
        sections=[
            Section(
                "Chains of steps",
                [Table(caption="Each beside the first model.", columns=COLUMNS, rows=listed), swept.front(listed)],
            )
        ],
        facts=facts,
        made=page.made(run_directory.machine(), seeds=run.seeds, total_time=page.duration(time.perf_counter() - began)),
        command=shared["command"],
    )
    say(f"done: open {run_dir / 'report.html'}")


def context_for(run: Run, calibration: Calibration, loaded: Loaded, source: str, seed: int) -> Context:
    """What the parts of all chains read."""
    made = api.context_for(
        [step for parts in run.names.values() for part in parts for step in steps_of(part, {}, 1)],
        source, dataset.cache(), loaded.model, loaded.tokenizer,
        batch=run.batch, length=run.length, calibration=calibration, seed=seed,
        lower=api.FLAGS, strict=run.strict,
    )  # fmt: skip
    return dataclasses.replace(made, teacher=loaded.model)


def speed_of(dense: LanguageModel, model: LanguageModel, protocol: throughput.Protocol) -> tuple[tuple, machine.Load]:
    """Prefill and decode of a model over those of the first, and what other programs used meanwhile."""
    here = {
        name: ops.prepare(sharding.on_one_device(each), jax.default_backend())
        for name, each in (("first", dense), ("this", model))
    }
    rates, load = throughput.rates(here, protocol)
    return tuple(throughput.ratio(*pair)[0] for pair in zip(rates["this"], rates["first"], strict=True)), load


def row_of(
    parts: list[str], made: list[Made], scores: list[Quality], before: Quality,
    speed: tuple[float | None, float | None], found: dict[str, Row],
) -> Row:  # fmt: skip
    """made, scores: of each seed."""
    mean, error, deviation = quality.mean_difference(scores, before)
    trained = list(map(recovers, parts))
    cut = trained.index(True) if any(trained) else len(parts)
    base = found.get(",".join(parts[:cut])) if 0 < cut < len(parts) and all(trained[cut:]) else None
    model = made[-1].model
    return recovered.row(
        ",".join(parts),
        parameters=trees.count(model.params),
        bytes=ops.stored_nbytes(model.params, model.masks),
        bits_per_byte=float(np.mean([quality.bits_per_byte(each)[0] for each in scores])),
        over_dense=mean,
        error=error,
        deviation=deviation,
        recovered=1 - mean / base.over_dense if base and base.over_dense > 0 else None,
        tokens=made[-1].tokens,
        seconds=float(np.mean([each.seconds for each in made])),
        memory=max(each.memory for each in made) or None,
        prefill=speed[0],
        decode=speed[1],
        seeds=len(made),
    )


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), calibration=Calibration(), score=Scoring(), distill=Distill, adapt=Adapt)
