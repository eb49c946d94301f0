"""What chains of steps cost and save, and what recovers a model that was made smaller: means over seeds.

    bash launch/run.sh experiments.sweep --model=runs/pretrain --chains=methods --seeds=3
    bash launch/run.sh experiments.sweep --model=runs/pretrain --chains=recovery
    bash launch/run.sh experiments.sweep --model=smollm2 --corpus=notes/ --precision=auto --seeds=3 --chains="width@0.3
      width@0.3,finetune width@0.3,distill"
    bash launch/run.sh experiments.sweep --model=runs/pretrain --chains= --orders="width@0.3 distill w8a16"

A chain is steps or recipes joined by commas (efflm/compress/grammar.py). finetune, distill and adapt train for --steps,
with @ for a share of them: "width@0.2,distill@0.5,width@0.2,distill@0.5" prunes and distills in turn. Flags such as
--distill.weight are settings of the steps that chains name; recipes are as they are. Of this command alone is
finetune@seconds, which trains for as many seconds as distill took after the same steps. There are two lists of chains:
methods, which are calibrated, at several bits and sparsities, and recovery, ways to train a smaller model.

Expect a table in the terminal, and in the run directory recipe.toml with the chains, results.json, which is written
anew after each model, and report.html with loss against bytes and its Pareto front, with perplexity against bits and
against sparsity where chains are NAME@NUMBER.

Protocol: everything is of the training split but the text that is scored, which is of the test split. A seed chooses
batches, calibration text and random weights; chains that read no text run once. Shown are the mean over seeds,
their standard deviation, and the standard error over test documents. Recovered: the share that training took away of
the loss that the steps before it had brought. Speed is measured for the first model of each shape, in turn with the
first model.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from efflm import api, ops, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.cli.subject import Subject
from efflm.compress import grammar, recipe
from efflm.compress.adapt import Adapt
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.step import Calibration, Context, Step, reads_text, trains
from efflm.config import flag, require, require_positive
from efflm.data import dataset, overlap
from efflm.evaluate import machine, quality, scoring, speed, throughput, windows
from efflm.evaluate.quality import Quality
from efflm.evaluate.windows import Scoring
from efflm.formats import sources
from efflm.model import LanguageModel, autotune
from efflm.parallel import meshes, sharding
from efflm.report import compared, rows, swept, table
from efflm.report.journal import Journal
from efflm.report.page import Section, Table

SECONDS = "finetune@seconds"  # as many as distill took
TIMED = ("finetune", "distill")  # what SECONDS compares
METHODS = [f"{name}@{bits}" for name in swept.BITS for bits in (8, 4, 3)]
METHODS += [f"{name}@{share}" for name in swept.SHARES for share in (0.3, 0.5, 0.6, 0.7, 0.8)]
METHODS += ["w8a16", "w8a8", "w8a8_static", "smoothquant_w8a8_static", "smoothquant_w8a8", "awq4"]
METHODS += ["magnitude24", "wanda24", "sparsegpt24", "wanda50_w8a8"]
RECOVERY = ["width@0.3", "width@0.3,finetune", "width@0.3,distill", f"width@0.3,{SECONDS}"]
RECOVERY += ["width@0.3,depth@0.001[init=random],finetune"]  # all layers stay, randomly initialized
RECOVERY += ["depth@0.5", "depth@0.5,finetune", "depth@0.5,distill"]
Measure = Callable[[LanguageModel], Quality]
CHAINS = {"methods": " ".join(METHODS), "recovery": " ".join(RECOVERY)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Subject):
    """The run"""

    chains: str = flag("recovery", "chains with spaces between them, a .toml file of them, or a list: see above")
    orders: str = flag("", "parts of which every order is a chain, as in 'width@0.3 distill w8a16'; empty: none")
    steps: int = flag(150, "optimizer steps of distill, finetune and adapt")
    learning_rate: float = flag(5e-4, "peak learning rate of distill and finetune")
    batch: int = flag(8, "sequences in a training batch")
    length: int = flag(256, "tokens in each")
    seeds: int = flag(1, "seeds of each chain that reads text")
    speed: bool = flag(True, "measure prefill and decode of each shape")
    calibration_error: bool = flag(False, "measure how far the confidence of each model is from its accuracy")
    run_dir: str = flag(str(run_directory.ROOT / "sweep"), "where everything is written", path=True)

    def __post_init__(self):
        require_positive(self, "steps", "learning_rate", "batch", "length", "seeds")
        require(bool(self.parts), "chains and orders are empty: give one of them")
        for chain, parts in self.parts.items():
            for index in (index for index, part in enumerate(parts) if part == SECONDS):
                needed = [",".join([*parts[:index], kind]) for kind in TIMED]
                listed = all(each in self.parts for each in needed)
                require(listed, f"{chain}: {SECONDS} takes its time from {' and '.join(needed)}: list them too")
        _ = steps_in(self.parts.values())  # which checks them

    @property
    def parts(self) -> dict[str, list[str]]:
        """{chain: its parts}."""
        orders = itertools.permutations(grammar.parts(self.orders))
        return grammar.parts(CHAINS.get(self.chains, self.chains)) | grammar.parts(" ".join(map(",".join, orders)))


def defaults_of(run: Run, given: dict[str, dict[str, Any]]) -> grammar.Defaults:
    """The fields of the steps that chains name. given: of each step those that flags set. Raises InputError for those
    of a step that no chain names."""
    named = {grammar.kind_of(part) for parts in run.parts.values() for part in parts}
    for name, fields in given.items():
        flags = ", ".join(f"--{name}.{field}" for field in fields)
        used = not fields or recipe.STEPS[name] in named
        require(used, f"{flags} is of the step {name}, which no chain names: list it in --chains")
    trained = {"steps": run.steps, "learning_rate": run.learning_rate}
    usual = {Finetune: trained, Distill: trained, Adapt: {"steps": run.steps}}
    return {kind: usual.get(kind, {}) | given.get(name, {}) for name, kind in recipe.STEPS.items()}


def steps_of(part: str, defaults: grammar.Defaults = grammar.NONE, longer: float = 1.0) -> tuple[Step, ...]:
    """longer: of SECONDS, how many times the steps."""
    if part != SECONDS:
        return grammar.steps_of([part], defaults)
    (step,) = grammar.steps_of([TIMED[0]], defaults)
    return (dataclasses.replace(step, steps=max(1, round(longer * step.steps))),)


def steps_in(chains: Iterable[list[str]]) -> list[Step]:
    """All steps of chains, as they are by default."""
    return [step for parts in chains for part in parts for step in steps_of(part)]


@dataclasses.dataclass(frozen=True)
class Made:
    """A model, the steps that made it, the seconds that took, those of them in which it was trained, and the bytes held
    at most beyond what was held before."""

    model: LanguageModel
    steps: tuple[Step, ...] = ()
    seconds: float = 0.0
    training: float = 0.0
    memory: int = 0


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the models of chains. Those that no step has trained yet and with which longer chains begin are kept."""

    run: Run
    dense: LanguageModel
    defaults: grammar.Defaults
    context: Callable[[int], Context]  # of a seed
    kept: dict[Any, Made] = dataclasses.field(default_factory=dict)
    seconds: dict[Any, float] = dataclasses.field(default_factory=dict)  # of the last part of each chain

    def __call__(self, parts: list[str], seed: int) -> Made:
        if not parts:
            return Made(self.dense)
        key = lambda last: (*parts[:-1], last, seed)
        mine = key(parts[-1])
        if mine in self.kept:
            return self.kept[mine]
        before = self(parts[:-1], seed)
        text, teacher = (self.seconds.get(key(kind), 1.0) for kind in TIMED)
        steps = steps_of(parts[-1], self.defaults, teacher / text)
        work = functools.partial(recipe.apply, before.model, steps, self.context(seed))
        (model, _), took, above = speed.cost_of(work)
        self.seconds[mine], training = took, before.training + took * trains(steps)
        memory = max(before.memory, above or 0)
        made = Made(model, (*before.steps, *steps), before.seconds + took, training, memory)
        if not trains(made.steps) and any(parts == other[: len(parts)] != other for other in self.run.parts.values()):
            self.kept[mine] = made
        return made


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring, **steps: dict[str, Any]) -> None:
    log, defaults = Journal(run.run_dir, command_line("experiments.sweep", sys.argv)), defaults_of(run, steps)
    run_directory.require_writable(log.folder, needs=run_directory.SMALL_FILES)
    user_cache.use_compilation_cache()
    auto = run.precision == autotune.AUTO
    loaded = sources.load(run.model, precision="" if auto else run.precision, mesh=meshes.data_parallel(run.batch))
    if auto:  # most of the time goes into training
        model = autotune.trained(loaded.model, run.batch, run.length, log.say)
        loaded = dataclasses.replace(loaded, model=model)
    dense, source = loaded.model, dataset.source_of(run.corpus, loaded.about)
    recipe.require_finite(dense)
    given = functools.partial(
        api.context_for, steps_in(run.parts.values()), cache=dataset.cache(), model=dense, tokenizer=loaded.tokenizer,
        batch=run.batch, length=run.length, calibration=calibration, lower=api.FLAGS, strict=run.strict,
    )  # fmt: skip
    context = functools.cache(lambda seed: dataclasses.replace(given(source, seed=seed), teacher=dense))
    make = Maker(run, dense, defaults, context)
    text = dataset.to_score("", run.corpus, loaded.about, loaded.tokenizer, dataset.cache(), run.strict)
    score = score.within(dense.config.max_length, loaded.about.get("train.length", 0), text.unbroken)
    test = scoring.against(dense, text, loaded.tokenizer, score)
    before, name, read = test(dense), rows.label(loaded.about), context(0).calibration
    noise = test(quality.rounded(dense))
    log.say(f"{name}: {quality.words(quality.bits_per_byte(before))} bits per byte")
    one_pass = speed.seconds_to_read(dense, read) if read else 0.0
    facts = [
        f"Quality: {scoring.protocol(text, score, before)}. Teacher: the first model."
        f"{scoring.rounding(noise, dense.config.precision)}",
        *protocol(run, dense, read, one_pass, itertools.islice(text, score.documents or None)),
        rows.BITS,
        *rows.cautions(run.model, loaded.about, text.known),
    ]
    blocks = lambda: windows.blocks(text.sized(), loaded.tokenizer.separator, score, text.unbroken)
    error = lambda model: quality.calibration_error(model, blocks()) if run.calibration_error else None
    first = swept.alone(name, dense, [before], calibration=error(dense), noise=rows.rounding(noise))
    found, texts, speeds, loads = {name: first}, {}, {}, []
    for chain, parts in run.parts.items():
        made, scores = [], []
        for seed in range(run.seeds if reads_text(steps_in([parts])) else 1):
            made.append(make(parts, seed))
            model = made[-1].model
            scores.append(test(model))
            row = swept.row(
                chain, model, scores, before, first, tied=dense.config.tied, calibration=error(model),
                tokens=sum(step.steps for step in made[-1].steps if trains([step])) * run.batch * run.length,
                seconds=float(np.mean([each.training for each in made])),
                passes=made[-1].seconds / one_pass if read else None, memory=max(each.memory for each in made) or None,
            )  # fmt: skip
            shape = model.config, row.bytes
            if run.speed and shape not in speeds:
                speeds[shape], load = speed_of(dense, model)
                loads.append(load)
            train = [getattr(grammar.kind_of(part), "at", "") == "steps" for part in parts]  # and do nothing else
            share = swept.recovered(parts, train, row, found)
            found[chain] = row.but(recovered=share, **speeds.get(shape, {}))
            texts[chain] = grammar.write(made[-1].steps)
            log.say(f"{chain}, seed {seed}: {swept.words(found[chain])}")
            log.results(facts, rows=[*found.values()], forward_seconds=one_pass, seeds=run.seeds)
            run_directory.write_whole(log.folder / "recipe.toml", grammar.to_toml(texts))
    if loads:
        timed = throughput.protocol_for(dense)
        facts.append(f"Speed: {timed}; the median over the first model's in the same rounds.{machine.most(loads)}")
    listed = list(found.values())
    log.results(facts, rows=listed, forward_seconds=one_pass, seeds=run.seeds)
    whole = Table(caption="Each beside the first model.", columns=table.known(listed, swept.COLUMNS), rows=listed)
    table.show(whole.rows, facts, whole.columns)
    sections = [Section("Chains of steps", [whole, *swept.charts(listed), compared.against_bytes(listed)])]
    title = f"What steps cost, and what recovers it: {run.model}"
    log.report(facts, title=title, sections=sections, made={"seeds": run.seeds})


def speed_of(dense: LanguageModel, model: LanguageModel) -> tuple[dict[str, float], machine.Load]:
    """Prefill and decode of a model over those of the first, and what other programs used meanwhile."""
    here = [ops.prepare(sharding.on_one_device(each), jax.default_backend()) for each in (dense, model)]
    rates, load = throughput.rates(dict(zip(("first", "this"), here)), throughput.protocol_for(dense))
    pairs = zip(("prefill", "decode"), rates["this"], rates["first"], strict=True)
    return {f"{phase}_speedup": throughput.ratio(own, base)[0] for phase, own, base in pairs}, load


def protocol(run: Run, dense: LanguageModel, read: Any, one_pass: float, tested: Iterable[Any]) -> Iterator[str]:
    """How models are made, in words. read: the calibration text of seed 0, which took one_pass seconds."""
    if trains(steps_in(run.parts.values())):
        yield (
            f"Training: batches of {run.batch} x {run.length} tokens, {run.steps} steps, learning rate "
            f"{run.learning_rate:g}, matmuls in {dense.config.precision}."
        )
    if read:
        (count, length), share = read["inputs"].shape, overlap.share(read, tested)
        yield (
            f"Calibration: {count} rows of {length} tokens of the training split, {run.seeds} calibration samples; a "
            f"forward pass over them took {one_pass:.1f} s. {share:.2%} of the {overlap.LENGTH}-token sequences of the "
            "test text are in the first calibration sample too."
        )


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), calibration=Calibration(), score=Scoring(), **recipe.STEPS)
