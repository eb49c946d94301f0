"""Compress a model by one recipe or several, and show before and after side by side.

    python -m experiments.compress --model=runs/quickstart --recipe=w8a8
    python -m experiments.compress --model=runs/quickstart --recipe=masks50,w8a16 --prune.sparsity=0.3
    python -m experiments.compress --model=smollm2 --recipe="w8a16 w8a8 masks50 masks24"

Expect a table of all models, and in the run directory each compressed one as `<recipe>.safetensors`, its tokenizer,
`results.json` and `report.html`. Beside the first model one compressed model is held at a time.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax

from efflm import api, ops, rundir, trees
from efflm.compress import recipe
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.prune import Prune
from efflm.compress.quantize import Quantize
from efflm.compress.shrink import Shrink
from efflm.compress.step import Context, Step
from efflm.config import PRECISION, AskedPrecision, InputError, flag, require
from efflm.data import corpora, dataset
from efflm.evaluate import cost, quality
from efflm.evaluate.windows import Scoring
from efflm.flags import command_line, launch
from efflm.formats import safetensors, sources
from efflm.formats.sources import KINDS, Loaded
from efflm.infer.generate import generate
from efflm.model import LanguageModel, sharding
from efflm.report import page, plots, rows, scoring, table
from efflm.tokenizer import Tokenizer

BEFORE = "before.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag(str(rundir.ROOT / "quickstart"), KINDS)
    text: str = flag("", "file or folder of UTF-8 text to score; default: the test split of --corpus")
    corpus: str = flag("", f"{corpora.KINDS}; default: what the model was trained on, else stdlib")
    strict: bool = flag(False, corpora.STRICT)
    precision: AskedPrecision = flag("", PRECISION)
    recipe: str = flag(
        "w8a16",
        f"one of {', '.join(recipe.RECIPES)}; several joined by commas are one after another, several with spaces "
        "between them are compared",
    )
    run_dir: str = flag(str(rundir.ROOT / "compress"), "where everything is written")
    batch: int = flag(8, "sequences in a batch, where a step trains")
    length: int = flag(256, "tokens in a sequence, where a step trains")
    seed: int = flag(0, "seed of what a step draws at random")
    prompt: str = flag("The capital of France is", "prompt that each model continues in the report; empty: none")
    sample: int = flag(32, "tokens of that continuation")

    def __post_init__(self):
        require(bool(self.recipe.split()), f"recipe is {self.recipe!r}: give at least one")
        for names in self.recipe.split():
            recipe.named(names)
        for name in ("batch", "length", "sample"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")


def chains(names: str, changes: dict[type, dict]) -> dict[str, tuple[Step, ...]]:
    """{name: steps} of each recipe, with the changes on those that have such a step. Raises InputError if none has."""
    plans = {each.replace(",", "+"): recipe.named(each) for each in names.split()}
    for kind, fields in changes.items():
        having = [name for name, steps in plans.items() if any(type(step) is kind for step in steps)]
        if fields and not having:
            raise InputError(
                f"{', '.join(fields)} set for {kind.__name__}, which is not in this recipe: choose another recipe"
            )
        for name in having:
            plans[name] = recipe.override(plans[name], {kind: fields})
    return plans


def context_for(run: Run, loaded: Loaded, trains: bool) -> Context:
    """What the steps may use; text is prepared only where one of them trains."""
    if not trains:
        return Context(seed=run.seed, mesh=sharding.data_parallel(run.batch))
    return api.training_context(
        dataset.source_of(run.corpus, loaded.about),
        dataset.cache_beside(run.model),
        loaded.model,
        loaded.tokenizer,
        batch=run.batch,
        length=run.length,
        seed=run.seed,
        strict=run.strict,
    )


def described(steps: tuple[Step, ...], after: LanguageModel) -> str:
    """What was done; for pruned models, that zeros do not make them faster."""
    return "; ".join(filter(None, [", then ".join(map(repr, steps)), rows.zeros(after)]))


def written(model: LanguageModel, tokens: Tokenizer, prompt: str, new: int) -> str:
    """A greedy continuation."""
    ids = tokens.prompt(prompt) or [tokens.separator]
    new = min(new, model.config.max_length - len(ids))
    return prompt + tokens.decode(generate(model, [ids], new, stops=tokens.stops)[0]) if new > 0 else prompt


def main(run: Run, score: Scoring, quantize: dict, prune: dict, finetune: dict, distill: dict, shrink: dict) -> None:
    began = time.perf_counter()
    say = lambda words: print(f"[{time.perf_counter() - began:4.0f} s] {words}", flush=True)
    changes = {Quantize: quantize, Prune: prune, Finetune: finetune, Distill: distill, Shrink: shrink}
    plans, run_dir = chains(run.recipe, changes), Path(run.run_dir)
    rundir.require_writable(run_dir, needs=50_000_000)
    loaded = sources.load(run.model, precision=run.precision, mesh=sharding.data_parallel(run.batch))
    dense, tokens, about = loaded.model, loaded.tokenizer, loaded.about
    rundir.require_writable(run_dir, needs=50_000_000 + (1 + len(plans)) * trees.nbytes(dense.params))
    say(f"{run.model}: {trees.count(dense.params) / 1e6:.1f} M parameters, {rows.origin(run.model, about)}")
    text = dataset.to_score(run.text, run.corpus, about, tokens, dataset.cache_beside(run.model), run.strict)
    if text.left_out:
        say(text.left_out)
    score = score.within(dense.config.max_length, about.get("train.length", 0), text.unbroken)
    context = context_for(run, loaded, any(map(recipe.trains, plans.values())))
    rundir.use_compilation_cache(run_dir.parent / "compilation_cache")
    protocol, kept = cost.protocol_for(dense), {}
    platform, records, samples, measured = jax.default_backend(), {}, {}, []
    first = rows.label(about)
    dense_here = ops.prepare(sharding.on_one_device(dense), platform)
    for name, steps in plans.items():
        say(f"{name}: {', then '.join(map(repr, steps))}")
        after, records[name] = recipe.run(dense, steps, context)
        here = ops.prepare(sharding.on_one_device(after), platform)
        models = {name: here} if measured else {first: dense_here, name: here}
        say(f"{name}: reading the text")
        found = scoring.measure(models, text, tokens, score, dense_here, kept)
        for each, figures in found.items():
            say(f"{each}: {quality.words(quality.bits_per_byte(figures))} bits per byte")
        if not measured:  # only now: if a step or the text fails, no directory is left behind
            run_dir.mkdir(parents=True, exist_ok=True)
            tokens.save(run_dir / "tokenizer.json")
            before, size = found[first], safetensors.save(run_dir / BEFORE, dense, about)
        after_size = safetensors.save(run_dir / f"{name}.safetensors", after, about | {"recipe": name}, records[name])
        rates = cost.rates({first: dense_here, name: here}, protocol)
        pairs = [(name, here, after_size, described(steps, here), found[name])]
        if not measured:
            pairs.insert(0, (first, dense_here, size, rows.origin(run.model, about), before))
        for each, model, nbytes, note, figures in pairs:
            base = None if each == first else (before, rates[first])
            measured.append(rows.make(each, model, nbytes, note, figures, rates[each], base))
            if run.prompt:
                samples[each] = written(model, tokens, run.prompt, run.sample)
        del after, here, models, model, pairs
    report(run, measured, records, samples, [
        f"Quality: {scoring.protocol(text, score, before)}. Divergence: from the first model.",
        f"Speed: {protocol}; each model in turn with the first, whose rounds beside the second are shown. In brackets "
        "the quartiles.",
        f"Size: an uncompressed safetensors file; the source itself takes {table.megabytes(loaded.nbytes)} MB.",
        *rows.cautions(run.model, about, text.known),
    ])  # fmt: skip
    say(f"done: {run_dir / 'report.html'}")


def report(run: Run, measured: list[rows.Row], records: dict, samples: dict[str, str], facts: list[str]) -> None:
    """The table in the terminal, the page, and results.json."""
    run_dir = Path(run.run_dir)
    table.show(measured, facts)
    plots.pareto(measured, run_dir / "pareto.png")
    versions, command = rundir.machine(), command_line("experiments.compress", sys.argv)
    page.write(
        run_dir / "report.html",
        title=f"efflm: {run.model} by {run.recipe.replace(',', '+').replace(' ', ', ')}",
        rows=measured,
        facts=facts,
        plot=run_dir / "pareto.png",
        samples=samples,
        command=command,
        versions=versions,
    )
    rundir.write_json(
        run_dir / "results.json",
        {
            "rows": [dataclasses.asdict(row) for row in measured],
            "records": {name: [dataclasses.asdict(record) for record in kept] for name, kept in records.items()},
            "samples": samples,
            "protocol": facts,
            "command": command,
            "versions": versions,
        },
    )


if __name__ == "__main__":
    launch(
        main, __doc__, run=Run(), score=Scoring(), quantize=Quantize, prune=Prune, finetune=Finetune, distill=Distill,
        shrink=Shrink,
    )  # fmt: skip
