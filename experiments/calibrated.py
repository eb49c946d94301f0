"""What calibration buys: every method at several bits and sparsities, over calibration seeds and domains of text.

    python -m experiments.calibrated --model=runs/pretrain
    python -m experiments.calibrated --model=smollm2 --corpus=notes/ --recipes="gptq3 wanda50" --seeds=1
    python -m experiments.calibrated --model=smollm2 --domains="wiki=a/ books=b/ code=stdlib" --domain_recipes="gptq3"

A model to compress that no one has rounded before, of 14 million parameters, trained in about an hour on 2 cores:

    python -m experiments.pretrain --corpus=FOLDER --run_dir=runs/14M --model.width=384 --model.heads=6 \\
      --model.kv_heads=6 --model.mlp_dim=1024 --model.vocabulary=8192 --train.batch=16 --train.steps=1500 \\
      --train.optimizer=muon --train.learning_rate=1e-2 --train.policy=auto

Expect a table in the terminal, sorted as the recipes are given, and in the run directory results.json, which is written
anew after each recipe, and report.html with perplexity against bits and against sparsity, loss against bytes with its
Pareto front, and for domains a table of calibration text against test text.

Protocol: recipes are chains (efflm/compress/grammar.py), and NAME@NUMBER are points of a sweep over bits or sparsity.
Those that are calibrated run once for each seed, which draws the rows of calibration text from the training split; test
text is of the test split. Reported is the mean over seeds and the standard deviation, which is beside the standard
error over test documents. Time is a multiple of one plain forward pass over the calibration text. Memory is the model's
and what the process held beyond that while it was compressed, over the model's bytes.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efflm import api, ops, trees
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress import grammar, recipe
from efflm.compress.gptq import GPTQ
from efflm.compress.step import Calibration, Context, Step, reads_text
from efflm.config import at_home, flag, require
from efflm.data import corpora, dataset, overlap
from efflm.evaluate import quality, scoring, speed
from efflm.evaluate.quality import Quality
from efflm.evaluate.windows import Scoring
from efflm.formats import sources
from efflm.formats.sources import KINDS, Loaded
from efflm.model import LanguageModel
from efflm.parallel import sharding
from efflm.report import page, rows, swept, table
from efflm.report.page import Section, Table
from efflm.report.rows import Row

SWEPT = [f"{name}@{bits}" for name in swept.BITS for bits in (8, 4, 3)]
SWEPT += [f"{name}@{share}" for name in swept.SHARES for share in (0.3, 0.5, 0.6, 0.7, 0.8)]
NAMED = ("w8a16", "w8a8", "w8a8_static", "smoothquant_w8a8_static", "smoothquant_w8a8", "awq4")
NAMED += ("magnitude24", "wanda24", "sparsegpt24", "wanda50_w8a8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag(str(run_directory.ROOT / "quickstart"), KINDS, path=True)
    corpus: str = flag("", f"{corpora.KINDS}; default: what the model was trained on, else stdlib", path=True)
    strict: bool = flag(False, corpora.STRICT)
    recipes: str = flag(" ".join((*SWEPT, *NAMED)), "chains with spaces between them, or a .toml file of them")
    seeds: int = flag(3, "draws of calibration text")
    domains: str = flag("", 'corpora to calibrate on and to test, as in "wiki=a/ code=stdlib"; empty: none')
    domain_recipes: str = flag("gptq3 wanda50", "recipes of the table of domains")
    run_dir: str = flag(str(run_directory.ROOT / "calibrated"), "where everything is written", path=True)

    def __post_init__(self):
        require(self.seeds > 0, f"seeds is {self.seeds}, but must be positive")
        for text in (self.recipes, self.domain_recipes):
            grammar.chains(text)
        for pair in self.domains.split():
            require("=" in pair, f"domains holds {pair!r}, but must be NAME=CORPUS, as in code=stdlib")
        self.pairs  # noqa: B018  (which checks the paths)

    @property
    def pairs(self) -> dict[str, str]:
        """Of the domains, by their names."""
        pairs = (pair.partition("=") for pair in self.domains.split())
        return {name: at_home(corpus) for name, _, corpus in pairs}


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring) -> None:
    began = time.perf_counter()
    say = lambda words: print(f"[{time.perf_counter() - began:4.0f} s] {words}", flush=True)
    run_dir = Path(run.run_dir)
    run_directory.require_writable(run_dir, needs=run_directory.SMALL_FILES)
    run_dir.mkdir(parents=True, exist_ok=True)
    run_directory.use_compilation_cache()
    loaded = sources.load(run.model)
    dense = loaded.model
    recipe.require_finite(dense)
    source = dataset.source_of(run.corpus, loaded.about)
    text = held_out(run, loaded, source)
    score = score.within(dense.config.max_length, loaded.about.get("train.length", 0), text.unbroken)
    chains = grammar.chains(run.recipes)
    context = functools.partial(context_for, run, calibration, loaded, chains.values())
    contexts = [context(source, seed) for seed in range(run.seeds)]
    measure = functools.partial(measured, text, loaded, score, {})
    before, found = measure(dense), {}
    say(f"{rows.label(loaded.about)}: {quality.words(quality.bits_per_byte(before))} bits per byte")
    forward_seconds = speed.seconds_to_read(dense, contexts[0].calibration)
    facts = protocol(run, calibration, loaded, text, score, before, contexts, forward_seconds)
    results = {
        "protocol": facts,
        "command": command_line("experiments.calibrated", sys.argv),
        "versions": run_directory.machine(),
        "forward_seconds": forward_seconds,
    }
    for name, steps in chains.items():
        made = []
        for seed in range(run.seeds if reads_text(steps) else 1):
            work = functools.partial(recipe.run, dense, steps, contexts[seed])
            (after, _), seconds, more = speed.cost_of(work)
            made.append(measure(after))
            size = ops.stored_nbytes(after.params, after.masks)
            memory = None if more is None else 1 + more / trees.nbytes(dense.params)
            del after
        found[name] = swept.row(
            name, before, made, size, ops.stored_nbytes(dense.params), seconds / forward_seconds, memory
        )
        say(f"{name}: {swept.words(found[name])}")
        run_directory.write_json(run_dir / "results.json", results | {"rows": [row.json() for row in found.values()]})
    first = swept.first(rows.label(loaded.about), before, ops.stored_nbytes(dense.params))
    listed = [first, *found.values()]
    domains = domain_table(run, calibration, loaded, score, say)
    results |= {"rows": [row.json() for row in listed], "domains": domains}
    run_directory.write_json(run_dir / "results.json", results)
    table.show(listed, facts, swept.COLUMNS)
    for name, grid in domains.items():
        table.show(
            swept.domain_rows(grid), [f"{name}: bits per byte over the model before."], swept.domain_columns(grid)
        )
    write_report(run, run_dir, listed, domains, facts, began)
    say(f"done: open {run_dir / 'report.html'}")


def held_out(run: Run, loaded: Loaded, source: str) -> Any:
    return dataset.held_out(source, loaded.tokenizer, dataset.cache(), strict=run.strict)


def context_for(
    run: Run, calibration: Calibration, loaded: Loaded, chains: Iterable[Sequence[Step]], source: str, seed: int
) -> Context:
    """What the steps of all these chains read."""
    steps = [step for chain in chains for step in chain]
    return api.context_for(
        [*steps, GPTQ()],  # the text is always drawn: one pass over it is the unit of time
        source, dataset.cache(), loaded.model, loaded.tokenizer,
        batch=8, length=calibration.length, calibration=calibration, seed=seed,
        lower=("--calibration.length", api.FLAGS[1]), strict=run.strict,
    )  # fmt: skip


def measured(text: Any, loaded: Loaded, score: Scoring, kept: dict[int, np.ndarray], model: LanguageModel) -> Quality:
    models = {"": sharding.on_one_device(model)}
    return scoring.measure(models, text, loaded.tokenizer, score, loaded.model, kept)[""]


def protocol(
    run: Run, calibration: Calibration, loaded: Loaded, text: Any, score: Scoring, before: Quality,
    contexts: Sequence[Context], forward_seconds: float,
) -> list[str]:  # fmt: skip
    """What was done, in words."""
    rows_, length = contexts[0].calibration["inputs"].shape
    shared = overlap.share(contexts[0].calibration, itertools.islice(text, score.documents or None))
    return [
        f"Quality: {scoring.protocol(text, score, before)}.",
        f"Calibration: {rows_} rows of {length} tokens of the training split, {run.seeds} draws. {shared:.2%} of the "
        f"{overlap.LENGTH}-token sequences of the test text are in the first draw too.",
        f"Time: a plain forward pass over these rows took {forward_seconds:.1f} s. Memory: the model and what was held "
        "beyond it meanwhile, over the bytes of the model.",
        *rows.cautions(run.model, loaded.about, text.known),
    ]


def domain_table(
    run: Run, calibration: Calibration, loaded: Loaded, score: Scoring, say: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """{recipe: {calibration domain: {test domain: bits per byte over the model before}}}."""
    pairs = run.pairs
    texts = {name: held_out(run, loaded, source) for name, source in pairs.items()}
    scores = {name: score.within(loaded.model.config.max_length, 0, text.unbroken) for name, text in texts.items()}
    kept: dict[str, dict] = {name: {} for name in texts}
    before = {name: measured(texts[name], loaded, scores[name], kept[name], loaded.model) for name in texts}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, steps in grammar.chains(run.domain_recipes).items() if pairs else ():
        found[name] = {}
        for domain, source in pairs.items():
            context = context_for(run, calibration, loaded, [steps], source, 0)
            after, _ = recipe.run(loaded.model, steps, context)
            found[name][domain] = {
                other: quality.paired_difference(
                    measured(texts[other], loaded, scores[other], kept[other], after), before[other]
                )[0]
                for other in texts
            }
            say(f"{name} calibrated on {domain}: " + ", ".join(f"{k} {v:+.4f}" for k, v in found[name][domain].items()))
    return found


def write_report(
    run: Run, run_dir: Path, listed: Sequence[Row], domains: dict[str, Any], facts: list[str], began: float
) -> None:
    charts = [*swept.charts(listed), swept.front(listed)]
    tables = [Table(caption="Each beside the model before.", columns=swept.COLUMNS, rows=listed)]
    sections = [Section("What each recipe costs and saves", [*tables, *charts])]
    if domains:
        grids = [
            Table(
                caption=f"{name}: bits per byte over the model before. Rows: calibration text; columns: test text.",
                columns=swept.domain_columns(grid), rows=swept.domain_rows(grid),
            )
            for name, grid in domains.items()
        ]  # fmt: skip
        sections.append(Section("Calibration text and test text", grids))
    page.write(
        run_dir / "report.html",
        title=f"What calibration buys: {run.model}",
        sections=sections,
        facts=facts,
        made=page.made(run_directory.machine(), seeds=run.seeds, total_time=page.duration(time.perf_counter() - began)),
        command=command_line("experiments.calibrated", sys.argv),
    )


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), calibration=Calibration(), score=Scoring())
