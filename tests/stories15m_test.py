"""A model trained elsewhere drives the same Transformer: llama2.c's stories15M goes on with a story."""

import os
from pathlib import Path

import pytest

from efflm.compress.quantize import quantize
from efflm.infer.generate import generate
from efflm.model import LanguageModel
from experiments.peers import llama2c

DATA = Path(os.environ.get("EFFLM_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not (DATA / "stories15M.bin").exists(), reason=f"no stories15M.bin in {DATA}: set EFFLM_DATA to its folder"
)
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the"


@pytest.mark.parametrize("quantized", [False, True])
def test_it_tells_a_story(quantized):
    model = llama2c.load_model(DATA / "stories15M.bin")
    tokens = llama2c.load_tokenizer(DATA / "stories15M.tokenizer.bin")
    if quantized:
        model = LanguageModel(model.config, quantize(model.params))
    prompt = [*tokens.before, *tokens.encode("Once upon a time")]
    (ids,) = generate(model, [prompt], 40)
    text = tokens.decode([*prompt[len(tokens.before) :], *ids]).strip()
    assert text.startswith(STORY), text
