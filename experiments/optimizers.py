"""What does adaptive optimization buy? Every optimizer at its own best learning rate, for the same number of steps.

    bash launch/run.sh experiments.optimizers --reduced      # 3 minutes on two cores
    bash launch/run.sh experiments.optimizers                # about 45 runs of one to two minutes
    bash launch/run.sh experiments.optimizers --optimizers=adamw,muon --seeds=2 --run_dir=runs/muon

Expect a table in the terminal and, in the run directory, report.html with loss curves against steps and against
seconds, results.json, and the metrics of every run (curves/).

Protocol: for each optimizer the learning rate is swept with seed 0, on multiples of its usual one; the grid is widened
where the best is at its edge. Selected is the lowest loss on validation text. The other seeds, of weights and of the
order of the sequences, are then trained at that rate; seed 0 is counted with them. Reported is the loss on test text,
which selected nothing. The same seed has the same weights and batches under every optimizer, so differences are paired.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import optax
from jax.sharding import Mesh

from efflm import user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.config import InputError, flag, require, require_positive
from efflm.config.model import ModelConfig, ModelShape
from efflm.config.train import Optimizer, TrainConfig
from efflm.data import corpora, dataset
from efflm.data.dataset import Dataset, Text
from efflm.evaluate import quality, scoring
from efflm.evaluate.quality import Quality
from efflm.evaluate.windows import Scoring
from efflm.model import LanguageModel, autotune, init_params
from efflm.parallel import meshes
from efflm.report import numbers, plots, table
from efflm.report.journal import Journal
from efflm.report.page import Section, Table
from efflm.report.rows import Row
from efflm.report.table import figure
from efflm.train import callbacks, metrics, optimizer, trainer

# Untied, since with tied embeddings the seed decides when a small model leaves the loss of token frequencies.
MODEL = ModelShape(layers=4, width=128, mlp_dim=352, vocabulary=2048, max_length=256, tied=False)
TRAIN = TrainConfig(steps=600, length=128, learning_rate=4e-3, log_every=5)
REDUCED_MODEL = {"layers": 2, "width": 64, "heads": 2, "mlp_dim": 176, "vocabulary": 512, "max_length": 64}
REDUCED_TRAIN = {"steps": 250, "length": 64, "learning_rate": 6e-3}

# Where an optimizer's usual settings differ from AdamW's: factors of the learning rate and of the weight decay (Lion's
# product of the two stays: Chen 2023, section 5), and Muon's momentum (Jordan 2024).
RATE = {"sgd": 30.0, "lion": 0.2}
DECAY = {"lion": 5.0}
MOMENTUM = {"muon": 0.95}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    run_dir: str = flag(str(run_directory.ROOT / "optimizers"), "where everything is written", path=True)
    corpus: str = flag(corpora.DEFAULT, corpora.KINDS, path=True)
    strict: bool = flag(False, corpora.STRICT)
    optimizers: tuple[Optimizer, ...] = flag(get_args(Optimizer), "which to compare; adamw is always among them")
    multipliers: tuple[float, ...] = flag((0.5, 1, 2), "grid of learning rates, as multiples of each one's usual rate")
    widen: int = flag(1, "further rates tried where the best of the grid is at its edge")
    seeds: int = flag(3, "runs at the best rate, over which mean and standard deviation are taken")
    reduced: bool = flag(False, "a tiny model and few steps, in place of all flags that were left at their defaults")

    def __post_init__(self):
        require_positive(self, "seeds", "multipliers")
        require(self.widen >= 0, f"widen is {self.widen}, but must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """One finished run. curve: steps, seconds since the end of the first step, training losses. A run that diverged
    has no model and an infinite validation loss."""

    rate: float
    curve: np.ndarray
    tokens_per_second: float
    model: LanguageModel | None
    validation: float


COLUMNS = (
    figure("optimizer", "name", str),
    figure("learning rate", "learning_rate", "{:.1e}".format),
    figure("test bits/byte ± s.d.", "bits_per_byte", numbers.with_error, "bits_per_byte_sd"),
    figure("over AdamW ± s.d.", "over_adamw", numbers.signed, "over_adamw_sd", "reference", 0.0),
    figure("steps to AdamW's loss", "steps_to_adamw", "{:,}".format),
    figure("seconds to it", "seconds_to_adamw", "{:.1f}".format),
    figure("tokens/s", "tokens_per_second", "{:,.0f}".format, best="largest"),
    figure("state bytes/parameter", "state_bytes", "{:.2f}".format, best="smallest"),
)


@run_directory.locked
def main(run: Run, model: ModelShape, train: TrainConfig, score: Scoring) -> None:
    log = Journal(run.run_dir, command_line("experiments.optimizers", sys.argv))
    if run.reduced:
        model, train = replace_defaults(model, MODEL, REDUCED_MODEL), replace_defaults(train, TRAIN, REDUCED_TRAIN)
    if train.warmup == -1:  # a quarter: of small models, some have not recovered from a shorter one by the end
        train = dataclasses.replace(train, warmup=train.steps // 4)
    shape = model.config()
    train.require_within(shape.max_length)
    run_directory.require_writable(log.folder, needs=2 * run_directory.SMALL_FILES)
    train = autotune.training(shape, train)
    sizes = {"vocabulary": shape.vocabulary, "length": train.length, "batch": train.batch}
    data = dataset.prepare(run.corpus, dataset.cache(), **sizes, strict=run.strict)
    user_cache.use_compilation_cache()
    mesh = meshes.data_parallel(train.batch, train.accumulate)
    print(data.corpus.describe())

    score, folder = score.within(shape.max_length, train.length, data.test.unbroken), log.folder / "curves"
    runs, fastest, notes = {}, {}, {}
    for name in dict.fromkeys(["adamw", *run.optimizers]):
        usual = settings(name, train)
        at = lambda rate, seed=0, usual=usual: trained(usual, rate, seed, shape, data, score, mesh, folder)
        swept = sweep(at, [usual.learning_rate * factor for factor in sorted(set(run.multipliers))], run.widen)
        best = min(swept, key=lambda one: one.validation)
        runs[name] = [best, *(at(best.rate, seed) for seed in range(1, run.seeds))]
        diverged = [seed for seed, one in enumerate(runs[name]) if one.model is None]
        require(not diverged, f"{name} diverged at {best.rate:.1e} with seed {diverged}: lower --train.learning_rate")
        fastest[name] = max([*swept, *runs[name]], key=lambda one: one.tokens_per_second if one.model else 0.0)
        tried = ", ".join(f"{one.rate:.1e}: {one.validation:.4f}" for one in swept)
        edge = "; the best is the last tried" if len(swept) > 1 and best in (swept[0], swept[-1]) else ""
        notes[name] = f"validation bits per byte by learning rate {tried}{edge}"
        log.say(f"{name}: {notes[name]}")

    found = {name: [held_out(one.model, data.test, data, score) for one in group] for name, group in runs.items()}
    test = {name: np.array([quality.bits_per_byte(one)[0] for one in group]) for name, group in found.items()}
    curves, rows = {}, []
    for name, group in runs.items():
        mean = smoothed(np.mean([one.curve[2] for one in group], axis=0))
        curves[name] = np.stack([group[0].curve[0], fastest[name].curve[1], mean])
        over = test[name] - test["adamw"]
        reached = np.flatnonzero(curves[name][2] <= curves["adamw"][2, -1])
        steps, seconds, _ = curves[name][:, reached[0]] if len(reached) else (None, None, None)
        figures = {
            "learning_rate": group[0].rate,
            "bits_per_byte": float(test[name].mean()),
            "bits_per_byte_sd": quality.deviation(test[name]),  # over seeds, None of one
            "over_adamw": None if name == "adamw" else float(over.mean()),  # paired by seed
            "over_adamw_sd": quality.deviation(over),
            "steps_to_adamw": None if steps is None else int(steps),
            "seconds_to_adamw": seconds,
            "tokens_per_second": fastest[name].tokens_per_second,
            "state_bytes": optimizer.state_bytes(optimizer.make(settings(name, train)), group[0].model.params),
        }
        rows.append(Row(name, figures, notes[name]))
    facts = [
        *verdicts({row.name: row for row in rows}),
        f"Trained for {train.steps} steps of {train.batch} x {train.length} tokens, {train.warmup} of them warm-up, "
        f"policy {train.policy}; seeds: {run.seeds}; {train.schedule} schedule (schedule_free: constant, and evaluated "
        "at its average).",
        f"Quality: {scoring.protocol(data.test, score, found['adamw'][0])}. Smaller is better; learning "
        "rates were selected on validation text.",
        "Steps to AdamW's loss: when the training loss, averaged over seeds and the tenth of the steps before, first "
        "is at most AdamW's at its end. A run planned to end there might do so sooner, its rate decayed by then.",
        "Seconds and tokens/s: of the fastest run of each optimizer, after its first step, which compiles.",
    ]
    by_seed = {name: values.tolist() for name, values in test.items()}
    log.results(facts, rows=rows, test_bits_per_byte=by_seed, seeds=run.seeds)
    table.show(rows, facts, COLUMNS)
    label = "training loss, nats a token"
    ends = "; ".join(f"{name} {curve[2][-1]:.3f}" for name, curve in curves.items())
    charts = [
        plots.chart(
            plots.curves({name: (curve[index], curve[2]) for name, curve in curves.items()}, across, label),
            f"Training loss against {across}, mean over seeds. At the end: {ends}.",
            "Mean over seeds, averaged over the tenth of the steps before.",
        )
        for index, across in enumerate(("steps", "seconds after the first step"))
    ]
    caption = "Each beside AdamW; × is the ratio to it."
    log.report(
        facts,
        title="What adaptive optimization buys: each optimizer at its own best learning rate",
        sections=[
            Section("The optimizers", [Table(caption=caption, columns=COLUMNS, rows=rows)]),
            Section("Training loss", charts),
        ],
        made={"seeds": run.seeds, "steps": train.steps},
    )


def replace_defaults(given, usual, values: dict):
    """`given` with the values, except where it differs from the usual: there the user spoke."""
    return dataclasses.replace(given, **{k: v for k, v in values.items() if getattr(given, k) == getattr(usual, k)})


def settings(name: str, train: TrainConfig) -> TrainConfig:
    """The run's settings with the optimizer's usual learning rate, weight decay and momentum."""
    return dataclasses.replace(
        train,
        optimizer=name,
        learning_rate=train.learning_rate * RATE.get(name, 1.0),
        weight_decay=train.weight_decay * DECAY.get(name, 1.0),
        beta1=MOMENTUM.get(name, train.beta1),
    )


def at_rate(usual: TrainConfig, rate: float) -> optax.GradientTransformation:
    """The optimizer with its peak learning rate in the state, an input of the step: one program serves every rate."""
    return optax.inject_hyperparams(lambda learning_rate: optimizer.make(usual, learning_rate))(learning_rate=rate)


def sweep(at, rates: list[float], widen: int) -> list[Trained]:
    """Runs at all rates, in ascending order, and at up to `widen` more beyond an edge that is the best."""
    swept = [at(rate) for rate in rates]
    factor = rates[-1] / rates[-2] if len(rates) > 1 else 3.0
    for _ in range(widen):
        best = min(swept, key=lambda one: one.validation)
        if best is swept[-1]:
            swept.append(at(best.rate * factor))
        elif best is swept[0]:
            swept.insert(0, at(best.rate / factor))
    return swept


def trained(
    usual: TrainConfig, rate: float, seed: int, shape: ModelConfig, data: Dataset, score: Scoring, mesh: Mesh,
    folder: Path,
) -> Trained:  # fmt: skip
    """Train at one rate and seed, and score on validation text; the seed is that of the weights and of the batches."""
    file = folder / f"{usual.optimizer}-{rate:.2e}-seed{seed}.jsonl"
    try:
        start, batches = (lambda: init_params(shape, seed)), data.batches(usual.batch, seed)
        model = trainer.fit(
            trainer.model_task(shape, usual, start, batches, rule=at_rate(usual, rate)),
            mesh=mesh,
            title=f"{usual.optimizer}, rate {rate:.1e}, seed {seed}",
            watched=[callbacks.lines(file)],
        )
        validation = quality.bits_per_byte(held_out(model, data.validation, data, score))[0]
    except InputError as error:  # it diverged, which is an answer too
        print(f"  {error}")
        model, validation = None, math.inf
    (steps, losses), seconds, speeds = (metrics.curve(file, name) for name in ("loss", "seconds", "tokens_per_second"))
    curve, speed = np.stack([steps, seconds[1], losses]), float(np.median(speeds[1])) if len(steps) else 0.0
    return Trained(rate=rate, curve=curve, tokens_per_second=speed, model=model, validation=validation)


def held_out(model: LanguageModel, text: Text, data: Dataset, score: Scoring) -> Quality:
    return scoring.measure({"": model}, text, data.tokenizer, score, model)[""]


def smoothed(losses: np.ndarray) -> np.ndarray:
    """At each point the mean over the tenth of the curve that ends there: one point is the loss of one batch."""
    window = max(1, len(losses) // 10)
    return np.array([losses[max(0, end - window) : end].mean() for end in range(1, len(losses) + 1)])


def verdicts(rows: dict[str, Row]) -> list[str]:
    """What is published, and whether it held here."""
    adamw, found = rows["adamw"], []
    if "sgd" in rows:
        more = rows["sgd"].over_adamw / adamw.bits_per_byte
        found.append(f"What adaptive steps buy: SGD with momentum ends {more:+.1%} bits per byte from AdamW.")
    faster = [row for row in rows.values() if row is not adamw and row.steps_to_adamw]
    if faster:
        best = min(faster, key=lambda row: row.steps_to_adamw)
        ratio = adamw.steps_to_adamw / best.steps_to_adamw
        found.append(
            f"Fastest in steps: {best.name}, at AdamW's final loss {ratio:.2f}x as soon. Published: at most about 1.4x "
            "over a tuned AdamW, by matrix methods on models of 0.1 B parameters, less on larger ones (Wen 2025, arXiv "
            f"2509.02046): {'held' if ratio <= 1.45 else 'not held'} here."
        )
    if "adamw8bit" in rows:
        eight = rows["adamw8bit"]
        ratio = eight.bits_per_byte / adamw.bits_per_byte - 1
        found.append(
            f"8-bit moments: {ratio:+.2%} bits per byte, with {eight.state_bytes:.2f} bytes of state a parameter "
            f"against {adamw.state_bytes:.2f}. Published: no loss (Dettmers 2021, arXiv 2110.02861); within 1%: "
            f"{'held' if abs(ratio) <= 0.01 else 'not held'} here."
        )
    return found


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), model=MODEL, train=TRAIN, score=Scoring())
