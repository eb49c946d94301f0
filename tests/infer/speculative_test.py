import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.config import InputError
from efflm.infer import generate as plain
from efflm.infer import speculative
from efflm.infer.sampling import GREEDY, Sampling, probabilities, ranked
from tests import tiny

SMALL = dataclasses.replace(tiny.LLAMA, layers=1, width=24)
TEN = dataclasses.replace(tiny.LLAMA, vocabulary=257)  # the fewest entries a byte-level model has


def prompts(config, *lengths):
    return [tiny.tokens(config, 1, length, seed=length)[0].tolist() for length in lengths]


def varied(shape):
    """A model that does not repeat one token, as tiny ones do: then no stop token has another token after it."""
    return half_right(tiny.model(shape), seed=9, size=0.4)


def half_right(model, seed=0, size=0.03):
    """A draft that often proposes what the model would write: its own weights, disturbed."""
    rng = np.random.default_rng(seed)
    shaken = lambda w: w + size * rng.standard_normal(w.shape).astype(np.float32)
    return model.replace(params=jax.tree.map(shaken, model.params))


@pytest.mark.parametrize("name", tiny.and_combinations(["llama", "gpt2", "qwen2"], ["gpt2", "qwen2"]))
def test_greedy_gives_what_the_model_alone_writes(name):
    model = varied(tiny.CONFIGS[name])
    some = prompts(model.config, 3, 14, 9)
    want = plain.generate(model, some, 20)
    for draft in (half_right(model), tiny.model(dataclasses.replace(SMALL), seed=5)):
        got, told = speculative.generate(model, draft, some, 20, ahead=3)
        assert got == want
        assert told.drafted == 3 * told.passes
        # A pass writes one token and those that stayed; of the last one some may be beyond the limit.
        assert 0 <= told.passes + told.accepted - 3 * 19 <= 3 * 3
    stop = want[1][4]
    for draft in (half_right(model), model):
        cut, _ = speculative.generate(model, draft, some, 20, stops=[stop], ahead=3)
        assert cut == plain.generate(model, some, 20, stops=[stop])


def test_a_draft_that_is_the_model_is_always_right():
    model = tiny.model()
    got, told = speculative.generate(model, model, prompts(model.config, 5), 21, ahead=4)
    assert got == plain.generate(model, prompts(model.config, 5), 21)
    assert (told.acceptance, told.passes) == (1.0, 4)  # the first token, then five a pass


def test_what_stays_and_what_follows_is_distributed_as_the_target_says():
    """Over many keys, for two proposals: by enumeration the pair of the first two tokens has p's probabilities."""
    rng, rows, V = np.random.default_rng(0), 20_000, 5
    q_AV, p_TV = rng.dirichlet(np.ones(V), 2), rng.dirichlet(np.ones(V), 3)
    keys_B = jax.random.split(jax.random.key(1), rows)
    where_B, how = jnp.full(rows, 7), Sampling(temperature=1.0).arrays()
    ids_BA = jnp.stack(
        [
            speculative._drawn(jnp.tile(q_AV[i], (rows, 1)), speculative.keys_at(keys_B, where_B + i, 0), how)
            for i in (0, 1)
        ],
        axis=1,
    )
    of_all = lambda p: jnp.broadcast_to(jnp.asarray(p, jnp.float32), (rows, *p.shape))
    count_B, token_B = jax.jit(speculative.verify)(of_all(p_TV), of_all(q_AV), ids_BA, keys_B, where_B, how)
    count_B, token_B, ids_BA = (np.asarray(x) for x in (count_B, token_B, ids_BA))
    first = np.where(count_B == 0, token_B, ids_BA[:, 0])
    np.testing.assert_allclose(np.bincount(first, minlength=V) / rows, p_TV[0], atol=0.015)
    has_second = count_B >= 1
    second = np.where(count_B == 1, token_B, ids_BA[:, 1])[has_second]
    np.testing.assert_allclose(np.bincount(second, minlength=V) / has_second.sum(), p_TV[1], atol=0.02)
    third = token_B[count_B == 2]
    np.testing.assert_allclose(np.bincount(third, minlength=V) / len(third), p_TV[2], atol=0.03)
    stays = np.minimum(q_AV[0], p_TV[0]).sum()  # Leviathan 2022, theorem 3.5
    assert has_second.mean() == pytest.approx(stays, abs=0.015)


def test_whole_sequences_are_distributed_as_the_target_says():
    """The second and third token of many sequences after one prompt, against the model's own probabilities."""
    model, rows = tiny.model(TEN), 1500
    draft, warm = half_right(model, seed=3), Sampling(temperature=0.5, top_k=6)
    prompt = tiny.tokens(model.config, 1, 4)[0].tolist()
    got, told = speculative.generate(model, draft, [prompt] * rows, 3, warm, seed=2, ahead=2)
    alone = plain.generate(model, [prompt] * rows, 3, warm, seed=9)
    assert 0.2 < told.acceptance < 0.98
    for place in (1, 2):
        one, other = (np.bincount([ids[place] for ids in each], minlength=257) / rows for each in (got, alone))
        assert np.abs(one - other).sum() / 2 < 0.09  # two samples of the same distribution differ by about 0.06
    from_draft = plain.generate(draft, [prompt] * rows, 3, warm, seed=9)
    far = np.bincount([ids[1] for ids in from_draft], minlength=257) / rows
    assert np.abs(far - np.bincount([ids[1] for ids in alone], minlength=257) / rows).sum() / 2 > 0.15


@pytest.mark.parametrize(
    "how", [GREEDY, Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=5), Sampling(temperature=1, top_p=0.6),
            Sampling(temperature=2, min_p=0.3, top_p=0.9)]
)  # fmt: skip
def test_probabilities_are_those_that_tokens_are_drawn_by(how):
    logits_BV = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    p_BV = np.asarray(probabilities(jnp.asarray(logits_BV), how.arrays()))
    np.testing.assert_allclose(p_BV.sum(-1), 1, rtol=1e-5)
    if how is GREEDY:
        np.testing.assert_array_equal(p_BV.argmax(-1), logits_BV.argmax(-1))
        return
    order_BV, scores_BV = (np.asarray(x) for x in ranked(jnp.asarray(logits_BV), how.arrays()))
    for p_V, order_V, scores_V in zip(p_BV, order_BV, scores_BV, strict=True):
        want_V = np.exp(scores_V - scores_V.max())
        np.testing.assert_allclose(p_V[order_V], want_V / want_V.sum(), rtol=1e-5)


def test_what_cannot_be_is_refused():
    model = tiny.model()
    with pytest.raises(InputError, match="the draft's vocabulary is 301, the model's 300"):
        speculative.generate(model, tiny.model(dataclasses.replace(SMALL, vocabulary=301)), [[1]], 4)
    with pytest.raises(InputError, match="ahead is 0, but must be a positive whole number"):
        speculative.generate(model, model, [[1]], 4, ahead=0)
    with pytest.raises(InputError, match="max_length is 16"):
        speculative.generate(model, tiny.model(dataclasses.replace(SMALL, max_length=16)), [[1] * 10], 20)


@pytest.mark.parametrize("shape", [tiny.GPT2, tiny.LLAMA], ids=["gpt2", "llama"])
def test_what_is_proposed_beyond_the_last_position_changes_nothing(shape):
    model = tiny.model(shape)
    some = prompts(model.config, 14)
    got, _ = speculative.generate(model, half_right(model), some, 50, ahead=7)
    assert got == plain.generate(model, some, 50)
