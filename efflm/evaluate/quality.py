"""Likelihood on text, and divergence from a reference model, document by document.

What is scored, and what each token sees while it is, stands in blocks of rows (evaluate.windows). They are read one
after another and nothing of them is kept but sums for each document, so that memory does not grow with the text.
Errors are over documents: the tokens of one document are not independent.

Logits, which are by far the largest arrays here, exist for a slice of tokens at a time.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from efflm import ops
from efflm.model import LanguageModel, Transformer, require_same_tokenizer
from efflm.parallel import sharding
from efflm.precision import policy_for

LOGITS = 1 << 25  # logits held at a time, of the model and as many of the reference
BINS = 15  # of `expected_error`
KEPT = 1 << 28  # bytes of the reference's states that `measure` may keep for the next model

Block = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Quality:
    """Sums for each document, float64 [documents]: bits, bytes and tokens scored, KL(reference || model) in nats, and
    positions at which both rank the same token first."""

    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray


def _transformer(model: LanguageModel) -> Transformer:
    return Transformer(model.config, policy_for(model.config))


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


def _unembed(model: LanguageModel, x_MD: jax.Array) -> jax.Array:
    """float32 logits [M, V] of final states."""
    logits_BMV = _transformer(model).apply({"params": model.params}, x_MD[None], method=Transformer.unembed)
    return logits_BMV[0].astype(jnp.float32)


@jax.jit
def _expected(reference: LanguageModel, x_MD: jax.Array) -> jax.Array:
    """The reference's logits [M, V] over the ids that have a token."""
    return ops.possible(_unembed(reference, x_MD), reference.config.unused, ops.LEAST)


@jax.jit
def _score(
    expected_MV: jax.Array | None, model: LanguageModel, x_MD: jax.Array, targets_M: jax.Array
) -> dict[str, jax.Array]:
    """Without the reference's logits, the model is its own. KL and agreement are over the ids that have a token."""
    whole_MV = _unembed(model, x_MD)
    logits_MV = ops.possible(whole_MV, model.config.unused, ops.LEAST)
    if expected_MV is None:
        expected_MV = logits_MV
    # From both normalizers, in one pass over the vocabulary: through log-probabilities it takes four times as long.
    normalizer_M, expected_normalizer_M = (jax.nn.logsumexp(x, axis=-1) for x in (logits_MV, expected_MV))
    p_MV = jnp.exp(expected_MV - expected_normalizer_M[:, None])
    of_all_M = jax.nn.logsumexp(whole_MV, axis=-1) if model.config.unused else normalizer_M
    at = lambda x_MV, index_M: jnp.take_along_axis(x_MV, index_M[:, None], axis=-1)[:, 0]
    likeliest_M = jnp.argmax(logits_MV, axis=-1)
    return _whole(
        {
            "bits": (of_all_M - at(whole_MV, targets_M)) / jnp.log(2.0),
            "kl": jnp.sum(p_MV * (expected_MV - logits_MV), axis=-1) - expected_normalizer_M + normalizer_M,
            "agreement": jnp.argmax(expected_MV, axis=-1) == likeliest_M,
            "right": likeliest_M == targets_M,
            "confidence": jnp.exp(at(logits_MV, likeliest_M) - normalizer_M),
        }
    )


def rounded(model: LanguageModel) -> LanguageModel:
    """The same model computed in bfloat16, or in float32 if it is computed in less. How far it is from the model is
    what float rounding alone does: a divergence that is no larger says nothing of a compressed model."""
    precision = "bfloat16" if model.config.precision == "float32" else "float32"
    return model.replace(config=dataclasses.replace(model.config, precision=precision))


def _without_layers(model: LanguageModel) -> LanguageModel:
    kept = {name: w for name, w in model.params.items() if not name.startswith("block_")}
    return model.replace(params=kept, masks=None)


def states(model: LanguageModel, block: Block) -> np.ndarray:
    """What the model makes of a block, before its output layer: [tokens scored, D], row by row."""
    part = {name: block[name] for name in ("inputs", "segments", "positions")}
    with sharding.mesh_of(model.params) as place:
        if place is not None:
            spread = math.prod(place.mesh.shape[axis] for axis in sharding.BATCH[0])
            missing = -len(block["inputs"]) % spread
            part = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in part.items()}
            part = jax.device_put(part, place)
        states_RTD = np.asarray(_states(model, part))
    return states_RTD[: len(block["inputs"])][block["documents"] > 0]


def score(
    models: dict[str, LanguageModel],
    states: dict[str, np.ndarray],
    reference: LanguageModel,
    expected_MD: np.ndarray,
    targets_M: np.ndarray,
    most: int,
) -> dict[str, dict[str, np.ndarray]]:
    """bits, kl and agreement (see Quality) of each model at each of at most `most` targets, the probability of the
    likeliest token there (confidence), and whether that is the target (right). states: what each makes of the text;
    expected_MD: the reference's, whose logits are computed once for all models."""
    vocabulary = max(model.config.vocabulary for model in (reference, *models.values()))
    count = max(1, min(most, LOGITS // vocabulary))  # not the number of targets: one program for all
    outputs = {name: _without_layers(model) for name, model in models.items()}
    first, alone = _without_layers(reference), all(model is reference for model in models.values())
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in models}
    with sharding.mesh_of(reference.params):
        for start in range(0, len(targets_M), count):
            cut = lambda x, start=start: _filled(x[start : start + count], count)
            expected_MV = None if alone else _expected(first, cut(expected_MD))
            for name, model in models.items():
                given = None if model is reference else expected_MV
                got = jax.device_get(_score(given, outputs[name], cut(states[name]), cut(targets_M)))
                parts[name].append({figure: x[: len(targets_M) - start] for figure, x in got.items()})
    figures = ("bits", "kl", "agreement", "right", "confidence")
    joined = lambda found, figure: np.concatenate([np.zeros(0), *(part[figure] for part in found)])
    return {name: {figure: joined(found, figure) for figure in figures} for name, found in parts.items()}


def _filled(x: np.ndarray, count: int) -> np.ndarray:
    return np.pad(x, [(0, count - len(x))] + [(0, 0)] * (x.ndim - 1))


def measure(
    models: dict[str, LanguageModel],
    blocks: Iterable[Block],
    reference: LanguageModel,
    kept: dict[int, np.ndarray] | None = None,
) -> dict[str, Quality]:
    """How good each model is, and how far from the reference, which reads each block once. kept: see `by_target`."""
    fields = [field.name for field in dataclasses.fields(Quality)]
    sums = {name: np.zeros((len(fields), 0)) for name in models}
    documents = 0
    for where, found in by_target(models, blocks, reference, kept):
        owners_M = where["documents"]
        first, documents = int(owners_M.min()), int(owners_M.max())
        counts = {"bytes": where["bytes"], "tokens": np.ones(len(owners_M))}
        for name, figures in found.items():
            sums[name] = _room_for(documents, sums[name])
            for i, field in enumerate(fields):
                sums[name][i, first - 1 : documents] += np.bincount(owners_M - first, (counts | figures)[field])
    return {name: Quality(*(of[:, :documents])) for name, of in sums.items()}


def by_target(
    models: dict[str, LanguageModel],
    blocks: Iterable[Block],
    reference: LanguageModel,
    kept: dict[int, np.ndarray] | None = None,
) -> Iterator[tuple[Block, dict[str, dict[str, np.ndarray]]]]:
    """Block by block, the fields of a block at the targets that are scored [M], and what `score` gives of each model.

    kept: filled with the reference's states of the first blocks, up to KEPT bytes; given again with the same reference
    and text, it spares reading these. Raises InputError if a model has other tokens than the reference.
    """
    for model in models.values():
        require_same_tokenizer(model, reference, "model", "reference")
    for index, block in enumerate(blocks):
        where = block["documents"] > 0
        if not where.any():
            continue
        expected_MD = kept[index] if kept and index in kept else states(reference, block)
        if kept is not None:
            keep(kept, index, expected_MD)
        read = {name: expected_MD if model is reference else states(model, block) for name, model in models.items()}
        fields = {name: array[where] for name, array in block.items()}
        yield fields, score(models, read, reference, expected_MD, fields["targets"], where.size)


def keep(kept: dict[int, np.ndarray], index: int, states_MD: np.ndarray) -> None:
    """Keep the reference's states of a block, as long as all that is kept stays below KEPT."""
    if sum(x.nbytes for x in kept.values()) + states_MD.nbytes <= KEPT:
        kept[index] = states_MD


def _room_for(count: int, sums: np.ndarray) -> np.ndarray:
    """The sums with space for `count` documents: doubled where they are short, so that growing takes linear time."""
    missing = count - sums.shape[1]
    return sums if missing <= 0 else np.pad(sums, ((0, 0), (0, max(missing, sums.shape[1]))))


# --- how far a model's confidence is from its accuracy ----------------------------------------------------------------


def calibration_error(model: LanguageModel, blocks: Iterable[Block]) -> float:
    """The expected calibration error of the likeliest next token over a text."""
    found = [figures[""] for _, figures in by_target({"": model}, blocks, model)]
    return expected_error(*(np.concatenate([each[name] for each in found]) for name in ("confidence", "right")))


def expected_error(confidence_M: np.ndarray, correct_M: np.ndarray) -> float:
    """The expected calibration error (Guo 2017, arXiv 1706.04599, equation 3): the mean over predictions of |accuracy -
    mean confidence| in BINS bins of equal width of the confidence. NaN where a confidence is not finite."""
    if not np.all(np.isfinite(confidence_M)):
        return math.nan
    sums = lambda values: np.bincount(bin_of(confidence_M), np.asarray(values, np.float64), minlength=BINS)
    return float(np.abs(sums(correct_M) - sums(confidence_M)).sum() / len(confidence_M))


def bin_of(confidence_M: np.ndarray) -> np.ndarray:
    """Which of the BINS each is in; the upper end belongs to a bin."""
    return np.clip(np.ceil(confidence_M * BINS).astype(int) - 1, 0, BINS - 1)


# --- figures: a mean over all tokens or bytes, and its standard error over documents ---------------------------------


Figure = tuple[float, float | None]  # the error of a single document is not known: None


def bits_per_byte(quality: Quality) -> Figure:
    """All bits over all bytes."""
    return ratio(quality.bits, quality.bytes)


def perplexity(quality: Quality) -> Figure:
    """exp of the mean nats a token; depends on the tokenizer, as bits per byte do not. The error is to first order.
    Infinity, without an error, where that is beyond the largest number."""
    nats, error = ratio(quality.bits * math.log(2), quality.tokens)
    try:
        return math.exp(nats), None if error is None else math.exp(nats) * error
    except OverflowError:
        return math.inf, None


def divergence(quality: Quality) -> Figure:
    """KL(reference || model) in nats a token."""
    return ratio(quality.kl, quality.tokens)


def agreement(quality: Quality) -> Figure:
    """The share of tokens at which model and reference rank the same one first."""
    return ratio(quality.agreement, quality.tokens)


def words(figure: Figure, form: str = ".4f") -> str:
    """The figure and its error as a reader sees them."""
    value, error = figure
    spread = " (one document: no error bar)" if error is None else f" ± {error:{form.lstrip('+')}}"
    return f"{value:{form}}{spread}"


def paired_difference(
    first: Quality, second: Quality, figure: Literal["loss", "divergence", "agreement"] = "loss"
) -> Figure:
    """bits per byte (divergence, agreement) of `first` minus those of `second` on the same documents.

    What both find hard cancels, so the error is far below that of either alone.
    """
    if figure == "loss":
        return ratio(first.bits - second.bits, first.bytes)
    name = {"divergence": "kl", "agreement": "agreement"}[figure]
    return ratio(getattr(first, name) - getattr(second, name), first.tokens)


def relative_increase(first: Quality, before: Quality) -> Figure:
    """The loss of `first` over that of `before` on the same documents, as a share of the latter."""
    return ratio(first.bits - before.bits, before.bits)


def mean_difference(made: Sequence[Quality], before: Quality) -> tuple[float, float | None, float | None]:
    """Over seeds, the mean of the paired differences of bits per byte; the mean of their errors over documents, None
    where they are not known; and their deviation over seeds."""
    values, errors = zip(*(paired_difference(each, before) for each in made), strict=True)
    return float(np.mean(values)), None if None in errors else float(np.mean(errors)), deviation(values)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of fewer than two, and where one is not finite."""
    return float(np.std(values, ddof=1)) if len(values) > 1 and np.all(np.isfinite(values)) else None


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Figure:
    """sum / sum, and its standard error by linearization (Cochran, Sampling Techniques, section 6.3)."""
    count, value = len(numerators), numerators.sum() / denominators.sum()
    if count < 2:
        return float(value), None
    residuals = numerators - value * denominators
    return float(value), float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / denominators.sum())
