"""Log-probabilities of tokens against one full forward, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from efflm.config import InputError
from efflm.infer import logprobs
from tests import tiny


@pytest.mark.parametrize("family", tiny.and_combinations(["llama", "gpt2", "gemma"], ["llama"]))
@pytest.mark.parametrize("block", [5, 64])
def test_they_are_those_of_the_softmax(family, block, monkeypatch):
    monkeypatch.setattr(logprobs, "BLOCK", block)
    logprobs._of_next.clear_cache()
    model = tiny.model(tiny.CONFIGS[family])
    for length in (1, 7, 40):
        tokens = tiny.tokens(model.config, 1, length)
        found = logprobs.log_probabilities(model, tokens[0].tolist())
        want = special.log_softmax(np.float64(tiny.logits(model, jnp.asarray(tokens)))[0, :-1], axis=-1)
        np.testing.assert_allclose(found.tokens, want[np.arange(length - 1), tokens[0, 1:]], atol=1e-5)
        np.testing.assert_array_equal(found.top_ids, np.argsort(-want, axis=-1)[:, : logprobs.TOP])
        np.testing.assert_allclose(found.top, np.take_along_axis(want, found.top_ids, axis=-1), atol=1e-5)
    logprobs._of_next.clear_cache()


def test_what_the_model_cannot_read_is_refused():
    with pytest.raises(InputError, match="max_length is 64"):
        logprobs.log_probabilities(tiny.model(), [1] * 65)
