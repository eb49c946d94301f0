"""Models for lm-eval (EleutherAI's harness, an optional package: pip install lm-eval), whose tasks ask for three
things: log-likelihoods of continuations, of whole texts, and text that is written until a stop string comes.

    from efflm.evaluate import lm_eval
    found = lm_eval.evaluate(model, tokenizer, ["arc_easy"], items=100)
    print(found["results"])

Its figures on items in a file are those of evaluate.tasks, which asks by the same functions.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efflm import ops
from efflm.cli import progress
from efflm.config import InputError, require
from efflm.evaluate import continuations, tasks
from efflm.evaluate.continuations import Request
from efflm.infer import generate
from efflm.infer.sampling import Sampling
from efflm.model import LanguageModel
from efflm.parallel import sharding

ROWS = 16  # texts that are written side by side
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call the most tokens
WRITTEN = 256  # tokens, where a task says nothing
RESAMPLED = 1000  # draws for the standard error of a perplexity
SAMPLED = ("temperature", "top_k", "top_p", "min_p")


class Answering:
    """What lm-eval asks of a model. requests: have `args`, what is asked."""

    def __init__(self, model: LanguageModel, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = ops.prepared(sharding.on_one_device(model), jax.default_backend()), tokenizer

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p in nats, whether each token is the likeliest) of a continuation. args: its context, and itself."""
        pairs = [tasks.pair(self.tokenizer, *request.args) for request in requests]
        longest = self.model.config.max_length
        for request, (_, end) in zip(requests, pairs):
            tasks.require_readable(f"the continuation {request.args[1]!r:.60}", len(end), longest)
        shared = itertools.groupby(pairs, key=lambda pair: pair[0])  # the choices of an item come one after the other
        return self._scored([(context, [end for _, end in ends]) for context, ends in shared])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p in nats of each text, which is read in windows of the model's length, each token once and after as many
        as there is room for. args: the text."""
        windows = [list(self._windows(*request.args)) for request in requests]
        found = iter(self._scored([window for each in windows for window in each]))
        return [sum((nats for nats, _ in itertools.islice(found, len(each))), 0.0) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes until a stop string or token. args: the context, and settings as tasks have them."""
        asked = [_settings(request.args[1]) for request in requests]
        ids = [self._ids(request.args[0], most) for request, (most, _, _) in zip(requests, asked)]
        order = sorted(range(len(ids)), key=lambda i: (repr(asked[i]), -len(ids[i])))  # alike and of like length
        alike = [list(group) for _, group in itertools.groupby(order, key=lambda i: repr(asked[i]))]
        batches = [group[start : start + ROWS] for group in alike for start in range(0, len(group), ROWS)]
        out = [""] * len(ids)
        for batch in progress.shown(batches, "writing", len(ids), len):
            for i, text in zip(batch, self._written([ids[i] for i in batch], *asked[batch[0]])):
                out[i] = text
        return out

    def _scored(self, requests: list[Request]) -> list[tuple[float, bool]]:
        """Of each continuation."""
        found = continuations.scores({"": self.model}, requests, self.model)[""]
        count = sum(len(ends) for _, ends in requests)
        nats = np.bincount(found.owners, found.nats, minlength=count)
        wrong = np.bincount(found.owners, ~found.right, minlength=count)
        return list(zip((-nats).tolist(), (wrong == 0).tolist()))

    def _windows(self, text: str) -> Iterator[Request]:
        longest = self.model.config.max_length
        ids = [tasks.prefix_token(self.tokenizer), *tasks.whole_text(self.tokenizer, text)]
        for start in range(1, len(ids), longest):
            end = min(start + longest, len(ids))
            yield ids[max(0, end - 1 - longest) : start], [ids[start:end]]

    def _ids(self, context: str, most: int) -> list[int]:
        """The last tokens of a context, as many as leave room for `most` more."""
        room = self.model.config.max_length - most
        require(room > 0, f"{most} tokens are asked for, but the model reads {self.model.config.max_length}: ask fewer")
        return (tasks.whole_text(self.tokenizer, context) or [tasks.prefix_token(self.tokenizer)])[-room:]

    def _written(self, ids: list[list[int]], most: int, stops: tuple[str, ...], sampling: Sampling) -> list[str]:
        texts, decoders = [""] * len(ids), [self.tokenizer.stream() for _ in ids]
        for new in generate.stream(self.model, ids, most, sampling, self.tokenizer.stops):
            texts = [text + decode(each) for text, decode, each in zip(texts, decoders, new)]
            if all(not each or any(stop in text for stop in stops) for text, each in zip(texts, new)):
                break
        for i, decode in enumerate(decoders):
            texts[i] += decode([], final=True)
            for stop in stops:
                texts[i] = texts[i].partition(stop)[0]
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.chat(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.digest


def _settings(given: dict[str, Any]) -> tuple[int, tuple[str, ...], Sampling]:
    """The most tokens, stop strings, and how to sample."""
    until = given.get("until") or ()
    known = {"until", "do_sample", *LENGTHS, *SAMPLED}
    unknown = ", ".join(sorted(set(given) - known))
    require(not unknown, f"the task asks to generate with {unknown}: known are {', '.join(sorted(known))}")
    most = next((int(given[name]) for name in LENGTHS if given.get(name) is not None), WRITTEN)
    sampled = {name: given[name] for name in SAMPLED if given.get(name) is not None}
    drawn = given.get("do_sample", sampled.get("temperature", 0) > 0)
    sampling = Sampling(**({"temperature": 1.0} | sampled)) if drawn else Sampling()
    return most, (until,) if isinstance(until, str) else tuple(filter(None, until)), sampling


def adapted(model: LanguageModel, tokenizer: Any) -> Any:
    """The model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`. Raises InputError."""
    return type("Efflm", (Answering, _package().api.model.LM), {})(model, tokenizer)


def evaluate(
    model: LanguageModel, tokenizer: Any, names: Sequence[str], folder: str | Path = "", items: int = 0
) -> dict[str, Any]:
    """What lm-eval finds: its results. names, folder: see `tasks_of`; items: of each task, its first; 0: all."""
    package = _package()
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # read by lm-eval: it would fork, and threads here may hold locks
    return package.simple_evaluate(
        adapted(model, tokenizer),
        tasks=list(names),
        task_manager=tasks_of(names, folder),
        limit=items or None,
        bootstrap_iters=RESAMPLED,
    )


def tasks_of(names: Sequence[str], folder: str | Path = "") -> Any:
    """lm-eval's tasks, and those of a folder of .yaml files if it is there. Raises InputError for names of no task."""
    manager = _package().tasks.TaskManager(include_path=str(folder) if folder and Path(folder).is_dir() else None)
    unknown = ", ".join(sorted(set(names) - set(manager.all_tasks)))
    require(not unknown, f"lm-eval has no task {unknown}: `lm_eval ls tasks` lists its own, or give a folder of yours")
    return manager


def table(found: dict[str, Any]) -> str:
    """What `evaluate` found, as lm-eval shows it."""
    return _package().utils.make_table(found)


def _package() -> Any:
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError:
        raise InputError("lm-eval is not installed: pip install lm-eval") from None
    return lm_eval
