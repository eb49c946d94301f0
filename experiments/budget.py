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
import math
import shutil
import sys
import time
from typing import Any, Literal

import numpy as np

from efflm import ops, trees, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress import grammar, recipe
from efflm.compress.step import Calibration, Context, calibrates, digest, trains
from efflm.config import InputError, flag, require, require_choices, require_positive, written
from efflm.data import dataset, overlap
from efflm.evaluate import acceptance, quality, scoring, task_files, throughput
from efflm.evaluate.quality import Quality
from efflm.evaluate.search import FIRST, UNSEEN, Search, between
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import saved, sources
from efflm.formats.saved import Saved
from efflm.formats.sources import OWN
from efflm.model import LanguageModel
from efflm.parallel import meshes
from efflm.plan import work
from efflm.precision import policy_for
from efflm.report import budgeted, rows, table
from efflm.report.journal import Journal
from efflm.report.page import Section, Table
from experiments.making.candidates import Candidates, begun
from experiments.making.chains import Making, prepared

CHAINS = (  # to begin with, the cheapest first; those that train are tried where the minutes allow
    "w8a16 w8a8 w5a16 quantize@4[activations=int8] smoothquant_w8a8 width@0.05,w8a8 width@0.15,w8a8 depth@0.07,w8a8 "
    "gptq@4 gptq@3 gptq@4[super_block=256,embeddings=4] mixed@5[rows=2] mixed@3.5[rows=2] tuned@4 tuned@3 "
    "wanda@0.2,w8a16 wanda@0.4,w8a16 sparsegpt@0.2,w8a16 sparsegpt@0.5,w8a16 width@0.2,distill,w8a8 "
    "width@0.3,distill,w8a8"
)
SHARES = (0.25, 0.5, 1.0)  # of the selection text that candidates have read before each halving
MAKING = 0.6  # of the time left, the share in which a round may make candidates
RESAMPLINGS = 20  # of the documents of --check


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
    costs = tried["costs"].setdefault(run.target, {})
    own = Candidates(
        run, log.folder, loaded, context, texts, score, asked, tried, costs, deadline, log.say,
    )  # fmt: skip
    search = Search(
        parts=len(ends) - 1, allowed=run.allowed, most=run.most, sums=tried["sums"], costs=costs,
        tests=tried["tests"].setdefault(run.claim, []), measure=own.measure, kept=own.keep,
        say=lambda name: log.say(budgeted.words(search, run.target, name)),
        flips=own.flips if asked else None, allowed_flips=written.share("flips", run.flips),
    )  # fmt: skip
    for text in texts:
        search.read(FIRST, text)
    costs[FIRST] = cost_of(run, dense, dense)
    keep_best(search, own)
    unseen = search.read(FIRST, UNSEEN)
    log.say(f"{run.model}: {quality.words(quality.bits_per_byte(unseen))} bits per byte of unseen text")
    go_on(run, search, own)
    outcome = budgeted.outcome(search, run.target)
    log.say(outcome)
    listed, checked = budgeted.rows(search, run.target), None
    if run.check and search.best:
        third = dataset.to_score(run.check, "", about, tokens, dataset.cache(), run.strict)
        here = [prepared(own.made(name)) for name in (search.best["name"], FIRST)]
        pair = [scoring.measure({"": model}, third, tokens, score, model)[""] for model in here]
        checked = budgeted.checked(third.name, *pair, run.allowed, RESAMPLINGS)
        log.say(f"{search.best['name']} {checked['words']}")
    facts = [*protocol(texts, score, context, unseen), *rows.cautions(run.model, about, held[1].known)]
    log.results(facts, rows=listed, tests=search.tests, best=search.best, check=checked, claim=run.claim, seed=run.seed)
    whole = Table(caption="By cost; loss over the first model's.", columns=budgeted.columns(run.target), rows=listed)
    table.show(listed, [outcome, *facts], whole.columns)
    section = Section("Candidates", [budgeted.front(listed, run.target), whole], outcome)
    log.report(facts, title=f"{run.model}: {run.claim}", sections=[section], made={"seed": run.seed})


def go_on(run: Run, search: Search, own: Candidates) -> None:
    """Search until no minutes are left, or nothing new is to be tried."""
    names = sorted(run.parts, key=lambda name: 2 * trains(run.steps_of(name)) + calibrates(run.steps_of(name)))
    costs, first = search.costs, own.made(FIRST)
    while True:  # once even where no minutes are left: what is known already may be accepted
        until, before = time.monotonic() + MAKING * own.left, len(costs)
        for name in (name for name in names if name not in costs and name not in own.tried["problems"]):
            if time.monotonic() < until:
                own.make(name, lambda model: cost_of(run, model, first), functools.partial(budgeted.cost, run.target))
        least = min(costs, key=costs.get)
        require(
            costs[least] <= run.most,
            f"bytes is {run.bytes}, but the smallest candidate, {least}, takes {written.size(costs[least])}: raise it, "
            "or give smaller --chains",
        )
        search.halve([name for name in costs if name != FIRST and costs[name] <= run.most])
        for test in search.accept():
            own.say(budgeted.tested(test, run.allowed))
            if search.best is test:
                keep_best(search, own)
        read = [name for name in costs if name != FIRST and search.sums.get(name)]
        for name in {*read} - {*search.ranked(read), (search.best or {}).get("name")}:
            own.file(name).unlink(missing_ok=True)
        new = [name for name in between(read, search.good) if is_chain(name)]
        if own.left < 0 or (len(costs) == before and not new):
            return
        names = [*run.parts, *new]


def keep_best(search: Search, own: Candidates) -> None:
    """The best accepted so far as the model of the run directory; until one is, the first model."""
    if not search.best:
        saved.save(own.folder, {OWN: Saved(own.loaded.model, own.loaded.about)}, own.loaded.tokenizer)
        return
    own.made(search.best["name"])
    with run_directory.whole(own.folder / OWN) as partial:
        shutil.copy(own.file(search.best["name"]), partial)


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
