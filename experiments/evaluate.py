"""Measure a model: bits per byte on the test split, divergence from a reference, size, and speed on this machine.

    python -m experiments.evaluate --model=runs/quickstart
    python -m experiments.evaluate --model=runs/quickstart/models/w8a8.safetensors --reference=runs/quickstart

Expect a table; with --run_dir also results.json in that directory.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from efflm import rundir, tokenizer
from efflm.config import flag, require
from efflm.data import dataset
from efflm.evaluate.cost import Protocol
from efflm.flags import launch
from efflm.formats import safetensors
from efflm.model import LanguageModel, sharding
from efflm.report import rows, table
from efflm.tokenizer import Tokenizer
from efflm.train import checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    model: str = flag(str(rundir.ROOT / "quickstart"), "directory of a training run, or a .safetensors file of efflm's")
    reference: str = flag("", "what divergence is measured against, given like --model; default: the model itself")
    corpus: str = flag("", "file or folder of UTF-8 text, or 'stdlib'; default: the text the model was trained on")
    length: int = flag(256, "tokens in a row, the longest context a token is scored in")
    run_dir: str = flag("", "where to write results.json; default: nowhere")

    def __post_init__(self):
        require(self.length > 0, f"length is {self.length}, but must be positive")


def load_source(source: str, mesh: Mesh) -> tuple[LanguageModel, Tokenizer, dict[str, Any], int]:
    """A model, its tokenizer, how it was made, and its bytes on disk. Raises InputError."""
    path = Path(source)
    require(path.exists(), f"no model at {source}: give a training run's directory or a .safetensors file")
    if path.is_dir():
        model, about = checkpoint.load(path / "checkpoint", mesh)
        size = sum(file.stat().st_size for file in (path / "checkpoint").rglob("*") if file.is_file())
    else:
        model, about = safetensors.load(path)
        size = path.stat().st_size
    return model, tokenizer.load((path if path.is_dir() else path.parent) / "tokenizer.json"), about, size


def cache_of(source: str) -> Path:
    """Where the corpora of a model's run are kept."""
    path = Path(source).absolute()
    return next((p / "corpora" for p in path.parents if (p / "corpora").is_dir()), rundir.ROOT / "corpora")


def main(run: Run) -> None:
    if run.run_dir:
        rundir.require_writable(Path(run.run_dir), needs=1_000_000)
    mesh = sharding.make_mesh()
    model, tokens, about, size = load_source(run.model, mesh)
    reference = model
    if run.reference:
        reference, other, _, _ = load_source(run.reference, mesh)
        require(tokens.digest == other.digest, f"{run.model} and {run.reference} have different tokenizers")
    data = dataset.prepare(
        run.corpus or about["source"],
        cache_of(run.model),
        vocabulary=model.config.vocabulary,
        length=run.length,
        batch=1,
        tokenizer=tokens,
    )
    name, protocol = Path(run.model).stem, Protocol().within(model.config.context)
    measured, _ = rows.collect(
        {name: model},
        {name: size},
        {name: f"from {run.model}"},
        data.test[:],
        data.tokenizer.token_bytes,
        reference,
        protocol,
    )
    facts = [f"Quality: {data.protocol}.", f"Speed: {protocol}."]
    table.show(measured, facts)
    if run.run_dir:
        rundir.write_json(
            Path(run.run_dir) / "results.json",
            {"rows": [dataclasses.asdict(row) for row in measured], "protocol": facts, "versions": rundir.machine()},
        )


if __name__ == "__main__":
    launch(main, __doc__, run=Run())
