"""What `import efflm` offers: load, compress, measure, generate, stream and save, thin names over the packages below.

    model, tokenizer = efflm.load("smollm2")
    small = efflm.compress(model, "w8a8")
    print(efflm.measure({"before": model, "w8a8": small}, tokenizer, "stdlib"))
    print(efflm.generate(small, tokenizer, "The capital of France is"))
    efflm.save("runs/small", small, tokenizer)

A model is a LanguageModel. One that `load` or `compress` returned knows where it is from and what was done to it
(model.about), which `save` writes down. What is given wrongly raises InputError, in one line with the remedy.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from efflm import ops
from efflm.cli import arguments
from efflm.compress import grammar, recipe
from efflm.compress.step import Calibration, Context, Step, calibrates, reads_text, trains
from efflm.config import AskedPrecision, InputError, at_home, require
from efflm.data import corpora, dataset, enwik8, loader
from efflm.evaluate import scoring, task_files
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats import compressed_tensors, gguf_export, huggingface, saved, sources
from efflm.infer import speculative, streaming
from efflm.infer.generate import generate as generate_ids
from efflm.infer.sampling import Sampling
from efflm.model import LanguageModel, placement, require_same_tokenizer
from efflm.parallel import meshes, sharding
from efflm.report import measured, rows
from efflm.report.measured import Measured
from efflm.text import encoding, fitted
from efflm.text.chat import prompt_ids
from efflm.text.tokenizer import Tokenizer

SOURCE = str | os.PathLike
ARGUMENTS = ("batch or length", "calibration_rows or calibration_length")  # of `compress`, that ask for text
FLAGS = ("--batch or --length", "--calibration.rows or --calibration.length")  # the same of commands


def load(source: SOURCE, *, dtype: str | None = None, precision: str = "") -> tuple[LanguageModel, Tokenizer]:
    """The model at `source` and its tokenizer, on one device.

    source: a name such as "smollm2", a Hugging Face directory, a model of its hub as "hf:org/name" or
    "hf:org/name@revision", a .gguf file, a run of efflm's, or what `save` wrote. dtype: of the weights; None: as
    stored. precision: of the matmuls, "float32" or "bfloat16"; "auto": the faster one here, which is measured for a
    second and told on stderr; "": what the model was saved for.
    """
    require(arguments.is_path(source), f"source is {arguments.shown(source)}, but must be {sources.KINDS}")
    require(
        precision in get_args(AskedPrecision),
        f"precision is {precision!r}: choose float32, bfloat16 or auto, or leave it out",
    )
    return sources.load_model(at_home(os.fspath(source)), dtype=dtype, precision=precision)


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


def save(
    path: SOURCE,
    model: LanguageModel | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    format: str = "efflm",
    kind: str = "",
    check: bool = True,
) -> Path:
    """Write the model and its tokenizer, all or nothing; `load` and every --model read them back. Returns the path of
    the weights.

    format: "efflm": weights in their own form, compressed or not, and what is known of the model. path: a folder, in
    which model.safetensors is written, or a name that ends in .safetensors, with tokenizer.json beside it; an earlier
    save there is replaced, other things are not. "coded": the same file, entropy-coded, which is smaller on disk and
    the same model when it is loaded; one that was rounded for such files always is. path of all others: a folder that
    holds nothing yet. "huggingface": floats, which transformers and other programs load unchanged; float32 where the
    model is compressed.
    "compressed-tensors": quantized matrices as transformers and vLLM read them. "gguf": a file for llama.cpp, with the
    codes of compressed weights as they are; path: a name that ends in .gguf, not there yet. What such a format cannot
    hold as it is is told on stderr, with its bytes.
    kind: with "gguf", what all matrices are rounded to, such as F16 or Q8_0; "": what holds their numbers, or an error
    where nothing does. check: compare logits with those of llama.cpp or transformers, where it is installed.
    """
    require(
        arguments.is_path(path),
        f"path is {arguments.shown(path)}, but must be where to write: save(path, model, tokenizer)",
    )
    require(format in FORMATS, f"format is {arguments.shown(format)}: choose {' or '.join(FORMATS)}")
    arguments.require_model(model)
    arguments.require_tokenizer(tokenizer, model, "saving needs")
    require(not kind or format == "gguf", f"kind is {arguments.shown(kind)}, but that is for the format gguf")
    file = Path(at_home(os.fspath(path)))
    try:
        return FORMATS[format](file, model, tokenizer, kind=kind, check=check)
    except OSError as error:
        raise InputError(
            f"cannot write {file} ({error.strerror or error}): give another path, or free some space"
        ) from None


def _save_own(file: Path, model: LanguageModel, tokenizer: Tokenizer, coded: bool = False, **_: Any) -> Path:
    if file.suffix != ".safetensors":
        require(not (file / "checkpoint").exists(), f"{file} holds another model (checkpoint): give another path")
        file = file / sources.OWN
    saved.require_free(file.parent, [file.name], tokenizer, "give another path")
    saved.save(file.parent, {file.name: saved.Saved(model, model.about, coded=coded)}, tokenizer)
    return file


def _save_huggingface(folder: Path, model: LanguageModel, tokenizer: Tokenizer, check: bool, **_: Any) -> Path:
    return _told(huggingface.save(folder, model, tokenizer, check), folder / huggingface.WEIGHTS, folder)


def _save_compressed_tensors(folder: Path, model: LanguageModel, tokenizer: Tokenizer, check: bool, **_: Any) -> Path:
    return _told(compressed_tensors.save(folder, model, tokenizer, check), folder / huggingface.WEIGHTS, folder)


def _save_gguf(file: Path, model: LanguageModel, tokenizer: Tokenizer, kind: str, check: bool) -> Path:
    made = grammar.of_lineage(model.about.get("lineage", ()))
    return _told(gguf_export.save(file, model, tokenizer, kind=kind, check=check, made=made), file, file)


def _told(lines: Sequence[str], file: Path, name: Path) -> Path:
    for line in lines:
        print(f"{name}: {line}", file=sys.stderr)
    return file


# Each writes a model and its tokenizer to a path, as `kind` and `check` say, and returns the path of the weights.
FORMATS = {
    "efflm": _save_own,
    "coded": functools.partial(_save_own, coded=True),
    "huggingface": _save_huggingface,
    compressed_tensors.FORMAT: _save_compressed_tensors,
    "gguf": _save_gguf,
}


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
