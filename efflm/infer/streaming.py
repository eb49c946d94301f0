"""Text while a model writes it: the token ids of infer.generate and infer.speculative as pieces of whole characters."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from efflm import ops
from efflm.infer import generate, speculative
from efflm.infer.sampling import GREEDY, Sampling
from efflm.model import LanguageModel
from efflm.text import encoding


class Piece(NamedTuple):
    """text: what follows the piece before it, "" where a character is not complete. ids: the new tokens, the
    stop token that ends the text among them. end: of the last piece why it is the last: "length" for max_tokens, "stop"
    for a stop token or text. drafting: with a draft, how its tokens fared so far."""

    text: str
    ids: list[int]
    end: str = ""
    drafting: speculative.Statistics | None = None


def pieces(
    model: LanguageModel,
    tokenizer: Any,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stops: Sequence[str] = (),
    seed: int = 0,
    draft: LanguageModel | None = None,
    ahead: int = 4,
    chunk: int = 1,
) -> Iterator[Piece]:
    """What the model writes after the ids of a prompt, up to a stop token of the tokenizer's or one of the texts
    `stops`; at least one piece. Together they are the text that is written in one go.

    chunk: tokens in a piece, where there is no draft; of models that write a thousand tokens a second, more are faster.
    Models are laid out for this machine once (ops.prepared). Nothing is computed before a piece is asked for, and
    closing the iterator ends the work and frees the cache. Raises InputError, when called and not at the first piece.
    """
    model, draft = (each and ops.prepared(each, jax.default_backend()) for each in (model, draft))
    how = ([prompt], max_tokens, sampling, tokenizer.stops, seed)
    if draft is None:
        chunks = ((rows, None) for rows in generate.stream(model, *how, chunk))
    else:
        chunks = speculative.stream(model, draft, *how, ahead)

    def texts() -> Iterator[Piece]:
        decode, up_to, end, drafting = tokenizer.stream(), encoding.until(stops), "length", None
        for (new,), drafting in chunks:
            ids = generate.without_stop(new, tokenizer.stops)
            text, stopped = up_to(decode(ids))
            if stopped:
                yield Piece(text, new, "stop", drafting)
                return
            end = "length" if ids == new else "stop"
            yield Piece(text, new, "", drafting)
        text, stopped = up_to(decode([], final=True), final=True)
        yield Piece(text, [], "stop" if stopped else end, drafting)

    return texts()
