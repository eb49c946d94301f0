import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops
from efflm.compress.quantize import quantize
from efflm.config import InputError
from efflm.infer import generate as module
from efflm.infer.generate import generate, prefill, start, stream
from efflm.infer.sampling import GREEDY, Sampling
from efflm.model import in_dtype, placement
from efflm.parallel import meshes, sharding
from tests import tiny

WARM = Sampling(temperature=1.5, top_k=40, top_p=0.95)
WINDOWED = dataclasses.replace(tiny.LLAMA, window=6)


def after(model, prompt):
    """The logits after a prompt, by one full forward: of 64 tokens, since what comes later is never looked at."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    return np.asarray(tiny.logits(model, jnp.asarray(tokens)))[0, len(prompt) - 1]


def prompts(config, *lengths):
    return [tiny.tokens(config, 1, length, seed=length)[0].tolist() for length in lengths]


@pytest.mark.parametrize("name", tiny.and_combinations(tiny.FAMILIES, ["gpt2", "qwen2", "neox", "gemma", "experts"]))
def test_greedy_equals_the_argmax_of_full_forwards(name):
    model = tiny.model(tiny.FAMILIES[name])
    tokens = np.zeros((2, 11), np.int32)  # what is not written yet is never looked at
    tokens[:, :5] = tiny.tokens(model.config, 2, 5)
    out = np.asarray(generate(model, tokens[:, :5], 6))
    for t in range(5, 11):
        tokens[:, t] = np.argmax(tiny.logits(model, jnp.asarray(tokens))[:, t - 1], axis=-1)
    np.testing.assert_array_equal(out, tokens[:, 5:])


@pytest.mark.parametrize("shape", [tiny.LLAMA, tiny.combination(tiny.GPT2), tiny.combination(tiny.UNTIED), WINDOWED])
def test_rows_of_different_lengths_equal_each_row_alone(shape):
    model = tiny.model(shape)
    some = prompts(model.config, 3, 14, 9)
    tokens_BT, lengths_B = module.padded(some, model.config, new=12)
    logits, cache = prefill(model, tokens_BT, lengths_B, cache_length=32)
    np.testing.assert_array_equal(cache.length_B, [3, 14, 9])
    state = start(logits, cache, module.row_keys(0, 3), GREEDY.arrays(), np.zeros(0, np.int32))
    next_B = np.asarray(state.token_B)
    state, _ = jax.jit(module.step)(model, state, GREEDY.arrays(), np.zeros(0, np.int32))
    for i, prompt in enumerate(some):
        np.testing.assert_allclose(logits[i], after(model, prompt), atol=1e-4)
        assert state.token_B[i] == np.argmax(after(model, [*prompt, next_B[i]]))
    together = generate(model, some, 12)
    assert together == [generate(model, [prompt], 12)[0] for prompt in some]
    assert all(len(row) == 12 for row in together)


def test_rows_of_a_longer_batch_are_drawn_alike():
    model = tiny.model()
    some = prompts(model.config, 5, 12)
    both = generate(model, some, 10, WARM, seed=3)
    assert both[0] == generate(model, some[:1], 10, WARM, seed=3)[0]
    assert both[0] != generate(model, some[:1], 10, WARM, seed=4)[0]
    assert generate(model, [some[0]] * 2, 10, WARM)[0] != generate(model, [some[0]] * 2, 10, WARM)[1]


@pytest.mark.parametrize("how", [GREEDY, WARM])
def test_streaming_gives_the_same_tokens_in_chunks(how):
    model = tiny.model()
    some = prompts(model.config, 4, 6)
    parts = list(stream(model, some, 14, how, chunk=4))
    assert [len(part[0]) for part in parts] == [1, 4, 4, 4, 1]
    joined = [[token for part in parts for token in part[i]] for i in range(2)]
    assert joined == generate(model, some, 14, how)


def test_a_row_ends_before_its_stop_token_and_the_loop_with_the_last_row(monkeypatch):
    model = tiny.model(dataclasses.replace(tiny.LLAMA, layers=1, mlp_dim=72))  # compiled nowhere else
    seen, original = [], module.sample

    def counted(*args):
        jax.debug.callback(lambda: seen.append(0))
        return original(*args)

    monkeypatch.setattr(module, "sample", counted)
    some = prompts(model.config, 4, 6)
    whole = generate(model, some, 30)
    stops = [whole[0][5], whole[1][11]]
    ends = [next(i for i, token in enumerate(row) if token in stops) for row in whole]
    jax.effects_barrier()
    seen.clear()
    assert generate(model, some, 30, stops=stops) == [row[:end] for row, end in zip(whole, ends)]
    jax.effects_barrier()
    assert max(ends) < 29
    assert len(seen) == max(ends) + 1  # the stop token is drawn, and nothing after it
    first = generate(model, some[:1], 30, stops=whole[0][:1])
    assert first == [[]]  # a stop token at once


def test_one_program_serves_a_bucket_of_lengths():
    model = tiny.model(dataclasses.replace(tiny.LLAMA, max_length=256, mlp_dim=56))
    counts = lambda: (module.prefill._cache_size(), module.decode._cache_size())
    before = counts()
    for length, new in ((3, 12), (9, 20), (16, 16), (11, 21)):
        for how in (GREEDY, WARM, Sampling(temperature=0.5, min_p=0.1)):
            list(stream(model, prompts(model.config, length), new, how, stops=[length]))
    # A prompt of at most 16; caches of 16 and of 32.
    assert np.subtract(counts(), before).tolist() == [2, 2]
    list(stream(model, prompts(model.config, 17), 15))  # a longer bucket of prompts, in a cache of 32
    assert np.subtract(counts(), before).tolist() == [3, 2]


def test_positions_beyond_the_context_are_refused():
    for shape in (tiny.GPT2, WINDOWED):
        model = tiny.model(shape)
        with pytest.raises(InputError, match=r"60 tokens and max_tokens is 5, together 65 .* max_length is 64"):
            generate(model, prompts(model.config, 60), 5)
        (full,) = generate(model, prompts(model.config, 60), 4)
        assert full[-1] == np.argmax(after(model, [*prompts(model.config, 60)[0], *full[:-1]]))


@pytest.mark.parametrize(
    ("some", "new", "message"),
    [
        ([], 3, "no prompt"),
        ([[1], []], 3, "prompt 1 is empty"),
        ([[1]], 0, "max_tokens is 0"),
        ([[300]], 3, "token 300 is not in the model's vocabulary of 300"),
        ([[-1]], 3, "token -1"),
    ],
)
def test_bad_prompts_are_refused(some, new, message):
    with pytest.raises(InputError, match=message):
        generate(tiny.model(), some, new)


@pytest.mark.parametrize("format", ["bfloat16", "float", "int8"])
def test_compressed_models_generate(format):
    model = tiny.model()
    quantized = format != "bfloat16"
    model = model.replace(params=quantize(model.params, format)) if quantized else in_dtype(model, format)
    (out,) = generate(model, [[0, 0, 0]], 4)
    assert len(out) == 4
    assert max(out) < model.config.vocabulary


def test_a_model_on_a_mesh_writes_the_same():
    model = tiny.model()
    some = prompts(model.config, 5, 12)
    mesh = meshes.make_mesh(fsdp=2, tensor=4)
    spread = model.replace(params=jax.device_put(model.params, placement.shardings(model.params, mesh)))
    assert generate(spread, some, 8) == generate(model, some, 8)


def test_every_phase_is_traced_inside_the_mesh_of_the_weights(monkeypatch):
    """What a shard_map inside would find; decoding leaves the layout of activations to the partitioner all the same."""
    model = tiny.model(dataclasses.replace(tiny.LLAMA, mlp_dim=40))  # compiled nowhere else
    mesh = meshes.make_mesh(fsdp=2, tensor=4)
    spread = model.replace(params=jax.device_put(model.params, placement.shardings(model.params, mesh)))
    attended, constrained, here = [], [], jax.sharding.get_abstract_mesh
    attention, constraint = ops.cached_attention, jax.lax.with_sharding_constraint

    def seen_attention(q_BTNH, *args, **inputs):
        attended.append((q_BTNH.shape[1], here().shape))
        return attention(q_BTNH, *args, **inputs)

    def seen_constraint(x, spec):
        constrained.append(x.shape)
        return constraint(x, spec)

    monkeypatch.setattr(ops, "cached_attention", seen_attention)
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", seen_constraint)
    generate(spread, [[1, 2, 3]] * 4, 3)
    assert {length for length, _ in attended} == {16, 1}
    assert all(shape == mesh.shape for _, shape in attended)
    assert (4, 16, model.config.width) in constrained
    assert (4, 1, model.config.width) not in constrained
    with sharding.mesh_of(model.params) as place:
        assert place is None
        assert here().empty
    eager, _ = module.forward(spread, jnp.asarray([[1, 2, 3]]))
    np.testing.assert_allclose(eager, module.forward(model, jnp.asarray([[1, 2, 3]]))[0], atol=1e-4)
