"""Measure a model: likelihood of text, divergence from a reference, size, and speed on this machine.

    python -m experiments.evaluate --model=runs/quickstart
    python -m experiments.evaluate --model=runs/quickstart/models/w8a8.safetensors --reference=runs/quickstart
    python -m experiments.evaluate --model=smollm2 --text=~/notes --tokens=0 --window=2048 --stride=512

Expect a table with the protocol below it; with --run_dir also results.json in that directory.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efflm import rundir, trees
from efflm.config import MeshConfig, ModelConfig, flag, require
from efflm.data import corpora
from efflm.evaluate import cost, quality
from efflm.evaluate.cost import Protocol
from efflm.evaluate.windows import Windows, cut
from efflm.flags import command_line, launch
from efflm.formats import sources
from efflm.formats.sources import KINDS, Loaded
from efflm.model import LanguageModel, sharding
from efflm.report import rows, table

# A model of 100 million parameters in float32 decodes some tens of tokens a second on two cores.
LARGE, SHORT = 50_000_000, Protocol(prompt=256, start=256, new=16, repeats=5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What is measured, and on which text"""

    model: str = flag(str(rundir.ROOT / "quickstart"), KINDS)
    text: str = flag("", "file or folder of UTF-8 text to score; default: the test split of --corpus")
    corpus: str = flag(
        "", "'stdlib', or a file or folder of UTF-8 text; default: what the model was trained on, else stdlib"
    )
    documents: int = flag(32, "documents to score, drawn by a hash of their names; 0: all")
    tokens: int = flag(384, "tokens of each document to score, its first; 0: all")
    window: int = flag(0, "tokens the model reads at once; 0: 1024, or the model's max_length if that is shorter")
    stride: int = flag(0, "tokens from one window to the next, of which only the new ones are scored; 0: the window")
    bos: bool = flag(True, "put the tokenizer's separator before each text; without it the first token is not scored")
    joined: bool = flag(False, "join all documents to one text, the separator between them, in place of each by itself")

    def __post_init__(self):
        for name in ("documents", "tokens", "window"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, but must be positive, or 0")
        Windows(window=self.window or 1024, stride=self.stride)

    def windows(self, config: ModelConfig) -> Windows:
        window = self.window or min(1024, config.max_length)
        require(
            window <= config.max_length,
            f"window is {window}, but the model's max_length is {config.max_length}: shorten it",
        )
        return Windows(window=window, stride=self.stride, bos=self.bos, joined=self.joined)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Scored):
    """The run"""

    reference: str = flag("", "what divergence is measured against, given like --model; default: the model itself")
    run_dir: str = flag("", "where to write results.json; default: nowhere")


def source_of(run: Scored, about: dict[str, Any]) -> str:
    """The corpus whose test split is scored, and whose training split trains."""
    return run.corpus or about.get("source") or corpora.DEFAULT


def scored_rows(run: Scored, loaded: Loaded) -> tuple[dict[str, np.ndarray], str]:
    """The rows to score, and the protocol in words. Raises InputError."""
    windows, tokens, vocabulary = run.windows(loaded.model.config), loaded.tokenizer, loaded.model.config.vocabulary
    require(
        tokens.vocabulary <= vocabulary,
        f"the tokenizer of {run.model} has {tokens.vocabulary} entries, but the model's vocabulary is {vocabulary}",
    )
    if run.text:
        name, count, texts = corpora.read(run.text, run.documents)
        where = "documents"
    else:
        name, count, texts = corpora.held_out(source_of(run, loaded.about), run.documents)
        where = "test documents"
    ids = [some[: run.tokens or None] for some in tokens.encode_batch([text for _, text in texts])]
    out = cut(ids, tokens.separator, windows)
    each = f"at most the first {run.tokens:,} tokens of each" if run.tokens else "whole"
    return out, (
        f"{len(texts)} of {count:,} {where} of {name}, {each} ({np.sum(out['documents'] > 0):,} scored); {windows}; "
        "bits per byte of UTF-8; perplexity of this tokenizer's tokens; standard errors over documents"
    )


def rows_at_a_time(rows: dict[str, np.ndarray]) -> int:
    """About 8,192 tokens, so that long windows take no more memory than short ones."""
    count, length = rows["inputs"].shape
    return min(count, max(1, 8192 // length))


def speed_protocol(model: LanguageModel) -> Protocol:
    return (SHORT if trees.count(model.params) > LARGE else Protocol()).within(model.config.max_length)


def label(about: dict[str, Any]) -> str:
    """What the first of several models is called."""
    return f"dequantized {about['dequantized']}" if "dequantized" in about else "before"


def origin(source: str, about: dict[str, Any]) -> str:
    """Where a model is from, in words: what it was before it became floats must be said."""
    return f"from {source}" + (f", dequantized {about['dequantized']}" if "dequantized" in about else "")


def cautions(run: Scored, about: dict[str, Any]) -> list[str]:
    """What the figures must not be taken for."""
    out = []
    if not run.text and not about.get("source") and source_of(run, about) == corpora.DEFAULT:
        out.append(
            f"{run.model} was in all likelihood trained on Python's standard library: compare these rows with each "
            "other and not with other texts, or give --text."
        )
    if "dequantized" in about:
        out.append(
            f"The weights of {run.model} are dequantized {about['dequantized']}: they lie on that format's grid, so "
            "nothing here says what rounding to as few bits would cost a model whose weights do not."
        )
    return out


def main(run: Run, mesh: MeshConfig) -> None:
    if run.run_dir:
        rundir.require_writable(Path(run.run_dir), needs=1_000_000)
    any_rows = 2 * jax.device_count() * math.prod(abs(size) for size in dataclasses.asdict(mesh).values())
    devices = sharding.mesh_for(mesh, any_rows, any_rows)
    loaded = sources.load(run.model, mesh=devices)
    model, name = loaded.model, Path(run.model).stem
    to_score, words = scored_rows(run, loaded)
    rundir.use_compilation_cache((Path(run.run_dir).parent if run.run_dir else rundir.ROOT) / "compilation_cache")
    batch, expected = rows_at_a_time(to_score), None
    if run.reference:
        other = sources.load(run.reference, mesh=devices)
        require(
            loaded.tokenizer.digest == other.tokenizer.digest,
            f"{run.model} and {run.reference} have different tokenizers: divergence compares token by token",
        )
        expected = quality.read(other.model, to_score, batch)
        del other  # two models need not be held at once
    reading = quality.read(model, to_score, batch)
    measured = quality.score(reading, expected or reading, to_score, loaded.tokenizer.token_bytes)
    protocol = speed_protocol(model)
    rates = cost.rates({name: model}, protocol)[name]
    row = rows.make(name, model, loaded.nbytes, origin(run.model, loaded.about), measured, rates, None)
    against = f" Divergence: from {run.reference}." if run.reference else ""
    facts = [f"Quality: {words}.{against}", f"Speed: {protocol}.", *cautions(run, loaded.about)]
    table.show([row], facts)
    if run.run_dir:
        rundir.write_json(
            Path(run.run_dir) / "results.json",
            {
                "rows": [dataclasses.asdict(row)],
                "protocol": facts,
                "command": command_line("experiments.evaluate", sys.argv),
                "versions": rundir.machine(),
            },
        )


if __name__ == "__main__":
    launch(main, __doc__, run=Run(), mesh=MeshConfig(data=1))
