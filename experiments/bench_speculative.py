"""How fast is a model with a smaller one that proposes its tokens (infer.speculative), compared with the model alone?

    python -m experiments.bench_speculative --model=runs/pretrain --draft=runs/compress/depth50_distill.safetensors
    python -m experiments.bench_speculative --model=smollm2 --draft=small.safetensors --corpus=notes/ --ahead="2 4 8"

Expect a line for each number of tokens proposed at a time: the share of proposals that stay, tokens for each pass of
the model, tokens a second with and without the draft, and the ratio of these medians. A ratio below 1 means that the
draft makes it slower. The model alone and each number take turns in every round. The prompts are the first tokens of
test documents, one sequence at a time; the time is that of the whole text, reading the prompt included.
"""

import dataclasses
import itertools
import statistics
import time

import jax
import numpy as np

from efflm import ops
from efflm.cli import run_directory
from efflm.cli.flags import launch
from efflm.config import PRECISION, AskedPrecision, InputError, flag, require
from efflm.data import corpora, dataset
from efflm.formats import sources
from efflm.formats.sources import KINDS
from efflm.infer import generate, speculative
from efflm.infer.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag(str(run_directory.ROOT / "quickstart"), KINDS, path=True)
    draft: str = flag("", "a smaller model with the same tokenizer", path=True)
    corpus: str = flag("", f"{corpora.KINDS}; default: what the model was trained on, else stdlib", path=True)
    strict: bool = flag(False, corpora.STRICT)
    precision: AskedPrecision = flag("", PRECISION)
    ahead: str = flag("2 4 8", "tokens that the draft proposes at a time, with spaces between them")
    prompts: int = flag(4, "test documents that are gone on from")
    prompt_tokens: int = flag(32, "tokens of each that are the prompt")
    max_tokens: int = flag(64, "tokens to write")
    temperature: float = flag(0.0, "0 takes the likeliest token")
    rounds: int = flag(5, "rounds of which the median is taken, after one that compiles")

    def __post_init__(self):
        for name in ("prompts", "prompt_tokens", "max_tokens", "rounds"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, but must be positive")
        require(bool(self.numbers), "ahead is empty: give numbers, as in '2 4 8'")

    @property
    def numbers(self) -> list[int]:
        try:
            numbers = [int(number) for number in self.ahead.split()]
        except ValueError:
            numbers = [0]
        require(all(number > 0 for number in numbers), f"ahead is {self.ahead!r}, but must be positive numbers")
        return numbers


def main(run: Run) -> None:
    require(bool(run.draft), "--draft is missing: give a smaller model with the same tokenizer")
    target, draft = (sources.load(each, precision=run.precision) for each in (run.model, run.draft))
    if target.tokenizer.ids_digest != draft.tokenizer.ids_digest:
        raise InputError(f"the tokenizer of {run.draft} is not that of {run.model}: give a draft that has it")
    models = [ops.prepare(each.model, jax.default_backend()) for each in (target, draft)]
    source = dataset.source_of(run.corpus, target.about)
    text = dataset.held_out(source, target.tokenizer, dataset.cache(), strict=run.strict)
    read = (list(itertools.islice(document, run.prompt_tokens)) for document in text)
    prompts = list(itertools.islice((ids for ids in read if len(ids) == run.prompt_tokens), run.prompts))
    require(bool(prompts), f"no test document of {source} has {run.prompt_tokens} tokens: ask for shorter prompts")
    how = (run.max_tokens, Sampling(temperature=run.temperature))

    def once(ahead: int) -> tuple[float, int, list[speculative.Statistics]]:
        """Seconds, tokens written, and what the draft did. ahead: 0: without it."""
        began, written, told = time.perf_counter(), 0, []
        for prompt in prompts:
            if ahead:
                (ids,), statistics_ = speculative.generate(*models, [prompt], *how, ahead=ahead)
                told.append(statistics_)
            else:
                (ids,) = generate.generate(models[0], [prompt], *how)
            written += len(ids)
        return time.perf_counter() - began, written, told

    rates: dict[int, list[float]] = {ahead: [] for ahead in (0, *run.numbers)}
    for round_, ahead in itertools.product(range(run.rounds + 1), rates):
        seconds, written, told = once(ahead)
        if round_:
            rates[ahead].append(written / seconds)
        if round_ < run.rounds or not ahead:
            continue
        drafted, accepted, passes = (
            sum(getattr(each, name) for each in told) for name in ("drafted", "accepted", "passes")
        )
        alone, this = (statistics.median(rates[number]) for number in (0, ahead))
        found = {
            "ahead": ahead,
            "acceptance": round(accepted / drafted, 3),
            "tokens_per_pass": round((accepted + passes) / passes, 2),
            "tokens_per_second": round(this, 1),
            "alone": round(alone, 1),
            "ratio": round(this / alone, 3),
            "quartiles": [round(float(q) / alone, 3) for q in np.quantile(rates[ahead], (0.25, 0.75))],
        }
        print(run_directory.to_json(found), flush=True)
        if found["ratio"] <= 1:
            print(f"  no speedup here with {ahead} tokens at a time", flush=True)
    cpu = run_directory.machine()["cpu"]
    print(f"  {len(prompts)} prompts of {run.prompt_tokens} tokens, {run.max_tokens} new, on {cpu}")


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
