"""Likelihood on text, and divergence from a reference model, document by document.

Every document of the packed rows is scored from its first token on; a token sees the tokens before it in its own
document and row, and no others. Sums are kept for each document, so that errors are over documents: the tokens of one
document are not independent.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from efflm.infer.generate import forward
from efflm.model import LanguageModel
from efflm.train.losses import kl_divergence, next_token_nll


@dataclasses.dataclass(frozen=True)
class Quality:
    """Sums for each document, float64 [documents]: bits, bytes and tokens scored, KL(reference || model) in nats, and
    positions at which both rank the same token first."""

    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def top1_agreement(self) -> float:
        return float(self.agreement.sum() / self.tokens.sum())


@jax.jit
def _logits(model: LanguageModel, batch: dict[str, jax.Array]) -> jax.Array:
    return forward(model, batch["inputs"], segments=batch["segments"], positions=batch["positions"])[0]


@jax.jit
def _score(expected: jax.Array, logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
    return {
        "bits": next_token_nll(logits, targets) / jnp.log(2.0),
        "kl": kl_divergence(expected, logits),
        "agreement": jnp.argmax(expected, axis=-1) == jnp.argmax(logits, axis=-1),
    }


def measure(
    models: dict[str, LanguageModel],
    rows: dict[str, np.ndarray],
    token_bytes: np.ndarray,
    reference: LanguageModel,
    batch: int = 8,
) -> dict[str, Quality]:
    """Score packed rows (see data.packing) under each model; the reference reads every batch once for all of them.

    token_bytes [V]: the bytes of text each token stands for.
    """
    documents = int(rows["segments"].max())
    sums = {name: {part.name: np.zeros(documents + 1) for part in dataclasses.fields(Quality)} for name in models}
    for start in range(0, len(rows["inputs"]), batch):
        part = {name: array[start : start + batch] for name, array in rows.items()}
        missing = batch - len(part["inputs"])
        part = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in part.items()}
        counts = {"bytes": token_bytes[part["targets"]], "tokens": np.ones(part["targets"].shape)}
        expected = _logits(reference, part)
        for name, model in models.items():
            scores = jax.device_get(_score(expected, _logits(model, part), part["targets"]))
            for kind, values in (scores | counts).items():
                np.add.at(sums[name][kind], part["segments"], values.astype(np.float64))
    return {name: Quality(**{kind: values[1:] for kind, values in kinds.items()}) for name, kinds in sums.items()}


def bits_per_byte(quality: Quality) -> tuple[float, float]:
    """All bits over all bytes, and the standard error of that ratio over documents."""
    return _ratio(quality.bits, quality.bytes)


def paired_difference(first: Quality, second: Quality) -> tuple[float, float]:
    """bits per byte of `first` minus those of `second` on the same documents, and its standard error.

    What both find hard cancels, so the error is far below that of either alone.
    """
    return _ratio(first.bits - second.bits, first.bytes)


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """sum / sum, and its standard error by linearization (Cochran, Sampling Techniques, section 6.3)."""
    count, ratio = len(numerators), numerators.sum() / denominators.sum()
    if count < 2:
        return float(ratio), float("nan")
    residuals = numerators - ratio * denominators
    return float(ratio), float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / denominators.sum())
