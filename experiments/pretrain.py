"""Train a language model from scratch on a text corpus, and keep a checkpoint.

    bash launch/run.sh experiments.pretrain --corpus=stdlib --run_dir=runs/pretrain --train.steps=200 --model.layers=6
    bash launch/run.sh experiments.pretrain --corpus=FOLDER --train.length=512 --train.learning_rate=1e-3

Expect `checkpoint/`, `tokenizer.json`, `metrics.jsonl`, `tensorboard/` and `loss.png` in the run directory, and a
validation loss at the end. While it trains, `state/` holds what the same command resumes from when it was
stopped or killed: at Ctrl-C or SIGTERM it writes one last checkpoint and ends with exit code 0. On several hosts:
launch/.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from efflm import trees, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import launch
from efflm.config import InputError, flag, require, require_seed
from efflm.config.model import ModelConfig, ModelShape
from efflm.config.parallel import HostsConfig, MeshConfig
from efflm.config.train import TrainConfig
from efflm.data import corpora, dataset
from efflm.data.dataset import Dataset
from efflm.evaluate import machine, quality, scoring
from efflm.evaluate.windows import Scoring
from efflm.formats import checkpoint, saved
from efflm.model import LanguageModel, autotune, init_params, params
from efflm.parallel import meshes, processes
from efflm.plan import device, work
from efflm.precision import POLICIES
from efflm.report import plots
from efflm.text import tokenizer
from efflm.train import callbacks, metrics, trainer
from efflm.train.checkpointing import Checkpointing
from efflm.train.training import Callback

LEAF_FILES, METRICS_LINE = 4_000, 1_000  # bytes: what Orbax notes of a weight, and a line in both kinds of metrics
VALIDATION_ROWS = 16  # at most, in one batch at least
# What may change when a run is resumed, and beside that when another one branches from it: not the text nor the model.
RESUMED = {f"train.{name}" for name in ("steps", "decay", "remat", "accumulate", "scan", "log_every", "on_nan")}
RESCHEDULED = {f"train.{name}" for name in ("schedule", "learning_rate", "warmup", "final_fraction")} | {"init_from"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    run_dir: str = flag(str(run_directory.ROOT / "pretrain"), "where everything is written", path=True)
    corpus: str = flag(corpora.DEFAULT, corpora.KINDS, path=True)
    strict: bool = flag(False, corpora.STRICT)
    seed: int = flag(0, "seed of the weights and of the order of sequences")
    test: bool = flag(False, "score the test text too: once, when all choices are made")
    init_from: str = flag("", "run directory of an earlier training run to start the weights from", path=True)
    branch_from: str = flag("", "RUN_DIR:STEP of a run to go on from, in another schedule", path=True)
    checkpoint_every: int = flag(200, "steps between checkpoints of the running training; 0: only at its end")
    keep: int = flag(2, "how many of the newest of these checkpoints to keep")
    keep_period: int = flag(0, "keep those of every so many steps for good; 0: none")
    profile_steps: str = flag("", "FIRST,LAST: trace these steps into run_dir/profile, for TensorBoard and Perfetto")
    validate_every: int = flag(-1, "steps between losses on validation text; -1: about ten in the run; 0: none")
    wandb: str = flag("", "project of Weights & Biases to send the metrics to, where wandb is installed")

    def __post_init__(self):
        require_seed(self.seed)
        self.profile()
        self.branch()
        self.checkpointing({})
        require(self.validate_every >= -1, f"validate_every is {self.validate_every}, but must be positive, 0 or -1")

    def checkpointing(self, about: dict[str, Any]) -> Checkpointing:
        branch = self.branch()
        kept = {name: value for name, value in about.items() if name not in RESCHEDULED}
        return Checkpointing(
            directory=Path(self.run_dir) / "state",
            every=self.checkpoint_every,
            keep=self.keep,
            keep_period=self.keep_period,
            about=about | ({"branch_from": self.branch_from} if branch else {}),
            branch=branch and (branch, kept),
        )

    def branch(self) -> Path | None:
        """The folder of the checkpoint to branch from."""
        run, _, step = self.branch_from.rpartition(":")
        good = not self.branch_from or (run and step.isdigit() and not self.init_from)
        require(good, f"branch_from is {self.branch_from!r}: give RUN_DIR:STEP, as in runs/long:8000, and no init_from")
        return Path(run) / "state" / step if self.branch_from else None

    def profile(self) -> tuple[int, int, Path] | None:
        if not self.profile_steps:
            return None
        try:
            first, last = map(int, self.profile_steps.split(","))
        except ValueError:
            raise InputError(f"profile_steps is {self.profile_steps!r}: give two step numbers, as in 10,12") from None
        require(0 <= first <= last, f"profile_steps is {self.profile_steps!r}: the first must not be after the last")
        return first, last, Path(self.run_dir) / "profile"


def settled(run: Run, config: ModelConfig, train: TrainConfig) -> TrainConfig:
    """`train` with the policy that "auto" stands for: the one that this run began with, else the faster one here."""
    if train.policy != autotune.AUTO:
        return train
    names = list(POLICIES)
    folders = [Path(run.run_dir) / name for name in ("checkpoint", "state")]
    begun = next(filter(None, (checkpoint.recorded(folder).get("train.policy") for folder in folders)), "")
    told = processes.agree(names.index(begun) if begun in names else -1)
    if told < 0:
        return autotune.training(config, train)
    print(f"train.policy auto: {names[told]}, which this run began with")
    return dataclasses.replace(train, policy=names[told])


def check(run: Run, config: ModelConfig, train: TrainConfig, models: int = 1) -> None:
    """Find what is wrong with the directories and checkpoints before anything is written. Raises InputError.

    models: how many of the size of the trained one are written.
    """
    train.require_within(config.max_length)
    profile = run.profile()
    require(
        profile is None or profile[1] < train.steps,
        f"profile_steps {run.profile_steps} lies beyond the last step: train.steps is {train.steps}",
    )
    weights = work.weight_bytes(config, POLICIES[train.policy])
    state = trees.nbytes(device.state(config, train)) + LEAF_FILES * len(params.table(config))
    lines = METRICS_LINE * train.steps // train.log_every
    checkpoints = run.checkpointing({}).most(train.steps)
    run_directory.require_writable(
        Path(run.run_dir), needs=checkpoints * state + models * weights + lines + run_directory.SMALL_FILES
    )
    if run.init_from:
        require(
            checkpoint.exists(Path(run.init_from) / "checkpoint"),
            f"no checkpoint in {run.init_from}: --init_from takes the directory of a finished training run",
        )


def saved_config(model: ModelShape, train: TrainConfig) -> ModelConfig:
    """The config of the model that is trained: saved for matmuls in the dtype that its weights are kept in."""
    return dataclasses.replace(model.config(), precision=POLICIES[train.policy].param)


def prepare(run: Run, config: ModelConfig, train: TrainConfig) -> Dataset:
    """The corpus in tokens; with --init_from, in the tokens of that run."""
    given = tokenizer.load(Path(run.init_from) / "tokenizer.json") if run.init_from else None
    return dataset.prepare(
        run.corpus, dataset.cache(), vocabulary=config.vocabulary, length=train.length, batch=train.batch,
        tokenizer=given, strict=run.strict,
    )  # fmt: skip


def trained_model(run: Run, config: ModelConfig, train: TrainConfig, data: Dataset, mesh: Mesh) -> LanguageModel:
    """The model of this run: from its checkpoint if it has one, else trained now, from where an earlier life of the run
    was stopped, and checkpointed."""
    run_dir = Path(run.run_dir)
    folder = run_dir / "checkpoint"
    settings = {f"train.{name}": value for name, value in dataclasses.asdict(train).items()}
    about = {
        "corpus": data.corpus.digest,
        "tokenizer": data.tokenizer.digest,
        "seed": run.seed,
        "init_from": run.init_from,
        **{name: value for name, value in settings.items() if name not in RESUMED},
    }
    if processes.agree(checkpoint.recorded(folder).get("train.steps", -1)) >= train.steps:
        model, found = checkpoint.load(folder, mesh)
        schedule = {name: settings[name] for name in ("train.steps", "train.decay")}
        checkpoint.require_same(config.to_dict(), model.config.to_dict(), folder)
        checkpoint.require_same(about | schedule, found, folder)
        print(f"  found the trained model in {folder}: not training again")
        return model
    saved.require_free(run_dir, [], data.tokenizer, "give another --run_dir")

    def start() -> Any:
        if not run.init_from:
            return init_params(config, run.seed, mesh)
        other, _ = checkpoint.load(Path(run.init_from) / "checkpoint", mesh)
        checkpoint.require_same(config.to_dict(), other.config.to_dict(), Path(run.init_from))
        return other.params

    model = trainer.fit(
        trainer.model_task(config, train, start, data.batches(train.batch, run.seed)),
        mesh=mesh,
        seed=run.seed,
        watched=watched(run, config, train, data, mesh),
        checkpointing=run.checkpointing(config.to_dict() | about),
    )
    if processes.is_first():
        data.tokenizer.save(run_dir / "tokenizer.json")
    checkpoint.save(folder, train.steps, model, settings | about | {"source": data.corpus.source})
    return model


def watched(run: Run, config: ModelConfig, train: TrainConfig, data: Dataset, mesh: Mesh) -> list[Callback]:
    """The callbacks that the flags ask for; what adds to lines of metrics before what writes them."""
    run_dir, flops = Path(run.run_dir), work.train_flops(config, train.batch, train.length)
    out = [callbacks.utilization(flops, machine.peak(POLICIES[train.policy].compute, mesh.devices.size))]
    every = run.validate_every
    if every < 0:  # at steps that have a line anyway
        every = -(-train.steps // 10 // train.log_every) * train.log_every
    if every:
        rows = train.batch // train.accumulate
        held_out = data.validation_batches(rows, -(-VALIDATION_ROWS // rows))
        out.append(callbacks.validation(held_out, every))
    if run.profile():
        out.append(callbacks.profile(*run.profile()))
    out.append(callbacks.lines(run_dir / "metrics.jsonl", run_dir / "tensorboard"))
    if run.wandb:
        out.append(callbacks.wandb(run.wandb, run_dir, dataclasses.asdict(train) | config.to_dict()))
    return out


def show_curve(run_dir: Path) -> None:
    file = run_dir / "metrics.jsonl"
    found = {"training": metrics.curve(file), "validation": metrics.curve(file, "validation_loss")}
    found = {name: curve for name, curve in found.items() if len(curve[0])}
    if found:
        plots.save(plots.curves(found, "steps", "loss, nats a token"), run_dir / "loss.png")


@run_directory.locked
def main(run: Run, model: ModelShape, train: TrainConfig, score: Scoring, mesh: MeshConfig) -> None:
    train = settled(run, model.config(), train)
    config = saved_config(model, train)
    check(run, config, train)
    score.within(config.max_length)
    devices = meshes.mesh_for(mesh, train.batch, train.length, train.accumulate)
    with processes.first_alone():
        data = prepare(run, config, train)
    run_dir = Path(run.run_dir)
    user_cache.use_compilation_cache()
    print(data.corpus.describe())
    trained = trained_model(run, config, train, data, devices)
    if processes.is_first():
        show_curve(run_dir)
    for split in ("validation", "test") if run.test else ("validation",):
        text = getattr(data, split)
        resolved = score.within(config.max_length, train.length, text.unbroken)
        measured = scoring.measure({"": trained}, text, data.tokenizer, resolved, trained)[""]
        print(f"{split}: {quality.words(quality.bits_per_byte(measured))} bits per byte", flush=True)
    if run.test:
        print(f"on {scoring.protocol(text, resolved, measured)}")
    print(f"the model is in {run_dir}")


if __name__ == "__main__":
    launch(
        main, __doc__, run=Run(), model=ModelShape(), train=TrainConfig(), score=Scoring(), mesh=MeshConfig(),
        hosts=HostsConfig(),
    )  # fmt: skip
