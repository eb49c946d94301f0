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
from collections.abc import Callable
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
from efflm.config import InputError, flag, require, require_choices, require_positive, written
from efflm.data import dataset, overlap
from efflm.evaluate import acceptance, quality, scoring, task_files, tasks, throughput
from efflm.evaluate.answers import Answers, correct, usual
from efflm.evaluate.quality import Quality
from efflm.evaluate.search import FINALISTS, FIRST, UNSEEN, Search, between
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import efflm_file, saved, sources
from efflm.formats.saved import Saved
from efflm.formats.sources import OWN, Loaded
from efflm.model import LanguageModel
from efflm.parallel import meshes, sharding
from efflm.plan import work
from efflm.precision import policy_for
from efflm.report import budgeted, rows, table
from efflm.report.journal import Journal
from efflm.report.page import Section, Table
from efflm.text import fitted

QUICK = "w8a16 w8a8 quantize@4[activations=int8] smoothquant_w8a8 gptq@4 gptq@3"
QUICK += " mixed@5[rows=2] mixed@4[rows=2] mixed@3.5[rows=2] gptq@4[embeddings=4] tuned@4 tuned@3"
NARROW = " width@0.05,w8a8 width@0.15,w8a8 depth@0.07,w8a8 width@0.2,distill,w8a8 width@0.3,distill,w8a8"
SPARSE = " wanda@0.2,w8a16 wanda@0.4,w8a16 sparsegpt@0.2,w8a16 sparsegpt@0.5,w8a16"
CHAINS = {"bytes": QUICK + NARROW + SPARSE, "memory": QUICK + NARROW, "latency": QUICK + NARROW}
SHARES = (0.25, 0.5, 1.0)  # of the selection text that candidates have read before each halving
MAKING = 0.6  # of the time left, the share in which a round may make candidates
FORWARD_PASSES = 4  # that a training step on as many tokens takes, with a teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Subject):
    """The run"""

    loss: str = flag("", "the share by which the loss may rise, as 1%, which is the default")
    bytes: str = flag("", "in place of --loss: the bytes that the model may take, as 60MB; the least loss is searched")
    target: Literal["bytes", "latency", "memory"] = flag("bytes", "what is to be small within the allowed loss")
    tasks: tuple[str, ...] = flag((), task_files.ASKED)
    flips: str = flag("5%", "with --tasks: the share of answers that may become right or wrong")
    minutes: float = flag(30.0, "how long the search may take, the acceptance included")
    chains: str = flag("", "chains to begin with, spaces between them, or a .toml file of them; empty: a list")
    context: int = flag(1024, "positions of the key-value cache whose memory counts")
    check: str = flag("", "file or folder of a third text, to check the accepted model on", path=True)
    steps: int = flag(100, "optimizer steps of distill and finetune")
    learning_rate: float = flag(5e-4, "peak learning rate of both")
    batch: int = flag(8, "sequences in a training batch")
    length: int = flag(256, "tokens in each")
    seed: int = flag(0, "seed of the batches and of the calibration text")
    run_dir: str = flag(str(run_directory.ROOT / "budget"), "where everything is written", path=True)

    def __post_init__(self):
        require_choices(self)
        require_positive(self, "minutes", "context", "steps", "learning_rate", "batch", "length")
        require(not (self.loss and self.bytes), "loss and bytes are both given: one is searched within the other")
        require(not self.bytes or self.target == "bytes", f"bytes goes with target=bytes, but that is {self.target}")
        require(bool(self.parts), f"chains is {self.chains!r}: give at least one chain")
        _ = self.allowed, self.most, self.allowed_flips, [self.steps_of(name) for name in self.parts]

    @property
    def parts(self) -> list[str]:
        """The chains to begin with, each as it is written."""
        return [",".join(each) for each in grammar.parts(self.chains or CHAINS[self.target]).values()]

    def steps_of(self, name: str) -> tuple[Step, ...]:
        usual = {"steps": self.steps, "learning_rate": self.learning_rate}
        return grammar.steps_of(grammar.parts(name)[name], {Distill: usual, Finetune: usual})

    @property
    def allowed(self) -> float:
        """The increase of the loss, as a share."""
        return math.inf if self.bytes else written.share("loss", self.loss or "1%")

    @property
    def allowed_flips(self) -> float:
        return written.share("flips", self.flips)

    @property
    def most(self) -> float:
        """Bytes."""
        return written.nbytes("bytes", self.bytes) if self.bytes else math.inf

    @property
    def claim(self) -> str:
        """What the acceptance shows, in words."""
        answers = f", {self.flips} of the answers to {', '.join(self.tasks)}" if self.tasks else ""
        return f"at most {self.most:.0f} bytes" if self.bytes else f"{self.target} within {self.allowed:g}{answers}"


def prepared(model: LanguageModel) -> LanguageModel:
    return ops.prepare(sharding.on_one_device(model), jax.default_backend())


def cost_of(run: Run, model: LanguageModel, first: LanguageModel) -> float:
    """What is to be small."""
    if run.target == "bytes":
        return ops.stored_nbytes(model.params, model.masks)
    here = prepared(model)
    if run.target == "memory":
        cache = work.kv_cache_bytes(model.config, 1, run.context, policy_for(model.config))
        return trees.nbytes(here.params) + cache
    timing = throughput.protocol_for(first)
    rates, _ = throughput.rates({"": here, FIRST: prepared(first)}, timing)
    own, base = (
        [timing.prompt / read + timing.new / write for read, write in zip(*(rate.rounds for rate in rates[name]))]
        for name in ("", FIRST)
    )
    return throughput.paired(own, base)[0]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Makes the models of chains once, each kept in a file."""

    run: Run
    loaded: Loaded
    context: Context

    def file(self, name: str) -> Path:
        return Path(self.run.run_dir) / "candidates" / f"{grammar.file_name(name)}.safetensors"

    def __call__(self, name: str) -> LanguageModel:
        if name == FIRST:
            return self.loaded.model
        file, tokens = self.file(name), self.loaded.tokenizer
        if file.exists():
            return fitted.told(efflm_file.load(file, self.context.mesh)[0], tokens)
        model, records = recipe.apply(self.loaded.model, self.run.steps_of(name), self.context)
        saved.save(file.parent, {file.name: Saved(model, self.loaded.about | {"recipe": name}, records)}, tokens)
        return model

    def keep_best(self, name: str) -> None:
        """As the model of the run directory."""
        self(name)
        with run_directory.whole(Path(self.run.run_dir) / OWN) as partial:
            shutil.copy(self.file(name), partial)


def begun(file: Path, key: str) -> dict[str, Any]:
    """What tried.json holds. Raises InputError if it is of another search."""
    found = {"key": key, "second_a_token": 0.0, "sums": {}, "costs": {}, "tests": {}, "problems": {}}
    found = json.loads(file.read_text()) if file.exists() else found
    require(found["key"] == key, f"{file} is of another model, text or settings: give another --run_dir, or delete it")
    return found


def part(text: Any, start: int, end: int) -> Any:
    """Some documents of a dataset.Text."""
    return dataclasses.replace(text, parts=text.parts[start:end], sizes=text.sizes[start:end])


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
    source, steps = dataset.source_of(run.corpus, about), [step for name in run.parts for step in run.steps_of(name)]
    held = [dataset.held_out(source, tokens, dataset.cache(), split, run.strict) for split in dataset.HELD_OUT]
    score = score.within(dense.config.max_length, about.get("train.length", 0), held[0].unbroken)
    context = api.context_for(
        steps, source, dataset.cache(), dense, tokens, batch=run.batch, length=run.length, calibration=calibration,
        seed=run.seed, lower=api.FLAGS, strict=run.strict,
    )  # fmt: skip
    counts = [min(score.documents or len(text), len(text)) for text in held]
    ends = [0, *dict.fromkeys(math.ceil(share * counts[0]) for share in SHARES)]
    texts = {str(i): part(held[0], *pair) for i, pair in enumerate(itertools.pairwise(ends))}
    texts[UNSEEN] = part(held[1], 0, counts[1])
    same = [digest(dense), source, tokens.digest, score, calibration, run.context, run.seed]
    same += [run.steps, run.learning_rate, run.batch, run.length]
    tried = begun(log.folder / "tried.json", hashlib.sha256(repr(same).encode()).hexdigest()[:16])
    made = Candidates(run, loaded, context)

    def left() -> float:
        """Seconds, without those that it takes to test."""
        unseen = sum(tried["sums"].get(FIRST, {}).get(UNSEEN, {}).get("tokens", ()))
        return deadline - FINALISTS * unseen * tried["second_a_token"] - time.monotonic()

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
            tried["problems"][name] = str(error)
            log.say(f"{name} cannot be made: {error}")
        kept()

    @functools.cache
    def answers(name: str) -> dict[str, Answers]:
        return tasks.answering(asked, tokens, prepared(dense))({name: prepared(made(name))})[name]

    def flips(name: str) -> tuple[int, int]:
        """Answers that are right in one model and wrong in the other, and of how many."""
        pairs = [(own, answers(FIRST)[task]) for task, own in answers(name).items()]
        right = [[correct(each, usual(first)) for each in (first, own)] for own, first in pairs]
        return sum(int(np.sum(a != b)) for a, b in right), sum(len(a) for a, _ in right)

    costs = tried["costs"].setdefault(run.target, {})
    kept = lambda: run_directory.write_json(log.folder / "tried.json", tried)
    search = Search(
        parts=len(ends) - 1, allowed=run.allowed, most=run.most, sums=tried["sums"], costs=costs,
        tests=tried["tests"].setdefault(run.claim, []), measure=measure, kept=kept,
        say=lambda name: log.say(budgeted.words(search, run.target, name)),
        flips=flips if asked else None, allowed_flips=run.allowed_flips,
    )  # fmt: skip
    for text in texts:
        search.read(FIRST, text)
    costs[FIRST] = 1.0 if run.target == "latency" else cost_of(run, dense, dense)
    if search.best:
        made.keep_best(search.best["name"])
    else:
        saved.save(log.folder, {OWN: Saved(dense, about)}, tokens)
    unseen = search.read(FIRST, UNSEEN)
    log.say(f"{run.model}: {quality.words(quality.bits_per_byte(unseen))} bits per byte of unseen text")
    facts = [*protocol(run, score, texts, context, unseen), *rows.cautions(run.model, about, held[1].known)]
    names = sorted(run.parts, key=lambda name: 2 * trains(run.steps_of(name)) + calibrates(run.steps_of(name)))
    while left() > 0:
        until, before = time.monotonic() + MAKING * left(), len(costs)
        for name in (name for name in names if name not in costs and name not in tried["problems"]):
            if time.monotonic() < until:
                make(name)
        least = min(costs, key=costs.get)
        require(
            costs[least] <= run.most,
            f"bytes is {run.bytes}, but the smallest candidate, {least}, takes {written.size(costs[least])}: raise it, "
            "or give smaller --chains",
        )
        on = search.halve([name for name in costs if name != FIRST and costs[name] <= run.most])
        for test in search.accept():
            log.say(budgeted.tested(test, run.allowed))
            if search.best is test:
                made.keep_best(test["name"])
        for name in costs.keys() - {*on, (search.best or {}).get("name")}:
            made.file(name).unlink(missing_ok=True)
        log.results(facts, rows=budgeted.rows(search, run.target), tests=search.tests, best=search.best)
        new = [name for name in between([*costs.keys() - {FIRST}], search.good) if is_chain(name)]
        if len(costs) == before and not new:
            break
        names = [*run.parts, *new]
    log.say(budgeted.outcome(search, run.target))
    listed = budgeted.rows(search, run.target)
    checked = check(run, made, search.best["name"], score, log.say) if run.check and search.best else None
    log.results(facts, rows=listed, tests=search.tests, best=search.best, check=checked)
    whole = Table(caption="By cost; loss over the first model's.", columns=budgeted.columns(run.target), rows=listed)
    table.show(listed, [budgeted.outcome(search, run.target), *facts], whole.columns)
    title = f"{run.model}: {'the least loss' if run.bytes else f'the least {run.target}'} {run.claim}"
    section = Section("Candidates", [budgeted.front(listed, run.target), whole], budgeted.outcome(search, run.target))
    log.report(facts, title=title, sections=[section], made={"seed": run.seed})


def is_chain(name: str) -> bool:
    """Whether there is such a setting: there are no 3.5 bits."""
    try:
        return bool(grammar.chain(name))
    except InputError:
        return False


def protocol(run: Run, score: Scoring, texts: dict[str, Any], context: Context, unseen: Quality) -> list[str]:
    """What is said of the figures. unseen: of the first model on the acceptance text."""
    selection = sum(len(text) for name, text in texts.items() if name != UNSEEN)
    read = context.calibration
    out = [f"Unseen text: {scoring.protocol(texts[UNSEEN], score, unseen)}."]
    out.append(f"Selection: {selection} documents of the validation split, of which candidates read ever more.")
    if read:
        rows_, length = read["inputs"].shape
        share = overlap.share(read, itertools.islice(texts[UNSEEN], None))
        out.append(
            f"Calibration: {rows_} rows of {length} tokens of the training split; {share:.2%} of the "
            f"{overlap.LENGTH}-token sequences of the unseen text are in them too."
        )
    out.append(
        "Accepted: the upper end of a one-sided interval of the loss over the first model's, paired over documents "
        f"(Student's t). The chance that any candidate is accepted wrongly is {acceptance.CHANCE:.0%}: test j has the "
        "share 1 / (j (j + 1)) of it, and what it accepts hands its share on (fallback procedure). That holds for text "
        "such as the unseen documents, drawn like them."
    )
    return out


def check(run: Run, made: Candidates, name: str, score: Scoring, say: Callable[[str], None]) -> dict[str, Any]:
    """The accepted model on a third text: the increase, and in how many resamplings of its documents it is within what
    was allowed."""
    loaded, times = made.loaded, 20
    text = dataset.to_score(run.check, "", loaded.about, loaded.tokenizer, dataset.cache(), run.strict)
    models = [prepared(made(each)) for each in (name, FIRST)]
    read = lambda model: scoring.measure({"": model}, text, loaded.tokenizer, score, model)[""]
    own, first = map(read, models)
    increase = quality.relative_increase(own, first)
    share = acceptance.held(own, first, run.allowed, times)
    said = budgeted.percent(*increase)
    say(
        f"{name} on {text.name}: loss {said}, within what is allowed in {share:.0%} of {times} resamplings of documents"
    )
    return {"text": text.name, "increase": increase, "documents": len(own.bits), "held": share, "resamplings": times}


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), calibration=Calibration(rows=32, length=256), score=Scoring(), task=TaskFiles())
