"""What claims share: text, a small model's shape, and models that are trained once for each seed."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from efflm.compress import grammar, recipe
from efflm.compress.step import Context
from efflm.config.model import ModelConfig, ModelShape
from efflm.config.train import TrainConfig
from efflm.data import loader
from efflm.data.dataset import Dataset, Text
from efflm.evaluate import quality, scoring, windows
from efflm.evaluate.quality import Quality
from efflm.evaluate.windows import Scoring
from efflm.formats import efflm_file
from efflm.model import LanguageModel, init_params, unstack_blocks
from efflm.precision import LossScale
from efflm.train import trainer
from efflm.train.training import Training

SHORT = 1 / 5  # of the steps: runs that are only compared with runs of the same length
OTHER = 1000  # what compression reads is drawn by other seeds than what the models were trained on
CALIBRATION = 64  # rows of the training text
HEALING = 1e-3  # peak learning rate of what a pruned model is trained with
PROTOCOL = (  # of claims whose models `Lab.lengths` trains
    "The model is trained here (wsd schedule); increases are of bits per byte of held-out text over the dense model. "
)


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
    """shape, train: of the model that is trained in full (`lengths`); shorter runs say how much of it. text: what is
    scored. folder: where trained models are kept."""

    shape: ModelShape
    train: TrainConfig
    data: Dataset
    text: Text
    score: Scoring
    mesh: Mesh
    folder: Path

    @property
    def config(self) -> ModelConfig:
        return self.shape.config()

    def steps(self, share: float) -> int:
        return max(2, round(share * self.train.steps))

    def fit(
        self, seed: int, share: float, *, config: ModelConfig | None = None, start: Any = None,
        rule: optax.GradientTransformation | None = None, loss_scale: LossScale | None = None, watched: Any = (),
        **settings: Any,
    ) -> LanguageModel:  # fmt: skip
        """A model trained for a share of the steps. start: of the weights, in place of fresh ones; settings: of the
        training, in place of the lab's."""
        config, train = config or self.config, dataclasses.replace(self.train, steps=self.steps(share), **settings)
        start = start or (lambda: init_params(config, seed))
        task = trainer.model_task(config, train, start, self.data.batches(train.batch, seed), rule)
        task = dataclasses.replace(task, loss_scale=loss_scale)
        return trainer.fit(task, mesh=self.mesh, seed=seed, title=f"{train.steps} steps", watched=watched)

    def lengths(self, seed: int) -> dict[int, LanguageModel]:
        """{steps: the model} along one run: an eighth, a quarter, half and the end of the constant learning rate, and
        the end of the run, where the rate has decayed. Trained once and kept."""
        train = dataclasses.replace(self.train, schedule="wsd")
        n = train.steps
        steps = sorted({max(1, n // 8), max(1, n // 4), n // 2, n - train.decay_steps, n})
        files = {step: self.folder / f"seed{seed}-step{step}.safetensors" for step in steps}
        if not all(file.exists() for file in files.values()):
            self.fit(seed, 1.0, schedule="wsd", watched=[lambda training: _keeping(training, self.config, files)])
        return {step: efflm_file.load(file, self.mesh)[0] for step, file in files.items()}

    def dense(self, seed: int) -> LanguageModel:
        """The model that was trained in full."""
        return list(self.lengths(seed).values())[-1]

    def compressed(
        self, model: LanguageModel, chain: str, seed: int, teacher: LanguageModel | None = None
    ) -> LanguageModel:
        """The model after a chain of steps (compress.grammar), on calibration text and batches of this seed."""
        rows = loader.sample(self.data.train, min(CALIBRATION, len(self.data.train)), OTHER + seed)
        batches = self.data.batches(self.train.batch, OTHER + seed)
        context = Context(batches=batches, calibration=rows, teacher=teacher, seed=seed, mesh=self.mesh)
        return recipe.apply(model, grammar.chain(chain), context)[0]

    def training(self, step: str, share: float, **settings: Any) -> str:
        """A step that trains for a share of the steps, in the grammar of chains."""
        how = {"steps": self.steps(share), "learning_rate": HEALING, **settings}
        return f"{step}[{','.join(f'{name}={value}' for name, value in how.items())}]"

    def qualities(self, models: dict[str, LanguageModel], reference: LanguageModel) -> dict[str, Quality]:
        return scoring.measure(models, self.text, self.data.tokenizer, self.score, reference)

    def loss(self, model: LanguageModel) -> float:
        """Bits per byte of the text."""
        return quality.bits_per_byte(self.qualities({"": model}, model)[""])[0]

    def increase(self, model: LanguageModel, reference: LanguageModel) -> float:
        """Of the loss over the reference's, in percent."""
        return percent(self.loss(model), self.loss(reference))

    def calibration_error(self, model: LanguageModel) -> float:
        blocks = windows.blocks(self.text.sized(), self.data.tokenizer.separator, self.score, self.text.unbroken)
        return quality.calibration_error(model, blocks)


def percent(new: float, old: float) -> float:
    return 100 * (new / old - 1)


@contextlib.contextmanager
def _keeping(training: Training, config: ModelConfig, files: dict[int, Path]):
    """A callback that writes the model at these steps."""

    def after() -> None:
        if training.step in files:
            weights = jax.device_get(training.state.trainable)
            params = unstack_blocks(weights, config) if training.train.scan else weights
            efflm_file.save(files[training.step], LanguageModel(config, params), {})

    yield after
