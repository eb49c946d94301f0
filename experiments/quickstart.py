"""Train a small language model on real text, compress it in thirteen ways, and show what each gains and costs.

    bash launch/quickstart.sh
    bash launch/quickstart.sh --corpus=FOLDER --run_dir=runs/mine --train.steps=300 --seed=1

Expect, in 5 to 9 minutes on two cores, a table in the terminal and in runs/quickstart: report.html, results.json,
metrics.jsonl and curves/, the trained model in checkpoint/ and every compressed one in models/.
"""

import dataclasses
import sys
from pathlib import Path

import jax

from efflm import ops, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.compress import grammar, recipe
from efflm.compress.step import Context
from efflm.config.model import ModelShape
from efflm.config.train import TrainConfig
from efflm.data import loader
from efflm.evaluate import machine, quality, scoring, throughput
from efflm.evaluate.throughput import Protocol
from efflm.evaluate.windows import Scoring
from efflm.formats import saved
from efflm.formats.saved import Saved
from efflm.parallel import meshes, sharding
from efflm.report import analysis, compared, rows, samples, table, verdicts
from efflm.report.comparison import Comparison, Limits
from efflm.report.journal import Journal
from efflm.text.chat import prompt_ids
from efflm.train import metrics
from experiments import pretrain

NOTES = {
    "float32": "the original that all others are compared with",
    "bfloat16": "every weight cast to bfloat16, matmuls in bfloat16, sums in float32",
    "w8a16": "int8 matrices, one scale for each output channel; activations in floating point",
    "w8a8": "the same int8 matrices, activations in int8, one scale per token",
    "w4a16": "4-bit matrices in the layers, one scale for 32 weights, rounded to the nearest; embeddings in 8 bits",
    "gptq4": "the same bits, each rounding compensated by the weights that are not yet rounded, on calibration text",
    "magnitude50": "the smaller half of every matrix in the layers set to zero",
    "magnitude24": "two of every four inputs set to zero",
    "magnitude50_trained": "magnitude50, then trained briefly with the zeros kept: more text than the original saw",
    "magnitude70": "the smaller 70% of every matrix in the layers set to zero",
    "sparsegpt70": "as many, chosen by calibration text, the remaining weights compensating",
    "student_scratch": "half the layers, randomly initialized, trained on text alone",
    "student_distilled": "the same randomly initialized student on the same batches, taught by the original",
    "shrink_distill_int8": "half the layers, begun with the original's own, distilled, then int8 matrices; in all "
    "it has seen more text than the original, which can make it the better one",
}


PROMPT = "def main("  # what each model continues, to look at
MODELS = 10  # of the size of the dense one: the fourteen that are written, most of them smaller, and the checkpoint
CALIBRATION = 128  # rows of the training text
RUN = pretrain.Run(run_dir=str(run_directory.ROOT / "quickstart"))


@run_directory.locked
def main(run: pretrain.Run, model: ModelShape, train: TrainConfig, score: Scoring, limits: Limits) -> None:
    log = Journal(run.run_dir, command_line("experiments.quickstart", sys.argv))
    train = pretrain.settled(run, model.config(), train)
    run_dir, config = Path(run.run_dir), pretrain.saved_config(model, train)
    pretrain.check(run, config, train, MODELS)
    score.within(config.max_length)
    step = lambda number, words: log.say(f"{number}/6 {words}")

    step(1, f"Text: {run.corpus}")
    data = pretrain.prepare(run, config, train)
    user_cache.use_compilation_cache()
    print(f"  {data.corpus.describe()}")
    file = "{}.safetensors".format
    saved.require_free(run_dir / "models", [*map(file, NOTES)], data.tokenizer, "give another --run_dir")
    step(2, f"Tokens: byte-level BPE of {data.tokenizer.vocabulary}, {len(data.train):,} rows of {train.length}")

    mesh = meshes.data_parallel(train.batch, train.accumulate)
    step(3, f"Training: {len(config.blocks)} layers x {config.width}, {train.steps} steps of {train.batch} rows")
    dense = pretrain.trained_model(run, config, train, data, mesh)

    step(4, "Compression")
    models, records, notes = {"float32": dense}, {"float32": ()}, dict(NOTES)
    digests = {"corpus": data.corpus.digest, "tokenizer": data.tokenizer.digest}
    rows_read = loader.sample(data.train, min(CALIBRATION, len(data.train)), run.seed + 1)
    seed, batches = run.seed + 1, data.batches(train.batch, run.seed + 1)
    context = Context(batches=batches, calibration=rows_read, seed=seed, mesh=mesh, **digests)
    for name in list(NOTES)[1:]:
        print(f"  {name}: {NOTES[name]}", flush=True)
        context = dataclasses.replace(context, metrics=run_dir / "curves" / name)
        models[name], records[name] = recipe.apply(dense, grammar.chain(name), context)
        notes[name] = rows.note(notes[name], models[name])
    about = digests | {"source": data.corpus.source, "seed": run.seed, "train.length": train.length}
    files = {file(name): Saved(each, about | {"recipe": name}, records[name]) for name, each in models.items()}
    nbytes = saved.save(run_dir / "models", files, data.tokenizer)
    sizes = {name: nbytes[file(name)] for name in models}

    step(5, "Measuring quality, then speed, all models in turn")
    protocol, platform = Protocol().within(config.max_length), jax.default_backend()
    text, score = data.test, score.within(config.max_length, train.length, data.test.unbroken)
    here = {name: ops.prepare(sharding.on_one_device(each), platform) for name, each in models.items()}
    qualities = scoring.measure(scoring.with_rounded(here), text, data.tokenizer, score, here["float32"])
    noise = qualities.pop(scoring.ROUNDED)
    rates, load = throughput.rates(here, protocol)
    measured = rows.collect(models, sizes, notes, qualities, rates, noise)
    roofline = machine.measure((dense.config.precision,))
    phases = analysis.inference(dense, protocol, rates["float32"], roofline)

    step(6, "Report")
    difference, error = quality.paired_difference(qualities["student_distilled"], qualities["student_scratch"])
    facts = [
        f"Distilled minus from scratch, paired over test documents: {quality.words((difference, error), '+.4f')} bits "
        f"per byte, {verdict(difference, error)}.",
        f"Quality: {scoring.protocol(text, score, qualities['float32'])}. Smaller is better."
        f"{scoring.rounding(noise, dense.config.precision)}",
        f"Speed: {protocol}. In brackets the quartiles.{load}",
        "Size: an uncompressed safetensors file; matrices with many zeros are stored as a bitmask and their values. "
        f"{rows.BITS}",
        "One seed, one small model, one corpus: read the order of the rows, not the exact values.",
    ]
    about = digests | {"source": data.corpus.source, "seed": run.seed}
    prompt = prompt_ids(data.tokenizer, PROMPT, about)
    written = {name: samples.write(each, data.tokenizer, prompt, 48, protocol) for name, each in here.items()}
    about |= {f"train.{name}": value for name, value in dataclasses.asdict(train).items()}
    minus = {"bits_per_byte": difference, "stderr": error}
    pairs = {name: (own, rates["float32"]) for name, own in rates.items()}
    comparison = Comparison(measured, limits, qualities, pairs)
    said = {"verdicts": verdicts.positive(comparison), "distilled_minus_scratch": minus}
    log.results(facts, rows=measured, records=records, seed=run.seed, **said)
    table.show(measured, facts)
    trained = {"float32": metrics.curve(run_dir / "metrics.jsonl")}
    again = commands(run, train, list(models), log.command)
    log.report(
        facts,
        compared.write,
        title="What each way of making a language model cheaper buys, and what it costs",
        comparison=comparison,
        details=compared.details("", about, records, written, PROMPT, data.tokenizer, again),
        curves=trained | dict(pair for name in models for pair in metrics.curves(run_dir / "curves" / name, name)),
        phases=phases,
        made={"seed": run.seed, "steps": train.steps},
    )


def verdict(difference: float, error: float | None) -> str:
    if error is None or abs(difference) < 2 * error:
        return "no difference beyond two standard errors"
    return "distillation helped" if difference < 0 else "distillation hurt"


def commands(run: pretrain.Run, train: TrainConfig, names: list[str], whole: str) -> dict[str, str]:
    """The command that makes each model again, from the trained one of this run."""
    flags = [f"--model={run.run_dir}", f"--seed={run.seed + 1}", f"--batch={train.batch}", f"--length={train.length}"]
    flags += [f"--calibration.rows={CALIBRATION}", f"--calibration.length={train.length}"]
    of = lambda name: ["", *flags, f"--recipe={name}", f"--run_dir={run.run_dir}_{name}"]
    return {name: command_line("experiments.compress", of(name)) if name in recipe.RECIPES else whole for name in names}


if __name__ == "__main__":
    model, train = ModelShape(layers=4), TrainConfig(steps=600, batch=4)
    launch(main, __doc__, run=RUN, model=model, train=train, score=Scoring(), limits=Limits())
