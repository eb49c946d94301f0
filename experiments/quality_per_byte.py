"""Quality against bytes: chains of efflm's beside what other programs make of the same floats, scored by one program.

    bash launch/run.sh experiments.quality_per_byte --model=runs/rotated/rotate.safetensors '--corpus=~/wikipedia' \\
      --llama_cpp=PYTHON --auto_round=PYTHON --gptqmodel=PYTHON --run_dir=runs/bytes_smollm2

PYTHON is that of an environment with the program (llama-cpp-python, auto-round, gptqmodel), which a script in
experiments/peers runs. Expect results.json in the run directory, written anew after each model. Its `scores/` keeps
what was measured: the same command goes on where it was interrupted, and with --renew measures the chains of efflm's
anew. Without a PYTHON the rows of that program are those that were measured before.

What is calibrated reads the same rows of text, --seeds samples of them. Every file is read by efflm and computed in
float32. Bytes are those of all tensors, without the tokenizer. AutoRound and GPTQModel leave embeddings and the output
layer in floats: here they are rounded to 8 bits afterwards, as efflm's are, and the bytes are those of efflm's file.
"""

import dataclasses
import functools
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efflm import api, ops, trees, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import command_line, launch
from efflm.cli.subject import Subject
from efflm.compress import calibrate, grammar, plan, recipe
from efflm.compress.calibrate import Layer
from efflm.compress.step import Calibration, Context, reads_text
from efflm.config import InputError, flag, require, require_positive
from efflm.data import dataset
from efflm.evaluate import quality, scoring
from efflm.evaluate.quality import Quality
from efflm.evaluate.windows import Scoring
from efflm.formats import gguf_export, gguf_file, sources
from efflm.formats.families import FAMILIES
from efflm.formats.sources import Loaded
from efflm.formats.translate import describe
from efflm.model import LanguageModel
from efflm.ops import Format
from efflm.report import rows
from efflm.report.journal import Journal
from efflm.report.rows import Row

PEERS = Path(__file__).parent / "peers"
OURS = "efflm"
CHAINS = "w8a16 quantize@4 quantize@3 gptq@4 gptq@3 awq@4 tuned@4 tuned@3 mixed4"
Made = tuple[LanguageModel, int]  # and the bytes of its tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Subject):
    """The run"""

    chains: str = flag(CHAINS, "chains of efflm's with spaces between them, or a .toml file of them")
    seeds: int = flag(3, "calibration samples of what is calibrated")
    renew: bool = flag(False, "measure the chains of efflm's anew")
    llama_cpp: str = flag("", "the Python of an environment with llama-cpp-python", path=True)
    auto_round: str = flag("", "that of one with auto-round", path=True)
    gptqmodel: str = flag("", "that of one with gptqmodel", path=True)
    kinds: tuple[str, ...] = flag(
        ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "Q4_K_M", "Q3_K_M", "Q2_K"), "of llama.cpp's files"
    )
    formats: tuple[str, ...] = flag(("4:128", "4:32", "3:32", "2:32"), "bits:group of AutoRound's and GPTQModel's")
    iterations: int = flag(200, "of AutoRound for each layer; 200 is its default")
    batch: int = flag(4, "sequences in a batch, where a step trains")
    length: int = flag(256, "tokens in a sequence, where a step trains")
    run_dir: str = flag(str(run_directory.ROOT / "quality_per_byte"), "where everything is written", path=True)

    def __post_init__(self):
        require_positive(self, "seeds", "iterations", "batch", "length")


class Candidate(NamedTuple):
    """A way to make a smaller model: of a seed where it is calibrated."""

    name: str
    program: str
    calibrated: bool
    make: Callable[[int], Made]


class Score(NamedTuple):
    """What is kept of a model. seconds: of the processor, to make it."""

    quality: Quality
    bytes: int
    seconds: float


@run_directory.locked
def main(run: Run, calibration: Calibration, score: Scoring) -> None:
    log = Journal(run.run_dir, command_line("experiments.quality_per_byte", sys.argv))
    user_cache.use_compilation_cache()
    loaded = sources.load(run.model, precision=run.precision or "float32")
    dense, tokens, about = loaded.model, loaded.tokenizer, loaded.about
    source, chains = dataset.source_of(run.corpus, about), grammar.chains(run.chains)
    steps = [step for chain in chains.values() for step in chain]
    settings = {"batch": run.batch, "length": run.length, "calibration": calibration, "lower": api.FLAGS}
    given = functools.partial(api.context_for, [*steps, *grammar.chain("gptq")], source, dataset.cache(), dense, tokens)
    context = functools.cache(lambda seed: given(seed=seed, strict=run.strict, **settings))
    text = dataset.to_score("", run.corpus, about, tokens, dataset.cache(), run.strict)
    score = score.within(dense.config.max_length, about.get("train.length", 0), text.unbroken)
    test, scores = scoring.against(dense, text, tokens, score), log.folder / "scores"
    before = kept(scores / "original.npz", lambda: Score(test(dense), ops.stored_nbytes(dense.params), 0)).quality
    noise = kept(scores / "rounded.npz", lambda: Score(test(quality.rounded(dense)), 0, 0)).quality
    forward = kept(scores / "forward.npz", lambda: Score(before, 0, forward_seconds(dense, context(0)))).seconds
    count, length = context(0).calibration["inputs"].shape
    require_same(
        scores / "settings.json", [run.model, source, run.iterations, *map(dataclasses.asdict, (score, calibration))]
    )
    facts = [
        f"Quality: {scoring.protocol(text, score, before)}; every file computed by efflm."
        f"{scoring.rounding(noise, dense.config.precision)}",
        f"Calibration: {count} x {length} tokens of the training split, the same for all programs; of {run.seeds} "
        "samples, or as many as `samples` says, the mean, and the standard deviation of KL.",
        f"Bits a weight: 8 x the bytes of all tensors over {trees.count(dense.params):,} weights. Files of chains with "
        "`entropy` or `coded` are entropy-coded, no others. AutoRound "
        f"({run.iterations} iterations a layer) and GPTQModel leave embeddings and output layer in floats, which efflm "
        "rounded to 8 bits afterwards.",
        f"Passes: the processor time that a file took to make, compiling included, over the {forward:.0f} s of a "
        "forward pass through the layers over the calibration text.",
        "KL of efflm's: the least of efflm's files that are no larger, over this file's.",
        *rows.cautions(run.model, about, text.known),
    ]
    found: list[Row] = []
    for each in candidates(run, log.folder, loaded, context, chains):
        made = []
        for seed in range(run.seeds if each.calibrated else 1):
            file = scores / f"{grammar.file_name(each.name)}.{seed}.npz"
            if run.renew and each.program == OURS:
                file.unlink(missing_ok=True)
            try:
                made.append(kept(file, lambda each=each, seed=seed: measured(each, seed, test)))
            except (InputError, OSError, subprocess.CalledProcessError) as error:
                had = f"has {len(made)} of {run.seeds} samples" if made else "is left out"
                log.say(f"{each.name} {had}: {error}")
                break
        if made:
            found.append(row(each, made, before, trees.count(dense.params), forward))
            log.say(f"{each.name}: {found[-1].bits_a_weight:.2f} bits a weight, KL {found[-1].kl_to_original:.5f}")
            log.results(facts, rows=beside(found), seeds=run.seeds, noise=quality.divergence(noise)[0])


def require_same(file: Path, settings: list[Any]) -> None:
    """Raise InputError for a run directory that was begun with other settings."""
    if not file.exists():
        run_directory.write_json(file, settings)
    before = json.loads(file.read_bytes())
    require(before == settings, f"{file.parent} was begun with {before}, not {settings}: give another --run_dir")


def kept(file: Path, make: Callable[[], Score]) -> Score:
    """What the file keeps, which is made and written first where there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        score = make()
        np.savez(file, **vars(score.quality), nbytes=score.bytes, seconds=score.seconds)
    arrays = dict(np.load(file))
    nbytes, seconds = int(arrays.pop("nbytes")), float(arrays.pop("seconds"))
    return Score(Quality(**arrays), nbytes, seconds)


def measured(candidate: Candidate, seed: int, test: Callable[[LanguageModel], Quality]) -> Score:
    before = processor_seconds()
    model, nbytes = candidate.make(seed)
    took = processor_seconds() - before
    return Score(test(model), nbytes, took)


def forward_seconds(model: LanguageModel, context: Context) -> float:
    """Of the processor, for the layers over the calibration text, once what is compiled for it is there."""
    for _ in range(2):
        before = processor_seconds()
        calibrate.walk(model, context.calibration, lambda layer, _: (layer, None), mesh=context.mesh, output=True)
    return processor_seconds() - before


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


# --- what is compared -------------------------------------------------------------------------------------------------


def candidates(
    run: Run, folder: Path, loaded: Loaded, context: Callable[[int], Context], chains: grammar.Chains
) -> Iterator[Candidate]:
    dense, tokens = loaded.model, loaded.tokenizer

    def chain(steps: Sequence[Any], seed: int) -> Made:
        after, _ = recipe.apply(dense, steps, context(seed))
        return after, ops.stored_nbytes(after.params, after.masks)

    def llama_cpp(kind: str, calibrated: bool, seed: int) -> Made:
        source, out = folder / "floats.gguf", folder / "files" / f"{kind}.gguf"
        importance = folder / f"importance-{seed}.npz"
        if not source.exists():
            gguf_export.save(source, dense, tokens, kind="F32", check=False)
        if calibrated and not importance.exists():
            np.savez(importance, **mean_squares(dense, context(seed)))
        started(run.llama_cpp, "llama_quantize", source, out, kind, *[importance] * calibrated)
        nbytes = sum(tensor.size for tensor in gguf_file.read_header(out).tensors.values())
        model = sources.load(out, precision=dense.config.precision).model
        out.unlink()
        return model, nbytes

    def checkpoint(python: str, script: str, format: str, more: Sequence[int], seed: int) -> Made:
        source, out, text = folder / "floats", folder / "files" / f"{script}-{format}-{seed}", folder / f"{seed}.npy"
        if not source.exists():
            api.save(source, dense, tokens, format="huggingface", check=False)
        if not (out / "config.json").exists():
            np.save(text, context(seed).calibration["inputs"])
            started(python, script, source, out, text, *format.split(":"), *more, seed)
        model = sources.load(out, precision=dense.config.precision).model
        rounded = plan.nearest(model.params, plan.Plan(plan.for_embeddings(8, Format())))
        return model.replace(params=rounded), ops.stored_nbytes(rounded)

    for name, steps in chains.items():
        yield Candidate(name, OURS, reads_text(steps), functools.partial(chain, steps))
    for kind in run.kinds:
        yield Candidate(f"llama.cpp {kind}", "llama.cpp", False, functools.partial(llama_cpp, kind, False))
        yield Candidate(f"llama.cpp {kind}, imatrix", "llama.cpp", True, functools.partial(llama_cpp, kind, True))
    for format in run.formats:
        name = "{} bits, groups of {}".format(*format.split(":"))
        auto_round = functools.partial(checkpoint, run.auto_round, "auto_round_quantize", format, [run.iterations])
        gptq = functools.partial(checkpoint, run.gptqmodel, "gptqmodel_quantize", format, [])
        yield Candidate(f"AutoRound, {name}", "AutoRound", True, auto_round)
        yield Candidate(f"GPTQModel, {name}", "GPTQModel", True, gptq)


def started(python: str, script: str, *arguments: Any) -> None:
    """Run one of the scripts of peers. Raises OSError and CalledProcessError."""
    program = Path(python) if "/" in python else python or f"Python for {script}"
    command = [program, PEERS / f"{script}.py", *arguments]
    folder = Path(arguments[1]).parent  # where it leaves logs, if it does
    folder.mkdir(parents=True, exist_ok=True)
    whole = [str(each.absolute() if isinstance(each, Path) else each) for each in command]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, cwd=folder)


def mean_squares(model: LanguageModel, context: Context) -> dict[str, np.ndarray]:
    """Of what each matrix of the layers reads of the calibration text, float32 [inputs], by its name in a GGUF file."""
    family, _ = describe(model.config)
    statistics, found = {"squares": calibrate.SQUARES, "tokens": calibrate.TOKENS}, {}

    def one(layer: Layer, read: calibrate.States) -> tuple[Layer, None]:
        for path, state in read.items():
            whole = layer.path(path)
            found[gguf_export.stored_name(FAMILIES[family].place(whole).tensor(whole))] = np.asarray(
                state["squares"] / state["tokens"]
            )
        return layer, None

    calibrate.walk(model, context.calibration, one, statistics, mesh=context.mesh, title="importance")
    return found


# --- how it is shown --------------------------------------------------------------------------------------------------


def row(candidate: Candidate, made: Sequence[Score], before: Quality, weights: int, forward: float) -> Row:
    """Means over seeds, with their standard errors over documents; of_seeds: the standard deviation of KL. forward:
    processor seconds of a forward pass."""
    fields = [field.name for field in dataclasses.fields(Quality)]
    mean = Quality(*(np.mean([getattr(score.quality, name) for score in made], axis=0) for name in fields))
    nbytes = float(np.mean([score.bytes for score in made]))
    own = {"program": candidate.program, "calibrated": "yes" if candidate.calibrated else "no"}
    own |= {"bytes": round(nbytes), "bits_a_weight": round(8 * nbytes / weights, 3)}
    own |= {"samples": len(made) if candidate.calibrated else None}
    own |= {"kl_of_seeds": quality.deviation([quality.divergence(score.quality)[0] for score in made])}
    passes = round(float(np.mean([score.seconds for score in made])) / max(forward, 1e-3), 1)
    return Row(candidate.name, own | rows.of_text(mean, before) | {"passes": passes})


def beside(found: Sequence[Row]) -> list[Row]:
    """The rows by their bytes, those of peers with the KL of the best of our files that are no larger, over theirs."""
    ours = [row for row in found if row.program == OURS]

    def best(row: Row) -> float | None:
        least = min((own.kl_to_original for own in ours if own.bytes <= row.bytes), default=None)
        known = row.program != OURS and least is not None and row.kl_to_original > 0
        return round(least / row.kl_to_original, 3) if known else None

    return [row.but(ours_ratio=best(row)) for row in sorted(found, key=lambda row: row.bytes)]


if __name__ == "__main__":
    few = {"calibration": Calibration(rows=32, length=256), "score": Scoring(documents=24, tokens=256)}
    launch(main, __doc__, run=Run(), **few)
