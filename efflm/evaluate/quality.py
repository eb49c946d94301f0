"""Likelihood on text, and divergence from a reference model, document by document.

What is scored, and what each token sees while it is, stands in the rows: packed ones (data.packing), where a document
is scored from its first token on within its own row, or windows (evaluate.windows). Sums are kept for each document,
so that errors are over documents: the tokens of one document are not independent.

Of the reference only the states before its output layer are kept, so models can be scored one after another without
it, and logits, which are by far the largest arrays here, exist for a slice of tokens at a time.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from efflm.config import require
from efflm.model import LanguageModel, Transformer, sharding
from efflm.precision import policy_for

SLICE = 512  # tokens whose logits are held at a time, of the model and of the reference
BLOCK = 1 << 18  # tokens whose states `measure` holds at a time


@dataclasses.dataclass(frozen=True)
class Quality:
    """Sums for each document, float64 [documents]: bits, bytes and tokens scored, KL(reference || model) in nats, and
    positions at which both rank the same token first."""

    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model made of some rows: the states [tokens scored, D] before its output layer, and what is left of the
    model without its layers."""

    states_MD: np.ndarray
    output: LanguageModel


def _transformer(model: LanguageModel) -> Transformer:
    return Transformer(model.config, policy_for(model.params))


@jax.jit
def _states(model: LanguageModel, batch: dict[str, jax.Array]) -> jax.Array:
    inputs = {name: batch[name] for name in ("segments", "positions")}
    states = Transformer.final_states
    return _whole(_transformer(model).apply({"params": model.params}, batch["inputs"], **inputs, method=states)[0])


def _whole(tree: Any) -> Any:
    """The arrays on every device, so that each host can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


@jax.jit
def _score(
    reference: LanguageModel, expected_MD: jax.Array, model: LanguageModel, x_MD: jax.Array, targets_M: jax.Array
) -> dict[str, jax.Array]:
    unembed = lambda model, x: _transformer(model).apply({"params": model.params}, x[None], method=Transformer.unembed)
    expected_MV, logits_MV = (x[0].astype(jnp.float32) for x in (unembed(reference, expected_MD), unembed(model, x_MD)))
    # From both normalizers, in one pass over the vocabulary: through log-probabilities it takes four times as long.
    normalizer_M, expected_normalizer_M = (jax.nn.logsumexp(x, axis=-1) for x in (logits_MV, expected_MV))
    p_MV = jnp.exp(expected_MV - expected_normalizer_M[:, None])
    chosen_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    return _whole(
        {
            "bits": (normalizer_M - chosen_M) / jnp.log(2.0),
            "kl": jnp.sum(p_MV * (expected_MV - logits_MV), axis=-1) - expected_normalizer_M + normalizer_M,
            "agreement": jnp.argmax(expected_MV, axis=-1) == jnp.argmax(logits_MV, axis=-1),
        }
    )


def _without_layers(model: LanguageModel) -> LanguageModel:
    return model.replace(params={name: w for name, w in model.params.items() if not name.startswith("block_")})


def _scored(rows: dict[str, np.ndarray]) -> np.ndarray:
    """1 + the document of each target [rows, T] that is scored, else 0."""
    return rows.get("documents", rows["segments"])


def read(model: LanguageModel, rows: dict[str, np.ndarray], batch: int = 8) -> Reading:
    """The model's states at every token that is scored, row by row, reading `batch` rows at a time."""
    owners_RT, parts = _scored(rows), []
    with sharding.mesh_of(model.params) as place:
        if place is not None:
            spread = math.prod(place.mesh.shape[axis] for axis in sharding.BATCH[0])
            batch = -(-batch // spread) * spread
        for start in range(0, len(owners_RT), batch):
            part = {name: rows[name][start : start + batch] for name in ("inputs", "segments", "positions")}
            missing = batch - len(part["inputs"])
            part = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in part.items()}
            states = np.asarray(_states(model, jax.device_put(part, place) if place else part))
            owners = owners_RT[start : start + batch]
            parts.append(states[: len(owners)][owners > 0])
    return Reading(np.concatenate(parts), _without_layers(model))


def score(
    mine: Reading, reference: Reading, rows: dict[str, np.ndarray], token_bytes: np.ndarray, documents: int = 0
) -> Quality:
    """How good a model is and how far from a reference, which both have read these rows.

    token_bytes [V]: the bytes of text each token stands for. documents: how many there are; 0: as the rows say. Raises
    InputError if the vocabularies differ.
    """
    sizes = [each.output.config.vocabulary for each in (mine, reference)]
    require(
        sizes[0] == sizes[1],
        f"the model's vocabulary has {sizes[0]} entries, the reference's {sizes[1]}: both need the same one",
    )
    owners_RT = _scored(rows)
    owners_M, targets_M = owners_RT[owners_RT > 0], rows["targets"][owners_RT > 0]
    values = {"bytes": token_bytes[targets_M], "tokens": np.ones(len(targets_M))}
    slices: dict[str, list[np.ndarray]] = {"bits": [], "kl": [], "agreement": []}
    with sharding.mesh_of(mine.output.params):
        for start in range(0, len(targets_M), SLICE):
            some = slice(start, start + SLICE)
            fill = lambda x, some=some: np.pad(x[some], [(0, SLICE - len(x[some]))] + [(0, 0)] * (x.ndim - 1))
            pairs = (reference.output, fill(reference.states_MD), mine.output, fill(mine.states_MD))
            for name, got in jax.device_get(_score(*pairs, fill(targets_M))).items():
                slices[name].append(got[: len(targets_M[some])])
    values |= {name: np.concatenate([np.zeros(0), *parts]) for name, parts in slices.items()}
    total = lambda x: np.bincount(owners_M, x.astype(np.float64), minlength=1 + (documents or owners_RT.max()))[1:]
    return Quality(**{name: total(x) for name, x in values.items()})


def measure(
    models: dict[str, LanguageModel],
    rows: dict[str, np.ndarray],
    token_bytes: np.ndarray,
    reference: LanguageModel,
    batch: int = 8,
) -> dict[str, Quality]:
    """`score` of each model against the reference, which reads the rows once."""
    documents, blocks = int(_scored(rows).max()), {name: [] for name in models}
    count = max(batch, BLOCK // rows["inputs"].shape[1])
    for start in range(0, len(rows["inputs"]), count):
        some = {name: array[start : start + count] for name, array in rows.items()}
        expected = read(reference, some, batch)
        for name, model in models.items():
            mine = expected if model is reference else read(model, some, batch)
            blocks[name].append(score(mine, expected, some, token_bytes, documents))
    fields = [field.name for field in dataclasses.fields(Quality)]
    total = lambda parts: Quality(**{name: sum(getattr(part, name) for part in parts) for name in fields})
    return {name: total(parts) for name, parts in blocks.items()}


# --- figures: a mean over all tokens or bytes, and its standard error over documents ---------------------------------


def bits_per_byte(quality: Quality) -> tuple[float, float]:
    """All bits over all bytes."""
    return _ratio(quality.bits, quality.bytes)


def perplexity(quality: Quality) -> tuple[float, float]:
    """exp of the mean nats a token; depends on the tokenizer, as bits per byte do not. The error is to first order."""
    nats, error = _ratio(quality.bits * math.log(2), quality.tokens)
    return math.exp(nats), math.exp(nats) * error


def divergence(quality: Quality) -> tuple[float, float]:
    """KL(reference || model) in nats a token."""
    return _ratio(quality.kl, quality.tokens)


def agreement(quality: Quality) -> tuple[float, float]:
    """The share of tokens at which model and reference rank the same one first."""
    return _ratio(quality.agreement, quality.tokens)


def paired_difference(first: Quality, second: Quality) -> tuple[float, float]:
    """bits per byte of `first` minus those of `second` on the same documents.

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
