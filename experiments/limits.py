"""Where compressed models fail: on which texts and tokens, by what they were fitted to, and how sure they are of it.

    bash launch/run.sh experiments.limits --model=smollm2 --chains="w8a8 gptq@4 tuned@3 wanda@0.5 width@0.3,distill"
      --domains="wiki=wiki/ books=books/ code=stdlib mine=~/notes"
    bash launch/run.sh experiments.limits --model=runs/pretrain --chains="gptq@3 width@0.3,finetune gradual@0.5"
    bash launch/run.sh experiments.limits --model=smollm2 --chains=gptq@3 --domains="books=b/ code=stdlib" --matrix

Generality: the loss over the first model's on the test split of each domain, with its error, and the worst one of each
chain; --matrix: each chain that reads text, calibrated or trained on each domain and tested on all. Overfitting: for
chains that train, the loss of text that they were trained on, of the calibration text and of held-out text, along the
training; how much of the test texts the calibration text holds; with --tasks, whether loss and accuracy rank the
models alike. Confidence: the expected calibration error, the next tokens that change by how frequent the token is, and
generated tasks with exact answers: rare words, digits, sums, names and copies over a long distance. Length: the loss
by the place in the text.

Calibration and training read the training split of --corpus, by default of the first domain; frequency, confidence and
length are of the first domain's test text. Expect tables in the terminal, and in the run directory `models/`, which the
same command goes on from when it was interrupted, results.json and report.html.
"""

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from efflm import api, ops, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress import grammar, recipe
from efflm.compress.step import Calibration, Context, digest, reads_text, trains
from efflm.config import at_home, flag, require, require_positive
from efflm.data import corpora, dataset, overlap
from efflm.evaluate import limits, probes, quality, scoring, task_files, tasks
from efflm.evaluate.limits import Targets
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import saved, sources
from efflm.formats.saved import Saved
from efflm.formats.sources import OWN, Loaded
from efflm.model import LanguageModel
from efflm.parallel import meshes
from efflm.report import compared, limited, numbers, page, rows, table
from efflm.report.journal import Journal
from efflm.report.page import Section
from efflm.report.rows import Row
from efflm.report.tasks import READING
from efflm.train import callbacks, metrics
from experiments.making.chains import Making, prepared

CURVES = {"text trained on": "trained_loss", "calibration text": "calibration_loss", "held-out text": "held_out_loss"}
COUNTED = 1 << 14  # rows of the training text in which tokens are counted, at most
MUCH = 0.01  # share of a test text in the calibration text of which is warned
RARE = 200  # words to draw the rare ones from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Making):
    """The run"""

    chains: str = flag("w8a8 gptq@4 wanda@0.5 width@0.3,distill", "chains with spaces between them, or a .toml file")
    domains: str = flag("", "texts to test on, as in 'wiki=a/ code=stdlib'; empty: --corpus alone")
    matrix: bool = flag(False, "make each chain that reads text from each domain too")
    tasks: tuple[str, ...] = flag((), task_files.ASKED)
    probes: int = flag(64, "items of each generated task")
    run_dir: str = flag(str(run_directory.ROOT / "limits"), "where everything is written", path=True)

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "probes")
        _ = self.pairs  # which checks them

    @property
    def pairs(self) -> dict[str, str]:
        """Of the domains, by their names."""
        pairs = [pair.partition("=") for pair in self.domains.split()]
        for name, equals, corpus in pairs:
            require(bool(equals and corpus), f"domains holds {name!r}, but must be NAME=CORPUS, as in code=stdlib")
        return {name: at_home(corpus) for name, _, corpus in pairs}


@dataclasses.dataclass(frozen=True, eq=False)
class Maker:
    """Makes the models of chains out of the training split of a corpus. Each is kept in a file, the losses along its
    training beside it."""

    run: Run
    loaded: Loaded
    calibration: Calibration

    @functools.cached_property
    def dense(self) -> str:
        return digest(self.loaded.model)

    @functools.cache  # noqa: B019 (there is one Maker, until the program ends)
    def context(self, source: str) -> Context:
        run, context = self.run, self.run.context(source, self.loaded, self.calibration)
        if not context.batches:
            return context
        held_out = tokenized(run, self.loaded, source).validation_batches(run.batch, 2)
        batches = {"trained_loss": [context.batches(0)], "held_out_loss": held_out}
        if context.calibration:
            some = {name: array[: run.batch, : run.length] for name, array in context.calibration.items()}
            batches["calibration_loss"] = [some]
        every = max(1, run.steps // 10)
        watched = tuple(callbacks.validation(each, every, name) for name, each in batches.items())
        return dataclasses.replace(context, watched=watched)

    def folder(self, name: str, source: str) -> Path:
        """Of a chain that reads this text."""
        context, run = self.context(source), self.run
        made_of = [self.dense, context.corpus, self.calibration, run.steps_of(name), run.seed, run.batch, run.length]
        kept = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
        return Path(run.run_dir) / "models" / f"{grammar.file_name(name)}-{kept}"

    def __call__(self, name: str, source: str) -> LanguageModel:
        folder, context = self.folder(name, source), self.context(source)

        def make() -> Saved:
            own = dataclasses.replace(context, metrics=folder / "curves")
            model, records = recipe.apply(self.loaded.model, self.run.steps_of(name), own)
            return Saved(model, self.loaded.about | {"recipe": name}, records)

        return saved.once(folder / OWN, self.loaded.tokenizer, context.mesh, make)


def tokenized(run: Run, loaded: Loaded, source: str) -> dataset.Dataset:
    """A corpus in the tokens of the model."""
    return dataset.prepare(
        source, dataset.cache(), vocabulary=loaded.model.config.vocabulary, batch=run.batch, tokenizer=loaded.tokenizer,
        length=min(run.length, loaded.model.config.max_length), strict=run.strict, lower=api.FLAGS[0],
    )  # fmt: skip


def read(models: dict[str, LanguageModel], text: Any, tokens: Any, score: Scoring) -> Targets:
    """What each model makes of each target of a text. The first one is the reference."""
    blocks = scoring.blocks(text, tokens, score)
    return limits.gathered(quality.by_target(models, blocks, next(iter(models.values()))))


def row_of(name: str, model: LanguageModel, seen: dict[str, Targets], first: str, counts: np.ndarray, told: Any) -> Row:
    """All that is known of a model. seen: of each domain; told: what rows.tasks gives."""
    own, base = ({domain: each.quality(which) for domain, each in seen.items()} for which in (name, first))
    domain, size = next(iter(seen)), ops.stored_nbytes(model.params, model.masks)
    before = None if name == first else (base[domain], None)
    shown = rows.make(name, model, size, "", own[domain], None, before, tasks=told)
    figures = {each: rows.of_text(own[each], None if name == first else base[each]) for each in seen}
    worst, note = max(seen, key=lambda each: quality.relative_increase(own[each], base[each])[0]), ""
    if name != first and len(seen) > 1:
        more = " ".join(numbers.percent(*quality.relative_increase(own[worst], base[worst]), sign=True))
        note = f"worst on {worst}: loss {more}"
    error, difference = limits.calibration(seen[domain], name, first)
    groups = {
        "by_position": limits.by_position(seen[domain], name, first),
        "by_frequency": limits.by_frequency(seen[domain], name, counts),
        "calibration": {"error": error} | ({"difference": difference} if difference else {}),
    }
    groups = {each: limited.told(figures) for each, figures in groups.items()}
    return dataclasses.replace(shown.but(domains=figures, **groups), note=note)


def overlaps(read: Any, texts: dict[str, Any], score: Scoring, say: Callable[[str], None]) -> dict[str, float]:
    """The share of each test text that the calibration text holds; a warning where that is much."""
    documents = lambda text: itertools.islice(text, score.documents or None)
    found = {name: overlap.share(read, documents(text)) for name, text in texts.items()} if read else {}
    for name, share in found.items():
        if share > MUCH:
            say(f"warning: {overlap.words(share, name)}")
    return found


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring, task: TaskFiles) -> None:
    log = Journal(run.run_dir, command_line("experiments.limits", sys.argv))
    run_directory.require_writable(log.folder, needs=run_directory.SMALL_FILES)
    user_cache.use_compilation_cache()
    asked = task_files.read(run.tasks, task)
    loaded = sources.load(run.model, precision=run.precision, mesh=meshes.data_parallel(run.batch))
    dense, tokens, about, first = loaded.model, loaded.tokenizer, loaded.about, rows.label(loaded.about)
    recipe.require_finite(dense)
    source = run.corpus or next(iter(run.pairs.values()), "") or dataset.source_of("", about)
    pairs = run.pairs or {corpora.name_of(source): source}
    texts = {name: dataset.held_out(at, tokens, dataset.cache(), strict=run.strict) for name, at in pairs.items()}
    unbroken = any(text.unbroken for text in texts.values())
    score = score.within(dense.config.max_length, about.get("train.length", 0), unbroken)
    make, domain = Maker(run, loaded, calibration), next(iter(texts))
    made = {first: dense}
    for name in run.parts:
        made[name] = make(name, source)
        log.say(f"{name}: made")
    models, seen = {name: prepared(model) for name, model in made.items()}, {}
    for name, text in texts.items():
        seen[name] = read(models, text, tokens, score)
        log.say(f"{name}: {text.name} read by {len(models)} models")
    text = tokenized(run, loaded, source).train
    counts = np.bincount(text[:COUNTED]["targets"].ravel(), minlength=dense.config.vocabulary)
    made_up = probes.tasks(probes.rare_words(tokens, counts, RARE), run.probes, run.seed)
    answered = tasks.answering([*asked, *made_up], tokens, models[first])(models)
    told = {name: rows.tasks(answered, name, first) for name in models}
    listed = [row_of(name, model, seen, first, counts, told[name]) for name, model in made.items()]
    context = make.context(source)
    shares = overlaps(context.calibration, texts, score, log.say)
    found = {name: curves(make.folder(name, source)) for name in run.parts if trains(run.steps_of(name))}
    grids = matrix(run, make, texts, score, log.say) if run.matrix else {}
    facts = [
        f"Quality: {scoring.protocol(texts[domain], score, seen[domain].quality(first))}. Divergence: from {first}.",
        f"Places, frequency and confidence: of {domain}. Made from the training split of {corpora.name_of(source)}; "
        f"tokens are counted in {min(COUNTED, len(text)):,} rows of it.",
        *(overlap.words(share, name) for name, share in shares.items()),
        *rows.cautions(run.model, about, texts[domain].known),
    ]
    order = None
    if asked:
        accuracy = [np.mean([row.tasks[each.name]["accuracy"] for each in asked]) for row in listed]
        order = limits.rank_correlation([-row.bits_per_byte for row in listed], accuracy)
        facts.append(f"Loss and accuracy rank the models alike by {order:.2f} (Spearman)." if order is not None else "")
    log.results(facts, rows=listed, overlap=shares, curves=found, domains=grids, rank_correlation=order, seed=run.seed)
    grouped = limited.tables(listed)
    answers = [compared.of_task(listed, each) for each in listed[0].tasks]
    table.show(listed, facts)
    for each in grouped.values():
        table.show(each.rows, [each.caption], each.columns)
    whole = page.Table(caption="Loss by domain.", columns=table.columns(listed), rows=listed)
    charts = [limited.curves(name, each) for name, each in found.items()]
    sections = [
        Section("Generality", [whole, *[limited.domains(grids)] * bool(grids)]),
        *[Section("Overfitting", charts)] * bool(charts),
        Section("Confidence", [grouped["calibration"], grouped["frequency"], *answers], READING),
        Section("Length", [grouped["position"]]),
    ]
    log.report(facts, title=f"Where compressed models fail: {run.model}", sections=sections, made={"seed": run.seed})


def curves(folder: Path) -> dict[str, Any]:
    """{text: (steps, losses)} along the training of a chain, by the last of its steps that trains."""
    files = sorted((folder / "curves").glob("*.jsonl"))
    found = {text: metrics.curve(files[-1], name) for text, name in CURVES.items()} if files else {}
    return {text: [each.tolist() for each in pair] for text, pair in found.items() if len(pair[0])}


def matrix(run: Run, make: Maker, texts: dict[str, Any], score: Scoring, say: Callable[[str], None]) -> dict[str, Any]:
    """{chain: {domain that it was made from: {test domain: bits per byte over the first model, and its error}}}."""
    dense, tokens, out = prepared(make.loaded.model), make.loaded.tokenizer, {}
    tests = {name: scoring.against(dense, text, tokens, score) for name, text in texts.items()}
    before = {name: test(dense) for name, test in tests.items()}
    for chain in (chain for chain in run.parts if reads_text(run.steps_of(chain))):
        out[chain] = {}
        for domain, source in run.pairs.items():
            model = prepared(make(chain, source))
            over = {name: quality.paired_difference(test(model), before[name]) for name, test in tests.items()}
            shown = ", ".join(f"{name} {value:+.4f}" for name, (value, _) in over.items())
            say(f"{chain} made from {domain}: {shown}")
            out[chain][domain] = over
    return out


if __name__ == "__main__":
    launch(
        main, __doc__, run=Run(), calibration=Calibration(rows=32, length=256), score=Scoring(), task=TaskFiles()
    )  # fmt: skip
