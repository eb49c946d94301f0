"""Models made smaller, and the text that the steps are given."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax

from efflm.cli import arguments
from efflm.cli.arguments import SOURCE
from efflm.compress import recipe
from efflm.compress.step import Calibration, Context, Step, calibrates, reads_text, trains
from efflm.config import require
from efflm.data import dataset, loader
from efflm.model import LanguageModel, placement
from efflm.parallel import meshes, sharding
from efflm.text.tokenizer import Tokenizer

ARGUMENTS = ("batch or length", "calibration_rows or calibration_length")  # of `compress`, that ask for text
FLAGS = ("--batch or --length", "--calibration.rows or --calibration.length")  # the same of commands


def compress(
    model: LanguageModel,
    steps: str | Step | Sequence[str | Step] | None = None,
    text: SOURCE | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    seed: int = 0,
    batch: int = 8,
    length: int = 256,
    calibration_rows: int = 128,
    calibration_length: int = 512,
    strict: bool = False,
) -> LanguageModel:
    """The model after the steps, one after the other.

    steps: a chain such as "gptq@3,distill@0.5" or the file of one (see efflm.compress.grammar; the names of recipes are
    chains too), steps such as Magnitude(sparsity=0.3), or a list of both.
    Where a step trains or is calibrated it needs the model's tokenizer and text, of which the test split is kept
    apart (see `measure`); default: what the model itself was trained on here. Steps of your own get it where it is
    given.
    batch, length: sequences in a training batch and tokens in each; calibration_rows, calibration_length: of the
    calibration text. strict: refuse files that are not UTF-8 text.
    """
    arguments.require_model(model)
    name, chain = arguments.chain(steps)
    counts = {"calibration_rows": calibration_rows, "calibration_length": calibration_length}
    for setting, value in ({"batch": batch, "length": length} | counts).items():
        require(
            type(value) is int and value > 0, f"{setting} is {arguments.shown(value)}, but must be a positive integer"
        )
    if reads_text(chain) or (text is not None and not recipe.known(chain)):
        does = "trains" if trains(chain) else "is calibrated"
        require(
            text is not None or "source" in model.about,
            f"{name} {does}, which needs text: give text=FOLDER, or any of {arguments.TEXT}",
        )
        source = arguments.text_of(model.about["source"] if text is None else text)
        arguments.require_tokenizer(tokenizer, model, f"{name} {does} on text, which needs")
        settings = {"batch": batch, "length": length, "seed": seed, "strict": strict}
        calibration = Calibration(rows=calibration_rows, length=calibration_length)
        context = context_for(
            chain, source, dataset.cache(), model, tokenizer, calibration=calibration, lower=ARGUMENTS, **settings
        )
        model = jax.device_put(model, placement.shardings(model, context.mesh)).with_about(model.about)
    else:
        context = Context(seed=seed, mesh=meshes.make_mesh())
    after, records = recipe.apply(model, chain, context)
    lineage = [*model.about.get("lineage", ()), *map(dataclasses.asdict, records)]
    return sharding.on_one_device(after).with_about({**model.about, "recipe": name, "lineage": lineage})


def context_for(
    steps: Sequence[Step],
    source: str,
    cache: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    batch: int,
    length: int,
    calibration: Calibration,
    seed: int,
    lower: tuple[str, str],
    strict: bool = False,
) -> Context:
    """What steps are given. Of the training split of `source`: batches of `length` tokens where one of them trains or
    is not known, and calibration text where one needs it. lower: the caller's names of what makes a batch smaller, and
    of what makes the calibration text smaller. Raises InputError with these."""
    if not reads_text(steps) and recipe.known(steps):
        return Context(seed=seed, mesh=meshes.data_parallel(batch))
    prepare = functools.partial(
        dataset.prepare, source, cache, vocabulary=model.config.vocabulary, tokenizer=tokenizer, strict=strict
    )
    made, batches, rows, longest = None, None, None, model.config.max_length
    if calibrates(steps):
        made = prepare(length=min(calibration.length, longest), batch=1, lower=lower[1])
        rows = loader.sample(made.train, calibration.rows, seed, lower[1])
    if trains(steps) or made is None:
        made = prepare(length=min(length, longest), batch=batch, lower=lower[0])
        batches = made.batches(batch, seed)
    return Context(
        batches=batches,
        calibration=rows,
        seed=seed,
        corpus=made.corpus.digest,
        tokenizer=made.tokenizer.digest,
        mesh=meshes.data_parallel(batch),
    )
