"""How far a model's confidence is from its accuracy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efflm import ops
from efflm.evaluate import quality, windows
from efflm.evaluate.windows import Scoring
from efflm.model import LanguageModel, Transformer
from efflm.parallel import sharding
from efflm.precision import policy_for

BINS = 15
TOKENS = 512  # whose logits are held at a time


def expected_error(confidence_M: np.ndarray, correct_M: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error (Guo 2017, arXiv 1706.04599, equation 3): the mean over predictions of |accuracy -
    mean confidence| in bins of equal width of the confidence."""
    which_M = np.clip(np.ceil(confidence_M * bins).astype(int) - 1, 0, bins - 1)
    sums = lambda values: np.bincount(which_M, np.asarray(values, np.float64), minlength=bins)
    return float(np.abs(sums(correct_M) - sums(confidence_M)).sum() / len(confidence_M))


@jax.jit
def _likeliest(model: LanguageModel, x_MD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The probability of the likeliest token, and whether it is the target."""
    transformer = Transformer(model.config, policy_for(model.config))
    logits_MV = transformer.apply({"params": model.params}, x_MD[None], method=Transformer.unembed)[0]
    logits_MV = ops.possible(logits_MV, model.config.unused)
    top_M = jnp.argmax(logits_MV, axis=-1)
    return jnp.max(jax.nn.softmax(logits_MV.astype(jnp.float32), axis=-1), axis=-1), top_M == targets_M


def of_text(model: LanguageModel, text: Any, tokenizer: Any, scoring: Scoring) -> float:
    """The expected calibration error of the likeliest next token over a text (see quality.measure)."""
    model, confidence, correct = sharding.on_one_device(model), [], []
    for block in windows.blocks(text.sized(), tokenizer.separator, scoring, text.unbroken):
        where = block["documents"] > 0
        if not where.any():
            continue
        states_MD, targets_M = quality.states(model, block), block["targets"][where]
        for start in range(0, len(targets_M), TOKENS):
            cut = lambda x, start=start: quality.filled(x[start : start + TOKENS], TOKENS)
            found = jax.device_get(_likeliest(model, cut(states_MD), cut(targets_M)))
            confidence.append(found[0][: len(targets_M) - start])
            correct.append(found[1][: len(targets_M) - start])
    return expected_error(np.concatenate(confidence), np.concatenate(correct))
