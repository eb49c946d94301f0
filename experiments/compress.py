"""Compress a model by one recipe or several, and show before and after side by side.

    python -m experiments.compress --model=runs/quickstart --recipe=w8a8
    python -m experiments.compress --model=runs/quickstart --recipe=magnitude50,w8a16 --magnitude.sparsity=0.3
    python -m experiments.compress --model=smollm2 --recipe="w8a16 w8a8 magnitude50" --text=notes.txt

Expect a table of all models, and in the run directory each compressed one as `<recipe>.safetensors`, with what flags
changed of a recipe in its name (`magnitude50@magnitude.sparsity=0.3.safetensors`), the tokenizer,
`results.json` and `report.html`. Beside the first model one compressed model is held at a time. A chain that trains or
is calibrated keeps the model after each step: the same command goes on with the step that was interrupted.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from efflm import api, ops, trees
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress import recipe
from efflm.compress.step import Calibration, Context, Record, Step, reads_text
from efflm.config import PRECISION, AskedPrecision, InputError, flag, require, require_seed
from efflm.data import corpora, dataset
from efflm.evaluate import machine, quality, scoring, throughput
from efflm.evaluate.windows import Scoring
from efflm.formats import efflm_file, saved, sources
from efflm.formats.saved import Saved
from efflm.formats.sources import KINDS, Loaded
from efflm.model import LanguageModel
from efflm.parallel import meshes, sharding
from efflm.report import analysis, compared, numbers, page, rows, samples, table
from efflm.report.comparison import Comparison, Limits
from efflm.text import fitted
from efflm.train import metrics

KIND, UNFINISHED = ".safetensors", ".unfinished.safetensors"
BEFORE = f"before{KIND}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag(str(run_directory.ROOT / "quickstart"), KINDS, path=True)
    text: str = flag("", "file or folder of UTF-8 text, scored whole; default: the test split of --corpus", path=True)
    corpus: str = flag("", f"{corpora.KINDS}; default: what the model was trained on, else stdlib", path=True)
    strict: bool = flag(False, corpora.STRICT)
    precision: AskedPrecision = flag("", PRECISION)
    recipe: str = flag(
        "w8a16",
        f"one of {', '.join(recipe.RECIPES)}; several joined by commas are one after another, several with spaces "
        "between them are compared. The flags of a step, as --quantize.bits, change one step of a recipe: of several "
        "such steps the one that is not the embeddings'",
    )
    run_dir: str = flag(str(run_directory.ROOT / "compress"), "where everything is written", path=True)
    batch: int = flag(8, "sequences in a batch, where a step trains")
    length: int = flag(256, "tokens in a sequence, where a step trains")
    seed: int = flag(0, "seed of what a step draws at random")
    prompt: str = flag("The capital of France is", "prompt that each model continues in the report; empty: none")
    sample: int = flag(32, "tokens of that continuation")

    def __post_init__(self):
        require_seed(self.seed)
        require(bool(self.recipe.split()), f"recipe is {self.recipe!r}: give at least one")
        for names in self.recipe.split():
            recipe.named(names)
        for name in ("batch", "length", "sample"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")


def chains(names: str, changes: dict[type, dict]) -> dict[str, tuple[Step, ...]]:
    """{name: steps} of each recipe, with the changes on those that have such a step: where one of them has another than
    the embeddings', those that have only that stay as they are. Raises InputError if none has such a step.

    What changed is part of a name, so that its file is not that of the recipe: magnitude50@magnitude.sparsity=0.3.
    """
    plans = {each.replace(",", "+"): recipe.named(each) for each in names.split()}
    for kind, fields in changes.items():
        found = {name: recipe.changed(steps, kind) for name, steps in plans.items()} if fields else {}
        having = [name for name, index in found.items() if index is not None]
        if fields and not having:
            raise InputError(
                f"{', '.join(fields)} set for {kind.__name__}, which is not in this recipe: choose another recipe"
            )
        layers = [name for name in having if not recipe.of_embeddings(plans[name][found[name]])]
        for name in layers or having:
            plans[name] = recipe.override(plans[name], {kind: fields})
    return {name + _differs(recipe.named(name.replace("+", ",")), steps): steps for name, steps in plans.items()}


def _differs(before: Sequence[Step], after: Sequence[Step]) -> str:
    """The settings of steps that were changed, each as @step.field=value; other signs than a file's name may have
    are -."""
    changed = [
        f"@{type(new).__name__.lower()}.{field.name}={getattr(new, field.name)}"
        for old, new in zip(before, after, strict=True)
        for field in dataclasses.fields(new)
        if getattr(old, field.name) != getattr(new, field.name)
    ]
    return re.sub(r"[^\w@.=+-]", "-", "".join(changed))


def context_for(run: Run, calibration: Calibration, loaded: Loaded, steps: Sequence[Step]) -> Context:
    """What the steps may use; text is prepared only where one of them reads it."""
    if not reads_text(steps):
        return Context(seed=run.seed, mesh=meshes.data_parallel(run.batch))
    return api.context_for(
        steps,
        dataset.source_of(run.corpus, loaded.about),
        dataset.cache(),
        loaded.model,
        loaded.tokenizer,
        batch=run.batch,
        length=run.length,
        calibration=calibration,
        seed=run.seed,
        lower=api.FLAGS,
        strict=run.strict,
    )


def described(steps: tuple[Step, ...], after: LanguageModel) -> str:
    """What was done; for pruned models, that zeros do not make them faster."""
    return "; ".join(filter(None, [", then ".join(map(repr, steps)), rows.zeros(after)]))


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring, limits: Limits, **steps: dict) -> None:
    began = time.perf_counter()
    say = lambda words: print(f"[{time.perf_counter() - began:4.0f} s] {words}", flush=True)
    changes = {kind: steps[name] for name, kind in recipe.STEPS.items()}
    plans, run_dir = chains(run.recipe, changes), Path(run.run_dir)
    run_directory.require_writable(run_dir, needs=run_directory.SMALL_FILES)
    loaded = sources.load(run.model, precision=run.precision, mesh=meshes.data_parallel(run.batch))
    dense, tokens, about = loaded.model, loaded.tokenizer, loaded.about
    recipe.require_finite(dense)
    files = [BEFORE, *(f"{name}{kind}" for name in plans for kind in (KIND, UNFINISHED))]
    saved.require_free(run_dir, files, tokens, "give another --run_dir")
    largest = max(trees.nbytes(dense.params), 2 * trees.count(dense.params))  # of int8, recipe bfloat16 makes that
    run_directory.require_writable(run_dir, needs=(2 + len(plans)) * largest + run_directory.SMALL_FILES)
    say(f"{run.model}: {trees.count(dense.params) / 1e6:.1f} M parameters, {rows.origin(run.model, about)}")
    text = dataset.to_score(run.text, run.corpus, about, tokens, dataset.cache(), run.strict)
    if text.left_out:
        say(text.left_out)
    score = score.within(dense.config.max_length, about.get("train.length", 0), text.unbroken)
    context = context_for(run, calibration, loaded, [step for steps in plans.values() for step in steps])
    run_directory.use_compilation_cache()
    protocol, kept, qualities, timed, loads = throughput.protocol_for(dense), {}, {}, {}, []
    platform, records, sizes, written, measured, phases = jax.default_backend(), {}, {}, {}, [], []
    prompt = api.prompt_ids(tokens, run.prompt, about)
    first = rows.label(about)
    dense_here = ops.prepare(sharding.on_one_device(dense), platform)
    for name, steps in plans.items():
        say(f"{name}: {', then '.join(map(repr, steps))}")
        own = dataclasses.replace(context, metrics=curves_of(run_dir, name), cache=run_dir / "teacher" / name)
        unfinished = run_dir / f"{name}{UNFINISHED}"
        slow = reads_text(steps)
        after, records[name] = recipe.run(
            dense, steps, own, kept_in(unfinished, about, tokens, own.mesh, say) if slow else None
        )
        here = ops.prepare(sharding.on_one_device(after), platform)
        models = {name: here} if measured else {first: dense_here, name: here}
        say(f"{name}: reading the text")
        found = scoring.measure(models, text, tokens, score, dense_here, kept)
        for each, figures in found.items():
            say(f"{each}: {quality.words(quality.bits_per_byte(figures))} bits per byte")
        models_of = {name + KIND: Saved(after, about | {"recipe": name}, records[name])}
        if not measured:  # only now: if a step or the text fails, no model is left behind
            models_of[BEFORE], before = Saved(dense, about), found[first]
        sizes |= saved.save(run_dir, models_of, tokens)
        unfinished.unlink(missing_ok=True)
        rates, load = throughput.rates({first: dense_here, name: here}, protocol)
        loads.append(load)
        pairs = [(name, after, sizes[name + KIND], described(steps, after), found[name])]
        if not measured:
            pairs.insert(0, (first, dense, sizes[BEFORE], rows.origin(run.model, about), before))
        for each, model, nbytes, note, figures in pairs:
            base = None if each == first else (before, rates[first])
            measured.append(rows.make(each, model, nbytes, note, figures, rates[each], base))
            qualities[each], timed[each] = figures, (rates[each], rates[first])
            if run.prompt:
                written[each] = samples.write(models[each], tokens, prompt, run.sample, protocol)
        phases = phases or analysis.inference(dense, protocol, rates[first])
        del after, here, models, model, pairs, models_of
    facts = [
        f"Quality: {scoring.protocol(text, score, before)}. Divergence: from the first model.",
        f"Speed: {protocol}; each model in turn with the first, whose rounds beside the second are shown: compare the "
        f"ratios, which are those of the same rounds. In brackets the quartiles.{machine.most(loads)}",
        f"Size: an uncompressed safetensors file; the source itself takes {numbers.megabytes(loaded.nbytes)} MB.",
        *rows.cautions(run.model, about, text.known),
    ]
    commands = {first: command_line("experiments.evaluate", ["", f"--model={run.model}"])}
    commands |= {name: command_for(name, steps, sys.argv) for name, steps in plans.items()}
    details = compared.details(rows.origin(run.model, about), about, records, written, run.prompt, tokens, commands)
    versions, command = run_directory.machine(), command_line("experiments.compress", sys.argv)
    run_directory.write_json(
        run_dir / "results.json",
        {
            "rows": [dataclasses.asdict(row) for row in measured],
            "records": {name: [dataclasses.asdict(record) for record in kept] for name, kept in records.items()},
            "samples": {name: run.prompt + samples.text(ids, tokens) for name, ids in written.items()},
            "protocol": facts,
            "command": command,
            "versions": versions,
        },
    )
    table.show(measured, facts)
    compared.write(
        run_dir / "report.html",
        title=f"{run.model} by {run.recipe.replace(',', '+').replace(' ', ', ')}: what it saves and what it costs",
        comparison=Comparison(measured, limits, qualities, timed),
        details=details,
        curves=dict(pair for name in plans for pair in metrics.curves(curves_of(run_dir, name), name)),
        phases=phases,
        facts=facts,
        made=page.made(versions, seed=run.seed, total_time=page.duration(time.perf_counter() - began)),
        command=command,
    )
    say(f"done: open {run_dir / 'report.html'}")


def kept_in(file: Path, about: dict[str, Any], tokens: Any, mesh: Mesh, say: Callable[[str], None]) -> recipe.Kept:
    """Keeps the model after each step of a chain in the file."""

    def save(model: LanguageModel, records: tuple[Record, ...], key: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        efflm_file.save(file, model, about | {"lineage": [], "chain": key}, records)

    def load() -> tuple[LanguageModel, tuple[Record, ...], str] | None:
        if not file.exists():
            return None
        try:
            model, made = efflm_file.load(file, mesh)
        except InputError as error:
            say(f"{error}: beginning anew")
            return None
        fields = {field.name for field in dataclasses.fields(Record)}
        records = tuple(Record(**{name: each[name] for name in fields}) for each in made["lineage"])
        say(
            f"found {file}, the model after {', then '.join(record.step for record in records)}: kept by an earlier run"
        )
        return fitted.told(model, tokens), records, made["chain"]

    return recipe.Kept(save, load)


def curves_of(run_dir: Path, name: str) -> Path:
    """Where the training steps of a recipe write their metrics."""
    return run_dir / "curves" / name


def command_for(name: str, steps: Sequence[Step], argv: list[str]) -> str:
    """The command for one recipe of several, without the settings of steps that only others have."""
    others = {flags for flags, kind in recipe.STEPS.items() if not any(type(step) is kind for step in steps)}
    kept, skip = [], False
    for arg in argv[1:]:
        given = arg.lstrip("-").partition("=")[0]
        drop = arg.startswith("-") and (given == "recipe" or given.partition(".")[0] in others)
        if not skip and not drop:
            kept.append(arg)
        skip = drop and "=" not in arg  # its value is the next argument
    recipe_of = name.partition("@")[0].replace("+", ",")
    return command_line("experiments.compress", [argv[0], *kept, f"--recipe={recipe_of}"])


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), calibration=Calibration(), score=Scoring(), limits=Limits(), **recipe.STEPS)
