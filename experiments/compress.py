"""Compress a model by one chain of steps or several, and show before and after side by side.

    bash launch/run.sh experiments.compress --model=runs/quickstart --recipe=w8a8
    bash launch/run.sh experiments.compress --model=runs/quickstart --recipe=magnitude@0.3,w8a16
    bash launch/run.sh experiments.compress --model=smollm2 --recipe="w8a16 gptq@3,distill@0.5" --text=notes.txt
    bash launch/run.sh experiments.compress --model=smollm2 --recipe=runs/compress/recipe.toml
    bash launch/run.sh experiments.compress --model=smollm2 --recipe="w8a8 wanda@0.5" --tasks=arc_easy,hellaswag

How chains are written is said in efflm/compress/grammar.py. Expect a table of all models, and in the run directory each
compressed one as `<chain>.safetensors`, with + between steps, the tokenizer, `recipe.toml` with the chains,
`results.json` and `report.html`. Beside the first model one compressed model is held at a time. A chain that trains or
is calibrated keeps the model after each step: the same command goes on with the step that was interrupted.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from efflm import api, ops, trees, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.cli.subject import Subject
from efflm.compress import grammar, recipe
from efflm.compress.step import Calibration, Record, reads_text
from efflm.config import InputError, flag, require, require_choices, require_positive, require_seed
from efflm.data import dataset
from efflm.evaluate import machine, quality, scoring, task_files, tasks, throughput
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import efflm_file, saved, sources
from efflm.formats.saved import Saved
from efflm.model import LanguageModel
from efflm.parallel import meshes, sharding
from efflm.report import analysis, compared, numbers, rows, samples, table, verdicts
from efflm.report.comparison import Comparison, Limits
from efflm.report.journal import Journal
from efflm.text import fitted
from efflm.text.chat import prompt_ids
from efflm.train import metrics

KIND, UNFINISHED = ".safetensors", ".unfinished.safetensors"
BEFORE = f"before{KIND}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Subject):
    """The run"""

    text: str = flag("", "file or folder of UTF-8 text, scored whole; default: the test split of --corpus", path=True)
    tasks: tuple[str, ...] = flag((), task_files.ASKED)
    recipe: str = flag(
        "w8a16",
        "steps joined by commas, as in gptq@3,distill@0.5; chains with spaces between them are compared. Or a .toml "
        f"file of chains, or names of chains: {', '.join(recipe.RECIPES)}. The flags of a step, as --quantize.bits, "
        "change it in the chains that have one",
    )
    run_dir: str = flag(str(run_directory.ROOT / "compress"), "where everything is written", path=True)
    format: Literal["efflm", "coded"] = flag(
        "efflm",
        "of the compressed models' files; coded: entropy-coded, smaller on disk and the same in memory, as files of "
        "chains that round for it (entropy, coded) always are",
    )
    batch: int = flag(8, "sequences in a batch, where a step trains")
    length: int = flag(256, "tokens in a sequence, where a step trains")
    seed: int = flag(0, "seed of the random numbers of steps")
    prompt: str = flag("The capital of France is", "prompt that each model continues in the report; empty: none")
    sample: int = flag(32, "tokens of that continuation")

    def __post_init__(self):
        require_choices(self)
        require_seed(self.seed)
        require(bool(grammar.chains(self.recipe)), f"recipe is {self.recipe!r}: give at least one step")
        require_positive(self, "batch", "length", "sample")


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring, task: TaskFiles, limits: Limits, **steps: dict) -> None:
    log = Journal(run.run_dir, command_line("experiments.compress", sys.argv))
    say, run_dir, curves = log.say, log.folder, log.folder / "curves"
    changes = {kind: steps[name] for name, kind in recipe.STEPS.items()}
    chains = grammar.with_settings(grammar.chains(run.recipe), changes)
    plans = {grammar.file_name(name): steps for name, steps in chains.items()}
    shared = {name: grammar.write(steps) for name, steps in chains.items()}
    run_directory.require_writable(run_dir, needs=run_directory.SMALL_FILES)
    asked = task_files.read(run.tasks, task)
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
    of_tasks = tasks.described(asked, tokens, dense.config.max_length)
    context = api.context_for(
        [step for steps in plans.values() for step in steps],
        dataset.source_of(run.corpus, about), dataset.cache(), dense, tokens,
        batch=run.batch, length=run.length, calibration=calibration, seed=run.seed, lower=api.FLAGS, strict=run.strict,
    )  # fmt: skip
    user_cache.use_compilation_cache()
    protocol, kept, qualities, timed, loads, coded = throughput.protocol_for(dense), {}, {}, {}, [], []
    platform, records, sizes, written, measured, phases = jax.default_backend(), {}, {}, {}, [], []
    noise = None  # what float rounding alone does to the first model
    prompt = prompt_ids(tokens, run.prompt, about)
    first = rows.label(about)
    dense_here = ops.prepare(sharding.on_one_device(dense), platform)
    answering, answers = tasks.answering(asked, tokens, dense_here), {}
    for name, steps in plans.items():
        say(f"{name}: {grammar.write(steps)}")
        own = dataclasses.replace(context, metrics=curves / name, cache=run_dir / "teacher" / name)
        unfinished = run_dir / f"{name}{UNFINISHED}"
        keeps = kept_in(unfinished, about, tokens, own.mesh, say) if reads_text(steps) else None
        after, records[name] = recipe.apply(dense, steps, own, keeps)
        here = ops.prepare(sharding.on_one_device(after), platform)
        models = {name: here} if measured else scoring.with_rounded({first: dense_here, name: here})
        say(f"{name}: reading the text")
        found = scoring.measure(models, text, tokens, score, dense_here, kept)
        noise = found.pop(scoring.ROUNDED, None) or noise
        answers |= answering(models) if asked else {}
        for each, figures in found.items():
            say(f"{each}: {quality.words(quality.bits_per_byte(figures))} bits per byte")
        models_of = {name + KIND: Saved(after, about | {"recipe": name}, records[name], run.format == "coded")}
        coded += [name] * (run.format == "coded" or ops.is_coded(after.params))
        if not measured:  # only now: if a step or the text fails, no model is left behind
            models_of[BEFORE], before = Saved(dense, about), found[first]
        sizes |= saved.save(run_dir, models_of, tokens)
        unfinished.unlink(missing_ok=True)
        rates, load = throughput.rates({first: dense_here, name: here}, protocol)
        loads.append(load)
        pairs = [(name, after, sizes[name + KIND], rows.note(grammar.write(steps), after), found[name])]
        if not measured:
            pairs.insert(0, (first, dense, sizes[BEFORE], rows.origin(run.model, about), before))
        for each, model, nbytes, note, figures in pairs:
            base = None if each == first else (before, rates[first])
            told = rows.tasks(answers, each, first)
            measured.append(
                rows.make(each, model, nbytes, note, figures, rates[each], base, noise, told, dense.config.tied)
            )
            qualities[each], timed[each] = figures, (rates[each], rates[first])
            if run.prompt:
                written[each] = samples.write(models[each], tokens, prompt, run.sample, protocol)
        if len(loads) == 1:
            phases = analysis.inference(dense, protocol, rates[first], machine.measure((dense.config.precision,)))
        del after, here, models, model, pairs, models_of
    listed = [text if name == text else f"{name} = {text}" for name, text in shared.items()]
    facts = [
        f"Quality: {scoring.protocol(text, score, before)}. Divergence: from the first model."
        f"{scoring.rounding(noise, dense.config.precision)}",
        *of_tasks,
        f"Speed: {protocol}; each model in turn with the first, whose rounds beside the second are shown: compare the "
        f"ratios, which are those of the same rounds. In brackets the quartiles.{machine.most(loads)}",
        f"Size: a safetensors file, uncompressed{', but entropy-coded of ' * bool(coded)}{', '.join(coded)}; the "
        f"source itself takes {numbers.megabytes(loaded.nbytes)} MB. "
        f"{rows.BITS}",
        f"Chains (recipe.toml): {'; '.join(listed)}.",
        *rows.cautions(run.model, about, text.known),
    ]
    commands = {first: command_line("experiments.evaluate", ["", f"--model={run.model}"])}
    texts = {grammar.file_name(name): grammar.text_of(name, steps) for name, steps in chains.items()}
    commands |= {name: command_for(text, sys.argv) for name, text in texts.items()}
    details = compared.details(rows.origin(run.model, about), about, records, written, run.prompt, tokens, commands)
    run_directory.write_whole(run_dir / "recipe.toml", grammar.to_toml(shared))
    texts = {name: run.prompt + samples.text(ids, tokens) for name, ids in written.items()}
    comparison = Comparison(measured, limits, qualities, timed, answers)
    said = {"samples": texts, "verdicts": verdicts.positive(comparison)}
    log.results(facts, rows=measured, records=records, seed=run.seed, **said)
    table.show(measured, facts)
    log.report(
        facts,
        compared.write,
        title=f"{run.model} by {', '.join(plans)}: what it saves and what it costs",
        comparison=comparison,
        details=details,
        curves=dict(pair for name in plans for pair in metrics.curves(curves / name, name)),
        phases=phases,
        made={"seed": run.seed},
    )


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
        done = ", then ".join(record.step for record in records)
        say(f"found {file}, the model after {done}: kept by an earlier run")
        return fitted.told(model, tokens), records, made["chain"]

    return recipe.Kept(save, load)


def command_for(text: str, argv: list[str]) -> str:
    """The command for one chain of several; its text has what the flags of steps changed."""
    kept, dropped = [], False
    for arg in argv[1:]:
        if arg.startswith("-"):
            group = arg.lstrip("-").partition("=")[0].partition(".")[0]
            dropped = group == "recipe" or group.removeprefix("no") in recipe.STEPS
        if not dropped:  # nor the value that is the next argument
            kept.append(arg)
    return command_line("experiments.compress", [argv[0], *kept, f"--recipe={text}"])


if __name__ == "__main__":
    groups = {"calibration": Calibration(), "score": Scoring(), "task": TaskFiles(), "limits": Limits()}
    launch(main, __doc__, run=Run(), **groups, **recipe.STEPS)
