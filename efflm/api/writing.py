"""Text that models write."""

from collections.abc import Iterator, Sequence

import jax

from efflm import ops
from efflm.cli import arguments
from efflm.config import require
from efflm.infer import speculative, streaming
from efflm.infer.generate import generate as generate_ids
from efflm.infer.sampling import Sampling
from efflm.model import LanguageModel, require_same_tokenizer
from efflm.text import encoding, fitted
from efflm.text.chat import prompt_ids
from efflm.text.tokenizer import Tokenizer


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer | None = None,
    prompt: str | Sequence[str] | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: str = "",
    chat: bool = False,
    system: str = "",
    draft: LanguageModel | None = None,
    ahead: int = 4,
) -> str | list[str]:
    """What the model writes after the prompt; for several prompts, a list.

    It ends before a stop token of the model's or the text `stop`, or after max_tokens. temperature: 0 takes the
    likeliest token. chat: the prompt is a question, which the model's chat template puts. draft: a smaller model
    with the same tokenizer, which proposes `ahead` tokens at a time; what is written is as likely as without it (see
    infer.speculative).

    The first call with a model lays it out for this machine and compiles; later ones of the same lengths reuse both.
    """
    model, draft, ids = _to_write(model, draft, tokenizer, prompt, max_tokens, stop, chat, system)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    here = ops.prepared(model, jax.default_backend())
    if draft is None:
        new_ids = generate_ids(here, ids, max_tokens, sampling, tokenizer.stops, seed)
    else:
        small = ops.prepared(draft, jax.default_backend())
        new_ids, _ = speculative.generate(here, small, ids, max_tokens, sampling, tokenizer.stops, seed, ahead)
    texts = [encoding.until([stop])(tokenizer.stream()(new, final=True), final=True)[0] for new in new_ids]
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer | None = None,
    prompt: str | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: str = "",
    chat: bool = False,
    system: str = "",
    draft: LanguageModel | None = None,
    ahead: int = 4,
) -> Iterator[str]:
    """What `generate` gives for one prompt and the same arguments, in pieces as they are written.

    Characters come whole, and nothing of the text `stop` comes. The model writes when it is asked for the next piece:
    leaving the loop ends its work.

        for text in efflm.stream(model, tokenizer, "The capital of France is"):
            print(text, end="", flush=True)
    """
    require(not isinstance(prompt, list | tuple), "prompt is a list, but stream goes on from one text: use generate")
    model, draft, (ids,) = _to_write(model, draft, tokenizer, prompt, max_tokens, stop, chat, system)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    settings = {"stops": [stop], "seed": seed, "draft": draft, "ahead": ahead}
    pieces = streaming.pieces(model, tokenizer, ids, max_tokens, sampling, **settings)
    return (piece.text for piece in pieces if piece.text)


def _to_write(
    model: LanguageModel,
    draft: LanguageModel | None,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[str] | None,
    max_tokens: int,
    stop: str,
    chat: bool,
    system: str,
) -> tuple[LanguageModel, LanguageModel | None, list[list[int]]]:
    """The two models, which know the tokenizer's ids where they compare their probabilities, and the ids of the
    prompts. Raises InputError."""
    arguments.require_model(model)
    arguments.require_tokenizer(tokenizer, model, "generating needs")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    require(
        isinstance(prompts, list | tuple) and len(prompts) > 0 and all(isinstance(each, str) for each in prompts),
        f"prompt is {arguments.shown(prompt)}, but must be text or a list of texts: generate(model, tokenizer, prompt)",
    )
    require(type(max_tokens) is int, f"max_tokens is {arguments.shown(max_tokens)}, but must be an integer")
    require(isinstance(stop, str), f"stop is {arguments.shown(stop)}, but must be text")
    texts = {"stop": stop, "system": system} | {f"prompt {i}": each for i, each in enumerate(prompts)}
    for name, each in texts.items():
        encoding.require_characters(each, name)
    if draft is not None:
        arguments.require_model(draft)
        model, draft = (fitted.told(each, tokenizer) for each in (model, draft))
        arguments.require_tokenizer(tokenizer, draft, "drafting needs")
        require_same_tokenizer(draft, model, "draft", "model")
    return model, draft, [prompt_ids(tokenizer, each, model.about, chat=chat, system=system) for each in prompts]
