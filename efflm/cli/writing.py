"""The flags of the commands that write text with a model."""

import dataclasses

from efflm.config import PRECISION, AskedPrecision, flag, require_positive, require_seed
from efflm.formats.sources import KINDS
from efflm.infer.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """The run"""

    model: str = flag("smollm2", KINDS, path=True)
    max_tokens: int = flag(64, "tokens to write at most")
    temperature: float = flag(0.0, "0 takes the likeliest token; 1 samples as the model says, more is more random")
    top_k: int = flag(0, "sample from the k likeliest tokens only; 0: all")
    top_p: float = flag(1.0, "sample from the fewest tokens that have this much of the probability; 1: all")
    min_p: float = flag(0.0, "sample from tokens at least this fraction as likely as the likeliest; 0: all")
    seed: int = flag(0, "seed of sampling")
    stop: str = flag("", "text to end before, beside the model's own stop tokens")
    draft: str = flag("", "a smaller model that proposes tokens, by the same tokenizer", path=True)
    ahead: int = flag(4, "tokens that the draft proposes at a time")
    precision: AskedPrecision = flag("", PRECISION)

    def __post_init__(self):
        require_positive(self, "max_tokens", "ahead")
        require_seed(self.seed)
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
