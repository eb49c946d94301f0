"""Text scored by the one protocol (evaluate.windows), with a bar on stderr that says how far it has come; and models
measured side by side: quality, then speed, all in turn."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from efflm import ops
from efflm.cli import progress
from efflm.evaluate import quality, tasks, throughput, windows
from efflm.evaluate.answers import Answers
from efflm.evaluate.quality import Block, Quality
from efflm.evaluate.task_files import Task
from efflm.evaluate.throughput import Protocol, Rate
from efflm.evaluate.windows import Scoring
from efflm.model import LanguageModel
from efflm.parallel import sharding

ROUNDED = "float rounding alone"  # the name beside the models' of the first one in another precision (quality.rounded)


def measure(
    models: dict[str, LanguageModel],
    text: Any,
    tokenizer: Any,
    scoring: Scoring,
    reference: LanguageModel,
    kept: dict[int, np.ndarray] | None = None,
) -> dict[str, Quality]:
    """`quality.measure` of a text (see data.dataset.Text) in the tokens of its tokenizer. scoring: as `within` says."""
    return quality.measure(models, blocks(text, tokenizer, scoring), reference, kept)


def blocks(text: Any, tokenizer: Any, scoring: Scoring) -> Iterator[Block]:
    """The text in blocks, with a bar."""
    found = windows.blocks(text.sized(), tokenizer.separator, scoring, text.unbroken)
    return _shown(found, f"reading {text.name}", text.sizes, scoring)


def against(first: LanguageModel, text: Any, tokenizer: Any, scoring: Scoring) -> Callable[[LanguageModel], Quality]:
    """A function that measures a model against the first one, of which what a text needs is computed once."""
    kept: dict[int, np.ndarray] = {}
    here = sharding.on_one_device
    return lambda model: measure({"": here(model)}, text, tokenizer, scoring, here(first), kept)[""]


def with_rounded(models: dict[str, LanguageModel]) -> dict[str, LanguageModel]:
    """The models, and where there are several the first one in another precision too, by the name ROUNDED: what float
    rounding alone does to the figures. It takes as long as one more model."""
    first = next(iter(models.values()))
    return models | ({ROUNDED: quality.rounded(first)} if len(models) > 1 else {})


def rounding(noise: Quality | None, precision: str) -> str:
    """What float rounding alone does, in words, "" if that was not measured. precision: of the first model."""
    if noise is None:
        return ""
    other = "bfloat16" if precision == "float32" else "float32"
    return (
        f" Float rounding alone (the first model computed in {other}): divergence "
        f"{quality.words(quality.divergence(noise), '.5f')} nats a token, the same likeliest token at "
        f"{quality.words(quality.agreement(noise), '.2%')} of the tokens."
    )


def protocol(text: Any, scoring: Scoring, measured: Quality) -> str:
    """What was scored and how, in words."""
    words = windows.described(scoring, text.name, len(text), measured, text.unbroken)
    return f"{words}; {text.left_out}" if text.left_out else words


def _shown(blocks: Iterable[Block], title: str, sizes: Sequence[int], scoring: Scoring) -> Iterator[Block]:
    """The blocks, with a bar and the time left where stderr is a terminal. sizes: bytes of each document.

    It counts bytes scored, or documents where only the first tokens of each are.
    """
    done, sizes = 0, sizes[: scoring.documents or None]
    with progress.bar(title, len(sizes) if scoring.tokens else sum(sizes)) as update:
        for block in blocks:
            yield block
            owners = block["documents"]
            scored = block["bytes"][owners > 0].sum()
            done = max(done, int(owners.max())) if scoring.tokens else done + int(scored)
            update(done)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What was measured, by the model's name, and in words how. rates: prefill and decode by the protocol; None where
    speed was not measured. noise: of the first model in another precision (`with_rounded`), None of a single model.
    answers: {name: {task: its answers}}, that of ROUNDED among them."""

    qualities: dict[str, Quality]
    rates: dict[str, tuple[Rate, Rate]] | None
    protocol: Protocol
    facts: tuple[str, ...]
    noise: Quality | None = None
    answers: Mapping[str, Mapping[str, Answers]] = dataclasses.field(default_factory=dict)


def side_by_side(
    models: dict[str, LanguageModel],
    text: Any,
    tokenizer: Any,
    score: Scoring,
    speed: bool = True,
    asked: Sequence[Task] = (),
) -> Figures:
    """Score a text (see data.dataset.Text), answer tasks, and time prefill and decode, all models in turn.

    models: not prepared for kernels yet; differences are those to the first. score: as `Scoring.within` says.
    """
    first = next(iter(models))
    here = {name: ops.prepare(model, jax.default_backend()) for name, model in models.items()}
    longest = min(model.config.max_length for model in models.values())
    of_tasks = tasks.described(asked, tokenizer, longest)  # first: it raises for items that no model can read
    found = measure(with_rounded(here), text, tokenizer, score, here[first])
    whole = {name: sharding.on_one_device(model) for name, model in here.items()} if asked else {}
    answers = tasks.answering(asked, tokenizer, whole[first])(with_rounded(whole)) if asked else {}
    noise = found.pop(ROUNDED, None)
    timing = throughput.protocol_for(models[first])
    rates, load = throughput.rates(here, timing) if speed else (None, "")
    against = f" Divergence: from {first}." if len(models) > 1 else ""
    against += rounding(noise, models[first].config.precision)
    facts = [f"Quality: {protocol(text, score, found[first])}.{against}", *of_tasks]
    return Figures(found, rates, timing, (*facts, *[f"Speed: {timing}.{load}"] * speed), noise, answers)
