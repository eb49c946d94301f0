"""What models answer to the items of a task: which choice after the context is the likeliest, or whether the last word
is. Text is tokenized as lm-eval does it, so that the figures are the same.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from efflm.config import require
from efflm.evaluate import continuations
from efflm.evaluate.answers import Answers
from efflm.evaluate.continuations import Request, Scores
from efflm.evaluate.task_files import Task
from efflm.model import LanguageModel


def run(
    models: dict[str, LanguageModel],
    task: Task,
    tokenizer: Any,
    reference: LanguageModel,
    kept: dict[int, np.ndarray] | None = None,
) -> dict[str, Answers]:
    """What each model answers. models, kept: as `continuations.scores` has them. Raises InputError for an item that a
    model cannot read."""
    longest = min(model.config.max_length for model in (reference, *models.values()))
    requests = encoded(task, tokenizer, longest)
    found = continuations.scores(models, requests, reference, kept, f"answering {task.name}")
    return {name: _answers(task, requests, each) for name, each in found.items()}


def answering(
    found: Sequence[Task], tokenizer: Any, reference: LanguageModel
) -> Callable[[dict[str, LanguageModel]], dict[str, dict[str, Answers]]]:
    """A function that gives {name: {task: answers}} of models by name. What the reference makes of the items is
    computed once."""
    kept: list[dict[int, np.ndarray]] = [{} for _ in found]

    def answered(models: dict[str, LanguageModel]) -> dict[str, dict[str, Answers]]:
        each = {task.name: run(models, task, tokenizer, reference, own) for task, own in zip(found, kept)}
        return {name: {task: answers[name] for task, answers in each.items()} for name in models}

    return answered


def described(found: Sequence[Task], tokenizer: Any, longest: int) -> list[str]:
    """What was asked and how, in words; nothing where nothing was. Raises InputError for an item that a model of so
    many tokens cannot read."""
    asked = []
    for task in found:
        requests = encoded(task, tokenizer, longest)
        cut = sum(any(continuations.is_cut(context, end, longest) for end in ends) for context, ends in requests)
        how = "multiple choice" if task.kind == "choices" else "the last word, right if each of its tokens is likeliest"
        left = f"; the context of {cut:,} is cut on the left to the model's {longest:,} tokens" if cut else ""
        asked.append(f"{task.name}, {len(task.items):,} items, {how}{left}")
    return [f"Tasks: {'; '.join(asked)}. Without examples, tokenized and scored as lm-eval does it."] if asked else []


def encoded(task: Task, tokenizer: Any, longest: int) -> list[Request]:
    """The ids of each item's context and choices. Raises InputError."""
    found = []
    for item in task.items:
        pairs = [pair(tokenizer, item.context, choice) for choice in item.choices]
        for choice, (_, end) in zip(item.choices, pairs):
            where = f"{task.name}: the choice {choice!r:.60} of the item {item.name}"
            require_readable(where, len(end), longest)
        found.append((pairs[0][0], [end for _, end in pairs]))  # the context of all choices is the same
    return found


def require_readable(what: str, tokens: int, longest: int) -> None:
    """Raise InputError unless what follows a context has tokens, and not more than a model reads."""
    require(tokens > 0, f"{what} adds no token to the context: give a longer one")
    require(tokens <= longest, f"{what} has {tokens:,} tokens, but the model reads {longest:,}: leave it out")


def pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows it, as lm-eval has them: spaces at the end of a context go to the
    continuation, and both are tokenized as one text. An empty context is the token that the model expects first."""
    if not context:
        prefix, ids = prefix_token(tokenizer), tokenizer.encode(continuation)
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
    cut = len(context.rstrip())
    context, continuation = context[:cut], context[cut:] + continuation
    first = whole_text(tokenizer, context)
    return first, whole_text(tokenizer, context + continuation)[len(first) :]


def prefix_token(tokenizer: Any) -> int:
    """The token that a text without a context is read after: bos, else eos."""
    known = [token for token in (tokenizer.bos, tokenizer.eos) if token is not None]
    return known[0] if known else tokenizer.separator


def whole_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, after what the model expects before it, unless the text says that itself."""
    bos = tokenizer.names.get("bos_token")
    return tokenizer.encode(text) if bos and text.startswith(bos) else tokenizer.prompt(text)


def _answers(task: Task, requests: list[Request], scores: Scores) -> Answers:
    counts = [len(ends) for _, ends in requests]
    item_of = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    ends = list(itertools.chain.from_iterable(ends for _, ends in requests))
    sums = lambda figure: np.bincount(scores.owners, figure, minlength=len(ends))

    def table(values: Any, empty: Any) -> np.ndarray:
        """One value a choice as [items, choices]."""
        values = np.asarray(values)
        out = np.full((len(counts), max(counts)), empty, values.dtype)
        out[item_of, place] = values
        return out

    labels = np.array([item.label for item in task.items])
    loglikelihoods = table(-sums(scores.nats), -np.inf)
    tokens = table([len(end) for end in ends], 0)
    confidence, right = scores.confidence, scores.right
    if task.kind == "choices":
        confidence = special.softmax(loglikelihoods, axis=1).max(axis=1)
        right = loglikelihoods.argmax(axis=1) == labels
    choices = itertools.chain.from_iterable(item.choices for item in task.items)
    return Answers(
        kind=task.kind,
        loglikelihoods=loglikelihoods,
        tokens=tokens,
        bytes=table([size(choice) for choice in choices], 0),
        greedy=table(sums(~scores.right) == 0, False),
        kl=table(sums(scores.kl), 0.0).sum(axis=1) / tokens.sum(axis=1),
        confidence=confidence,
        right=right,
        labels=labels,
    )


def size(choice: str) -> int:
    """Bytes by which a choice's log-likelihood is normalized: without the space that joins it to the context, which
    lm-eval does not count either."""
    return len(choice.removeprefix(" ").encode())
