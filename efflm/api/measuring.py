"""Models measured."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from efflm import ops
from efflm.cli import arguments
from efflm.cli.arguments import SOURCE
from efflm.compress import grammar
from efflm.config import require
from efflm.data import corpora, dataset, enwik8
from efflm.evaluate import scoring, task_files
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.model import LanguageModel
from efflm.parallel import sharding
from efflm.report import measured, rows
from efflm.report.measured import Measured
from efflm.text import fitted
from efflm.text.tokenizer import Tokenizer


def measure(
    models: LanguageModel | Mapping[str, LanguageModel],
    tokenizer: Tokenizer | None = None,
    text: SOURCE | None = None,
    *,
    documents: int = 64,
    tokens: int = 512,
    window: int = 0,
    stride: int = 0,
    held_out: bool | None = None,
    tasks: SOURCE | Sequence[SOURCE] = (),
    task_items: int = 0,
    task_folder: SOURCE = "tasks",
    speed: bool = True,
    strict: bool = False,
    format: str = "efflm",
) -> Measured:
    """Quality on text, size and speed on this machine: what experiments.evaluate measures, for one model or for several
    by name, the first of which the others are compared with. Print it for the table (a notebook
    shows it); result["name"] is a row.

    text: a file or folder, "stdlib" or "enwik8". Scored is its test split, which `compress` and pretraining leave out;
    held_out=False: all of a file or folder, as --text has it, which is also the default of a file too short to split
    (4 KiB) while no model has read text in a step. documents, tokens: how many documents, and tokens of
    each; 0: all. window, stride: as experiments.evaluate has them. tasks: files of items to answer
    (see efflm.evaluate.task_files), each a path, or its name in task_folder; task_items: of each, its first; 0: all.
    speed: time prefill and decode too. Bytes are those of the file that `save` writes in this format, "efflm" or
    "coded", to 1%.
    """
    require(format in ("efflm", "coded"), f"format is {arguments.shown(format)}: choose efflm or coded")
    named = arguments.named(models)
    for model in named.values():
        arguments.require_tokenizer(tokenizer, model, "measuring needs")
    named = {name: fitted.told(model, tokenizer) for name, model in named.items()}
    lineages = {name: model.about.get("lineage", ()) for name, model in named.items()}
    require(type(task_items) is int, f"task_items is {arguments.shown(task_items)}, but must be an integer")
    files = TaskFiles(items=task_items, folder=os.fspath(task_folder))
    asked = task_files.read([tasks] if arguments.is_path(tasks) else tasks, files)
    require(text is not None, f"measuring needs text: give {arguments.TEXT}")
    source, first = arguments.text_of(text), next(iter(named.values()))
    if held_out is None:
        read = any(step.get("corpus") for lineage in lineages.values() for step in lineage)
        held_out = read or not corpora.is_short(source)
    as_corpus = held_out or source in (corpora.DEFAULT, enwik8.NAME)
    where = ("", source) if as_corpus else (source, "")
    scored = dataset.to_score(*where, first.about, tokenizer, dataset.cache(), strict)
    score = Scoring(documents=documents, tokens=tokens, window=window, stride=stride).within(
        min(model.config.max_length for model in named.values()), first.about.get("train.length", 0), scored.unbroken
    )
    here = {name: sharding.on_one_device(model) for name, model in named.items()}
    size = lambda model: ops.stored_nbytes(model.params, model.masks, coded=format == "coded" or None)
    sizes = {name: size(model) for name, model in named.items()}
    notes = {name: rows.note(grammar.of_lineage(lineages[name]), model) for name, model in named.items()}
    found = scoring.side_by_side(here, scored, tokenizer, score, speed, asked)
    cautions = rows.cautions(next(iter(named)), first.about, scored.known)
    return measured.of(here, sizes, notes, dataclasses.replace(found, facts=(*found.facts, *cautions)))
