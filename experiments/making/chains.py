"""Chains as the flags of a command give them, what they read, and models as they are measured on one device."""

import dataclasses

import jax

from efflm import api, ops
from efflm.cli.subject import Subject
from efflm.compress import grammar
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.step import Calibration, Context, Step
from efflm.config import flag, require, require_positive, require_seed
from efflm.data import dataset
from efflm.formats.sources import Loaded
from efflm.model import LanguageModel
from efflm.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making(Subject):
    """The run"""

    steps: int = flag(100, "optimizer steps of distill and finetune")
    learning_rate: float = flag(5e-4, "peak learning rate of both")
    batch: int = flag(8, "sequences in a training batch")
    length: int = flag(256, "tokens in each")
    seed: int = flag(0, "seed of what is drawn: batches, calibration text")
    run_dir: str = flag("", "where everything is written", path=True)

    def __post_init__(self):
        require_seed(self.seed)
        require_positive(self, "steps", "learning_rate", "batch", "length")
        require(bool(self.parts), f"chains is {self.chains!r}: give at least one chain")
        _ = [self.steps_of(name) for name in self.parts]

    @property
    def parts(self) -> list[str]:
        """The chains, each as it is written."""
        return [",".join(each) for each in grammar.parts(self.chains).values()]

    def steps_of(self, name: str) -> tuple[Step, ...]:
        usual = {"steps": self.steps, "learning_rate": self.learning_rate}
        return grammar.steps_of(grammar.parts(name)[name], {Distill: usual, Finetune: usual})

    def context(self, source: str, loaded: Loaded, calibration: Calibration) -> Context:
        """What the chains read of a corpus."""
        steps, how = [step for name in self.parts for step in self.steps_of(name)], {"lower": api.FLAGS}
        how |= {name: getattr(self, name) for name in ("batch", "length", "seed", "strict")}
        cache, model, tokens = dataset.cache(), loaded.model, loaded.tokenizer
        return api.context_for(steps, source, cache, model, tokens, calibration=calibration, **how)


def prepared(model: LanguageModel) -> LanguageModel:
    """The model on one device, laid out for its kernels."""
    return ops.prepare(sharding.on_one_device(model), jax.default_backend())
