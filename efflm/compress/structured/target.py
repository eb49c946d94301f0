"""How much structured pruning is to remove: a share of the parameters, of the bytes, or of the time measured here."""

import dataclasses
from collections.abc import Callable

from efflm import ops, trees
from efflm.compress.structured import latency
from efflm.compress.structured.latency import Phase
from efflm.config import flag, require
from efflm.model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The settings that steps which remove whole slices or layers have in common."""

    parameters: float = flag(0.0, "share of all parameters to remove, embeddings counted")
    bytes: float = flag(0.0, "in place of it, share of the bytes to remove, as a file holds the model")
    latency: float = flag(0.0, "in place of it, share of the time to remove, measured on this machine")
    phase: Phase = flag("both", "of latency: reading a prompt, writing after it, or both")

    @property
    def given(self) -> dict[str, float]:
        """The targets that are set, by name."""
        every = {"parameters": self.parameters, "bytes": self.bytes, "latency": self.latency}
        return {name: share for name, share in every.items() if share}

    def __post_init__(self):
        for name, share in self.given.items():
            require(0 < share < 1, f"{name} is {share}, but must be between 0 and 1")

    def saving(self, model: LanguageModel) -> Callable[[LanguageModel], float]:
        """small -> the share of what the target is about that it has less than `model`."""
        if self.latency:
            before = latency.runner(model, self.phase)
            return lambda small: latency.saved(before, latency.runner(small, self.phase))
        count = (lambda m: ops.stored_nbytes(m.params, m.masks)) if self.bytes else (lambda m: trees.count(m.params))
        whole = count(model)
        return lambda small: 1 - count(small) / whole
