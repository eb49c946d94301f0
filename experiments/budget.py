"""The smallest or fastest model within an allowed loss, or the best one within a number of bytes: searched, then proved
on text that the search never saw.

    bash launch/run.sh experiments.budget --model=smollm2 --loss=1% --target=bytes --minutes=60
    bash launch/run.sh experiments.budget --model=runs/pretrain --loss=2% --target=latency
    bash launch/run.sh experiments.budget --model=smollm2 --bytes=60MB --corpus=~/notes
    bash launch/run.sh experiments.budget --model=runs/mine --loss=5% --chains="w8a16 mixed@4 mixed@6 width@0.2,distill"

--loss: the share by which the loss may rise. --target: bytes of the file; memory, that of the weights as they are laid
out here and of the key-value cache; latency, the time of a prompt and an answer as a share of the first model's. The
search begins with a list of chains (--chains has another one), the cheapest to make first; those that train only where
the minutes allow. All read a quarter of the selection text, the better half goes on to half of it, and so on. Then
chains are tried between those that keep to the loss and those that do not, as mixed@5 between mixed@4 and mixed@6.

Calibration and training read the training split of --corpus, the selection its validation split. The test split
accepts: where the upper end of the one-sided 95% interval of the increase, paired over documents, is at most what is
allowed, corrected for all candidates that were tested (efflm/evaluate/acceptance.py).

Expect a line for each candidate; in the run directory `model.safetensors`, the best accepted so far, which is the model
as it was until one is; tried.json, from which the same command goes on, with more minutes or another loss or target
too; results.json; and report.html with the Pareto front. --check: a third text on which what was accepted is checked.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from efflm import api, ops, trees, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.cli.subject import Subject
from efflm.compress import grammar, recipe
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.step import Calibration, Context, Step, calibrates, digest, trains
from efflm.config import InputError, flag, require, require_choices, require_positive, require_seed, written
from efflm.data import dataset, overlap
from efflm.evaluate import acceptance, quality, scoring, task_files, tasks, throughput
from efflm.evaluate.answers import Answers, correct, usual
from efflm.evaluate.quality import Quality
from efflm.evaluate.search import FINALISTS, FIRST, UNSEEN, Search, between
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import saved, sources
from efflm.formats.saved import Saved
from efflm.formats.sources import OWN, Loaded
from efflm.model import LanguageModel
from efflm.parallel import meshes, sharding
from efflm.plan import work
from efflm.precision import policy_for
from efflm.report import budgeted, rows, table
from efflm.report.journal import Journal
from efflm.report.page import Section, Table

CHAINS = (  # to begin with, the cheapest first; those that train are tried where the minutes allow
    "w8a16 w8a8 quantize@4[activations=int8] smoothquant_w8a8 width@0.05,w8a8 width@0.15,w8a8 depth@0.07,w8a8 gptq@4 "
    "gptq@3 gptq@4[embeddings=4] mixed@5[rows=2] mixed@3.5[rows=2] tuned@4 tuned@3 wanda@0.2,w8a16 wanda@0.4,w8a16 "
    "sparsegpt@0.2,w8a16 sparsegpt@0.5,w8a16 width@0.2,distill,w8a8 width@0.3,distill,w8a8"
)
SHARES = (0.25, 0.5, 1.0)  # of the selection text that candidates have read before each halving
MAKING = 0.6  # of the time left, the share in which a round may make candidates
FORWARD_PASSES = 4  # that a training step on as many tokens takes, with a teacher
RESAMPLINGS = 20  # of the documents of --check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making(Subject):
    """The run"""

    steps: int = flag(100, "optimizer steps of distill and finetune")
    learning_rate: float = flag(5e-4, "peak learning rate of both")
    batch: int = flag(8, "sequences in a training batch")
    length: int = flag(256, "tokens in each")
    seed: int = flag(0, "seed of what is drawn: batches, calibration text")
    run_dir: str = flag("", "where everything is written", path=True)

    def __post_init__(self):
        require_seed(self.seed)
        require_positive(self, "steps", "learning_rate", "batch", "length")
        require(bool(self.parts), f"chains is {self.chains!r}: give at least one chain")
        _ = [self.steps_of(name) for name in self.parts]

    @property
    def parts(self) -> list[str]:
        """The chains, each as it is written."""
        return [",".join(each) for each in grammar.parts(self.chains).values()]

    def steps_of(self, name: str) -> tuple[Step, ...]:
        usual = {"steps": self.steps, "learning_rate": self.learning_rate}
        return grammar.steps_of(grammar.parts(name)[name], {Distill: usual, Finetune: usual})

    def context(self, source: str, loaded: Loaded, calibration: Calibration) -> Context:
        """What the chains read of a corpus."""
        steps, how = [step for name in self.parts for step in self.steps_of(name)], {"lower": api.FLAGS}
        how |= {name: getattr(self, name) for name in ("batch", "length", "seed", "strict")}
        cache, model, tokens = dataset.cache(), loaded.model, loaded.tokenizer
        return api.context_for(steps, source, cache, model, tokens, calibration=calibration, **how)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Making):
    """The run"""

    loss: str = flag("", "the share by which the loss may rise, as 1%, which is the default")
    bytes: str = flag("", "in place of --loss: the bytes that the model may take, as 60MB; the least loss is searched")
    target: Literal["bytes", "latency", "memory"] = flag("bytes", "what is to be small within the allowed loss")
    tasks: tuple[str, ...] = flag((), task_files.ASKED)
    flips: str = flag("5%", "with --tasks: the share of answers that may become right or wrong")
    minutes: float = flag(30.0, "how long the search may take, the acceptance included")
    chains: str = flag(CHAINS, "chains to begin with, spaces between them, or a .toml file of them")
    context_length: int = flag(1024, "positions of the key-value cache whose memory counts")
    check: str = flag("", "file or folder of a third text, to check the accepted model on", path=True)
    run_dir: str = flag(str(run_directory.ROOT / "budget"), "where everything is written", path=True)

    def __post_init__(self):
        super().__post_init__()
        require_choices(self)
        require_positive(self, "minutes", "context_length")
        require(not (self.loss and self.bytes), "loss and bytes are both given: one is searched within the other")
        require(not self.bytes or self.target == "bytes", f"bytes goes with target=bytes, but that is {self.target}")
        _ = self.allowed, self.most, written.share("flips", self.flips)

    @property
    def allowed(self) -> float:
        """The increase of the loss, as a share."""
        return math.inf if self.bytes else written.share("loss", self.loss or "1%")

    @property
    def most(self) -> float:
        """Bytes."""
        return written.nbytes("bytes", self.bytes) if self.bytes else math.inf

    @property
    def claim(self) -> str:
        """What the acceptance shows."""
        answers = f", {self.flips} of the answers to {', '.join(self.tasks)}" if self.tasks else ""
        return (
            f"the least loss in {self.bytes}"
            if self.bytes
            else f"the least {self.target} within {self.allowed:.3%}{answers}"
        )


def prepared(model: LanguageModel) -> LanguageModel:
    return ops.prepare(sharding.on_one_device(model), jax.default_backend())


def cost_of(run: Run, model: LanguageModel, first: LanguageModel) -> float:
    """What is to be small."""
    if run.target == "bytes":
        return ops.stored_nbytes(model.params, model.masks)
    here = prepared(model)
    if run.target == "memory":
        cache = work.kv_cache_bytes(model.config, 1, run.context_length, policy_for(model.config))
        return trees.nbytes(here.params) + cache
    if model is first:
        return 1.0
    timing, seconds = throughput.protocol_for(first), []
    for read, wrote in throughput.rates({"": here, FIRST: prepared(first)}, timing)[0].values():
        seconds.append(timing.prompt / np.array(read.rounds) + timing.new / np.array(wrote.rounds))
    return throughput.paired(*seconds)[0]


def begun(file: Path, key: str) -> dict[str, Any]:
    """What tried.json holds. Raises InputError if it is of another search."""
    found = {"key": key, "second_a_token": 0.0, "sums": {}, "costs": {}, "tests": {}, "problems": {}}
    found = json.loads(file.read_text()) if file.exists() else found
    require(found["key"] == key, f"{file} is of another model, text or settings: give another --run_dir, or delete it")
    return found


def is_chain(name: str) -> bool:
    """Whether there is such a setting: there are no 3.5 bits."""
    try:
        return bool(grammar.chain(name))
    except InputError:
        return False


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring, task: TaskFiles) -> None:
    log = Journal(run.run_dir, command_line("experiments.budget", sys.argv))
    deadline = time.monotonic() + 60 * run.minutes
    run_directory.require_writable(log.folder, needs=run_directory.SMALL_FILES)
    user_cache.use_compilation_cache()
    asked = task_files.read(run.tasks, task)
    loaded = sources.load(run.model, precision=run.precision, mesh=meshes.data_parallel(run.batch))
    dense, tokens, about = loaded.model, loaded.tokenizer, loaded.about
    recipe.require_finite(dense)
    saved.require_free(log.folder, [OWN], tokens, "give another --run_dir")
    source = dataset.source_of(run.corpus, about)
    held = [dataset.held_out(source, tokens, dataset.cache(), split, run.strict) for split in dataset.HELD_OUT]
    score = score.within(dense.config.max_length, about.get("train.length", 0), held[0].unbroken)
    context = run.context(source, loaded, calibration)
    counts = [min(score.documents or len(text), len(text)) for text in held]
    ends = [0, *dict.fromkeys(math.ceil(share * counts[0]) for share in SHARES)]
    texts = {str(i): held[0].part(*pair) for i, pair in enumerate(itertools.pairwise(ends))}
    texts[UNSEEN] = held[1].part(0, counts[1])
    same = [digest(dense), source, tokens.digest, score, calibration, run.context_length]
    same += [run.seed, run.steps, run.learning_rate, run.batch, run.length]
    tried = begun(log.folder / "tried.json", hashlib.sha256(repr(same).encode()).hexdigest()[:16])
    costs, problems = tried["costs"].setdefault(run.target, {}), tried["problems"]
    file = lambda name: log.folder / "candidates" / f"{grammar.file_name(name)}.safetensors"

    def left() -> float:
        """Seconds, without those that it takes to test."""
        unseen = sum(tried["sums"].get(FIRST, {}).get(UNSEEN, {}).get("tokens", ()))
        return deadline - FINALISTS * unseen * tried["second_a_token"] - time.monotonic()

    def made(name: str) -> LanguageModel:
        def apply() -> Saved:
            model, records = recipe.apply(dense, run.steps_of(name), context)
            return Saved(model, about | {"recipe": name}, records)

        return dense if name == FIRST else saved.once(file(name), tokens, context.mesh, apply)

    def measure(name: str, text: str) -> Quality | None:
        if name != FIRST and text != UNSEEN and left() < 0:
            return None
        model, how, start = prepared(made(name)), dataclasses.replace(score, documents=0), time.monotonic()
        found = scoring.measure({"": model}, texts[text], tokens, how, model)[""]
        took = (time.monotonic() - start) / float(found.tokens.sum())
        tried["second_a_token"] = min(took, tried["second_a_token"] or took)  # later ones compile nothing
        return found

    def make(name: str) -> None:
        """Find the cost of a candidate, where it can be made and there is time to train it."""
        trained = sum(step.steps for step in run.steps_of(name) if trains([step])) * run.batch * run.length
        needed, start = FORWARD_PASSES * trained * tried["second_a_token"], time.monotonic()
        if left() < needed:
            log.say(f"{name}: left out for now, since it takes about {needed / 60:.0f} minutes to train")
            return
        try:
            costs[name] = cost_of(run, made(name), dense)
            log.say(f"{name}: {budgeted.cost(run.target, costs[name])}, made in {time.monotonic() - start:.0f} s")
        except InputError as error:
            problems[name] = str(error)
            log.say(f"{name} cannot be made: {error}")
        kept()

    @functools.cache
    def answers(name: str) -> dict[str, Answers]:
        return tasks.answering(asked, tokens, prepared(dense))({name: prepared(made(name))})[name]

    def flips(name: str) -> tuple[int, int]:
        """Answers that are right in one model and wrong in the other, and of how many."""
        pairs = [(own, answers(FIRST)[task]) for task, own in answers(name).items()]
        differ = [correct(own, usual(first)) != correct(first, usual(first)) for own, first in pairs]
        return int(sum(map(np.sum, differ))), sum(map(len, differ))

    kept = lambda: run_directory.write_json(log.folder / "tried.json", tried)
    search = Search(
        parts=len(ends) - 1, allowed=run.allowed, most=run.most, sums=tried["sums"], costs=costs,
        tests=tried["tests"].setdefault(run.claim, []), measure=measure, kept=kept,
        say=lambda name: log.say(budgeted.words(search, run.target, name)),
        flips=flips if asked else None, allowed_flips=written.share("flips", run.flips),
    )  # fmt: skip

    def keep_best() -> None:
        """As the model of the run directory; until one is accepted that is the first model."""
        if not search.best:
            saved.save(log.folder, {OWN: Saved(dense, about)}, tokens)
            return
        made(search.best["name"])
        with run_directory.whole(log.folder / OWN) as partial:
            shutil.copy(file(search.best["name"]), partial)

    for text in texts:
        search.read(FIRST, text)
    costs[FIRST] = cost_of(run, dense, dense)
    keep_best()
    unseen = search.read(FIRST, UNSEEN)
    log.say(f"{run.model}: {quality.words(quality.bits_per_byte(unseen))} bits per byte of unseen text")
    names = sorted(run.parts, key=lambda name: 2 * trains(run.steps_of(name)) + calibrates(run.steps_of(name)))
    while True:  # once even where no minutes are left: what is known already may be accepted
        until, before = time.monotonic() + MAKING * left(), len(costs)
        for name in (name for name in names if name not in costs and name not in problems):
            if time.monotonic() < until:
                make(name)
        least = min(costs, key=costs.get)
        require(
            costs[least] <= run.most,
            f"bytes is {run.bytes}, but the smallest candidate, {least}, takes {written.size(costs[least])}: raise it, "
            "or give smaller --chains",
        )
        search.halve([name for name in costs if name != FIRST and costs[name] <= run.most])
        for test in search.accept():
            log.say(budgeted.tested(test, run.allowed))
            if search.best is test:
                keep_best()
        read = [name for name in costs if name != FIRST and search.sums.get(name)]
        for name in {*read} - {*search.ranked(read), (search.best or {}).get("name")}:
            file(name).unlink(missing_ok=True)
        new = [name for name in between(read, search.good) if is_chain(name)]
        if left() < 0 or (len(costs) == before and not new):
            break
        names = [*run.parts, *new]
    outcome = budgeted.outcome(search, run.target)
    log.say(outcome)
    listed, checked = budgeted.rows(search, run.target), None
    if run.check and search.best:
        third = dataset.to_score(run.check, "", about, tokens, dataset.cache(), run.strict)
        here = [prepared(made(name)) for name in (search.best["name"], FIRST)]
        pair = [scoring.measure({"": model}, third, tokens, score, model)[""] for model in here]
        checked = budgeted.checked(third.name, *pair, run.allowed, RESAMPLINGS)
        log.say(f"{search.best['name']} {checked['words']}")
    facts = [*protocol(texts, score, context, unseen), *rows.cautions(run.model, about, held[1].known)]
    log.results(facts, rows=listed, tests=search.tests, best=search.best, check=checked, claim=run.claim, seed=run.seed)
    whole = Table(caption="By cost; loss over the first model's.", columns=budgeted.columns(run.target), rows=listed)
    table.show(listed, [outcome, *facts], whole.columns)
    section = Section("Candidates", [budgeted.front(listed, run.target), whole], outcome)
    log.report(facts, title=f"{run.model}: {run.claim}", sections=[section], made={"seed": run.seed})


def protocol(texts: dict[str, Any], score: Scoring, context: Context, unseen: Quality) -> list[str]:
    """What is said of the figures. unseen: of the first model on the acceptance text."""
    selection, read = sum(len(text) for name, text in texts.items() if name != UNSEEN), context.calibration
    out = [
        f"Unseen text: {scoring.protocol(texts[UNSEEN], score, unseen)}.",
        f"Selection: {selection} documents of the validation split, of which candidates read ever more.",
    ]
    if read:
        rows, length = read["inputs"].shape
        held = overlap.words(overlap.share(read, texts[UNSEEN]), "the unseen text")
        out.append(f"Calibration: {rows} rows of {length} tokens of the training split. {held}")
    return [*out, acceptance.PROTOCOL]


if __name__ == "__main__":
    launch(
        main, __doc__, run=Run(), calibration=Calibration(rows=32, length=256), score=Scoring(), task=TaskFiles(),
    )  # fmt: skip
